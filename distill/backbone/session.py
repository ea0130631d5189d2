"""Reading and writing on, without reading anything twice: keys and values of all that was read stay in memory.

Rows may differ in length. What is read together is padded on the left, and the padding stays behind as holes that
no later token sees; rotary positions count what is real.

Shape legend: B rows, T tokens read at once, L cache columns, D hidden, H heads, G key/value heads, E head size,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.backbone.model import Backbone
from distill.backbone.prepared import prepared
from distill.errors import BadInput


class Session:
    """What `rows` rows have read so far, ready to go on. The model's weights must not change meanwhile.

    length: columns to make room for at first; the cache grows where they don't suffice.
    """

    def __init__(self, model: Backbone, rows: int, length: int = 0) -> None:
        self.model = model
        self.weights = prepared(model)
        self.rows = rows
        self.end = 0
        """Columns used."""
        self.real: Tensor | None = None
        """(B, end) bool: columns that hold a token of the row; None: all of them."""
        config = model.config
        shape = (config.layers, 2, rows, config.kv_heads, length, config.head_dim)
        self.cache = self.weights.embed.new_zeros(shape)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has read."""
        return [self.end] * self.rows if self.real is None else self.real.sum(-1).tolist()

    def reserve(self, columns: int) -> None:
        """Make room for so many more."""
        missing = self.end + columns - self.cache.shape[4]
        if missing > 0:
            self.cache = F.pad(self.cache, (0, 0, 0, missing))

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (places among the B)."""
        self.rows = len(rows)
        self.cache = self.cache[:, :, rows]
        self.real = None if self.real is None else self.real[rows]

    def forget(self, columns: int) -> None:
        """Unread so many of the last columns."""
        self.end -= columns
        self.real = None if self.real is None else self.real[:, : self.end]

    @torch.inference_mode()
    def append(
        self, ids: Tensor, real: Tensor | None = None, last: bool = False, every: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read ids (B, T) after all before: their last hidden states (B, T, D), and logits (B, V) after the last.

        real (B, T) bool: False where a row has no token (padding goes to the left; its states mean nothing).
        last: give the last token's states alone, (B, 1, D), which is quicker. every: logits (B · T, V) after each.
        Raises BadInput where a row would outgrow the model's context.
        """
        config, weights = self.model.config, self.weights
        rows, count = ids.shape
        start, end = self.end, self.end + count
        self._note(count, real)
        self.reserve(count)
        self.end = end
        rotations, mask = self._places(start)
        heads, shared, size = config.heads, config.heads // config.kv_heads, config.head_dim
        # All layers at once, as each look into a tensor takes as long as a small sum.
        slots = self.cache.narrow(4, start, count).unbind(0)
        keys, values = (part.unbind(0) for part in self.cache.narrow(4, 0, end).unbind(1))
        x = weights.read(ids).flatten(0, 1)
        for block, slot, k, v in zip(weights.blocks, slots, keys, values, strict=True):
            q, new = weights.project(block, x, rotations).split((heads, 2 * config.kv_heads), dim=2)
            slot.copy_(new.view(rows, count, 2, -1, size).permute(2, 0, 3, 1, 4))
            if count == 1:
                # Queries that share keys stand as positions: to the kernel, that is no grouping at all.
                q = q.view(rows, -1, shared, size)
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(rows, -1)
            else:
                q, causal = q.transpose(1, 2), mask is None
                mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
                mixed = mixed.transpose(1, 2).reshape(rows * count, -1)
            if last and count > 1 and block is weights.blocks[-1]:  # nothing above reads the others
                x, mixed = (part.view(rows, count, -1)[:, -1] for part in (x, mixed))
            x = weights.finish(block, x, mixed)
        states = weights.states(x).view(rows, -1, config.hidden)
        return states, torch.mm(states.flatten(0, 1) if every else states[:, -1], weights.head)

    def _note(self, count: int, real: Tensor | None) -> None:
        """Write down which of the next columns hold a token."""
        lengths, after = self.real, self.end + count
        if real is not None or lengths is not None:
            device = self.cache.device
            before = torch.ones((self.rows, self.end), dtype=torch.bool, device=device) if lengths is None else lengths
            now = torch.ones((self.rows, count), dtype=torch.bool, device=device) if real is None else real
            lengths = torch.cat((before, now), dim=1)
        if after > (context := self.model.config.context):
            longest = after if lengths is None else int(lengths.sum(-1).max())
            if longest > context:
                raise BadInput(f"prompt: {longest} tokens don't fit a context of {context}; shorten it")
        self.real = lengths

    def _places(self, start: int) -> tuple[Tensor, Tensor | None]:
        """Of the columns from `start` on: rotations (B or 1, T, 1, E / 2), and what to add to the scores of those that
        each may read (0) or not (−∞). None: all up to its own are read.
        """
        count, real = self.end - start, self.real
        if real is None and (count == 1 or start == 0):
            return self.weights.rotations[None, start : self.end, None], None
        visible = torch.ones(count, self.end, dtype=torch.bool, device=self.cache.device).tril(start)
        rotations = self.weights.rotations[None, start : self.end, None]
        if real is not None:
            # Padding reads itself, lest its softmax be 0/0.
            itself = F.pad(torch.eye(count, dtype=torch.bool, device=real.device), (start, 0))
            visible = (visible & real[:, None, None]) | itself
            rotations = self.weights.rotations[(real.cumsum(1)[:, start:] - 1).clamp_min(0)].unsqueeze(2)
        return rotations, self.cache.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
