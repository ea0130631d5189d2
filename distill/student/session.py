"""Reading and writing on, without reading anything twice: keys and values of all that was read stay in memory.

Rows may differ in length. What is read together is padded on the left, and the padding stays behind as holes that
no later token sees; rotary positions count what is real.

Shape legend: B rows, T tokens read at once, L cache columns, D hidden, H heads, G key/value heads, E head size,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import BadInput
from distill.student.model import Backbone, Block


class Session:
    """What `rows` rows have read so far, ready to go on.

    length: columns to make room for at first; the cache grows where they don't suffice.
    """

    def __init__(self, model: Backbone, rows: int, length: int = 0) -> None:
        self.model = model
        self.rows = rows
        self.end = 0
        """Columns used."""
        self.real: Tensor | None = None
        """(B, end) bool: columns that hold a token of the row; None: all of them."""
        config, weight = model.config, model.model.embed_tokens.weight
        shape = (config.layers, 2, rows, config.kv_heads, length, config.head_dim)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

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

    @torch.inference_mode()
    def append(self, ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read ids (B, T) after all before: their last hidden states (B, T, D), and logits (B, V) after the last.

        real (B, T) bool: False where a row has no token (padding goes to the left; its states mean nothing).
        Raises BadInput where a row would outgrow the model's context.
        """
        start, end = self.end, self.end + ids.shape[1]
        model, context = self.model, self.model.config.context
        if real is not None or self.real is not None:
            before = ids.new_ones((self.rows, start), dtype=torch.bool) if self.real is None else self.real
            now = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            self.real = torch.cat((before, now), dim=1)
        if end > context and (longest := max(self.lengths) if self.real is not None else end) > context:
            raise BadInput(f"prompt: {longest} tokens don't fit a context of {context}; shorten it")
        self.reserve(ids.shape[1])
        cos, sin, mask = self._places(start, end)
        x = model.model.embed_tokens(ids)
        for block, (keys, values) in zip(model.model.layers, self.cache, strict=True):
            assert isinstance(block, Block)
            attention = block.self_attn
            q, k, v = attention.project(block.input_layernorm(x), cos, sin)
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            k, v = keys[:, :, :end], values[:, :, :end]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        self.end = end
        states = model.model.norm(x)
        return states, model.lm_head(states[:, -1])

    def _places(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the columns start … end − 1: cos and sin, and the columns that each may read, itself included."""
        model, count = self.model, end - start
        causal = None
        if count > 1:
            causal = torch.ones(count, end, dtype=torch.bool, device=model.cos.device).tril(start)
        if self.real is None:
            return model.cos[start:end], model.sin[start:end], causal
        positions = (self.real.cumsum(1)[:, start:] - 1).clamp_min(0)
        visible = self.real[:, None, None]
        if causal is not None:
            # Padding reads itself, lest its softmax be 0/0.
            itself = torch.eye(count, dtype=torch.bool, device=causal.device)
            visible = (visible & causal) | F.pad(itself, (start, 0))
        return model.cos[positions].unsqueeze(1), model.sin[positions].unsqueeze(1), visible
