"""A backbone's weights, laid out for decoding: what a token's step multiplies with, in the order of memory it reads.

A step at a small batch costs the reading of all weights and the start of each operation. So projections of the same
input are one matrix, each transposed (a vector times a row-major matrix streams through it: measured 1.6 × as fast
as through its transpose), norms are folded into what follows them, and the two halves of a rotary pair lie side by
side, so that rotating is one complex product.

Matrices may be in bfloat16: then the products' inputs are rounded to it, and what runs between them (the residual
stream, norms, rotations) stays in float32.

Shape legend: N tokens, D hidden, H heads, G key/value heads, E head size, F feed-forward, V vocabulary, L context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.backbone.model import Attention, Backbone, BackboneConfig, Block


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
    """embed (V, D); norm (D,) the last norm's weight; unembed (V, D); rotations (L, E / 2) complex: e^(i · angle).

    floor (): √(D · ε). Where x / hypot(‖x‖, floor) stands for an RMS norm, √D is in the weight that follows.
    head_floor (): √(E · ε), for norms of heads.
    """

    config: BackboneConfig
    embed: Tensor
    blocks: list[PreparedBlock]
    norm: Tensor
    unembed: Tensor
    rotations: Tensor
    floor: Tensor
    head_floor: Tensor

    @cached_property
    def head(self) -> Tensor:
        """(D, V): for few rows, which want it transposed. Takes its memory once more."""
        return self.unembed.t().contiguous()

    @property
    def dtype(self) -> torch.dtype:
        """What the matrices are in."""
        return self.embed.dtype

    def read(self, ids: Tensor) -> Tensor:
        """Embeddings (…, D) float32 of ids (…)."""
        return F.embedding(ids, self.embed).float()

    def project(self, block: PreparedBlock, x: Tensor, rotations: Tensor) -> Tensor:
        """(…, H + 2G, E): rotated queries, rotated keys, and values of x (N, D); rotations (…, 1, E / 2), whose first
        dimensions, those of 1 widened, make N."""
        config = self.config
        qkv = torch.mm(self._scaled(x).to(self.dtype), block.qkv).float()
        if block.bias is not None:
            qkv += block.bias
        qkv = qkv.view(-1, *rotations.shape[1:-2], config.heads + 2 * config.kv_heads, config.head_dim)
        turned = qkv.narrow(-2, 0, config.heads + config.kv_heads)
        if block.head_norm is not None:
            length = torch.linalg.vector_norm(turned, dim=-1, keepdim=True)
            turned.copy_(turned / torch.hypot(length, self.head_floor) * block.head_norm)
        torch.view_as_complex(turned.view(*turned.shape[:-1], -1, 2)).mul_(rotations)
        return qkv.to(self.dtype)

    def finish(self, block: PreparedBlock, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's output (N, D) for its input x (N, D) and what attention mixed (N, H·E)."""
        x = self._plus(x, mixed, block.out)
        gate, up = torch.mm(self._scaled(x).to(self.dtype), block.gate_up).chunk(2, dim=-1)
        return self._plus(x, F.silu(gate).mul_(up), block.down)

    def states(self, x: Tensor) -> Tensor:
        """Last hidden states (…, D) float32."""
        return self._scaled(x) * self.norm

    def _scaled(self, x: Tensor) -> Tensor:
        """x / √(‖x‖² + D·ε): an RMS norm short of √D and its weight."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)

    def _plus(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return torch.addmm(x, left, right) if x.dtype == self.dtype else x + torch.mm(left, right)


def prepared(model: Backbone) -> Prepared:
    """The model's weights for decoding, which take their memory once more: kept while it is in eval mode.

    Versions of parameters tell of changes, but fused optimizers don't count theirs: hence `Backbone.train` forgets.
    """
    if model.training:
        return prepare(model)
    state = [(parameter.data_ptr(), _version(parameter)) for parameter in model.parameters()]
    if model.for_decoding is None or model.for_decoding[0] != state:
        model.for_decoding = None  # its memory first
        model.for_decoding = state, prepare(model)
    return model.for_decoding[1]


def _version(parameter: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode don't count, and are taken to stay."""
    return -1 if parameter.is_inference() else parameter._version


@torch.inference_mode()
def prepare(model: Backbone, dtype: torch.dtype = torch.float32, consume: bool = False) -> Prepared:
    """Lay the weights out anew, in `dtype`. consume: give the memory of the model's own layers free on the way; it is
    of no use afterwards."""
    config, stack = model.config, model.model
    scale = config.hidden**0.5
    blocks: list[PreparedBlock] = []
    for block in cast("Sequence[Block]", stack.layers):
        attention, feed = block.self_attn, block.mlp
        before, between = block.input_layernorm.weight, block.post_attention_layernorm.weight
        qkv = _joined(attention, "weight")
        gate_up = torch.cat((feed.gate_proj.weight, feed.up_proj.weight))
        matrices = (
            qkv * (before * scale),
            attention.o_proj.weight,
            gate_up * (between * scale),
            feed.down_proj.weight,
        )
        bias = _joined(attention, "bias").float() if config.qkv_bias else None
        qkv, out, gate_up, down = (matrix.t().to(dtype).contiguous() for matrix in matrices)
        blocks.append(PreparedBlock(qkv, out, gate_up, down, bias, _head_norm(attention)))
        if consume:
            block.to("meta")
    half = config.head_dim // 2
    return Prepared(
        config,
        embed=stack.embed_tokens.weight.detach().to(dtype),
        blocks=blocks,
        norm=stack.norm.weight * scale,
        unembed=model.lm_head.weight.detach().to(dtype),
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
