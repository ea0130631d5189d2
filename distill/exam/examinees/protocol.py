"""What can be examined, whatever it is made of: one protocol, and what comes out of it.

Shape legend: A answer tokens of one answer (EOS left out), in the target's own tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.exam.metrics.speech import Form
from distill.exam.questions import Question
from distill.mining.triplets import Triplet

Dreamt = Literal["none", "own", "mined"]
"""What stands before an answer that is scored: an empty think block, a dream of its own, the mined dream."""
Thinks = bool | Literal["mined"]
"""What it answers after: an empty think block, a dream of its own, the mined dream."""

Ability = Literal["likelihood", "targets", "kl", "dreams", "mined"]
"""What a target may lack: likelihoods of given answers · the soft targets' tokens in its vocabulary (KL, agreement) ·
the probabilities of all of these (KL) · dreams of its own before an answer that is scored · the mined dream there."""
PASSING = "its codebook can't place phrases here"
"""How a reason begins that is one only while a server is away."""


@dataclass(frozen=True)
class AnswerScore:
    """One given answer after one context.

    logprobs (A,) float64, nats. kl (A,) float64, nats, and agrees, agrees_5 (A,) float64, 1 where the teacher's
    likeliest token is the target's likeliest, or among its five likeliest: NaN where there is no soft target, or the
    target can't tell.
    """

    logprobs: NDArray[np.float64]
    kl: NDArray[np.float64]
    agrees: NDArray[np.float64]
    agrees_5: NDArray[np.float64]

    @classmethod
    def unknown(cls, length: int) -> "AnswerScore":
        """All NaN, to be filled in."""
        return cls(*(np.full(length, np.nan) for _ in range(4)))


@dataclass(frozen=True)
class Spoken:
    """What a target said to one prompt.

    dream: what stood between its think tags, as printed; "" for none. closed: whether it ended the dream by itself.
    tokens: dream and answer, tags left out. seconds: its share of the time that its batch took. form: how it was
    spelled. mined: the labels that the question's triplets have in the target's codebook, None where it ships none.
    dropped: tokens that were written in these seconds too, and cut off.
    """

    dream: str
    answer: str
    closed: bool
    tokens: int
    seconds: float
    form: Form
    mined: list[str] | None = None
    dropped: int = 0

    @property
    def written(self) -> int:
        """All tokens that `seconds` were spent on."""
        return self.tokens + self.dropped


@dataclass(frozen=True)
class Card:
    """What a target is. parameters and context are None where it doesn't tell; bytes on disk likewise.

    quantization: "float32", "Q4_1" …; dreams: whether it was made to dream. note: what a reader of its numbers should
    know of how it was asked, "" for nothing.
    """

    kind: str
    name: str
    parameters: int | None
    bytes: int | None
    context: int | None
    quantization: str
    dreams: bool
    note: str = ""


class Examinee(Protocol):
    """Someone who sits an exam. Not thread-safe.

    `cannot` names the abilities that it lacks and why, in words for a report. Methods give one result a question, in
    the questions' order, the same to the last digit whenever they are called with the same questions; they raise what
    the server or engine behind them raises (TeacherError).
    """

    @property
    def card(self) -> Card: ...

    @property
    def cannot(self) -> Mapping[Ability, str]: ...

    def fits(self, question: Question, dream_tokens: int) -> bool:
        """Whether prompt, a dream of so many tokens and the teacher's whole answer fit its context. True where it
        can't tell."""
        ...

    def score(self, questions: Sequence[Question], dream: Dreamt, draw: int = 0) -> list[AnswerScore]:
        """The teacher's answers. "own": the `draw`-th dream of its own, sampled at temperature 1 with
        `question.seed(seed, draw)`. Only what `cannot` doesn't rule out may be asked."""
        ...

    def answer(
        self, questions: Sequence[Question], *, think: Thinks, temperature: float, max_tokens: int, draw: int
    ) -> list[Spoken]:
        """Its dreams (its own with `think`, where it dreams, or the mined ones) and answers. temperature 0 is greedy,
        else sampled without top-k or top-p, seeded by `question.seed(seed, draw)`. Of "mined" the same holds as where
        answers are scored. The dream has a limit of its own, `dream_tokens`."""
        ...

    def begin(self, question: Question) -> bool:
        """Its dream and its answer's first token, greedily, and no more: so long a user waits. Whether it came."""
        ...

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        """The labels of the image tokens that stand for these triplets in its own codebook; None where it ships
        none."""
        ...

    def close(self) -> None:
        """Free its memory; stop its engine."""
        ...
