"""Elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796): weights that old answers hang on are held.

    F_k = mean over old answers' tokens of E_{w ∼ p(w | before)} [(∂ log p(w | before) / ∂θ_k)²]
    penalty = λ/2 Σ_k F_k (θ_k − θ*_k)²

with words w drawn from the student itself, one draw a token, and θ* as it was. The draws of a document's tokens are
independent and each one's gradient is 0 in the mean, so that the square of their sum is, in the mean, the sum of
squares: one backward pass a document is enough.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.backbone.model import Backbone
from distill.training.batches import Batch


def diagonal_fisher(model: nn.Module, losses: Iterable[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """F of each parameter, of its shape, by name. losses: of each document −log p of what was drawn, in nats, and of
    how many tokens."""
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    count = 0
    for loss, tokens in losses:
        model.zero_grad()
        loss.backward()
        count += tokens
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad**2
    model.zero_grad()
    return {name: total / max(count, 1) for name, total in found.items()}


def drawn_loss(model: Backbone, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
    """−log p of words that the model draws at each position with loss of a batch, summed, and how many these are."""
    hidden = model.hidden(batch.ids, batch.positions, batch.spans).flatten(0, 1)
    logits = model.lm_head(hidden.index_select(0, batch.where[: batch.loss_positions])).float()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum"), batch.loss_positions


class Anchor:
    """Where a model was, and how much it matters: pulls it back there."""

    def __init__(self, model: nn.Module, fisher: Mapping[str, Tensor], weight: float) -> None:
        self.fisher, self.weight = fisher, weight
        self.parameters = dict(model.named_parameters())
        self.was = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def pull(self) -> float:
        """Add the penalty's gradient to what gradients there are; returns the penalty, nats."""
        penalty = 0.0
        for name, parameter in self.parameters.items():
            gradient = self.weight * self.fisher[name] * (parameter - self.was[name])
            penalty += 0.5 * float((gradient * (parameter - self.was[name])).sum())
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return penalty
