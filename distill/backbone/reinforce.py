"""Learning from the rewards of what a backbone wrote: group relative policy optimization (GRPO, arXiv:2402.03300).

With π what the backbone would write now, π_old when it wrote the reply, π₀ where learning began, ρ = π / π_old, and A
the advantage of the reply, the loss of one of its tokens is

    −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + β (π₀ / π − log(π₀ / π) − 1)

averaged over the reply's tokens, then over replies. A is the reward less the mean of its group, all replies to a
prompt, over the group's standard deviation; the last bracket estimates KL(π ‖ π₀) and is never negative
(joschu.net/blog/kl-approx, its k3). Under a grammar π is renormalised over what may be written.

Shape legend: n replies, T tokens of all of them, V vocabulary, M masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.backbone.generate import batches, states_of
from distill.backbone.model import Backbone

CLIP = 0.2
"""ε: how far a token's probability moves for one reply."""
STEADY = 1e-4
"""Added to a group's standard deviation, as TRL does."""
LOGITS = 1 << 26
"""Elements of the (T, V) logits that gradients are taken through at once (256 MiB of float32)."""


@dataclass
class Rollout:
    """A reply (its ids) after a context. rows: of the masks (M, V) that held where each of its ids was written. old and
    begun: log π_old and log π₀ of each id."""

    context: list[int]
    reply: list[int]
    rows: list[int]
    advantage: float = 0.0
    old: Tensor = field(default_factory=lambda: torch.zeros(0))
    begun: Tensor = field(default_factory=lambda: torch.zeros(0))


def advantages(rewards: Tensor) -> Tensor:
    """Of the rewards (groups, replies); 0 in a group of which all got the same."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + STEADY)


def reply_logprobs(model: Backbone, rollouts: Sequence[Rollout], masks: Tensor) -> Tensor:
    """(T,) log π of all ids of the replies, with gradients where they are wanted. masks (M, V): −∞ for what may not be
    written, 0 elsewhere."""
    hidden = states_of(model, [each.context for each in rollouts], [each.reply for each in rollouts])
    tokens, rows = (
        torch.tensor([one for each in rollouts for one in getattr(each, name)], device=hidden.device)
        for name in ("reply", "rows")
    )
    logits = model.lm_head(hidden).float() + masks.to(hidden.device).index_select(0, rows)
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def token_losses(now: Tensor, old: Tensor, begun: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) each: what the first part of the formula above costs, and the divergence that β weighs."""
    ratio, apart = (now - old).exp(), begun - now
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -gain, apart.exp() - apart - 1


@torch.no_grad()
def note_logprobs(model: Backbone, rollouts: Sequence[Rollout], masks: Tensor, name: str) -> None:
    """Write what the model gives each id into the rollouts' `old` or `begun`."""
    for some in _together(model, rollouts):
        found = reply_logprobs(model, some, masks).split([len(each.reply) for each in some])
        for each, logprobs in zip(some, found, strict=True):
            setattr(each, name, logprobs)


def policy_gradients(model: Backbone, rollouts: Sequence[Rollout], masks: Tensor, beta: float) -> tuple[float, float]:
    """Leave the gradients of the mean loss over the rollouts in the model; returns its two parts, the policy's loss and
    the divergence in nats a token."""
    told = [0.0, 0.0]
    for some in _together(model, rollouts):
        now = reply_logprobs(model, some, masks)
        sizes = torch.tensor([len(each.reply) for each in some], device=now.device)
        advantage, share = (
            torch.tensor(values, device=now.device, dtype=now.dtype).repeat_interleave(sizes)
            for values in (
                [each.advantage for each in some],
                [1 / (len(each.reply) * len(rollouts)) for each in some],
            )
        )
        old, begun = (torch.cat([getattr(each, name) for each in some]) for name in ("old", "begun"))
        parts = [(part * share).sum() for part in token_losses(now, old, begun, advantage)]
        (parts[0] + beta * parts[1]).backward()
        told = [sum_ + float(part.detach()) for sum_, part in zip(told, parts, strict=True)]
    return told[0], told[1]


def _together(model: Backbone, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """In batches that fit into memory, the longest first."""
    lengths = {i: len(each.context) + len(each.reply) for i, each in enumerate(rollouts)}
    room = max(512, min(8192, LOGITS // model.config.vocab_size))
    return [[rollouts[i] for i in some] for some in batches(lengths, room)]
