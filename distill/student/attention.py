"""Causal attention within the documents of packed rows.

A packed row holds several documents that must not see each other. With a mask over the whole row, most of the
work is on pairs that are thrown away; on a CPU it is quicker to go document by document with plain products.
On a GPU the masked kernel wins, and the same `Documents` object carries the mask.

Shape legend: B rows, T positions, H heads, G key/value heads, E head size, L positions of one document.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents:
    """Where documents lie: `spans` holds (row, start, end), covering every position that is used.

    length: T. rows: B.
    """

    def __init__(self, rows: int, length: int, spans: list[tuple[int, int, int]], device: torch.device) -> None:
        self.rows, self.length, self.spans, self.device = rows, length, spans, device

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, T) bool: who may be read."""
        owner = torch.full((self.rows, self.length), -1)
        for i, (row, start, end) in enumerate(self.spans):
            owner[row, start:end] = i
        owner = owner.to(self.device)
        same = owner[:, None, :, None] == owner[:, None, None, :]
        return same & torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()

    @cached_property
    def future(self) -> Tensor:
        """(T, T) float32: −inf above the diagonal."""
        return torch.full((self.length, self.length), float("-inf"), device=self.device).triu(1)


class DocumentAttention(torch.autograd.Function):
    """softmax(q kᵀ / √E) v for each document, probabilities kept for the way back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        groups, size = k.shape[1], q.shape[-1]
        shared = q.shape[1] // groups
        out = torch.zeros_like(q)
        future = documents.future.to(q.dtype)
        kept: list[Tensor] = []
        for row, start, end in documents.spans:
            length = end - start
            queries = q[row, :, start:end].reshape(groups, shared * length, size)
            scores = torch.bmm(queries, k[row, :, start:end].transpose(1, 2)).view(groups, shared, length, length)
            scores = torch.add(future[:length, :length], scores, alpha=size**-0.5)
            p = scores.softmax(-1).view(groups, shared * length, length)
            out[row, :, start:end] = torch.bmm(p, v[row, :, start:end]).view(q.shape[1], length, size)
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.documents = documents
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *kept = ctx.saved_tensors
        groups, size = k.shape[1], q.shape[-1]
        shared = q.shape[1] // groups
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (row, start, end), p in zip(ctx.documents.spans, kept, strict=True):
            length = end - start
            grad = grads[0][row, :, start:end].reshape(groups, shared * length, size)
            queries = q[row, :, start:end].reshape(groups, shared * length, size)
            dv[row, :, start:end] = torch.bmm(p.transpose(1, 2), grad)
            dp = torch.bmm(grad, v[row, :, start:end].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) * size**-0.5
            dq[row, :, start:end] = torch.bmm(ds, k[row, :, start:end]).view(q.shape[1], length, size)
            dk[row, :, start:end] = torch.bmm(ds.transpose(1, 2), queries)
        return dq, dk, dv, None


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Attention of q (B, H, T, E) over k, v (B, G, T, E) → (B, H, T, E).

    documents None: each row is one document.
    """
    if documents is not None and q.device.type == "cpu":
        return DocumentAttention.apply(q, k, v, documents)  # pyright: ignore[reportReturnType]
    mask = None if documents is None else documents.mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


attend: Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor] = torch.compiler.disable(_attend)  # pyright: ignore[reportAssignmentType]
"""`_attend`, left out of compiled graphs: spans change from batch to batch, and each would compile anew."""
