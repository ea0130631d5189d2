"""What is seen: pictures as embeddings, and as image tokens."""

PROJECTOR = "mmproj.gguf"
"""Of a checkpoint or a bundle whose student reads pictures themselves: see `distill.vision.sight`."""
