"""The language model to be trained: what it begins as, and what it may write."""
