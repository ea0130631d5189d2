"""What comes out of a dreaming: text, written by the backbone, or three image embeddings, or both.

Shape legend: B prompts, 3 roles (what, action, result), D = 512.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.tokens.concepts import CONCEPT_DIM

if TYPE_CHECKING:
    from distill.tokens.image_tokens import Codebook

ROLES = ("what", "action", "result")


class OutputDecoder(nn.Module):
    """The image head: the graph's reasoning embedding becomes the outcome's (what, action, result).

    A role's embedding is added to the reasoning, and a feed-forward correction, shared by the roles, to their sum:
    so three roles learn from every example, and an untrained head already points where the reasoning does.
    """

    def __init__(self, dim: int = CONCEPT_DIM) -> None:
        super().__init__()
        self.role = nn.Parameter(torch.randn(len(ROLES), dim) * dim**-0.5)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def image(self, reasoning: Tensor) -> Tensor:
        """(B, D) → (B, 3, D), each of length 1."""
        x = reasoning.unsqueeze(1) + self.role
        return F.normalize(x + self.down(F.gelu(self.up(self.norm(x)))), dim=-1)

    def forward(self, reasoning: Tensor) -> Tensor:
        return self.image(reasoning)
