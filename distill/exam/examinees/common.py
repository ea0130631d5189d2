"""What examinees have in common, whoever computes: dreams and answers as token ids, and how these are read.

Shape legend: A answer tokens, V vocabulary of the examinee, W that of the teacher.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distill.errors import CorruptFile
from distill.exam.examinees.protocol import Ability, AnswerScore, Card, Dreamt, Spoken, Thinks
from distill.exam.metrics.likelihood import SoftTargets, soft_targets
from distill.exam.metrics.speech import Letters, form_of
from distill.exam.questions import Question
from distill.exam.targets import How
from distill.mining.triplets import Triplet
from distill.teacher.gguf_tokenizer import BYTE, NORMAL, Vocabulary
from distill.teacher.protocol import HALF, TeacherTokenizer
from distill.tokens.aligner import Aligner
from distill.tokens.chat import END_THINK, THINK

if TYPE_CHECKING:
    from torch import nn

TOGETHER = 32
"""Prompts dreamed and answered at once."""

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF's names of what we call otherwise; Q4_1 is called so by everyone."""


@dataclass(frozen=True)
class OwnDream:
    """Tokens between `<think>⏎` and `⏎</think>`; `closed` by the student itself, or by us at the limit. written: all
    that it wrote after `<think>⏎`, with what ended it."""

    ids: list[int]
    closed: bool
    written: list[int] = field(default_factory=list[int])


class TokenExaminee(ABC):
    """An examinee whose weights are at hand: it is given ids and gives ids.

    A kind says how it renders a question, writes and scores. `context_size`: tokens that fit, None where it doesn't
    tell. It is the `Words` of an `Aligner` itself.
    """

    card: Card
    context_size: int | None
    end_think: int | None = None
    """The id of `</think>`, of one that can dream."""

    def __init__(self, how: How, vocabulary: Vocabulary) -> None:
        self.how, self.vocabulary = how, vocabulary
        self.cannot: dict[Ability, str] = {}
        self.letters = Letters(vocabulary)
        self.teacher_map, reason = map_teacher(vocabulary, how.vocabulary)
        if reason:
            self.cannot["targets"] = reason
        self._aligner = Aligner(self, None)

    # What a kind adds.

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """An answer by itself, nothing put before or after it."""

    @abstractmethod
    def opened(self, question: Question) -> list[int]:
        """The prompt and `<think>`: a dream of its own comes next."""

    @abstractmethod
    def context(self, question: Question, dream: Sequence[int]) -> list[int]:
        """The prompt and a dream, closed: the answer comes next. No dream: as `think: false` renders it."""

    @abstractmethod
    def write(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float, max_tokens: int, dream: bool
    ) -> list[list[int]]:
        """How it goes on: a dream, or an answer, up to what ends it and with that."""

    @abstractmethod
    def score_rows(
        self,
        contexts: Sequence[list[int]],
        answers: Sequence[list[int]],
        targets: Sequence[SoftTargets | None],
    ) -> list[AnswerScore]:
        """Each answer after its context."""

    def decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(list(ids)).decode(errors="replace")

    def mined(self, triplets: Sequence[Triplet]) -> list[int]:
        """The dream that triplets are; [] where it can't be given one."""
        return []

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        return None

    def close(self) -> None:  # noqa: B027
        """Nothing runs beside it: its memory goes with it."""

    # What all do.

    @property
    def eos_id(self) -> int:
        return self.vocabulary.tokenizer.eos_id

    def token_bytes(self, id: int) -> bytes:
        return self.vocabulary.bytes_of[id]

    def aligned(self, question: Question) -> tuple[list[int], SoftTargets | None]:
        """The answer's ids, EOS left out, and its soft targets, as in training: the teacher's own tokens where it has
        them all, else its own spelling with hard labels."""
        tokens = question.tokens
        found = self._aligner.align(question.text, tokens, question.done_reason)
        ids = found.ids.tolist()
        ids = ids[:-1] if ids[-1:] == [self.eos_id] else ids
        if tokens is None or self.teacher_map is None:
            return ids, None
        return ids, soft_targets(found, tokens, self.teacher_map, len(ids))

    def fits(self, question: Question, dream_tokens: int) -> bool:
        if self.context_size is None:
            return True
        longest = max(dream_tokens, len(self.mined(question.triplets)) + 1) if self.card.dreams else 0
        context = self.context(question, [0] * longest)
        return len(context) + max(1, len(self.aligned(question)[0])) <= self.context_size

    def score(self, questions: Sequence[Question], dream: Dreamt, draw: int = 0) -> list[AnswerScore]:
        if dream == "own":
            dreams = [own.ids for own in self._dreamed(questions, 1.0, draw)]
        else:
            dreams = [self.mined(question.triplets) if dream == "mined" else [] for question in questions]
        contexts = [self.context(question, ids) for question, ids in zip(questions, dreams, strict=True)]
        aligned = [self.aligned(question) for question in questions]
        return self.score_rows(contexts, [ids for ids, _ in aligned], [targets for _, targets in aligned])

    def answer(
        self, questions: Sequence[Question], *, think: Thinks, temperature: float, max_tokens: int, draw: int
    ) -> list[Spoken]:
        """The dream is drawn as `draw`, the answer as `draw` + 1: it must not read on in its dream's numbers."""
        spoken: list[Spoken] = []
        for start in range(0, len(questions), TOGETHER):
            group, started = questions[start : start + TOGETHER], time.perf_counter()
            if think == "mined":
                dreams = [OwnDream(self.mined(question.triplets), True) for question in group]
            elif think and self.card.dreams:
                dreams = self._dreamed(group, temperature, draw)
            else:
                dreams = [OwnDream([], True)] * len(group)
            contexts = [self.context(question, own.ids) for question, own in zip(group, dreams, strict=True)]
            answers = self.write(contexts, self._seeds(group, draw + 1), temperature, max_tokens, dream=False)
            share = (time.perf_counter() - started) / len(group)
            spoken += [self._spoken(dream, ids, share) for dream, ids in zip(dreams, answers, strict=True)]
        return spoken

    def begin(self, question: Question) -> bool:
        self.answer([question], think=True, temperature=0.0, max_tokens=1, draw=0)
        return True  # its dream has a limit of its own

    def _dreamed(self, questions: Sequence[Question], temperature: float, draw: int) -> list[OwnDream]:
        """Dreams of its own; what isn't closed within `dream_tokens` is closed."""
        dreams: list[OwnDream] = []
        for start in range(0, len(questions), TOGETHER):
            group = questions[start : start + TOGETHER]
            opened = [self.opened(question) for question in group]
            seeds = self._seeds(group, draw)
            dreams += map(self._dream, self.write(opened, seeds, temperature, self.how.dream_tokens, dream=True))
        return dreams

    def _dream(self, written: list[int]) -> OwnDream:
        closed = bool(written) and written[-1] == self.end_think
        ids = written[:-1] if closed or self._ends(written) else written
        ids = ids[:-1] if ids and self.decode(ids[-1:]).isspace() else ids  # the line break before </think>
        return OwnDream(ids, closed, written)

    def _spoken(self, dream: OwnDream, answer: list[int], seconds: float) -> Spoken:
        ended = self._ends(answer)
        answer = answer[:-1] if ended else answer
        thought, said = self.decode(dream.ids), self.decode(answer)
        form = form_of(
            self.letters(dream.written),
            self.letters(answer),
            dream_text=thought,
            answer_text=said,
            closed=dream.closed,
            ended=ended,
            steps=self.how.steps,
        )
        said = without_thought(said if ended else said.rstrip(HALF))
        return Spoken(thought.strip(), said, dream.closed, len(dream.ids) + len(answer), seconds, form)

    def _ends(self, ids: Sequence[int]) -> bool:
        return bool(ids) and self.vocabulary.is_end(ids[-1])

    def _seeds(self, questions: Sequence[Question], draw: int) -> list[int]:
        return [question.seed(self.how.seed, draw) for question in questions]


def map_teacher(own: Vocabulary, teacher: TeacherTokenizer | None) -> tuple[NDArray[np.int32] | None, str]:
    """(W,) each of the teacher's ids as the one of ours that spells the same bytes, −1 for none; all ends of an answer
    are our EOS. None, and why, where probabilities can't be compared: our tokens aren't a part of the teacher's."""
    if teacher is None:
        return None, "the exam has no soft targets"
    theirs, kinds = Vocabulary(teacher).bytes_of, own.tokenizer.types
    ids = {own.bytes_of[i]: i for i in reversed(range(len(kinds))) if kinds[i] in (NORMAL, BYTE)}
    foreign = sum(len(spelled) > 1 for spelled in ids.keys() - set(theirs))
    if foreign:
        return None, f"its tokens are not the teacher's ({foreign:,} of {len(kinds):,} are others)"
    found = np.array([ids.get(spelled, -1) for spelled in theirs], np.int32)
    found[[teacher.eos_id, *teacher.extra_stop_ids]] = own.tokenizer.eos_id
    return found, ""


def check_finite(model: "nn.Module", folder: Path) -> None:
    """Raises CorruptFile for weights that are no numbers: whatever was measured of them would be none either."""
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise CorruptFile(
                f"{folder}: {name} holds NaN or infinity, so that it can say nothing; take an earlier checkpoint, or "
                "download the model again"
            )


def engine_seed(seed: int) -> int:
    """The seed as llama.cpp takes it, 32 bits wide and not all ones: that would mean a random one."""
    return seed % (2**31 - 1)


def without_thought(text: str) -> str:
    """An answer without the think block that it opens with, should it open with one."""
    stripped = text.lstrip()
    if stripped.startswith(THINK):
        _, tag, after = stripped.partition(END_THINK)
        return after.lstrip() if tag else ""
    return text
