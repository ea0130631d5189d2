"""What the dream engine is taught: the right codes and lengths, in embeddings that mean what the phrases mean.

Shape legend: B prompts, S sequences (paths), T steps, 3 roles (what, action, result), D = 512, C codes, E experts,
W width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.dream.engine import Drafted
from distill.dream.generator import Dreams

WEIGHTS = {"code": 1.0, "cosine": 0.5, "coherence": 0.1, "more": 0.5, "diversity": 0.1, "balance": 0.01}
"""Of each part in the total. Load balance weighs 0.01 as in Switch Transformers (arXiv:2101.03961)."""
MARGIN = 0.2
"""Largest cosine between two paths' offsets that costs nothing."""


@dataclass
class DreamTargets:
    """True dreams: codes (B, S, T, 3) int64, −1 where absent; phrases (B, S, T, 3, D) float32, their vectors,
    anything where absent; steps (B, S, T) bool: whether the step exists."""

    codes: Tensor
    phrases: Tensor
    steps: Tensor

    def to(self, device: torch.device) -> "DreamTargets":
        return DreamTargets(self.codes.to(device), self.phrases.to(device), self.steps.to(device))


def engine_loss(dreams: Dreams, targets: DreamTargets) -> dict[str, Tensor]:
    """Every part as a scalar, and `total`, their weighted sum."""
    parts = {
        "code": code_loss(dreams.logits, targets.codes),
        "cosine": cosine_loss(dreams.embeddings, targets.phrases, targets.codes >= 0),
        "coherence": coherence_loss(dreams.embeddings, targets.phrases, targets.codes >= 0),
        "more": more_loss(dreams.more, targets.steps),
        "diversity": diversity_loss(dreams.offsets),
        "balance": balance_loss(dreams.gates),
    }
    total = torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()
    return {"total": total, **parts}


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, S, T, 3, C) at codes (B, S, T, 3) ≥ 0; 0 where there are none."""
    there = codes >= 0
    losses = F.cross_entropy(logits[there], codes[there], reduction="sum")
    return losses / there.sum().clamp_min(1)


def cosine_loss(embeddings: Tensor, phrases: Tensor, there: Tensor) -> Tensor:
    """Mean of 1 − cosine between dreamed and true vectors (B, S, T, 3, D), where there (B, S, T, 3)."""
    losses = 1 - F.cosine_similarity(embeddings[there], phrases[there], dim=-1)
    return losses.sum() / there.sum().clamp_min(1)


def coherence_loss(embeddings: Tensor, phrases: Tensor, there: Tensor) -> Tensor:
    """Neighbouring triplets should hang together as much as the true ones do, no more and no less.

    Mean of (cos(resultₜ, whatₜ₊₁) − the same of the true phrases)², over the neighbours that exist in truth.
    """
    both = there[:, :, :-1, 2] & there[:, :, 1:, 0]
    dreamed = F.cosine_similarity(embeddings[:, :, :-1, 2][both], embeddings[:, :, 1:, 0][both], dim=-1)
    true = F.cosine_similarity(phrases[:, :, :-1, 2][both], phrases[:, :, 1:, 0][both], dim=-1)
    return (dreamed - true).square().sum() / both.sum().clamp_min(1)


def more_loss(more: Tensor, steps: Tensor) -> Tensor:
    """Binary cross-entropy of more (B, S, T) up to and with each chain's end: after it nothing is asked.

    steps (B, S, T) bool, true from the first step on until the chain ends.
    """
    asked = torch.cat((torch.ones_like(steps[..., :1]), steps[..., :-1]), -1)
    losses = F.binary_cross_entropy_with_logits(more[asked], steps[asked].to(more.dtype), reduction="sum")
    return losses / asked.sum().clamp_min(1)


def diversity_loss(offsets: Tensor) -> Tensor:
    """Mean hinge max(0, cos − MARGIN) over pairs of offsets (S, W): paths start apart."""
    unit = F.normalize(offsets, dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    hinges = ((unit @ unit.T)[first, second] - MARGIN).clamp_min(0)
    return hinges.sum() / max(len(hinges), 1)


def balance_loss(gates: Tensor) -> Tensor:
    """E · Σₑ fₑ·pₑ, at least 1: f the share of paths whose largest gate is e, p the mean gate (arXiv:2101.03961).

    gates (B, S, E).
    """
    rows = gates.flatten(0, -2)
    chosen = F.one_hot(rows.argmax(-1), rows.shape[-1]).to(rows.dtype)
    return rows.shape[-1] * (chosen.mean(0) * rows.mean(0)).sum()


def right_paths(dreams: Dreams, targets: DreamTargets) -> Tensor:
    """(B, S) bool: paths as long as the true chain whose codes are all right. An empty chain rightly ends at once."""
    same = ((dreams.codes() == targets.codes) | (targets.codes < 0)).all(-1) | ~targets.steps
    return same.all(-1) & (dreams.live() == targets.steps).all(-1)


def right_shares(dreams: Dreams, targets: DreamTargets) -> tuple[Tensor, Tensor]:
    """How much is right: of each living step (B, S, T) the share of its codes, and of each path (B, S).

    A path's share is over its own steps or the true chain's, whichever are more: what it left out and what it made
    up both count against it.
    """
    live = dreams.live()
    steps = ((dreams.codes() == targets.codes) & targets.steps[..., None]).float().mean(-1) * live
    longer = torch.maximum(live.sum(-1), targets.steps.sum(-1))
    return steps, steps.sum(-1) / longer.clamp_min(1)


def score_loss(drafted: Drafted, targets: DreamTargets) -> Tensor:
    """Binary cross-entropy of the graph's scores (B, S) at the share of each path that is right; empty paths don't
    count."""
    counted = drafted.dreams.live()[..., 0]
    right = right_shares(drafted.dreams, targets)[1][counted]
    losses = F.binary_cross_entropy_with_logits(drafted.reasoned.score_logits[counted], right, reduction="sum")
    return losses / counted.sum().clamp_min(1)


def importance_loss(drafted: Drafted, targets: DreamTargets) -> Tensor:
    """Binary cross-entropy of the nodes' importances (B, S, T) at the share of each step that is right."""
    live = drafted.dreams.live()
    right = right_shares(drafted.dreams, targets)[0][live]
    losses = F.binary_cross_entropy_with_logits(drafted.reasoned.importance_logits[live], right, reduction="sum")
    return losses / live.sum().clamp_min(1)
