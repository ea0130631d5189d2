"""The capture stage: ask the teacher every prompt, several at once, and store what it says as it comes."""

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.config import CaptureSettings
from distill.corpus.asked import depends_on, prompts_of
from distill.corpus.gathered import capture_gathered, counted
from distill.corpus.given import keep_given
from distill.corpus.prompts import Prompt, evenly
from distill.corpus.selecting import selecting
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput, DistillError, PromptRefused, TeacherError
from distill.events import Event, Listener, silent
from distill.run import Run, StageRecord, write_json_lines
from distill.teacher.crew import MANY_LISTED, TICK, Crew, Host, Outcome
from distill.teacher.protocol import MAX_TOP_LOGPROBS, GenerateOptions, Response, Teacher, TeacherInfo
from distill.teacher.thinking import how_to_think

STAGE = "capture"
MISSING = "unanswered.jsonl"
"""In the run's folder: prompts without an answer, and why."""
MANY_CUT = 0.2
"""Share of answers cut by the token limit above which a student of them hardly learns to end its own."""


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: Prompt
    options: GenerateOptions
    key: str
    sample: int


class _Capture:
    """One session of asking: hands out jobs, collects answers. Only its own thread touches the store.

    unit: what is counted. how: kept with each answer. missing: job → why it has no answer. failed: those that may be
    answered another time.
    """

    def __init__(self, store: TraceStore, crew: Crew[_Job, Response], unit: str, how: dict[str, Any]) -> None:
        self.store, self.crew, self.unit, self.how = store, crew, unit, how
        self.missing: dict[_Job, str] = {}
        self.failed = self.refused = self.empty = self.thought = self.stored = self.tokens = 0
        self.started, self.limit = time.monotonic(), math.inf

    def run(self, jobs: Sequence[_Job], seconds: float, before: int, listen: Listener) -> None:
        """Until all is answered, or `seconds` (if any) are over and what is in flight has come back."""
        total, told, self.limit = before + len(jobs), 0.0, seconds or math.inf
        for outcome in self.crew.run(jobs, seconds, some=before > 0):
            if outcome is not None:
                self._collect(outcome, listen)
            if time.monotonic() - told > TICK:
                told = time.monotonic()
                self._progress(before, total, listen)
        self._progress(before, total, listen)

    def rescue(self) -> None:
        """Store the answers that have come but were not collected yet."""
        for outcome in self.crew.rescue():
            self._collect(outcome, silent)

    def _collect(self, outcome: Outcome[_Job, Response], listen: Listener) -> None:
        job, response = outcome.what, outcome.answer
        if response is not None and response.text.strip():
            self.thought += bool(response.thinking)
            text, held_out, teacher = job.prompt.text, job.prompt.held_out, self.crew.info.digest
            self.store.put(Trace(job.key, text, held_out, response, job.options, teacher, job.sample), **self.how)
            self.stored += 1
            self.tokens += 0 if response.tokens is None else len(response.tokens)
            return
        if response is not None:
            self.empty += 1
            room = f"; {_more_room(job.options, self.crew.info)}"
            why = f"thought, and gave no answer{room}" if response.thinking else "answered without any text"
        elif isinstance(outcome.problem, PromptRefused):
            self.refused += 1
            why = str(outcome.problem)
        else:
            self.failed += 1
            why = str(outcome.problem)
        self.missing[job] = why
        if len(self.missing) <= MANY_LISTED:
            listen(Event(STAGE, "warning", f"skipped {job.prompt.text!r}: {why}"))

    def lose(self, jobs: Sequence[_Job], why: str) -> None:
        """Those of the jobs that nothing has come of have failed."""
        for job in jobs:
            if job not in self.missing and not self.store.has(job.key):
                self.failed += 1
                self.missing[job] = why

    def _progress(self, before: int, total: int, listen: Listener) -> None:
        seconds = time.monotonic() - self.started
        left = total - before - self.stored - len(self.missing)
        # Where many are answered together, the first few tell nothing.
        pace = left * seconds / self.stored if 2 * self.stored > self.crew.in_flight else math.inf
        eta = max(0.0, min(pace, self.limit - seconds))
        data = {
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / seconds, 1) if seconds else 0.0,
            "in_flight": self.crew.in_flight,
            "eta": round(eta, 1) if math.isfinite(eta) else None,
        }
        listen(Event(STAGE, "progress", done=before + self.stored, total=total, unit=self.unit, data=data))


def capture(
    run: Run, listen: Listener = silent, force: bool = False, teachers: Sequence[Teacher] | None = None
) -> dict[str, Any]:
    """Ask all prompts that have no answer yet; returns the stage's summary. `force` asks again what has none.

    Skipped where nothing changed since it was done and no host failed at anything. Kill it at any time: what was
    answered is in traces.db, and starting it again asks only the rest. `teachers` are hosts of one model; by default
    the settings' are opened. A `capture.dataset`, or what was gathered, stands in for the teacher.
    Raises BadInput, TeacherError, RunMismatch (traces.db is another teacher's), DistillError (disk full).
    """
    settings = run.settings.capture
    _check(settings)
    if settings.gathered:
        return capture_gathered(run, listen, force)
    if settings.dataset:
        from distill.corpus.datasets.stage import capture_dataset

        return capture_dataset(run, listen, force)
    given = settings.answers == "given"
    prompts = prompts_of(run, listen)
    depends = depends_on(run, prompts)
    record = run.fresh(STAGE, depends)
    if record is None and settings.samples == 1:  # of before there could be several
        record = run.fresh(STAGE, {name: value for name, value in depends.items() if name != "samples"})
    if record is not None and not force and not record.summary.get("failed"):
        listen(Event(STAGE, "done", "unchanged, skipped", data=record.summary))
        return record.summary
    started = time.monotonic()
    try:
        kept = keep_given(run, prompts, listen) if given else _ask_all(run, prompts, teachers, listen, record, force)
    except TeacherError as error:
        if record is None or force:
            raise
        listen(Event(STAGE, "warning", f"{record.summary['failed']} answers are still missing: {error}"))
        return record.summary
    summary, digest = kept
    run.record(STAGE, depends, {"traces.db": digest}, summary, time.monotonic() - started)
    _warn_of_cut(summary.get("cut_share", 0.0), settings.max_tokens, listen)
    listen(Event(STAGE, "done", data=summary))
    return summary


def _ask_all(
    run: Run,
    prompts: Sequence[Prompt],
    teachers: Sequence[Teacher] | None,
    listen: Listener,
    record: StageRecord | None,
    force: bool,
) -> tuple[dict[str, Any], str]:
    """The summary, and the digest of what is stored. record: of these very prompts, where the stage was done before:
    unless forced, a teacher that goes now leaves those that it was not asked as failed."""
    settings, started, done = run.settings.capture, time.monotonic(), record is not None and not force
    with contextlib.ExitStack() as stack:
        if teachers is None:
            from distill.teacher import opened, room_for

            context = room_for((settings.system + prompt.text for prompt in prompts), settings.max_tokens)
            teachers = stack.enter_context(opened(run.settings.teacher, listen, context, run.settings.runtime))
        crew = Crew(
            teachers,
            _ask,
            stage=STAGE,
            listen=listen,
            fixed=run.settings.teacher.in_flight,
            service=lambda response: response.timings.get("service", 0.0),
        )
        info, tokenizer = crew.info, crew.first.teacher.tokenizer()
        if run.settings.teacher.weights:  # refused now, not after hours of asking
            from distill.teacher.find_weights import find_weights

            find_weights(run.settings.teacher, info, tokenizer, listen)
        store = stack.enter_context(TraceStore(run.traces))
        store.put_teacher(info, tokenizer)
        jobs = _jobs_to_ask(run, prompts, info, store, listen)
        stack.enter_context(selecting(run, store, record is None))
        store.select({job.key: job.prompt.held_out for job in jobs})
        if others := store.left_out():
            listen(Event(STAGE, "note", f"{others} answers are kept, but left out: these settings don't ask for them"))
        limit = 0 if done else settings.max_tokens  # what another context cut is asked again
        soft = bool(settings.top_logprobs and info.logprobs and tokenizer)
        how: dict[str, Any] = {"context": run.settings.teacher.context, "soft": soft}
        left = [job for job in jobs if not store.has(job.key, limit, **how, again=force)]
        before = len(jobs) - len(left)
        session = _Capture(store, crew, "prompts" if settings.samples == 1 else "answers", how)
        listen(Event(STAGE, "start", f"asking {info.spec}", done=before, total=len(jobs), unit=session.unit))
        try:
            _run_session(session, left, before, run, listen)
        except TeacherError as error:
            if not done:
                raise
            session.lose(left, str(error))
            listen(Event(STAGE, "warning", f"going on with what was answered: {error}"))
        if session.stored:
            store.put_teacher(_who(crew.first), tokenizer)  # which engine answered is known by now
        _tell_missing(session, run, listen)
        if unasked := len(left) - session.stored - len(session.missing):
            over = f"capture.minutes={settings.minutes:g} were over before {unasked:,} of {len(jobs):,} {session.unit}"
            listen(Event(STAGE, "note", f"{over}; more minutes ask for them, too"))
        summary = _summary(session, len(prompts), settings.samples, time.monotonic() - started)
        if not summary["responses"]:
            raise TeacherError(_nothing(session, jobs[0].options, info, len(prompts)))
        return summary, store.content_digest()


def _ask(teacher: Teacher, job: _Job) -> Response:
    return teacher.generate(job.prompt.text, job.options)


def _nothing(session: _Capture, options: GenerateOptions, info: TeacherInfo, prompts: int) -> str:
    if session.empty:
        thought = f"; it thinks first: {_more_room(options, info)}" if _has_thought(session) else ""
        return (
            f"{info.spec}: {session.empty} of {prompts} prompts were answered without any text, the rest not{thought}"
        )
    return f"{info.spec}: answered none of {prompts} prompts; `dream doctor` looks for the cause"


def _more_room(options: GenerateOptions, info: TeacherInfo) -> str:
    """What leaves a teacher room to answer after it has thought."""
    if options.think:
        return f"raise teacher.thinking_tokens={options.thinking_tokens}"
    return "set teacher.think=true" if info.can_think else f"raise capture.max_tokens={options.max_tokens}"


def _has_thought(session: _Capture) -> bool:
    return bool(session.thought) or any(why.startswith("thought") for why in session.missing.values())


def _tell_missing(session: _Capture, run: Run, listen: Listener) -> None:
    """List the prompts without an answer, and say what became of them."""
    path = run.path / MISSING
    if not session.missing:
        path.unlink(missing_ok=True)
        return
    several = run.settings.capture.samples > 1
    write_json_lines(
        path,
        (
            {"prompt": job.prompt.text, **({"sample": job.sample} if several else {}), "why": why}
            for job, why in session.missing.items()
        ),
    )
    counts = {"failed": session.failed, "refused": session.refused, "without text": session.empty}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    again = "; the same command asks those that failed again" if session.failed else ""
    what = "answers are missing" if several else "prompts have no answer"
    listen(Event(STAGE, "warning", f"{len(session.missing)} {what} ({told}): {path} lists them{again}"))


def _warn_of_cut(share: float, max_tokens: int, listen: Listener) -> None:
    """Once, at the end: what is cut off teaches nobody to stop."""
    if share > MANY_CUT:
        text = (
            f"{share:.0%} of the answers were cut by capture.max_tokens={max_tokens}, so a student hardly learns to "
            "end its own; raise capture.max_tokens, or ask for short answers with capture.system"
        )
        listen(Event(STAGE, "warning", text))


def _run_session(session: _Capture, jobs: Sequence[_Job], before: int, run: Run, listen: Listener) -> None:
    try:
        session.run(jobs, run.settings.capture.minutes * 60, before, listen)
    except KeyboardInterrupt:
        session.rescue()
        held = before + session.stored
        listen(
            Event(STAGE, "warning", f"stopped; {held} answers are in {run.traces}, the same command goes on from there")
        )
        raise
    except DistillError:
        with contextlib.suppress(DistillError):
            session.rescue()
        raise
    finally:
        session.crew.stop()  # threads still out there find nothing more to ask


def _check(settings: CaptureSettings) -> None:
    if not 0 <= settings.top_logprobs <= MAX_TOP_LOGPROBS:
        raise BadInput(f"capture.top_logprobs={settings.top_logprobs}: must be 0 to {MAX_TOP_LOGPROBS}")
    if settings.max_tokens < 1:
        raise BadInput(f"capture.max_tokens={settings.max_tokens}: must be at least 1")
    if settings.samples < 1:
        raise BadInput(f"capture.samples={settings.samples}: must be at least 1")
    for name, known in (("answers", ("teacher", "given")), ("turns", ("last", "all"))):
        if (value := getattr(settings, name)) not in known:
            raise BadInput(f"capture.{name}={value}: choose one of {', '.join(known)}")
    if settings.samples > 1 and (settings.dataset or settings.answers == "given"):
        whose = "a dataset has one answer to each question" if settings.dataset else "answers are given, not asked for"
        raise BadInput(f"capture.samples={settings.samples}: {whose}; set it to 1")
    if settings.samples > 1 and settings.temperature == 0:
        raise BadInput(
            f"capture.samples={settings.samples}: at capture.temperature=0 all answers to a prompt are alike; "
            "raise it, or set capture.samples=1"
        )
    if settings.minutes < 0:
        raise BadInput(f"capture.minutes={settings.minutes}: must be 0 (no limit) or more")


def _jobs_to_ask(
    run: Run, prompts: Sequence[Prompt], info: TeacherInfo, store: TraceStore, listen: Listener
) -> list[_Job]:
    """With `teacher.think=auto`, what was begun without thinking goes on so."""
    settings, teacher = run.settings.capture, run.settings.teacher
    think = how_to_think(teacher, info)
    plain = _jobs(prompts, info, settings, run.settings.seed)
    if not think:
        return plain
    jobs = _jobs(prompts, info, settings, run.settings.seed, think, teacher.thinking_tokens)

    def begun(those: Sequence[_Job]) -> bool:
        return any(store.has(job.key) for job in those)

    if teacher.think == "auto" and begun(plain) and not begun(jobs):
        text = f"{info.spec} could think: teacher.think=true asks anew; its answers so far were given without"
        listen(Event(STAGE, "note", text))
        return plain
    tokens = f"{teacher.thinking_tokens:,} tokens at most"
    listen(Event(STAGE, "note", f"{info.spec} thinks before each answer, {tokens}; teacher.think=false is faster"))
    return jobs


def _jobs(
    prompts: Sequence[Prompt],
    info: TeacherInfo,
    settings: CaptureSettings,
    seed: int,
    think: str = "",
    thinking_tokens: int = 0,
) -> list[_Job]:
    options = GenerateOptions(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        top_logprobs=settings.top_logprobs,
        system=settings.system,
        think=think,
        thinking_tokens=thinking_tokens,
    )
    jobs: list[_Job] = []
    # Evenly over the sets, so that a capture that is cut short has seen something of each; all answers to a prompt one
    # after the other, so that a server which keeps what it has read needn't read it again.
    for prompt, sample in itertools.product((prompts[i] for i in evenly(len(prompts))), range(settings.samples)):
        # A seed of its own: an answer doesn't depend on what is asked beside or before it.
        what = f"{seed}\0{prompt.text}" + (f"\0{sample}" if sample else "")
        mine = replace(options, seed=int.from_bytes(hashlib.sha256(what.encode()).digest()[:4], "big") & 0x7FFFFFFF)
        jobs.append(_Job(prompt, mine, TraceStore.key(info, prompt.text, mine), sample))
    return jobs


def _summary(session: _Capture, prompts: int, samples: int, seconds: float) -> dict[str, Any]:
    stats = session.store.stats()
    asking = time.monotonic() - session.started
    return {
        "prompts": prompts,
        **({"samples": samples} if samples > 1 else {}),
        **counted(stats),
        "failed": session.failed,
        "refused": session.refused,
        "empty": session.empty,
        "thought": stats.thinking,
        "asked_now": session.crew.received,
        "bytes_per_token": round(stats.bytes_per_token, 2),
        "tokens_per_second": round(session.tokens / asking, 1) if session.tokens else 0.0,
        "slots": [host.bound.slots for host in session.crew.hosts],
        "in_flight": [host.bound.limit for host in session.crew.hosts],
        "answered_by": [_who(host).version for host in session.crew.hosts if host.info],
        "seconds": round(seconds, 2),
    }


def _who(host: Host) -> TeacherInfo:
    """As it says by now, or said before it went or got another model. It has said so."""
    assert host.info is not None
    with contextlib.suppress(TeacherError):
        now = host.teacher.describe()
        return now if now.digest == host.info.digest else host.info
    return host.info
