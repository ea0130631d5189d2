"""What is seen: pictures as embeddings, and as image tokens."""

SEEING = ("pictures.json", "pictures.safetensors")
"""Of a student's folder: its map of pictures, see `distill.vision.codebook`."""
PROJECTOR = "mmproj.gguf"
"""Of a checkpoint or a bundle whose student reads pictures themselves: see `distill.vision.sight`."""
