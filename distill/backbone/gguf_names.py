"""GGUF's names and layout of a language model's weights, both ways.

llama.cpp rotates neighbouring pairs of a head's dimensions where we rotate halves: in a `llama` file the rows of the
query and key projections are reordered so that both compute the same. Other architectures it rotates as we do.
"""

import numpy as np
from numpy.typing import NDArray

from distill.backbone.architecture import BackboneConfig

TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Our names inside a layer → GGUF's inside a block."""

ROPE_DIVISORS = "rope_freqs.weight"
"""What each rotary frequency is divided by (Llama 3's scaling): no weight of ours, as config.json tells it."""

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_INNER = {theirs: ours for ours, theirs in TENSORS.items()}
_OUTSIDE = {theirs: ours for ours, theirs in OUTER.items()}


def tensor_name(name: str) -> str:
    """GGUF's name of one of our tensors: `model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem, _, part = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{part}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{TENSORS[inner]}.{part}"


def our_name(name: str) -> str | None:
    """The other way; None for a tensor that we have no place for."""
    stem, _, part = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{part}"
    first, _, rest = stem.partition(".")
    layer, _, inner = rest.partition(".")
    return f"model.layers.{layer}.{_INNER[inner]}.{part}" if first == "blk" and inner in _INNER else None


def to_gguf(name: str, values: NDArray[np.float32], config: BackboneConfig) -> NDArray[np.float32]:
    """One of our tensors as GGUF lays it out."""
    heads = _swapped_heads(name, config)
    return interleave(values, heads) if heads else values


def from_gguf(name: str, values: NDArray[np.float32], config: BackboneConfig) -> NDArray[np.float32]:
    """The other way."""
    heads = _swapped_heads(name, config)
    return separate(values, heads) if heads else values


def _swapped_heads(name: str, config: BackboneConfig) -> int:
    """How many heads' rows change places; 0 where none do."""
    if config.swaps_rows and ".q_proj." in name:
        return config.heads
    return config.kv_heads if config.swaps_rows and ".k_proj." in name else 0


def interleave(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows (heads · E, …) from halves to pairs: row i and row i + E/2 of a head become neighbours."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def separate(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The other way: neighbouring rows of a head become row i and row i + E/2."""
    rows = weight.shape[0]
    pairs = weight.reshape(heads, rows // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
