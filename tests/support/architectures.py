"""Tiny models of each architecture that we read, made by transformers' own classes."""

from pathlib import Path
from typing import Any

import torch

VARIANTS = ("llama", "llama3", "linear", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def reference(variant: str, vocab_size: int = 97, tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """Random weights, large enough that attention, biases and every norm matter to the result."""
    import transformers

    kind = {"llama3": "Llama", "linear": "Llama"}.get(variant, variant.capitalize())
    rope: dict[str, Any] = {"rope_type": "default"}
    if variant in ("llama3", "linear"):
        rope = LLAMA3 if variant == "llama3" else {"rope_type": "linear", "factor": 4.0}
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**rope, "rope_theta": 5000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    if variant in ("llama3", "mistral", "qwen3"):
        sizes["head_dim"] = 32  # not hidden / heads
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if (parameter == 1).all() else 0.15 * noise)
    return model


def saved(variant: str, folder: Path, **how: Any) -> Any:
    model = reference(variant, **how)
    model.save_pretrained(folder)
    return model
