"""Examining a target: every question is put to it, and what came of it is kept as it comes.

Questions are asked in chunks, in the order of their keys. A finished chunk is a line of a journal below the exam's
folder, so that an interrupted examination goes on in the chunk it was in and comes to the very same numbers; what is
finished is never asked again, and a target that is known by heart isn't even loaded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, cast

from distill.config import EvaluateSettings
from distill.errors import CorruptFile, NothingHeldOut
from distill.events import Event, Listener, silent
from distill.exam.cost import place_of
from distill.exam.examinees.opening import limits_of, open_examinee
from distill.exam.examinees.protocol import PASSING, Card, Dreamt, Examinee
from distill.exam.measured import ANSWERS, GREEDY, STEERED, Measured, Scored, Sheet, assemble, spread_over
from distill.exam.metrics.statistics import Ratio
from distill.exam.metrics.text import text_metrics
from distill.exam.questions import Exam, Question
from distill.exam.targets import How, Target, device_of
from distill.journal import Journal
from distill.run import Run, fingerprint
from distill.student.grammar import dream_size
from distill.student.made_with import made_with

VERSION = 3
"""Raised when what is kept of an examination, or how a question is asked, changes."""

CHUNK = 32
"""Questions asked at once, and at most lost when an examination is killed."""


def dream_tokens_of(run: Run | None, targets: Sequence[Target] = ()) -> int:
    """The longest dream that a student of these was taught: four lenses, each with up to `mine.steps` triplets, and
    the line's end and closing tag.

    run: whose prompts are asked. All targets that are asked together have one limit, that of the longest dreams among
    the exam's run and theirs; where no run is known, it is the default, of 5 steps.
    """
    runs = [known for known in (run, *(target.run for target in targets)) if known is not None]
    return max((dream_size(made_with(known).mine.steps) for known in runs), default=How.dream_tokens)


def examine(
    target: Target,
    exam: Exam,
    settings: EvaluateSettings,
    seed: int = 0,
    listen: Listener = silent,
    *,
    dream_tokens: int = How.dream_tokens,
    thinking_tokens: int = How.thinking_tokens,
    timeout: float = How.timeout,
    device: str = "auto",
    force: bool = False,
    only: Sequence[str] = (),
    opened: Callable[[Target, How], Examinee] | None = None,
    also: Any = None,
) -> Measured:
    """Everything that can be measured of `target` on `exam`.

    dream_tokens, thinking_tokens, timeout: see `How`. force: ask anew. only: some of the phases alone ("score-none", …;
    see `phases`). opened: makes who sits the exam, not the target's kind; also: what the numbers depend on then.
    Raises BadInput where no question fits the target's context, and what the target's kind raises when it is opened or
    asked (TeacherError, CorruptFile, RunMismatch).
    """
    how = How(seed, dream_tokens, thinking_tokens, device, timeout, exam.vocabulary)
    mark = _mark(target, exam, settings, how, also)
    folder = exam.folder / f"{safe_name(target.name)}-{mark[:12]}"
    with Journal(folder / "journal.jsonl", force) as journal, ExitStack() as stack:

        @cache
        def examinee() -> Examinee:
            """Opened when it is first needed."""
            found = (opened or open_examinee)(target, how)
            stack.callback(found.close)
            return found

        return _Examination(target, exam, settings, how, journal, examinee, listen, only).measure()


def _mark(target: Target, exam: Exam, settings: EvaluateSettings, how: How, also: Any) -> str:
    """Of all that the numbers depend on."""
    retrieved: Any = None
    if target.run is not None and (train := made_with(target.run).train).retrieve:
        retrieved = [train.retrieve, train.retrieve_limit, target.run.require("mine").outputs]
    asked = [
        settings.dreams,
        settings.temperature,
        settings.max_tokens,
        how.seed,
        *limits_of(target, how),
        device_of(target, how.device),
    ]
    kept = [VERSION, target.kind, target.digest(), exam.digest, exam.vocabulary is not None, asked, retrieved]
    if exam.vocabulary is not None and (hard := sum(bool(q.text) and q.tokens is None for q in exam.questions)):
        kept.append(hard)  # `dream capture` asks for their soft targets again, and the answers stay what they are
    return fingerprint(kept if also is None else [*kept, also])


def safe_name(name: str) -> str:
    """A target's name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "target"


def phases(exam: Exam, sheet: Sheet, settings: EvaluateSettings) -> list[str]:
    """What a target is asked, in order: score-none · score-own-1 … K · score-mined · score-sibling · answers · greedy ·
    steer-own · steer-sibling."""
    found: list[str] = []
    steered = "mined" not in sheet.cannot and exam.has_siblings
    if exam.has_answers and "likelihood" not in sheet.cannot:
        found.append("score-none")
        if "dreams" not in sheet.cannot:
            found += [f"score-own-{draw + 1}" for draw in range(settings.dreams)]
        if "mined" not in sheet.cannot and any(question.triplets for question in exam.questions):
            found.append("score-mined")
        if steered:
            found.append("score-sibling")
    return [*found, ANSWERS, *([GREEDY] if exam.has_truths else []), *(STEERED if steered else [])]


def _may_pass(cannot: Mapping[Any, str]) -> bool:
    return any(reason.startswith(PASSING) for reason in cannot.values())


@dataclass(frozen=True)
class _Examination:
    """One target on one exam. The journal's first line says who was asked, each other one what came of a chunk."""

    target: Target
    exam: Exam
    settings: EvaluateSettings
    how: How
    journal: Journal
    examinee: Callable[[], Examinee]
    listen: Listener
    only: Sequence[str]

    def measure(self) -> Measured:
        sheet, here = self._sheet(), place_of(self.target, self.how.device)[:12]
        asked = [question for question in self.exam.questions if question.key not in sheet.left_out]
        if not asked:
            raise NothingHeldOut(
                f"{self.target.spec}: none of the {len(self.exam.questions)} held-out answers fits its context of "
                f"{sheet.card.context} tokens with its prompt and a dream; raise student.context and train again, or "
                "ask for less (capture.max_tokens)"
            )
        todo = [phase for phase in phases(self.exam, sheet, self.settings) if not self.only or phase in self.only]
        chunks = [asked[start : start + CHUNK] for start in range(0, len(asked), CHUNK)]
        kept = self._kept()
        self.listen(Event("evaluate", "start", f"{self.target.name} on {self.exam.name}"))
        done, total = 0, len(todo) * len(asked)
        for phase in todo:
            records: list[Any] = []
            for number, chunk in enumerate(chunks):
                found = kept.get((phase, number))
                if found is None:
                    found = self._ask(phase, chunk)
                    self.journal.append({"phase": phase, "chunk": number, "records": found, "where": here})
                elif len(found) != len(chunk):
                    raise self._unreadable(f"{len(found)} records of {len(chunk)} questions in {phase}")
                records += found
                done += len(chunk)
                data = {"target": self.target.name, "phase": phase}
                self.listen(Event("evaluate", "progress", done=done, total=total, unit="answers", data=data))
            try:
                sheet.enter(phase, records)
            except (TypeError, KeyError) as error:
                raise self._unreadable(error) from error
        found = assemble(self.exam, sheet, self.settings)
        # Seconds of another server or machine are no speed of this one; lines of old journals don't tell whose.
        timed = [line for line in self.journal.lines if line.get("phase") == ANSWERS]
        elsewhere = any(line.get("where", here) != here for line in timed)
        return replace(found, tokens_per_second=None) if elsewhere else found

    def _kept(self) -> dict[tuple[str, int], list[Any]]:
        """(phase, number of a chunk) → its records."""
        try:
            return {(line["phase"], line["chunk"]): line["records"] for line in self.journal.lines[1:]}
        except KeyError as error:
            raise self._unreadable(f"a line is no chunk's: no {error}") from error

    def _unreadable(self, why: object) -> CorruptFile:
        return CorruptFile(f"{self.journal.path}: can't be read ({why}); delete it to examine anew")

    def _sheet(self) -> Sheet:
        """Who is asked what: from the journal's first line, which is written where there is none. Where what it lacked
        was its server's doing and it lacks it no more, all is asked anew."""
        known = next(iter(self.journal.lines), {}).get("cannot", {})
        if _may_pass(known) and not _may_pass(self.examinee().cannot):
            self.journal.clear()
        if not self.journal.lines:
            examinee = self.examinee()
            unfit = [q.key for q in self.exam.questions if not examinee.fits(q, self.how.dream_tokens)]
            why = f"does not fit its context of {examinee.card.context} tokens with its answer and a dream"
            self.journal.append(
                {
                    "target": self.target.spec,
                    "card": asdict(examinee.card),
                    "cannot": dict(examinee.cannot),
                    "left_out": dict.fromkeys(unfit, why),
                }
            )
        head = self.journal.lines[0]
        try:
            return Sheet(Card(**head["card"]), head["cannot"], head["left_out"])
        except (KeyError, TypeError) as error:
            raise self._unreadable(error) from error

    def _ask(self, phase: str, chunk: Sequence[Question]) -> list[Any]:
        """The records of one chunk of one phase."""
        examinee, settings = self.examinee(), self.settings
        if phase.endswith("-sibling"):
            chunk = [question.after_sibling for question in chunk]
        if phase.startswith("score-"):
            _, dream, *draw = phase.split("-")
            dream = "mined" if dream == "sibling" else dream
            scores = examinee.score(chunk, cast(Dreamt, dream), int(draw[0]) - 1 if draw else 0)
            return [asdict(Scored.of(score)) for score in scores]
        spoken = examinee.answer(
            chunk,
            think="mined" if phase in STEERED else True,
            temperature=0.0 if phase == GREEDY else settings.temperature,
            max_tokens=settings.max_tokens,
            # Other draws than those that were scored.
            draw=settings.dreams if phase == ANSWERS else 0,
        )
        if phase != ANSWERS:
            return [each.answer for each in spoken]
        pairs = zip(spoken, chunk, strict=True)
        return [asdict(replace(each, mined=examinee.labels(question.triplets))) for each, question in pairs]


def teacher_measured(exam: Exam, left_out: Mapping[str, str] | None = None) -> Measured:
    """The teacher's own row: bits per byte of its answers by its own account, how its text reads, and how often it
    ended by itself (within capture.max_tokens).

    left_out: as of those that it stands beside, so that all numbers are of the same prompts.
    """
    left_out = left_out or {}
    places = [i for i, question in enumerate(exam.questions) if question.key not in left_out]
    asked = [exam.questions[i] for i in places]
    spent = [question.teacher_bits for question in asked]
    metrics = {"bits_per_byte": Ratio.of(spent, [question.bytes for question in asked])}
    metrics |= text_metrics([question.text for question in asked])
    metrics["ended"] = Ratio.of([question.done_reason == "stop" for question in asked])
    missing = {} if metrics["bits_per_byte"].defined else {"bits_per_byte": "it told no probabilities of its tokens"}
    return Measured(
        keys=[question.key for question in exam.questions],
        metrics={n: spread_over(m, places, len(exam.questions)) for n, m in metrics.items() if n not in missing},
        missing=missing,
        dreams=[""] * len(exam.questions),
        answers=[question.text for question in exam.questions],
        left_out=dict(left_out),
        tokens_per_second=None,
        card=Card("teacher", exam.teacher, None, None, None, "", dreams=False),
    )
