"""What is seen: pictures as embeddings, and as image tokens."""
