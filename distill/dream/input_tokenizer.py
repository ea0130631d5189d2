"""A prompt as one triplet: whatever comes in, text or images, leaves as (what, action, result) embeddings.

The backbone reads from left to right only, so each of its states knows nothing of what follows. A small encoder
lets all positions see each other before three learned queries, one a role, read the prompt.

Shape legend: B prompts, P prompt positions, N images, M = P + N memory positions, H hidden of the backbone,
W width, D = 512, 3 roles (what, action, result).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.backbone.model import rotate
from distill.dream.record import ROLES
from distill.errors import BadInput

WIDTH, LEAST_WIDTH = 256, 128
"""Of all that the engine keeps of a place or a path: as wide as the backbone that it reads, between these."""
HEADS = 8
LAYERS = 1


@dataclass
class Encoded:
    """What is known of the prompts: triplet (B, 3, D) of length 1, memory (B, M, W), real (B, M) bool."""

    triplet: Tensor
    memory: Tensor
    real: Tensor


def width_for(hidden: int) -> int:
    """W for a backbone of this hidden size: what drafts for a small student must not take longer than the student."""
    return min(max(hidden - hidden % (2 * HEADS), LEAST_WIDTH), WIDTH)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, W) → (B, heads, T, W / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, T, E) → (B, T, heads · E)."""
    return x.transpose(1, 2).flatten(2)


class EncoderBlock(nn.Module):
    """Attention in both directions, with rotary positions (arXiv:2104.09864), and a feed-forward; norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, seen: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, M, W); seen (B, 1, 1, M) bool; cos, sin (M, W / heads)."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.attention_norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=seen)
        x = x + self.mix(join_heads(mixed))
        return x + self.feed(self.feed_norm(x))


class InputTokenizer(nn.Module):
    """Prompt states and image embeddings → a triplet and the memory that dreams read.

    hidden: width of the backbone's states. dim: of image embeddings and of the triplet. width: W.
    """

    def __init__(self, hidden: int, dim: int = 512, width: int = WIDTH) -> None:
        super().__init__()
        self.hidden, self.dim, self.head_size = hidden, dim, width // HEADS
        self.from_text = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        self.from_image = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.kinds = nn.Parameter(torch.randn(2, width) * 0.02)  # text, image
        self.blocks = nn.ModuleList(EncoderBlock(width, HEADS) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.roles = nn.Parameter(torch.randn(len(ROLES), width))
        self.keys, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.to_triplet = nn.Linear(width, dim)

    def forward(self, states: Tensor | None, real: Tensor | None, images: Tensor | None = None) -> Encoded:
        """states (B, P, H), real (B, P) bool (None: all), images (B, N, D): at least one of the two.

        Raises BadInput for widths other than its own, for nothing at all and for other numbers of prompts.
        """
        x, seen = self._together(states, real, images)
        cos, sin = _rotary(x.shape[1], self.head_size, x)
        mask = seen[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask, cos, sin)
        x = self.norm(x)
        queries = split_heads(self.roles.expand(len(x), -1, -1), HEADS)
        keys, values = split_heads(self.keys(x), HEADS), split_heads(self.values(x), HEADS)
        read = join_heads(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask))
        return Encoded(F.normalize(self.to_triplet(read + self.roles), dim=-1), x, seen)

    def _together(self, states: Tensor | None, real: Tensor | None, images: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, M, W) and which positions are real (B, M)."""
        parts: list[Tensor] = []
        seen: list[Tensor] = []
        if states is not None:
            if states.ndim != 3 or states.shape[-1] != self.hidden:
                raise BadInput(
                    f"prompt states of shape {tuple(states.shape)}: the dream engine was made for a backbone of "
                    f"hidden size {self.hidden}; train it on this one (`dream train --phase all`)"
                )
            parts.append(self.from_text(states) + self.kinds[0])
            seen.append(states.new_ones(states.shape[:2], dtype=torch.bool) if real is None else real)
        if images is not None:
            if images.ndim != 3 or images.shape[-1] != self.dim:
                raise BadInput(
                    f"images of shape {tuple(images.shape)}: give embeddings of shape (prompts, images, {self.dim})"
                )
            parts.append(self.from_image(images) + self.kinds[1])
            seen.append(images.new_ones(images.shape[:2], dtype=torch.bool))
        if not parts or not sum(part.shape[1] for part in parts):
            raise BadInput("nothing to dream of: give a prompt, images or both")
        if len({len(part) for part in parts}) > 1:
            raise BadInput(f"{len(parts[0])} prompts and images for {len(parts[1])}: give as many of each")
        return torch.cat(parts, 1), torch.cat(seen, 1)


def _rotary(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (length, size)."""
    rates = 10_000.0 ** (-torch.arange(0, size, 2, device=like.device).float() / size)
    angles = torch.outer(torch.arange(length, device=like.device).float(), rates)
    angles = torch.cat((angles, angles), -1).to(like.dtype)
    return angles.cos(), angles.sin()
