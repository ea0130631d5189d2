"""What dreaming is worth: the same student with dreams, without them, and with others' in their place."""
