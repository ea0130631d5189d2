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
WORTH = 64
"""Tokens that must be saved for a common beginning to be read by itself: one row reads all weights for it."""
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
        # How prompts began that were read together, and its keys and values: (layers, 2, 1, G, tokens, E).
        self._beginning: list[int] = []
        self._past = self.cache.new_zeros((config.layers, 2, 1, config.kv_heads, 0, config.head_dim))

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def bytes_of(weights: Prepared, columns: int) -> int:
        """Memory that one row's past of so many columns takes."""
        config = weights.config
        return 2 * config.layers * config.kv_heads * config.head_dim * columns * weights.embed.element_size()

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows in all, of so many columns: where it lacks, for just that."""
        if rows <= self.cache.shape[2] and columns <= self.cache.shape[4]:
            return
        used, longest = len(self), max(self.lengths, default=0)
        rows, columns = max(rows, used), -(-max(columns, longest) // STEP) * STEP
        layers, both, _, kv_heads, _, size = self.cache.shape
        roomy = self.cache.new_zeros((layers, both, rows, kv_heads, columns, size))
        roomy[:, :, :used, :, :longest] = self.cache[:, :, :used, :, :longest]
        self.cache = roomy

    @torch.inference_mode()
    def join(self, prompts: Sequence[list[int]]) -> None:
        """Read new rows, which come after all others, in their order. A prompt may be empty: then it has no past.

        How all of them begin (a template, a system message) is read once.
        """
        first = len(self)
        self.reserve(first + len(prompts), max(map(len, prompts), default=0) + 1)
        start = self._share(first, prompts)
        self.lengths += map(len, prompts)
        order = sorted((i for i in range(len(prompts)) if len(prompts[i]) > start), key=lambda i: -len(prompts[i]))
        while order:
            longest = len(prompts[order[0]]) - start
            most = max(1, READ_AT_ONCE // longest)
            size = next((k for k, i in enumerate(order[:most]) if len(prompts[i]) - start < SIMILAR * longest), most)
            group, order = order[:size], order[size:]
            self._read([prompts[i][start:] for i in group], [first + i for i in group], start)

    def _share(self, first: int, prompts: Sequence[list[int]]) -> int:
        """Give all rows from `first` on the keys and values of how their prompts begin: of how many tokens."""
        if not prompts:
            return 0
        begin, end = min(prompts), max(prompts)
        same, known = _common(begin, end), _common(begin, self._beginning)
        if (len(prompts) - 1) * (same - known) >= WORTH:
            self._read([begin[:same]], [first], 0)
            self._beginning, self._past = list(begin[:same]), self.cache[:, :, first : first + 1, :, :same].clone()
            known = same
        known = min(known, same)
        self.cache[:, :, first : first + len(prompts), :, :known] = self._past[..., :known, :]
        return known

    def _read(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], start: int) -> None:
        """Keys and values of prompts into `rows`, from column `start` on. Padding's too: each row overwrites them."""
        weights, config, device = self.weights, self.weights.config, self.cache.device
        count = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (count - len(prompt))] for prompt in prompts], device=device)
        places = torch.tensor(rows, device=device)
        rotations = weights.rotations[None, start : start + count, None]
        seen = torch.ones((count, start + count), dtype=torch.bool, device=device).tril(start) if start else None
        x = weights.read(ids).flatten(0, 1)
        for block, layer, past in zip(weights.blocks, self.cache.unbind(0), self._past.unbind(0), strict=True):
            qkv = weights.project(block, x, rotations).transpose(1, 2)
            q, k, v = qkv.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
            slot = layer.narrow(3, start, count)
            slot[0, places], slot[1, places] = k, v
            if block is weights.blocks[-1]:
                return  # nothing reads its output
            if start:
                before = past[..., :start, :].expand(-1, len(rows), -1, -1, -1)
                k, v = torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)
            mixed = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=True)
            x = weights.finish(block, x, mixed.transpose(1, 2).reshape(len(x), -1))

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
        mask = mask.expand(-1, kv_heads, heads // kv_heads, -1).flatten(0, 1)
        rotations = weights.rotations[places].unsqueeze(1)
        used = self.cache[:, :, :rows].flatten(2, 3)[..., :longest, :]
        keys, values = (part.unbind(0) for part in used.unbind(1))
        x = weights.read(tokens)
        for block, layer, k, v in zip(weights.blocks, self.cache.unbind(0), keys, values, strict=True):
            q, new = weights.project(block, x, rotations).split((heads, 2 * kv_heads), dim=1)
            layer.view(-1, size).index_copy_(0, at, new.reshape(-1, size))
            # Queries that share keys stand as positions: then there is no grouping at all.
            q = q.reshape(rows * kv_heads, -1, size)
            x = weights.finish(block, x, _attend(q, k, v, mask).view(rows, -1))
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


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √E + mask) v, (N, S, E), of q (N, S, E), k and v (N, L, E), mask (N, S, L)."""
    if q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # For few queries two batched products are a sixth faster than the fused kernel on a CPU.
    return torch.bmm(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1), v)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin. Of many prompts, the least and the greatest tell it of all."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
