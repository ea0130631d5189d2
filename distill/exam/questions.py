"""The exam: the questions that every target is asked, and what is known of their answers.

A run's held-out prompts come with the teacher's answers, its soft targets, mined triplets and, where the dataset has
them, true answers. A file of prompts comes with nothing: then only what a target says by itself can be measured.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

from distill.corpus.prompts import load_prompts
from distill.corpus.traces import TraceStore
from distill.corpus.truth import Truth, read_truths, spread
from distill.errors import NothingHeldOut
from distill.exam.metrics.likelihood import bits
from distill.mining.triplets import Triplet, by_trace, read_triplets
from distill.run import Run, fingerprint
from distill.student.made_with import made_with
from distill.teacher.protocol import TeacherTokenizer, TokenTargets
from distill.tokens.image_tokens import Codebook
from distill.tokens.shown import NAMED, load_shown, show


@dataclass(frozen=True)
class Sibling:
    """Another answer of the teacher's to the same prompt, and the triplets mined from it."""

    text: str
    triplets: tuple[Triplet, ...]


@dataclass(frozen=True)
class Question:
    """One prompt and what is known of its answer, the first where it has several.

    key: of the trace, or of the prompt where there is none. text: the teacher's answer, "" where nobody answered;
    done_reason: "stop" or "length", whether it ended by itself. tokens: its soft targets in the teacher's ids.
    triplets: mined from the teacher's answer. truth: its split, true answer and depth, where the dataset knows them.
    sibling: another answer, one that something was mined from. pictures: files that the prompt names, in its run.
    """

    key: str
    prompt: str
    system: str = ""
    text: str = ""
    done_reason: str = "stop"
    tokens: TokenTargets | None = None
    triplets: tuple[Triplet, ...] = ()
    truth: Truth | None = None
    sibling: Sibling | None = None
    pictures: tuple[Path, ...] = ()

    @property
    def after_sibling(self) -> Self:
        """The same with its sibling's dream in the place of its own."""
        return replace(self, triplets=self.sibling.triplets if self.sibling else ())

    @property
    def bytes(self) -> int:
        """Of the teacher's answer in UTF-8."""
        return len(self.text.encode())

    @property
    def teacher_bits(self) -> float:
        """−log₂ of the teacher's own sampled tokens, EOS left out; NaN where some are not known."""
        if self.tokens is None:
            return math.nan
        return bits(self.tokens.logprobs[: len(self.tokens) - (self.done_reason == "stop")])

    def about(self) -> dict[str, Any]:
        """How samples tell of it: prompt and teacher's answer and, where they are known, split, depth, true answer."""
        told: dict[str, Any] = {"key": self.key, "prompt": self.prompt, "teacher": self.text}
        if self.truth is not None:
            told |= {"split": self.truth.split, "depth": self.truth.depth, "expected": self.truth.answer}
        return told

    def seed(self, seed: int, draw: int) -> int:
        """Of this prompt's `draw`-th sample: the same whichever other prompts are asked beside it."""
        return int.from_bytes(hashlib.sha256(f"{seed}:{self.key}:{draw}".encode()).digest()[:6])


@dataclass(frozen=True)
class Exam:
    """Questions in the order of their keys.

    name: as a report says it. folder: where measurements on it are kept. teacher: who answered, "" for nobody.
    vocabulary: what the ids in `Question.tokens` mean. run: whose held-out prompts these are, None for a prompt file.
    """

    name: str
    folder: Path
    questions: list[Question]
    teacher: str = ""
    vocabulary: TeacherTokenizer | None = None
    run: Run | None = None

    @cached_property
    def digest(self) -> str:
        """Of all that a measurement can depend on: two targets are compared on equal digests only."""
        return fingerprint(
            [
                [q.key, q.prompt, q.system, q.text, [asdict(t) for t in q.triplets], q.truth and asdict(q.truth)]
                + ([asdict(q.sibling)] if q.sibling else [])
                for q in self.questions
            ]
        )

    @cached_property
    def answers_digest(self) -> str:
        """Of the prompts and their answers alone, however they were mined."""
        return fingerprint([[q.key, q.prompt, q.system, q.text] for q in self.questions])

    @property
    def has_answers(self) -> bool:
        """Whether a teacher answered."""
        return any(question.text for question in self.questions)

    @property
    def teacher_ended(self) -> float | None:
        """Share of the teacher's answers that ended by themselves; None where it gave none."""
        ends = [question.done_reason == "stop" for question in self.questions if question.text]
        return sum(ends) / len(ends) if ends else None

    @property
    def has_siblings(self) -> bool:
        return any(question.sibling for question in self.questions)

    @property
    def has_truths(self) -> bool:
        return any(question.truth for question in self.questions)

    @cached_property
    def codebook(self) -> Codebook | None:
        """The concept space that texts of all targets are compared in: the run's, where it is tokenized."""
        if self.run is None or not (self.run.tokenizer / "codebook.json").is_file():
            return None
        return Codebook.load(self.run.tokenizer, self.run.settings.teacher)


def load_exam(run: Run, limit: int | None = None, mined: bool = True) -> Exam:
    """The first `limit` held-out prompts in the order of their keys (None: evaluate.prompts; 0: all).

    Of several answers to a prompt the first is asked for, so that each prompt counts once; another is its sibling.
    Where the dataset has splits, as many of each as there are. Every target is told of pictures what the student
    reads: their image tokens. Empty answers are no questions. mined: with triplets, and so with siblings. Raises
    MissingStage before capture, BadInput where no held-out prompt has an answer.
    """
    run.require("capture")
    limit = run.settings.evaluate.prompts if limit is None else limit
    truths, shown, system = read_truths(run), load_shown(run.tokenizer), made_with(run).capture.system
    questions: list[Question] = []
    with TraceStore(run.traces, readonly=True) as store:
        teacher, vocabulary = store.teacher(), store.tokenizer()
        # Without splits they are read one by one, as far as they are wanted.
        first = store.traces(held_out=True, first=True)
        answered = (trace for trace in (spread(list(first), truths) if truths else first) if trace.response.text)
        chosen = list(islice(answered, limit or None))
        answers: dict[str, list[tuple[str, str]]] = {trace.prompt: [] for trace in chosen}
        for key, prompt, text in store.answers(held_out=True):
            if prompt in answers:
                answers[prompt].append((key, text))
    keys = {key.encode() for group in answers.values() for key, _ in group}
    triplets = by_trace(read_triplets(run.triplets, keys)) if mined and run.triplets.exists() else {}
    for trace in chosen:
        text = trace.response.text
        others = (Sibling(said, tuple(triplets.get(key, ()))) for key, said in answers[trace.prompt] if said != text)
        sibling = next((other for other in others if other.triplets), None)
        paths = (run.path / name for name in NAMED.findall(trace.prompt))
        questions.append(
            Question(
                trace.key,
                show(trace.prompt, shown),
                system,
                text,
                trace.response.done_reason,
                trace.response.tokens,
                tuple(triplets.get(trace.key, ())),
                truths.get(trace.key),
                sibling,
                tuple(path for path in paths if path.is_file()),
            )
        )
    if not questions:
        raise NothingHeldOut(
            f"{run.traces}: no usable answer to a held-out prompt; ask more prompts (capture.limit) or raise "
            "capture.held_out, then capture again"
        )
    questions.sort(key=lambda question: question.key)
    name = f"{len(questions)} held-out prompts of {run.name}"
    return Exam(name, run.evaluation / "targets", questions, teacher.spec, vocabulary, run)


def exam_of_prompts(source: str, folder: Path) -> Exam:
    """A file of prompts, or a set that ships with us, that nobody has answered. Raises BadInput."""
    prompts = load_prompts([source], 0.0)
    questions = [Question(hashlib.sha256(prompt.text.encode()).hexdigest(), prompt.text) for prompt in prompts]
    questions.sort(key=lambda question: question.key)
    return Exam(f"{len(questions)} prompts of {Path(source).name}", folder, questions)
