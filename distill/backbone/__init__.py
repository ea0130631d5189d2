"""The language model that teacher and student both are: its forward pass, cache and decoding."""
