"""Attention within documents on a GPU: FlexAttention (arXiv:2412.05496), one kernel that skips what no token reads.

What a token reads is told by three numbers, so that nothing of the size of all pairs of positions is ever made: a
table of blocks says which parts of a row are read in full, in part and not at all, and the kernel looks at pairs within
the second alone.

Shape legend: B rows, T positions, N blocks of them, H heads, G key/value heads, E head size.
"""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Positions of a block: what the kernel's tiles divide."""
COMPILED = 64
"""So often the kernel may be compiled: a student and its teacher, with gradients and without, some numbers of rows."""


def block_mask(first: Tensor, begin: Tensor, end: Tensor, hidden: bool = True) -> Any:
    """A BlockMask of (B, 1, N, N) blocks: the query q of a row reads from first[q] to q, without begin[q] up to end[q].

    All three (B, T) int32 on a device, which is never waited for. hidden: whether some end is above its begin.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = first.shape

    def blocks(positions: Tensor) -> Tensor:  # what stands past the end reads nothing
        return F.pad(positions, (0, -length % BLOCK), value=length).view(rows, -1, BLOCK)

    from_ = blocks(first).amin(-1, keepdim=True) // BLOCK
    whole_from = (blocks(torch.maximum(first, end)).amax(-1, keepdim=True) + BLOCK - 1) // BLOCK
    key = torch.arange(from_.shape[1], device=first.device)
    query = key[:, None]
    whole = (key >= whole_from) & (key < query)
    part = (key >= from_) & (key <= query) & ~whole

    def reads(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[row, query]) & (key <= query)

    def reads_some(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        unhidden = (key < begin[row, query]) | (key >= end[row, query])
        return (key >= first[row, query]) & (key <= query) & unhidden

    return BlockMask.from_kv_blocks(
        *_listed(part),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=reads_some if hidden else reads,
        seq_lengths=(length, length),
    )


def _listed(read: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries reads, (B, 1, N) int32; which, first of all, (B, 1, N, N) int32."""
    read = read.to(torch.int32).unsqueeze(1)
    which = torch.argsort(read, dim=-1, descending=True, stable=True).to(torch.int32)
    return read.sum(-1, dtype=torch.int32), which


@cache
def kernel() -> Any:
    """Compiled once for each shape, and not for each batch: what a BlockMask holds are its inputs."""
    from torch.nn.attention.flex_attention import flex_attention

    dynamo: Any = torch._dynamo.config  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    dynamo.recompile_limit = max(COMPILED, dynamo.recompile_limit)
    return torch.compile(flex_attention, fullgraph=True)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """(B, H, T, E) of q (B, H, T, E) and k, v (B, G, T, E). mask: of `block_mask`."""
    # Where a caller wants its own code uncompiled, this one is meant to be compiled all the same.
    with torch.compiler.set_stance("default"):
        return kernel()(q, k, v, block_mask=mask, enable_gqa=True)


tried: dict[tuple[Any, ...], bool] = {}
"""Kinds of heads on a device → whether the kernel runs for them."""


def runs(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> bool:
    """Whether the kernel can be compiled for such heads on such a device, there and back: tried once on zeros of this
    shape, which is needed next anyway. Where it can't, a warning says why."""
    kind = (q.device.type, q.dtype, q.shape[1], k.shape[1], q.shape[3])
    if kind not in tried:
        try:
            # Hooks of a caller that recomputes its layers (train.recompute) are for its own tensors.
            own = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
            with torch.inference_mode(False), torch.enable_grad(), own:
                parts = [torch.zeros_like(part).requires_grad_() for part in (q, k, v)]
                attend(parts[0], parts[1], parts[2], mask).sum().backward()
            tried[kind] = True
        except Exception as error:  # of Dynamo, Inductor, Triton, a C compiler that isn't there: each has its own
            why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            warnings.warn(
                f"attention: FlexAttention doesn't run here ({why}); masks of all pairs of positions take more memory",
                stacklevel=2,
            )
            tried[kind] = False
    return tried[kind]


def told(device: torch.device) -> str:
    """What has computed attention within documents there so far."""
    names = {True: "FlexAttention", False: "a masked product"}
    found = sorted({runs for (kind, *_), runs in tried.items() if kind == device.type}, reverse=True)
    return "document by document" if device.type == "cpu" else " and ".join(names[runs] for runs in found)
