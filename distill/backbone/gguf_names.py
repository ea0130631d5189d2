"""GGUF's names and layout of a Llama-like model's weights, both ways.

llama.cpp rotates neighbouring pairs of a head's dimensions where we rotate halves: in a `llama` file the rows of the
query and key projections are reordered so that both compute the same.
"""

import numpy as np
from numpy.typing import NDArray

TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Our names inside a layer → GGUF's inside a block."""

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_INNER = {theirs: ours for ours, theirs in TENSORS.items()}
_OUTSIDE = {theirs: ours for ours, theirs in OUTER.items()}


def tensor_name(name: str) -> str:
    """GGUF's name of one of our tensors: `model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{TENSORS[inner]}.weight"


def our_name(name: str) -> str | None:
    """The other way; None for a tensor that we have no place for."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    first, _, rest = stem.partition(".")
    layer, _, inner = rest.partition(".")
    return f"model.layers.{layer}.{_INNER[inner]}.weight" if first == "blk" and inner in _INNER else None


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
