"""A backbone's weights, laid out for decoding: what a token's step multiplies with, in the order of memory it reads.

A step at a small batch costs the reading of all weights and the start of each operation. So projections of the same
input are one matrix, each transposed (a vector times a row-major matrix streams through it: measured 1.6 × as fast
as through its transpose), norms are folded into what follows them, and the two halves of a rotary pair lie side by
side, so that rotating is one complex product.

Shape legend: D hidden, H heads, G key/value heads, E head size, F feed-forward, V vocabulary, L context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from distill.backbone.model import Attention, Backbone, Block


@dataclass(frozen=True)
class PreparedBlock:
    """qkv (D, (H + 2G)·E), out (H·E, D), gate_up (D, 2F), down (F, D). Where the architecture has them: bias
    ((H + 2G)·E,) of qkv, head_norm (H + G, E) the weights of queries' and keys' norms, times √E."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    bias: Tensor | None
    head_norm: Tensor | None


@dataclass(frozen=True)
class Prepared:
    """embed (V, D); norm (D,) the last norm's weight; head (D, V); rotations (L, E / 2) complex: e^(i · angle).

    floor (): √(D · ε). Where x / hypot(‖x‖, floor) stands for an RMS norm, √D is in the weight that follows.
    head_floor (): √(E · ε), for norms of heads.
    """

    embed: Tensor
    blocks: list[PreparedBlock]
    norm: Tensor
    head: Tensor
    rotations: Tensor
    floor: Tensor
    head_floor: Tensor


def prepared(model: Backbone) -> Prepared:
    """The model's weights for decoding, which take their memory once more: kept while it is in eval mode.

    Versions of parameters tell of changes, but fused optimizers don't count theirs: hence `Backbone.train` forgets.
    """
    if model.training:
        return _prepare(model)
    state = [(parameter.data_ptr(), _version(parameter)) for parameter in model.parameters()]
    if model.for_decoding is None or model.for_decoding[0] != state:
        model.for_decoding = None  # its memory first
        model.for_decoding = state, _prepare(model)
    return model.for_decoding[1]


def _version(parameter: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode don't count, and are taken to stay."""
    return -1 if parameter.is_inference() else parameter._version


@torch.inference_mode()
def _prepare(model: Backbone) -> Prepared:
    config, stack = model.config, model.model
    scale = config.hidden**0.5
    blocks: list[PreparedBlock] = []
    for block in cast("Sequence[Block]", stack.layers):
        attention, feed = block.self_attn, block.mlp
        before, between = block.input_layernorm.weight, block.post_attention_layernorm.weight
        qkv = _joined(attention, "weight")
        gate_up = torch.cat((feed.gate_proj.weight, feed.up_proj.weight))
        blocks.append(
            PreparedBlock(
                (qkv * (before * scale)).t().contiguous(),
                attention.o_proj.weight.t().contiguous(),
                (gate_up * (between * scale)).t().contiguous(),
                feed.down_proj.weight.t().contiguous(),
                _joined(attention, "bias") if config.qkv_bias else None,
                _head_norm(attention),
            )
        )
    half = config.head_dim // 2
    return Prepared(
        embed=stack.embed_tokens.weight.detach(),
        blocks=blocks,
        norm=stack.norm.weight * scale,
        head=model.lm_head.weight.t().contiguous(),
        rotations=torch.complex(model.cos[:, :half], model.sin[:, :half]),
        floor=torch.tensor((config.hidden * config.norm_eps) ** 0.5, device=model.cos.device),
        head_floor=torch.tensor((config.head_dim * config.norm_eps) ** 0.5, device=model.cos.device),
    )


def _joined(attention: Attention, part: str) -> Tensor:
    """The weights or biases of queries, keys and values, (H + 2G)·E rows."""
    q, k, v = (getattr(projection, part) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    return torch.cat((_pairs(q, attention.head_dim), _pairs(k, attention.head_dim), v))


def _head_norm(attention: Attention) -> Tensor | None:
    if attention.q_norm is None or attention.k_norm is None:
        return None
    size = attention.head_dim
    q, k = (_pairs(norm.weight, size) * size**0.5 for norm in (attention.q_norm, attention.k_norm))
    return torch.cat((q.expand(attention.heads, size), k.expand(attention.kv_heads, size)))


def _pairs(rows: Tensor, size: int) -> Tensor:
    """Rows (heads · E, …) of each head in the order 0, E/2, 1, E/2 + 1, …: rotary pairs side by side."""
    return rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)
