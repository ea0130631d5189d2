"""What a trained student learns further: its own words, feedback, rewards, new facts, pictures. Each can be undone."""
