"""Many rows at once, each with a past of its own: rows join, advance together by a token, and leave at any time.

Every row begins at column 0 of the cache and writes its next key and value at the column of its own length. So rows
of any length stand side by side without being moved, padding on the right is never seen by what is real, and reading
prompts needs no mask. Rows lie dense: where one leaves, the last takes its place.

Shape legend: R rows that there is room for, B rows in use, n rows joining, T their longest prompt, C columns,
D hidden, H heads, G key/value heads, E head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.backbone.prepared import Prepared

SIMILAR = 0.8
"""Prompts at least this share of the longest in their group are padded to it."""
READ_AT_ONCE = 2048
"""Tokens of prompts in one pass: more need memory and save nothing."""
STEP = 64
"""Columns by which the cache grows."""


class Rows:
    """What many rows have read so far. lengths (B,): tokens that each has read."""

    def __init__(self, weights: Prepared) -> None:
        self.weights = weights
        self.lengths: list[int] = []
        config = weights.config
        shape = (config.layers, 2, 0, config.kv_heads, 0, config.head_dim)
        self.cache = torch.zeros(shape, dtype=weights.dtype, device=weights.embed.device)

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def bytes_of(weights: Prepared, columns: int) -> int:
        """Memory that one row's past of so many columns takes."""
        config = weights.config
        return 2 * config.layers * config.kv_heads * config.head_dim * columns * weights.embed.element_size()

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows in all, of so many columns."""
        more = max(0, rows - self.cache.shape[2])
        wider = max(0, columns - self.cache.shape[4])
        if more or wider:
            wider = -(-wider // STEP) * STEP
            self.cache = F.pad(self.cache, (0, 0, 0, wider, 0, 0, 0, more))

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read new rows, which come after all others, in their order. A prompt may be empty: then it has no past."""
        first = len(self)
        self.reserve(first + len(prompts), max(map(len, prompts), default=0) + 1)
        self.lengths += map(len, prompts)
        order = sorted((i for i in range(len(prompts)) if prompts[i]), key=lambda i: -len(prompts[i]))
        while order:
            longest = len(prompts[order[0]])
            most = max(1, READ_AT_ONCE // longest)
            size = next((k for k, i in enumerate(order[:most]) if len(prompts[i]) < SIMILAR * longest), most)
            group, order = order[:size], order[size:]
            ids = torch.zeros((len(group), longest), dtype=torch.long)
            for row, i in enumerate(group):
                ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
            places = torch.tensor([first + i for i in group])
            self._read(ids.to(self.cache.device), places.to(self.cache.device))

    def _read(self, ids: Tensor, places: Tensor) -> None:
        """Keys and values of ids (n, T) into rows `places` (n,), padding's too: each row overwrites them by and by."""
        weights, config = self.weights, self.weights.config
        rows, count = ids.shape
        rotations = weights.rotations[None, :count, None]
        x = weights.read(ids).flatten(0, 1)
        for block, slot in zip(weights.blocks, self.cache.narrow(4, 0, count).unbind(0), strict=True):
            qkv = weights.project(block, x, rotations).transpose(1, 2)
            q, k, v = qkv.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
            slot[0, places], slot[1, places] = k, v
            if block is weights.blocks[-1]:
                return  # nothing reads its output
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = weights.finish(block, x, mixed.transpose(1, 2).reshape(rows * count, -1))

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Each row reads its next token of tokens (B,): the last hidden states (B, D) float32 after it."""
        weights, config = self.weights, self.weights.config
        rows, device = len(self), self.cache.device
        longest = max(self.lengths) + 1
        self.reserve(rows, longest)
        room, columns, size = self.cache.shape[2], self.cache.shape[4], config.head_dim
        heads, kv_heads = config.heads, config.kv_heads
        places = torch.tensor(self.lengths, device=device)
        # Where each row's key and value heads go, of the (2·R·G·C) vectors of a layer.
        at = torch.arange(2, device=device)[:, None] * room + torch.arange(rows, device=device)[:, None, None]
        at = at * kv_heads + torch.arange(kv_heads, device=device)
        at = (at * columns + places[:, None, None]).flatten()
        unseen = torch.arange(longest, device=device) > places[:, None]
        mask = torch.zeros((rows, 1, 1, longest), dtype=weights.dtype, device=device)
        mask.masked_fill_(unseen[:, None, None], float("-inf"))
        rotations = weights.rotations[places].unsqueeze(1)
        keys, values = (part.unbind(0) for part in self.cache[:, :, :rows, :, :longest].unbind(1))
        x = weights.read(tokens)
        for block, layer, k, v in zip(weights.blocks, self.cache.unbind(0), keys, values, strict=True):
            q, new = weights.project(block, x, rotations).split((heads, 2 * kv_heads), dim=1)
            layer.view(-1, size).index_copy_(0, at, new.reshape(-1, size))
            # Queries that share keys stand as positions: to the kernel, that is no grouping at all.
            q = q.reshape(rows, kv_heads, -1, size)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = weights.finish(block, x, mixed.reshape(rows, -1))
        self.lengths = [length + 1 for length in self.lengths]
        return weights.states(x)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self) - 1
        if row != last:
            length = self.lengths[last]
            self.cache[:, :, row, :, :length] = self.cache[:, :, last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
