"""Learning from what replies were worth: their tokens by GRPO, all replies being one group, and the choice of paths by
REINFORCE."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from distill.backbone.reinforce import Rollout, advantages, note_logprobs, policy_gradients
from distill.dream.dreaming import Dreaming
from distill.dream.policy import Choice
from distill.dream.pretrained import Parts
from distill.errors import BadInput

POLICY_RATE = 1e-2
"""Learning rate of the policy over paths."""
REMEMBERED = 1024


@dataclass(frozen=True)
class Said:
    """A reply and how it came. ids: prompt, dream and answer; question: how many are the prompt's; read: with the
    dream's. dreamer: whose the dream is. choice: of paths, where a policy chose."""

    ids: list[int]
    question: int
    read: int
    dreamer: str
    choice: Choice | None


GUIDED = "guided"
"""Whose a dream is of which a user gave a part: the backbone didn't choose it, and learns its answer alone."""


class Replies:
    """The last reply to each prompt, of the last REMEMBERED prompts."""

    def __init__(self) -> None:
        self._said: dict[str, Said] = {}

    def note(self, dreaming: Dreaming, prompt: str) -> None:
        """Remember a reply that was given whole. prompt: as the user gave it, without what was read of pictures."""
        ids = [*dreaming.speaker.ids, dreaming.speaker.peek()]  # the last token was drawn, and not read
        record, choice = dreaming.record, dreaming.dreamt.choice
        self._said.pop(prompt, None)
        guided = any(branch.provenance.startswith("guided") for branch in record.branches)
        dreamer = GUIDED if guided else record.dreamer
        self._said[prompt] = Said(ids, dreaming.question, dreaming.read, dreamer, choice)
        if len(self._said) > REMEMBERED:
            del self._said[next(iter(self._said))]

    def learn(
        self,
        parts: Parts,
        examples: Sequence[Mapping[str, Any]],
        ask: Callable[[str], object],
        epochs: int,
        lr: float,
        beta: float,
    ) -> dict[str, float]:
        """Learn from what replies were worth, in place; ask: gives a reply to a prompt that none is remembered of."""
        found = _checked(examples)
        if epochs < 1 or not lr > 0 or not beta >= 0:
            raise BadInput("learn_from_feedback: num_epochs and lr must be more than 0, beta at least 0")
        said: list[Said] = []
        for prompt, _ in found:
            if prompt not in self._said:
                ask(prompt)
            said.append(self._said[prompt])
        return learn(parts, said, [reward for _, reward in found], epochs, lr, beta)


def _checked(examples: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(prompt, reward) of each. Raises BadInput, naming the first that is none."""
    found: list[tuple[str, float]] = []
    for number, example in enumerate(examples, 1):
        try:
            prompt, reward = example["prompt"], float(example["reward"])
            if not isinstance(prompt, str) or not math.isfinite(reward):
                raise ValueError("a text and a number")
        except (TypeError, KeyError, ValueError) as error:
            text = f'example {number} is no {{"prompt": text, "reward": number}} ({type(error).__name__}: {error})'
            raise BadInput(f"learn_from_feedback: {text}") from error
        found.append((prompt, reward))
    if len({reward for _, reward in found}) < 2:
        text = "rewards count against each other; give two examples at least whose rewards differ"
        raise BadInput(f"learn_from_feedback: {text}")
    return found


def learn(
    parts: Parts, said: Sequence[Said], rewards: Sequence[float], epochs: int, lr: float, beta: float
) -> dict[str, float]:
    """Learn from replies and what they were worth, in place. Returns means over the epochs: avg_reward,
    avg_policy_loss (of tokens and paths together), avg_value_loss, avg_kl (nats a token, to where it began)."""
    worth = torch.tensor(rewards, dtype=torch.float32, device=parts.device)
    rollouts, masks = [_rollout(parts, each) for each in said], parts.grammar.forbidden
    note_logprobs(parts.model, rollouts, masks, "old")
    for rollout, advantage in zip(rollouts, advantages(worth[None])[0].tolist(), strict=True):
        rollout.advantage, rollout.begun = advantage, rollout.old
    chosen, brought = _together([each.choice for each in said], worth) if parts.policy is not None else (None, worth)
    groups: list[dict[str, Any]] = [{"params": [*parts.model.parameters()], "lr": lr}]
    if parts.policy is not None:
        groups.append({"params": [*parts.policy.parameters()], "lr": POLICY_RATE})
    optimizer, told = torch.optim.AdamW(groups, weight_decay=0.0), list[tuple[float, float, float]]()
    parts.model.train()
    for _ in range(epochs):
        policy, kl = policy_gradients(parts.model, rollouts, masks, beta)
        value = 0.0
        if parts.policy is not None and chosen is not None:
            paths, error = parts.policy.losses(chosen, brought)
            (paths + error).backward()
            policy, value = policy + float(paths.detach()), float(error.detach())
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.append((policy, value, kl))
    parts.model.eval()
    policy, value, kl = (sum(values) / epochs for values in zip(*told, strict=True))
    means = {"avg_policy_loss": policy, "avg_value_loss": value, "avg_kl": kl}
    return {"avg_reward": float(worth.mean()), **means}


def _together(choices: Sequence[Choice | None], worth: Tensor) -> tuple[Choice | None, Tensor]:
    """All choices that there are as one, and what they brought. They were made where nothing was to be learned."""
    there = [choice is not None for choice in choices]
    made = [choice for choice in choices if choice is not None]
    names = [field.name for field in fields(Choice)]
    parts = [torch.cat([getattr(choice, name).clone() for choice in made]) for name in names] if made else []
    return Choice(*parts) if parts else None, worth[there]


def _rollout(parts: Parts, said: Said) -> Rollout:
    """What the backbone chose of a reply: with the dream where that was its own, and spelled as dreams are."""
    if said.dreamer in ("backbone", "checked"):
        reply = said.ids[said.question :]
        rows = parts.grammar.rows(reply)
        if bool(parts.grammar.forbidden[rows, reply].isfinite().all()):
            return Rollout(said.ids[: said.question], reply, rows)
    reply = said.ids[said.read :]
    return Rollout(said.ids[: said.read], reply, parts.grammar.answering.rows(reply))
