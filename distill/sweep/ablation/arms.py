"""The arms of an ablation: what a trained student is given to read before it answers, and how well it then answers.

A dream here is the ids between `<think>⏎` and `⏎</think>`; an empty one is what `think: false` renders.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.backbone.generate import generate
from distill.backbone.model import Backbone
from distill.exam.metrics.likelihood import bits
from distill.exam.metrics.statistics import Ratio
from distill.exam.metrics.text import chrf, exact_match
from distill.exam.scoring import batched, dream_context, sample_dreams, score_answers
from distill.run import write_atomic
from distill.student.grammar import DreamGrammar, steps_within
from distill.sweep.ablation.examples import Example
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, parse_dream, with_steps

if TYPE_CHECKING:
    from distill.dream.engine import DreamEngine

TOGETHER = 64
"""Prompts dreamed and answered at once."""


@dataclass(frozen=True)
class Arm:
    """training: the student that it is measured on. own: its dreams are a guess at the true one. optional:
    measured only where it is asked for.
    """

    label: str
    training: str
    own: bool = False
    optional: bool = False


ARMS = {
    "nodream": Arm("no dream", "nodream"),
    "pause": Arm("pause tokens", "pause"),
    "backbone": Arm("backbone dreams", "dreams", own=True),
    "engine": Arm("engine dreams", "dreams", own=True),
    "oracle": Arm("true dreams (oracle)", "dreams"),
    "empty": Arm("dream left out", "dreams"),
    "shuffled": Arm("dream shuffled", "dreams"),
    "other": Arm("another prompt's dream", "dreams"),
    "retrieval": Arm("retrieval, backbone dreams", "retrieval", own=True, optional=True),
}
CONTROLS = ("nodream", "pause")
"""What a dream is held against: trained without any, and with as many tokens that say nothing."""

READINGS = ("empty", "shuffled", "other")
"""What becomes of the backbone's own dreams: does the answer read them?"""


@dataclass
class Measured:
    """What a student did in one arm. `metrics` maps a metric's name to its ratio over the examples, in their order."""

    metrics: dict[str, Ratio] = field(default_factory=dict[str, Ratio])
    dreams: list[str] = field(default_factory=list[str])
    answers: list[str] = field(default_factory=list[str])

    def keep(self, path: Path, mark: str) -> None:
        """Write it down under a fingerprint of all that it depends on."""
        metrics = {name: [m.numerator.tolist(), m.denominator.tolist()] for name, m in self.metrics.items()}
        write_atomic(path, json.dumps({"fingerprint": mark, "measured": {**vars(self), "metrics": metrics}}) + "\n")

    @classmethod
    def kept(cls, path: Path, mark: str) -> "Measured | None":
        """A kept measurement with this fingerprint; None where there is none, or it is cut short."""
        try:
            content = json.loads(path.read_text())
            found = content["measured"]
            metrics = {name: Ratio.of(*pair) for name, pair in found["metrics"].items()}
            return cls(metrics, found["dreams"], found["answers"]) if content["fingerprint"] == mark else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass
class Student:
    """One trained student on all examples. `listen` gets how many answers were written or scored since last told."""

    model: Backbone
    tokenizer: StudentTokenizer
    examples: list[Example]
    engine: "DreamEngine | None"
    seed: int
    dream_tokens: int
    max_tokens: int
    keep_above: float
    listen: Callable[[int], None]

    def measure(self, arm: str) -> Measured:
        """Answers after each prompt's dream of this arm, decoded greedily, and every metric of them."""
        dreams = self.dreams(arm)
        headers = [example.header for example in self.examples]
        contexts = [dream_context(self.tokenizer, h, d) for h, d in zip(headers, dreams, strict=True)]
        answers = self._answers(contexts)
        measured = Measured(dreams=[self.tokenizer.decode(dream) for dream in dreams], answers=answers)
        if any(example.truth for example in self.examples):
            measured.metrics["exact_match"] = exact_match(answers, self.examples)["exact_match"]
        else:
            pairs = zip(answers, self.examples, strict=True)
            measured.metrics["chrf"] = Ratio.of([chrf(answer, example.text) for answer, example in pairs])
        measured.metrics["bits_per_byte"] = self._bits(contexts)
        measured.metrics["dream_tokens"] = Ratio.of([len(dream) for dream in dreams])
        if ARMS[arm].own:
            measured.metrics |= dream_accuracy(self.tokenizer, dreams, [example.mined for example in self.examples])
        return measured

    def dreams(self, arm: str) -> list[list[int]]:
        """One dream a prompt."""
        mined = [example.mined for example in self.examples]
        own: dict[str, Callable[[], list[list[int]]]] = {
            "nodream": lambda: [[] for _ in mined],
            "empty": lambda: [[] for _ in mined],
            "pause": lambda: [[self.tokenizer.pad_id] * len(dream) for dream in mined],
            "oracle": lambda: mined,
            "backbone": lambda: self.own_dreams,
            "retrieval": lambda: self.own_dreams,
            "engine": self._drafts,
            "shuffled": lambda: [self._shuffled(i) for i in range(len(mined))],
            "other": lambda: [self.own_dreams[i] for i in others(self._groups, self.seed)],
        }
        return own[arm]()

    @cached_property
    def _grammar(self) -> DreamGrammar:
        return DreamGrammar(self.tokenizer, steps_within(self.dream_tokens))

    @cached_property
    def own_dreams(self) -> list[list[int]]:
        """The backbone's own dreams at temperature 0."""
        found: list[list[int]] = []
        for group in batched(self.examples, TOGETHER):
            dreams = sample_dreams(
                self.model,
                self.tokenizer,
                self._grammar,
                [example.header for example in group],
                max_tokens=self.dream_tokens,
                temperature=0.0,
                seeds=[0] * len(group),
            )
            found += [dream.ids for dream in dreams]
        return found

    @property
    def _groups(self) -> list[Any]:
        """Prompts of one split and depth dream alike; each gets another's dream from among them."""
        return [(e.truth.split, e.truth.depth) if e.truth else None for e in self.examples]

    def _drafts(self) -> list[list[int]]:
        """The paths that the engine's graph keeps; where it keeps none, nothing."""
        import torch

        from distill.dream.engine import drafted_dreams, prompt_states

        assert self.engine is not None
        found: list[list[int]] = []
        with torch.inference_mode():
            for group in batched(self.examples, TOGETHER):
                drafted = self.engine(*prompt_states(self.model, [example.header for example in group]))
                dreams = drafted_dreams(drafted, keep_above=self.keep_above)
                found += [dream_ids(self.tokenizer, dream) if with_steps(dream) else [] for dream in dreams]
        return found

    def _shuffled(self, i: int) -> list[int]:
        """The own dream of a prompt with its image tokens in another order; what is none keeps its place."""
        dream = np.array(self.own_dreams[i], np.int64)
        image = [self.tokenizer.image_code(id) is not None for id in dream.tolist()]
        places = np.flatnonzero(np.array(image, np.bool_))
        generator = np.random.default_rng(self.examples[i].seed(self.seed, 0))
        dream[places] = dream[generator.permutation(places)]
        return dream.tolist()

    def _answers(self, contexts: Sequence[Sequence[int]]) -> list[str]:
        eos, answers = self.tokenizer.eos_id, list[str]()
        for start in range(0, len(contexts), TOGETHER):
            group = contexts[start : start + TOGETHER]
            written = generate(
                self.model,
                group,
                max_tokens=self.max_tokens,
                stop_ids=[eos],
                batch_rows=TOGETHER,
                grammar=self._grammar.answering,
            )
            answers += [self.tokenizer.decode(ids[:-1] if ids[-1:] == [eos] else ids) for ids in written]
            self.listen(len(group))
        return answers

    def _bits(self, contexts: Sequence[Sequence[int]]) -> Ratio:
        """Of the teacher's answers after these contexts; no soft targets are needed for it."""
        spent = [0.0] * len(contexts)
        for i, score in score_answers(self.model, contexts, [e.answer for e in self.examples], [None] * len(contexts)):
            spent[i] = bits(score.logprobs)
            self.listen(1)
        return Ratio.of(spent, [example.bytes for example in self.examples])


def dream_accuracy(
    tokenizer: StudentTokenizer, dreams: Sequence[Sequence[int]], mined: Sequence[Sequence[int]]
) -> dict[str, Ratio]:
    """dream_accuracy: of the true dream's codes, those that stand in the own dream at the same lens, step and role.
    dream_exact: whether both are the same step by step. Prompts without a true dream don't count."""
    right: list[int] = []
    total: list[int] = []
    exact: list[bool] = []
    for own, true in zip(dreams, mined, strict=True):
        found, wanted = parse_dream(tokenizer, own), parse_dream(tokenizer, true)
        pairs = [pair for lens, steps in wanted.items() for pair in zip(found[lens], steps, strict=False)]
        right.append(sum(a == b for step, other in pairs for a, b in zip(step, other, strict=True)))
        total.append(3 * sum(len(steps) for steps in wanted.values()))
        exact.append(found == wanted and total[-1] > 0)
    return {"dream_accuracy": Ratio.of(right, total), "dream_exact": Ratio.of(exact, [count > 0 for count in total])}


def others(groups: Sequence[Any], seed: int) -> list[int]:
    """For each place another one, of the same group where that has two; each is taken once (Sattolo 1986).

    Those that are alone in their group change places among each other. Raises ValueError for fewer than two places.
    """
    if len(groups) < 2:
        raise ValueError("nothing to exchange with")
    by_group: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        by_group.setdefault(group, []).append(i)
    cycles = [places for places in by_group.values() if len(places) > 1]
    alone = [places[0] for places in by_group.values() if len(places) == 1]
    if len(alone) > 1 or not cycles:
        cycles.append(alone)
    elif alone:
        cycles[0].extend(alone)
    generator, found = np.random.default_rng(seed), list(range(len(groups)))
    for places in cycles:
        cycle = generator.permutation(places).tolist()
        for here, there in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            found[here] = there
    return found
