"""What was said: prompts, the teacher's answers, and datasets that bring their own."""
