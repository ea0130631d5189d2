"""Someone who sits an exam by drawing numbers: the same for the same question, with every ability or without some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distill.corpus.truth import Truth
from distill.exam.examinees.protocol import Ability, AnswerScore, Card, Dreamt, Spoken, Thinks
from distill.exam.metrics.speech import Form
from distill.exam.questions import Exam, Question, Sibling
from distill.mining.triplets import LENSES, Triplet

WORDS = ("ball", "falls", "floor", "rain", "street", "wet", "plant", "grows")


class Killed(BaseException):
    """As if the process had been killed: nothing catches it."""


@dataclass
class FakeExaminee:
    """reads: after a mined dream it says that dream's words. calls: (method, question keys) of each call. dies_at: the
    number of the call that doesn't come back."""

    cannot: Mapping[Ability, str] = field(default_factory=dict[Ability, str])
    dreams: bool = True
    codebook: bool = True
    reads: bool = True
    too_long: frozenset[str] = frozenset()
    dies_at: int = -1
    calls: list[tuple[str, list[str]]] = field(default_factory=list[tuple[str, list[str]]])
    closed: int = 0

    @property
    def card(self) -> Card:
        return Card("gguf", "fake", 1234, 5678, 512, "float32", self.dreams)

    def fits(self, question: Question, dream_tokens: int) -> bool:
        return question.key not in self.too_long

    def _called(self, method: str, questions: Sequence[Question]) -> None:
        if len(self.calls) == self.dies_at:
            raise Killed
        self.calls.append((method, [question.key for question in questions]))

    def score(self, questions: Sequence[Question], dream: Dreamt, draw: int = 0) -> list[AnswerScore]:
        self._called(f"score-{dream}-{draw}", questions)
        return [score_of(question, dream, draw) for question in questions]

    def answer(
        self, questions: Sequence[Question], *, think: Thinks, temperature: float, max_tokens: int, draw: int
    ) -> list[Spoken]:
        self._called(f"answer-{temperature}", questions)
        spoken: list[Spoken] = []
        for question in questions:
            draws = np.random.default_rng([question.seed(0, draw), int(10 * temperature)])
            words = [str(word) for word in draws.choice(WORDS, 12)]
            if think == "mined" and self.reads and question.triplets:
                words = [phrase for triplet in question.triplets for phrase in triplet.phrases]
            steps = "".join(f"⟨{word}⟩" for word in words[:3])
            dream = "".join(f"⟨{lens}⟩{steps}" for lens in LENSES) if self.dreams else ""
            closed = bool(draws.random() < 0.8)
            form = Form(closed if dream else None, clean=words[0] != "ball", whole=True, ended=words[1] != "rain")
            spoken.append(Spoken(dream, " ".join(words), closed, 12 + len(words), 0.25, form))
        return spoken

    def begin(self, question: Question) -> bool:
        self.answer([question], think=True, temperature=0.0, max_tokens=1, draw=0)
        return True

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        return [phrase for triplet in triplets for phrase in triplet.phrases] if self.codebook else None

    def close(self) -> None:
        self.closed += 1


def score_of(question: Question, dream: Dreamt, draw: int) -> AnswerScore:
    """Drawn from the question, the dream and the draw."""
    draws = np.random.default_rng([question.seed(1, draw), len(dream)])
    length = len(question.text.split())
    score = AnswerScore.unknown(length)
    score.logprobs[:] = -draws.exponential(2.0, length)
    soft = draws.random(length) < 0.7
    score.kl[soft] = draws.exponential(1.0, int(soft.sum()))
    score.agrees[soft] = draws.random(int(soft.sum())) < 0.4
    score.agrees_5[soft] = np.maximum(score.agrees[soft], draws.random(int(soft.sum())) < 0.5)
    return score


def fake_exam(folder: Path, size: int = 7, truths: bool = True, answered: bool = True, siblings: bool = False) -> Exam:
    """Questions with answers of many lengths, some with triplets, some with true answers. siblings: all but the last
    have another answer."""
    questions: list[Question] = []
    for i in range(size):
        text = " ".join(WORDS[(i * k) % len(WORDS)] for k in range(3 + i)) if answered else ""
        triplets = (Triplet("the ball", "falls", f"floor {i}", "causal", 0, f"k{i}", 0, "syntax"),) if i % 3 else ()
        rain = Triplet("rain", f"wets {i}", "the street", "causal", 0, f"s{i}", 0, "syntax")
        sibling = Sibling(f"rain wets {i} the street", (rain,)) if siblings and i < size - 1 else None
        truth = Truth("depth" if i % 2 else "familiar", "rain wet", 1) if truths and i else None
        mined = triplets if answered else ()
        questions.append(Question(f"k{i}", f"What falls {i}?", text=text, triplets=mined, truth=truth, sibling=sibling))
    return Exam("fake prompts", folder, questions, "fake:teacher" if answered else "")
