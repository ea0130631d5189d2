"""Who chooses among paths: which of the dreams offered the arbiter lets through, learned from what came of it.

Shape legend: B choices, S paths offered, T steps, D = 512.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dream.engine import Drafted
from distill.tokens.concepts import CONCEPT_DIM


@dataclass(frozen=True)
class Choice:
    """state (B, D): where was chosen; paths (B, S, D): from what; prior (B, S): logits without a policy; there (B, S)
    bool: which paths there are; taken (B, S) bool."""

    state: Tensor
    paths: Tensor
    prior: Tensor
    there: Tensor
    taken: Tensor


class PolicyNetwork(nn.Module):
    """Takes each path with a chance, by itself: σ(prior + what the policy adds). An untrained one adds nothing.

    It learns by REINFORCE (Williams 1992) with a baseline, the reward that its value network expects of a state.
    """

    def __init__(self, dim: int = CONCEPT_DIM, width: int = 64) -> None:
        super().__init__()
        self.path, self.value = (_scorer(size, width) for size in (2 * dim, dim))

    def forward(self, state: Tensor, paths: Tensor, prior: Tensor | float = 0.0) -> Tensor:
        """state (B, D), paths (B, S, D), prior (B, S) → (B, S) logits of taking each."""
        return prior + self.path(torch.cat([state[:, None].expand_as(paths), paths], -1))[..., 0]

    def losses(self, choice: Choice, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """What was chosen and what it brought (B,) → the policy's loss, and the squared error of the value network."""
        logits = self(choice.state, choice.paths, choice.prior)
        nats = F.binary_cross_entropy_with_logits(logits, choice.taken.to(logits), reduction="none")
        return self.reinforce(choice.state, nats.masked_fill(~choice.there, 0.0).sum(-1), rewards)

    def reinforce(self, state: Tensor, nats: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """The same two of what was chosen in states (B, D), with probabilities exp(−nats), (B,)."""
        value = self.value(state)[..., 0]
        return ((rewards - value.detach()) * nats).mean(), F.mse_loss(value, rewards)

    @torch.no_grad()
    def choose(self, drafted: Drafted, keep_above: float, seed: int | None) -> tuple[Tensor, Choice]:
        """(B, S) logits of paths in the place of the arbiter's: those above `keep_above` are taken. seed: of what is
        drawn, each path with its chance; None takes what is likelier than not."""
        dreams, live = drafted.dreams, drafted.dreams.live()
        steps = dreams.embeddings.float().mean(3) * live[..., None]
        paths = steps.sum(2) / live.sum(-1, keepdim=True).clamp_min(1)
        state, there = drafted.encoded.triplet.float().mean(1), live.any(-1)
        bar = math.log(max(keep_above, 1e-6) / max(1 - keep_above, 1e-6))
        prior = drafted.reasoned.score_logits.float() - bar
        logits = self(state, paths, prior)
        if seed is not None:
            # A logit and logistic noise are above 0 as often as its chance says.
            draw = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed % 2**63)).clamp(1e-6, 1 - 1e-6)
            logits = logits + draw.logit().to(logits.device)
        return logits + bar, Choice(state, paths, prior, there, (logits >= 0) & there)


def _scorer(size: int, width: int) -> nn.Sequential:
    """(…, size) → (…, 1), at first 0."""
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(size, width), nn.GELU(), last)
