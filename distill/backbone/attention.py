"""Causal attention within the documents of packed rows.

A packed row holds several documents that must not see each other. With a mask over the whole row, most of the
work is on pairs that are thrown away; on a CPU it is quicker to compute documents of similar length together, with
plain products. On a GPU one kernel for all rows wins, that skips what no token reads (`flex.py`); the same `Documents`
tells it what that is.

Shape legend: B rows, T positions, H heads, G key/value heads, E head size, L positions of one document.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.backbone import flex
from distill.backbone.device import sent

SIMILAR = 0.7
"""Documents at least this share of the longest in their group are padded to it: few large products beat many small."""


Span = tuple[int, int, int]
"""Where a document lies: its row, start and end."""


class Documents:
    """Where documents lie: `spans` cover every position that is used.

    length: T. rows: B. hidden: what documents don't read of their own, (after, begin, end) counted from their start:
    positions `after` and later don't see those from `begin` up to `end`, which is at most `after`.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        spans: list[Span],
        device: torch.device,
        hidden: Mapping[Span, tuple[int, int, int]] | None = None,
    ) -> None:
        self.rows, self.length, self.spans, self.device = rows, length, spans, device
        self.hidden = hidden or {}

    @cached_property
    @torch.inference_mode(False)  # gradients may be wanted of the same rows later
    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """first, begin, end, (B, T) int32 each: a position reads from `first` to itself, without `begin` up to `end`.
        What no document covers reads itself alone."""
        first = np.tile(np.arange(self.length, dtype=np.int32), (self.rows, 1))
        begin, end = np.zeros_like(first), np.zeros_like(first)
        for span in self.spans:
            row, start, stop = span
            first[row, start:stop] = start
            if span in self.hidden:
                after, hidden, until = self.hidden[span]
                begin[row, start + after : stop], end[row, start + after : stop] = start + hidden, start + until
        first, begin, end = (sent(torch.from_numpy(part), self.device) for part in (first, begin, end))
        return first, begin, end

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, T) bool: who may be read."""
        first, begin, end = (part.unsqueeze(-1) for part in self.read)
        places = torch.arange(self.length, device=self.device)
        seen = (first <= places) & (places <= places[:, None])
        if self.hidden:
            seen &= (places < begin) | (places >= end)
        return seen.unsqueeze(1)

    @cached_property
    @torch.inference_mode(False)
    def blocks(self) -> Any:
        """The same as flex.py wants it, without a (B, 1, T, T)."""
        return flex.block_mask(*self.read, bool(self.hidden))

    @cached_property
    def groups(self) -> list["Group"]:
        """Documents of similar length, to be computed together."""
        spans = sorted(self.spans, key=lambda span: span[1] - span[2])
        groups: list[Group] = []
        while spans:
            longest = spans[0][2] - spans[0][1]
            size = next((i for i, (_, start, end) in enumerate(spans) if end - start < SIMILAR * longest), len(spans))
            hidden = [(i, *self.hidden[span]) for i, span in enumerate(spans[:size]) if span in self.hidden]
            groups.append(Group(spans[:size], self.rows, self.length, hidden))
            spans = spans[size:]
        return groups


class Group:
    """n documents, padded on the right to the longest, L. Causality hides the padding from what is real.

    real (n, L) bool; future (L, L) float32: −inf above the diagonal. hidden: what some of them don't read, which of
    the n before it.
    """

    def __init__(self, spans: list[Span], rows: int, length: int, hidden: list[tuple[int, int, int, int]]) -> None:
        self.hidden = hidden
        longest = spans[0][2] - spans[0][1]
        starts = torch.tensor([row * length + start for row, start, _ in spans])[:, None]
        sizes = torch.tensor([end - start for _, start, end in spans])[:, None]
        step = torch.arange(longest)
        self.real = step < sizes
        self.from_ = starts + torch.where(self.real, step, 0)  # padding reads something real, of no effect
        self.to = torch.where(self.real, starts + step, rows * length)  # and is written past the end
        self.future = torch.full((longest, longest), float("-inf")).triu(1)

    def take(self, x: Tensor, kv_heads: int) -> Tensor:
        """(B, H, T, E) → (n·G, H/G·L, E)."""
        heads, size = x.shape[1], x.shape[3]
        flat = x.transpose(1, 2).reshape(-1, size)
        n, length = self.real.shape
        return flat.index_select(0, _with_heads(self.from_, heads)).view(n * kv_heads, heads // kv_heads * length, size)

    def put(self, out: Tensor, x: Tensor) -> None:
        """The other way, into `out` (B·T + 1, H, E), whose last row collects the padding."""
        out.view(-1, x.shape[-1]).index_copy_(0, _with_heads(self.to, out.shape[1]), x.reshape(-1, x.shape[-1]))


def _with_heads(places: Tensor, heads: int) -> Tensor:
    """(n, L) rows of (·, H, E) → (n·H·L,) rows of (·, E)."""
    return (places[:, None, :] * heads + torch.arange(heads)[None, :, None]).flatten()


class DocumentAttention(torch.autograd.Function):
    """softmax(q kᵀ / √E) v within each document, probabilities kept for the way back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        heads, shared = k.shape[1], q.shape[1] // k.shape[1]
        out = _flat(q, q.shape)
        kept: list[Tensor] = []
        for group in documents.groups:
            length = group.future.shape[0]
            queries, keys, values = (group.take(x, heads) for x in (q, k, v))
            scores = torch.bmm(queries, keys.transpose(1, 2)).view(-1, shared, length, length)
            scores = torch.add(group.future.to(q.dtype), scores, alpha=q.shape[-1] ** -0.5)
            for document, after, begin, end in group.hidden:  # a slice each is far quicker than a mask of all pairs
                scores.view(-1, q.shape[1], length, length)[document, :, after:, begin:end] = float("-inf")
            p = scores.softmax(-1).view(-1, shared * length, length)
            group.put(out, torch.bmm(p, values))
            kept += [queries, keys, values, p]
        ctx.save_for_backward(*kept)
        ctx.documents, ctx.shapes = documents, (q.shape, k.shape, v.shape)
        return _rows(out, q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (_, _, _, size), (_, heads, _, _), _ = ctx.shapes
        out, saved = tuple(_flat(grads[0], shape) for shape in ctx.shapes), ctx.saved_tensors
        for i, group in enumerate(ctx.documents.groups):
            queries, keys, values, p = saved[4 * i : 4 * i + 4]
            real = group.real[:, None, :, None].to(grads[0].dtype)
            n, length = group.real.shape
            grad = (group.take(grads[0], heads).view(n, -1, length, size) * real).view_as(queries)
            dp = torch.bmm(grad, values.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) * size**-0.5
            group.put(out[0], torch.bmm(ds, keys))
            group.put(out[1], torch.bmm(ds.transpose(1, 2), queries))
            group.put(out[2], torch.bmm(p.transpose(1, 2), grad))
        dq, dk, dv = (_rows(flat, shape) for flat, shape in zip(out, ctx.shapes, strict=True))
        return dq, dk, dv, None


def _flat(like: Tensor, shape: torch.Size) -> Tensor:
    """Zeros (B·T + 1, H, E) for the shape (B, H, T, E), of like's kind."""
    rows, heads, length, size = shape
    return like.new_zeros(rows * length + 1, heads, size)


def _rows(flat: Tensor, shape: torch.Size) -> Tensor:
    """(B·T + 1, H, E) → (B, H, T, E), the shape."""
    rows, heads, length, size = shape
    return flat[:-1].view(rows, length, heads, size).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Attention of q (B, H, T, E) over k, v (B, G, T, E) → (B, H, T, E).

    documents None: each row is one document.
    """
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if q.device.type == "cpu":
        return DocumentAttention.apply(q, k, v, documents)  # pyright: ignore[reportReturnType]
    return attend_rows(q, k, v, documents)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The same by one kernel for all rows, as on a GPU."""
    if flex.runs(q, k, v, documents.blocks):
        return flex.attend(q, k, v, documents.blocks)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=True)
