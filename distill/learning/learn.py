"""Learning from feedback: the `learn` stage.

What users thought of answers becomes a loss on their likelihood against the student as it was, π against π₀, with
r = β (log π(answer) − log π₀(answer)):

    −log σ(r_better − r_said)                      where something better was said: DPO (arXiv:2305.18290)
    1 − σ(r − z) of good, 1 − σ(z − r) of bad ones      alone: KTO (arXiv:2402.01306), z = max(0, mean r) of the batch

Better answers also stay likely by themselves (arXiv:2404.19733): DPO alone may lower both. Each step learns from a row
of the teacher's answers, too, lest they be forgotten. It always begins with the student before any feedback and learns
from all that there is, so that the order doesn't matter and a wrong thumb can be taken back.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.backbone.generate import generate, log_likelihood, states_of
from distill.backbone.model import Backbone
from distill.corpus.traces import TraceStore
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.learning.feedback import FEEDBACK, Feedback, answer_ids, read_feedback
from distill.learning.onward import Onward
from distill.run import Run, sha256_file
from distill.tokens.chat import render, think_block
from distill.tokens.packing import pack, split_traces
from distill.training import checkpoint
from distill.training.losses import tail_kernel
from distill.training.step import forward_backward, move

VERSION = 1
TOGETHER = 8
"""Lines of feedback a step."""
STAYS_LIKELY = 0.2
"""What the better answers' own loss, nats a token, counts beside DPO's."""
REPLAY = 0.1
"""What a row of the teacher's answers counts beside: they may say just what feedback is about."""
SHOWN = 16
"""Validation prompts that are answered before and after."""
NUMBERS = ("answer_tokens", "answers_that_end", "bits_per_byte")
"""What is measured before and after."""


@dataclass(frozen=True)
class Judged:
    """An answer (its ids, the end among them where it had one) after a context. sign: 1 liked, −1 not.
    was: log π₀(answer)."""

    context: list[int]
    answer: list[int]
    sign: int
    was: float = 0.0


def learn(
    run: Run, listen: Listener = silent, force: bool = False, epochs: int = 5, lr: float = 2e-5, beta: float = 0.1
) -> dict[str, Any]:
    """Teach the run's student what feedback.jsonl says; what comes out is the run's best checkpoint. Returns what that
    changed: before and after.

    Raises MissingStage before a training, BadInput without feedback or for a line that is none, RunMismatch where the
    student has learned by rewards since.
    """
    run.require("train")
    feedback = read_feedback(run.path / FEEDBACK)
    how: dict[str, Any] = {"epochs": epochs, "lr": lr, "beta": beta, "seed": run.settings.seed, "version": VERSION}
    how["feedback"] = sha256_file(run.path / FEEDBACK)
    if not force and (record := run.fresh("learn", how)) is not None:
        listen(Event("learn", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    checkpoint.refuse(run, "learn")
    started = time.monotonic()
    pack(run, listen)
    learning = Learning(run, feedback, lr)
    before, likely = learning.measured(), learning.preferred([each.was for group in learning.groups for each in group])
    listen(Event("learn", "start", f"{len(feedback)} lines of feedback"))
    steps = learning.perform(epochs, beta, listen)
    after = learning.measured()
    summary: dict[str, Any] = {"feedback": len(feedback), "left_out": learning.left_out, "steps": steps}
    now = likelihoods(learning.model, learning.groups)
    summary |= {"preferred_before": likely, "preferred": learning.preferred(now)}
    summary |= {f"{name}{when}": found[name] for name in NUMBERS for when, found in (("_before", before), ("", after))}
    summary["examples"] = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(learning.prompts[:3], before["answers"], after["answers"], strict=False)
    ]
    learning.keep(learning.base, steps, "learn", how)
    learning.record("learn", how, summary, time.monotonic() - started)
    listen(Event("learn", "done", f"{steps} steps", data=summary))
    return summary


class Learning(Onward):
    """One learning of a run."""

    def __init__(self, run: Run, feedback: Sequence[Feedback], lr: float) -> None:
        super().__init__(run, lr, anew="learn")
        self.base = checkpoint.read_loop(checkpoint.latest(run, "learn"))
        self.groups, self.left_out = self._read(feedback)
        if not self.groups:
            raise BadInput(f"{run.path / FEEDBACK}: nothing of it fits student.context; raise it")
        with TraceStore(run.traces, readonly=True) as store:
            asked = split_traces(store)[1]
        self.shown = self.fitting(self.validation.documents)[:SHOWN] if asked else []
        self.prompts = [asked[i].prompt for i in self.shown]

    def _read(self, feedback: Sequence[Feedback]) -> tuple[list[list[Judged]], int]:
        """Of each line one answer, or two to compare, after the dream that was dreamed and after none: the next dream
        will be another. And how many lines are longer than the context."""
        groups: list[list[Judged]] = []
        left_out = 0
        for line in feedback:
            prompt = self.tokenizer.encode(render(line.messages), special=True)
            dream = self.tokenizer.encode(line.dream.strip(), special=True)
            said, better = answer_ids(self.tokenizer, line.answer, line.cut), answer_ids(self.tokenizer, line.better)
            judged = (
                [(better, 1), (said, -1)] if line.verdict == "better" else [(said, 1 if line.verdict == "good" else -1)]
            )
            contexts = [prompt + think_block(self.tokenizer, ids) for ids in ([dream, []] if dream else [[]])]
            if len(contexts[0]) + max(len(said), len(better)) > self.model.config.context:
                left_out += 1
                continue
            groups += [[Judged(context, answer, sign) for answer, sign in judged] for context in contexts]
        were = iter(likelihoods(self.model, groups))
        return [[replace(each, was=next(were)) for each in group] for group in groups], left_out

    def perform(self, epochs: int, beta: float, listen: Listener) -> int:
        """All steps; how many there were."""
        random, steps = np.random.default_rng(self.run.settings.seed), 0
        total = epochs * -(-len(self.groups) // TOGETHER)
        rows = chain.from_iterable(self.given.epoch(epoch) for epoch in count())
        with self.board("learn", 0) as board:
            for _ in range(epochs):
                order = random.permutation(len(self.groups))
                for start in range(0, len(order), TOGETHER):
                    loss = preference_loss(self.model, [self.groups[i] for i in order[start : start + TOGETHER]], beta)
                    loss.backward()
                    row = move(self.given.assemble([next(rows)]), self.model.cos.device)
                    row.targets.scale(REPLAY)
                    forward_backward(self.model, row, self.precision, tail_kernel)
                    self.descend()
                    steps += 1
                    data = {"loss": float(loss.detach())}
                    board.add_scalar("loss", data["loss"], steps)
                    listen(Event("learn", "progress", done=steps, total=total, unit="steps", data=data))
        return steps

    def preferred(self, nats: Sequence[float]) -> float | None:
        """Share of the better answers that are likelier, a token, than what was said; None without any. nats:
        log-likelihoods of all answers of the groups."""
        each = iter(nats)
        means = [[next(each) / len(judged.answer) for judged in group] for group in self.groups]
        found = [pair[0] > pair[1] for pair in means if len(pair) == 2]
        return round(float(np.mean(found)), 3) if found else None

    def measured(self) -> dict[str, Any]:
        """NUMBERS, and greedy answers to validation prompts, without dreams."""
        asked, none = self.validation.documents, think_block(self.tokenizer, [])
        blocks = [[*map(int, asked.prompt(i)), *none] for i in self.shown]
        room, grammar = self.run.settings.capture.max_tokens, self.grammar.answering
        self.model.eval()
        said = generate(self.model, blocks, max_tokens=room, stop_ids=[self.tokenizer.eos_id], grammar=grammar)
        return {
            "answer_tokens": round(float(np.mean([len(ids) for ids in said])), 1),
            "answers_that_end": round(float(np.mean([ids[-1] == self.tokenizer.eos_id for ids in said])), 3),
            "bits_per_byte": self.bits_per_byte(),
            "answers": [self.tokenizer.decode(ids, skip_special=True).strip() for ids in said],
        }


def preference_loss(model: Backbone, groups: Sequence[Sequence[Judged]], beta: float) -> Tensor:
    """Mean over the groups of what the formulas above say; groups of two are pairs, the better one first."""
    flat = [each for group in groups for each in group]
    logprobs = answer_logprobs(model, flat)
    rewards = beta * (logprobs - torch.tensor([each.was for each in flat], device=logprobs.device))
    mean = rewards.detach().mean().clamp_min(0)
    losses: list[Tensor] = []
    place = 0
    for group in groups:
        reward = rewards[place]
        if len(group) == 2:
            stays = -logprobs[place] / len(group[0].answer)
            losses.append(-F.logsigmoid(reward - rewards[place + 1]) + STAYS_LIKELY * stays)
        else:
            losses.append(torch.sigmoid(-group[0].sign * (reward - mean)))
        place += len(group)
    return torch.stack(losses).mean()


def answer_logprobs(model: Backbone, some: Sequence[Judged]) -> Tensor:
    """(n,) log-likelihoods of whole answers after their contexts, with gradients."""
    hidden = states_of(model, [each.context for each in some], [each.answer for each in some])
    tokens = torch.tensor([token for each in some for token in each.answer], device=hidden.device)
    scores = model.lm_head(hidden).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    whose = torch.tensor([i for i, each in enumerate(some) for _ in each.answer], device=hidden.device)
    return torch.zeros(len(some), device=hidden.device).index_add(0, whose, scores)


def likelihoods(model: Backbone, groups: Sequence[Sequence[Judged]]) -> list[float]:
    """Log-likelihoods of all answers of the groups."""
    flat = [each for group in groups for each in group]
    found = log_likelihood(model, [each.context for each in flat], [each.answer for each in flat])
    return [float(part.sum()) for part in found]
