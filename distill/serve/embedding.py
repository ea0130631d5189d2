"""Texts as vectors: the mean of the student's last hidden states over a text, of length 1.

Shape legend: B texts, T tokens, D hidden.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distill.backbone.generate import batches
from distill.backbone.model import Backbone
from distill.serve.fields import ApiError, Fields, seconds
from distill.serve.shelf import Served

AT_ONCE = 2048
"""Tokens of one pass; answers are written on between them."""


@dataclass(frozen=True)
class Embedded:
    """vectors: one a text. tokens: of all texts. load: ns until the student was in memory."""

    vectors: list[list[float]]
    tokens: int
    load: int


async def embed(served: Served, texts: Sequence[str], body: Fields) -> Embedded:
    """body: may say truncate, dimensions (the first of them alone) and keep_alive. Raises ApiError, Busy."""
    size, keep, started = body.whole("dimensions") or 0, seconds(body.values.get("keep_alive")), time.monotonic()
    if size < 0:
        raise ApiError(400, "dimensions: must be positive")
    loaded = await served.acquire()
    try:
        load = max(1, int((time.monotonic() - started) * 1e9))
        tokenizer, model = loaded.student.tokenizer, loaded.student.model
        ids = await asyncio.to_thread(tokenizer.encode_batch, texts)
        if not body.flag("truncate", True) and any(len(row) > served.context for row in ids):
            raise ApiError(400, "the input length exceeds the context length")
        ids = [row[: served.context] or [tokenizer.newline_id] for row in ids]
        vectors: list[list[float]] = [[]] * len(ids)
        for group in batches(dict(enumerate(map(len, ids))), AT_ONCE):
            rows = [ids[i] for i in group]
            found = await asyncio.wrap_future(served.scheduler.call(lambda rows=rows: _means(model, rows, size)))
            for i, vector in zip(group, found, strict=True):
                vectors[i] = vector
        return Embedded(vectors, sum(map(len, ids)), load)
    finally:
        served.release(keep)


@torch.inference_mode()
def _means(model: Backbone, rows: Sequence[Sequence[int]], size: int) -> list[list[float]]:
    """(B, D), or their first `size` numbers, each of length 1. Padded on the right: a causal model never sees it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.cos.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    real = torch.arange(longest, device=ids.device) < lengths[:, None]
    means = (model.hidden(ids) * real.unsqueeze(-1)).sum(1) / lengths[:, None]
    return F.normalize(means[:, : size or None], dim=-1).tolist()
