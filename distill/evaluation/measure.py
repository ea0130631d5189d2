"""One system (a student, a baseline, the teacher) on the held-out examples: every metric, prompt by prompt."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.evaluation.examples import Example, batched
from distill.evaluation.metrics import bits, chance_recalled, chrf, distinct, log_mean_exp, recalled, repeated
from distill.evaluation.scoring import (
    BATCH_TOKENS,
    AnswerScore,
    OwnDream,
    dream_context,
    sample_dreams,
    score_answers,
    write_answers,
)
from distill.evaluation.statistics import Ratio
from distill.evaluation.truth import same_answer
from distill.run import write_atomic
from distill.student.model import Backbone
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, parse_dream

TOGETHER = 32
"""Prompts dreamed and answered at once."""


@dataclass
class Measured:
    """What a system did. `metrics` maps a metric's name to its ratio over the examples, in their order."""

    metrics: dict[str, Ratio] = field(default_factory=dict[str, Ratio])
    dreams: list[str] = field(default_factory=list[str])
    answers: list[str] = field(default_factory=list[str])
    tokens_per_second: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain lists; `from_json` gives the same numbers back."""
        metrics = {name: [m.numerator.tolist(), m.denominator.tolist()] for name, m in self.metrics.items()}
        return {**vars(self), "metrics": metrics}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Measured":
        metrics = {name: Ratio.of(*pair) for name, pair in value["metrics"].items()}
        return cls(metrics, value["dreams"], value["answers"], value["tokens_per_second"])

    def keep(self, path: Path, mark: str) -> None:
        """Write it down under a fingerprint of all that it depends on."""
        write_atomic(path, json.dumps({"fingerprint": mark, "measured": self.to_json()}) + "\n")

    @classmethod
    def kept(cls, path: Path, mark: str) -> "Measured | None":
        """A kept measurement with this fingerprint; None where there is none, or it is cut short."""
        try:
            content = json.loads(path.read_text())
            return cls.from_json(content["measured"]) if content["fingerprint"] == mark else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Examiner:
    """Measures students on `examples`. `listen` gets the number of answers scored or written since the last call."""

    tokenizer: StudentTokenizer
    examples: list[Example]
    seed: int
    dreams: int
    temperature: float
    max_tokens: int
    dream_tokens: int
    listen: Callable[[int], None]
    batch_tokens: int = BATCH_TOKENS

    def work(self, dreams: bool, texts: bool) -> int:
        """How many counts `listen` gets for one system."""
        return len(self.examples) * (1 + texts * (1 + self.has_truth) + dreams * (1 + self.dreams))

    @property
    def has_truth(self) -> bool:
        return any(example.truth for example in self.examples)

    def measure(self, model: Backbone, *, dreams: bool, texts: bool) -> Measured:
        """Likelihood metrics; with `dreams` also after own and mined dreams; with `texts` also of its own answers."""
        measured = Measured()
        contexts = [dream_context(self.tokenizer, example.header, []) for example in self.examples]
        self._likelihood(measured, "", [self._scores(model, contexts)])
        if dreams:
            if own := [self._scores(model, self._dreamed(model, draw)) for draw in range(self.dreams)]:
                self._likelihood(measured, "_dreams", own)
            mined = [dream_context(self.tokenizer, e.header, e.mined) for e in self.examples]
            self._likelihood(measured, "_oracle", [self._scores(model, mined)])
        if texts:
            self._speak(measured, model, dreams)
            if self.has_truth:
                measured.metrics |= exact_match(self._answer_greedily(model, dreams), self.examples)
        return measured

    def _dreamed(self, model: Backbone, draw: int) -> list[list[int]]:
        """Contexts with one dream each, sampled at T = 1: draws from the student's own distribution."""
        contexts: list[list[int]] = []
        for group in batched(self.examples, TOGETHER):
            dreams = self._sample(model, group, draw, temperature=1.0)
            pairs = zip(group, dreams, strict=True)
            contexts += [dream_context(self.tokenizer, example.header, dream.ids) for example, dream in pairs]
        return contexts

    def _sample(self, model: Backbone, group: list[Example], draw: int, temperature: float) -> list[OwnDream]:
        return sample_dreams(
            model,
            self.tokenizer,
            [example.header for example in group],
            max_tokens=self.dream_tokens,
            temperature=temperature,
            seeds=[example.seed(self.seed, draw) for example in group],
        )

    def _scores(self, model: Backbone, contexts: Sequence[Sequence[int]]) -> list[AnswerScore]:
        found: dict[int, AnswerScore] = {}
        answers = [example.answer for example in self.examples]
        targets = [example.targets for example in self.examples]
        for i, score in score_answers(model, contexts, answers, targets, self.batch_tokens):
            found[i] = score
            self.listen(1)
        return [found[i] for i in range(len(answers))]

    def _likelihood(self, measured: Measured, suffix: str, draws: list[list[AnswerScore]]) -> None:
        """Add bits per byte, KL and agreement. draws: for each dream, the score of each example."""
        lengths = [example.bytes for example in self.examples]
        by_example = [[draw[i] for draw in draws] for i in range(len(self.examples))]
        marginal = [log_mean_exp([float(score.logprobs.sum()) for score in scores]) for scores in by_example]
        measured.metrics[f"bits_per_byte{suffix}"] = Ratio.of([bits(np.array([total])) for total in marginal], lengths)
        soft = [int(np.isfinite(scores[0].kl).sum()) for scores in by_example]
        for name in ("kl", "agrees"):
            # Averaged over the dreams; positions without a soft target are NaN.
            sums = [float(np.mean([np.nansum(getattr(s, name)) for s in scores])) for scores in by_example]
            measured.metrics[f"{'agreement' if name == 'agrees' else name}{suffix}"] = Ratio.of(sums, soft)

    def _speak(self, measured: Measured, model: Backbone, dreams: bool) -> None:
        """Let the student dream and answer as a user would see it, and add the metrics of text and dream."""
        tokenizer, own, spoken, seconds = self.tokenizer, list[OwnDream](), 0, 0.0
        for group in batched(self.examples, TOGETHER):
            started = time.perf_counter()
            if dreams:
                found = self._sample(model, group, self.dreams, self.temperature)
                contexts = [dream_context(tokenizer, e.header, d.ids) for e, d in zip(group, found, strict=True)]
                own += found
                spoken += sum(len(dream.ids) for dream in found)
            else:
                contexts = [dream_context(tokenizer, example.header, []) for example in group]
            seeds = [example.seed(self.seed, self.dreams + 1) for example in group]
            answers = write_answers(
                model,
                contexts,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seeds=seeds,
                eos_id=tokenizer.eos_id,
            )
            seconds += time.perf_counter() - started
            spoken += sum(len(answer) for answer in answers)
            measured.answers += [tokenizer.decode(answer) for answer in answers]
            self.listen(len(group))
        measured.tokens_per_second = spoken / seconds if seconds else None
        measured.dreams = [tokenizer.decode(dream.ids) for dream in own]
        measured.metrics |= text_metrics(measured.answers, self.examples)
        if dreams:
            measured.metrics |= self._dream_metrics(own)

    def _answer_greedily(self, model: Backbone, dreams: bool) -> list[str]:
        """At temperature 0, dream and answer: what exact match is measured on."""
        answers: list[str] = []
        for group in batched(self.examples, TOGETHER):
            own = self._sample(model, group, 0, temperature=0.0) if dreams else [OwnDream([], True)] * len(group)
            contexts = [dream_context(self.tokenizer, e.header, d.ids) for e, d in zip(group, own, strict=True)]
            written = write_answers(
                model,
                contexts,
                max_tokens=self.max_tokens,
                temperature=0.0,
                seeds=[0] * len(group),
                eos_id=self.tokenizer.eos_id,
            )
            answers += [self.tokenizer.decode(ids) for ids in written]
            self.listen(len(group))
        return answers

    def _dream_metrics(self, own: list[OwnDream]) -> dict[str, Ratio]:
        codes = [self._codes(dream.ids) for dream in own]
        mined = [self._codes(example.mined) for example in self.examples]
        pairs = [recalled(dream, wanted) for dream, wanted in zip(codes, mined, strict=True)]
        totals = [total for _, total in pairs]
        formed = [d.closed and dream_ids(self.tokenizer, parse_dream(self.tokenizer, d.ids)) == d.ids for d in own]
        return {
            "dream_recall": Ratio.of([found for found, _ in pairs], totals),
            "dream_recall_chance": Ratio.of(chance_recalled(codes, mined), totals),
            "dream_form": Ratio.of(formed),
        }

    def _codes(self, ids: Sequence[int]) -> list[int]:
        found = (self.tokenizer.image_code(token) for token in ids)
        return [code for code in found if code is not None]


def text_metrics(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Ratio]:
    """chrF, repetition, distinct-2 and length against the teacher's answers."""
    grams = [repeated(answer) for answer in answers]
    return {
        "chrf": Ratio.of([chrf(answer, e.text) for answer, e in zip(answers, examples, strict=True)]),
        "repetition": Ratio.of([again for again, _ in grams], [total for _, total in grams]),
        "distinct_2": Ratio.of(*distinct(answers)),
        "length_ratio": Ratio.of([len(answer.encode()) for answer in answers], [e.bytes for e in examples]),
    }


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Ratio]:
    """Whether each answer is the true one but for white space: over all prompts, and over those of each split."""
    truths = [example.truth for example in examples]
    hits = [
        truth is not None and same_answer(answer, truth.answer) for answer, truth in zip(answers, truths, strict=True)
    ]
    metrics = {"exact_match": Ratio.of(hits, [truth is not None for truth in truths])}
    for split in sorted({truth.split for truth in truths if truth}):
        inside = [truth is not None and truth.split == split for truth in truths]
        both = [hit and here for hit, here in zip(hits, inside, strict=True)]
        metrics[f"exact_match_{split}"] = Ratio.of(both, inside)
    return metrics


def measure_teacher(examples: Sequence[Example]) -> Measured:
    """The teacher's row: bits per byte of its answers by its own account, and how its text reads."""
    texts = [example.text for example in examples]
    metrics = text_metrics(texts, examples)
    spent = [example.teacher_bits for example in examples]
    known = {name: metrics[name] for name in ("repetition", "distinct_2")}
    return Measured({"bits_per_byte": Ratio.of(spent, [e.bytes for e in examples]), **known})
