"""A tiny DINOv2, as transformers writes it."""

from pathlib import Path
from typing import Any

import torch


def dinov2(folder: Path) -> Path:
    """A tiny DINOv2 whose layer scales and places matter, its GELU by the formula that llama.cpp has."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    torch.manual_seed(0)
    model: Any = transformers.Dinov2Model(transformers.Dinov2Config(**small, hidden_act="gelu_pytorch_tanh"))  # pyright: ignore
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.7 if "lambda" in name or "embed" in name else 4.0 if parameter.ndim > 1 else 1.0
            parameter.copy_(torch.rand_like(parameter) * scale if "lambda" in name else parameter * scale)
        model.embeddings.position_embeddings.normal_()
    model.save_pretrained(folder)
    return folder
