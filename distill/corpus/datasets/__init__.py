"""Datasets that bring their own answers and dreams: no teacher is asked. Each is a module with `questions`."""
