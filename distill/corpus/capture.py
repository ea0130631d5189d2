"""The capture stage: ask the teacher every prompt, several at once, and store what it says as it comes."""

import contextlib
import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from distill.config import CaptureSettings
from distill.corpus.in_flight import InFlight
from distill.corpus.prompts import Prompt, evenly, load_prompts
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput, DistillError, ModelNotFound, RunMismatch, TeacherError, TeacherUnavailable
from distill.events import Event, Listener, silent
from distill.run import Run, fingerprint
from distill.teacher.protocol import MAX_TOP_LOGPROBS, GenerateOptions, Response, Teacher, TeacherInfo

STAGE = "capture"
GIVE_UP_AFTER = 8
"""Failures in a row after which a teacher is taken for gone."""
_TICK = 0.2
"""Seconds between progress events."""
MANY_CUT = 0.2
"""Share of answers cut by the token limit above which a student of them hardly learns to end its own."""


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    options: GenerateOptions
    key: str


@dataclass(frozen=True)
class _Answer:
    job: _Job
    pool: "_Pool"
    outcome: Response | BaseException
    started: float
    ended: float


class _Pool:
    """Threads that ask one teacher: as many as its InFlight allows, no more than there are jobs."""

    def __init__(self, teacher: Teacher, jobs: deque[_Job], answers: "queue.SimpleQueue[_Answer]", fixed: int) -> None:
        self.teacher = teacher
        self.bound = InFlight(teacher.slots, fixed)
        self.failures = 0
        self.asked = 0
        self.gone = False
        self._running = 0
        self._jobs = jobs
        self._answers = answers
        self._lock = threading.Lock()

    def fill(self) -> None:
        """Start threads up to the bound. Daemons: nobody waits for a server in order to quit."""
        while self._jobs and not self.gone and self._running < self.bound.limit:
            with self._lock:
                self._running += 1
            threading.Thread(target=self._work, daemon=True).start()

    def _next(self) -> _Job | None:
        with self._lock:
            if not self.gone and self._running <= self.bound.limit:
                self.asked += 1  # before it leaves the queue: at no time does it seem to be nowhere
                with contextlib.suppress(IndexError):
                    return self._jobs.popleft()
                self.asked -= 1
            self._running -= 1
            return None

    def _work(self) -> None:
        while job := self._next():
            started = time.monotonic()
            outcome: Response | BaseException
            try:
                outcome = self.teacher.generate(job.prompt.text, job.options)
            except BaseException as error:  # carried to the thread that collects, bugs too
                outcome = error
            self._answers.put(_Answer(job, self, outcome, started, time.monotonic()))


class _Capture:
    """One session of asking: hands out jobs, collects answers. Only its own thread touches the store."""

    def __init__(self, store: TraceStore, teachers: Sequence[Teacher], jobs: Sequence[_Job], fixed: int) -> None:
        self.store = store
        self.jobs = deque(jobs)
        self.answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self.pools = [_Pool(teacher, self.jobs, self.answers, fixed) for teacher in teachers]
        self.received = self.failed = self.stored = self.tokens = 0
        self.started = time.monotonic()

    @property
    def outstanding(self) -> int:
        return sum(pool.asked for pool in self.pools) - self.received

    def run(self, seconds: float, before: int, listen: Listener) -> None:
        """Until all is answered, or `seconds` (if any) are over and what is in flight has come back."""
        total = before + len(self.jobs)
        told = 0.0
        while True:
            if seconds and time.monotonic() - self.started > seconds:
                self.jobs.clear()
            for pool in self.pools:
                pool.fill()
            if not self.jobs and not self.outstanding:
                break
            with contextlib.suppress(queue.Empty):
                self._collect(self.answers.get(timeout=_TICK), listen)
            if time.monotonic() - told > _TICK:
                told = time.monotonic()
                self._progress(before, total, listen)
        self._progress(before, total, listen)

    def rescue(self) -> None:
        """Store the answers that have come but were not collected yet."""
        with contextlib.suppress(queue.Empty):
            while True:
                answer = self.answers.get_nowait()
                if isinstance(answer.outcome, Response):
                    self._store(answer.job, answer.outcome)

    def _collect(self, answer: _Answer, listen: Listener) -> None:
        self.received += 1
        if isinstance(answer.outcome, Response):
            answer.pool.failures = 0
            answer.pool.bound.completed(
                answer.ended, answer.ended - answer.started, answer.outcome.timings.get("service", 0.0)
            )
            self._store(answer.job, answer.outcome)
        elif isinstance(answer.outcome, DistillError):
            self._fail(answer, answer.outcome, listen)
        else:
            raise answer.outcome

    def _store(self, job: _Job, response: Response) -> None:
        digest = self.store.teacher().digest
        self.store.put(Trace(job.key, job.prompt.text, job.prompt.held_out, response, job.options, digest))
        self.stored += 1
        self.tokens += 0 if response.tokens is None else len(response.tokens)

    def _fail(self, answer: _Answer, error: DistillError, listen: Listener) -> None:
        pool = answer.pool
        pool.failures += 1
        if pool.failures >= GIVE_UP_AFTER or isinstance(error, ModelNotFound):
            pool.gone = True
        others = [other for other in self.pools if not other.gone and other is not pool]
        if pool.gone and not others:
            if isinstance(error, ModelNotFound):
                raise error
            kind = type(error) if isinstance(error, TeacherError) else TeacherError
            raise kind(f"{error} (given up after {pool.failures} failures in a row; what was answered is stored)")
        if pool.gone or (others and isinstance(error, TeacherUnavailable)):
            self.jobs.append(answer.job)  # another host will answer it
            listen(Event(STAGE, "warning", f"asking another host: {error}"))
            return
        self.failed += 1
        listen(Event(STAGE, "warning", f"skipped {answer.job.prompt.text!r}: {error}"))

    def _progress(self, before: int, total: int, listen: Listener) -> None:
        seconds = time.monotonic() - self.started
        left = total - before - self.stored - self.failed
        data = {
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / seconds, 1) if seconds else 0.0,
            "in_flight": self.outstanding,
            # Where many are answered together, the first few tell nothing.
            "eta": round(left * seconds / self.stored, 1) if 2 * self.stored > self.outstanding else None,
        }
        listen(Event(STAGE, "progress", done=before + self.stored, total=total, unit="prompts", data=data))


def capture(
    run: Run, listen: Listener = silent, force: bool = False, teachers: list[Teacher] | None = None
) -> dict[str, Any]:
    """Ask all prompts that have no answer yet; returns the stage's summary. `force` asks again what failed.

    Skipped where nothing changed since it was done. Kill it at any time: what was answered is in traces.db, and
    starting it again asks only the rest. `teachers` are hosts of one model; by default the settings' are opened. A
    `capture.dataset` stands in for the teacher.
    Raises BadInput, TeacherError, RunMismatch (traces.db is another teacher's), DistillError (disk full).
    """
    settings = run.settings.capture
    if settings.dataset:
        from distill.corpus.datasets.stage import capture_dataset

        return capture_dataset(run, listen, force)
    _check(settings)
    prompts = load_prompts(settings.prompts, settings.held_out, settings.limit)
    depends = {
        **{name: value for name, value in asdict(settings).items() if not name.startswith("dataset")},
        "teacher": {"model": run.settings.teacher.model},
        "seed": run.settings.seed,
        "texts": fingerprint([[prompt.text, prompt.held_out] for prompt in prompts]),
    }
    record = run.fresh(STAGE, depends)
    if record is not None and not force:
        listen(Event(STAGE, "done", "unchanged, skipped", data=record.summary))
        return record.summary
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if teachers is None:
            from distill.teacher import open_teacher

            teachers = open_teacher(run.settings.teacher, listen)
            for teacher in teachers:
                stack.callback(teacher.close)
        info = _same_model(run, teachers)
        tokenizer = teachers[0].tokenizer()
        if run.settings.teacher.weights:  # refused now, not after hours of asking
            from distill.teacher.find_weights import find_weights

            find_weights(run.settings.teacher, info, tokenizer, listen)
        store = stack.enter_context(TraceStore(run.traces))
        store.put_teacher(info, tokenizer)
        jobs = _jobs(prompts, info, settings, run.settings.seed)
        before = store.select({job.key: job.prompt.held_out for job in jobs})
        # Evenly over the sets, so that a capture that is cut short has seen something of each.
        left = [jobs[i] for i in evenly(len(jobs)) if not store.has(jobs[i].key)]
        listen(Event(STAGE, "start", f"asking {info.spec}", done=before, total=len(jobs), unit="prompts"))
        session = _Capture(store, teachers, left, run.settings.teacher.in_flight)
        _run_session(session, settings.minutes * 60, before, run, listen)
        if session.stored:
            info = teachers[0].describe()  # which engine answered is known by now
            store.put_teacher(info, teachers[0].tokenizer())
        summary = _summary(session, len(jobs), time.monotonic() - started)
        if not summary["responses"]:
            raise TeacherError(f"{info.spec}: answered none of {len(jobs)} prompts; `dream doctor` looks for the cause")
        digest = store.content_digest()
    run.record(STAGE, depends, {"traces.db": digest}, summary, time.monotonic() - started)
    _warn_of_cut(summary["cut_share"], settings.max_tokens, listen)
    listen(Event(STAGE, "done", data=summary))
    return summary


def _warn_of_cut(share: float, max_tokens: int, listen: Listener) -> None:
    """Once, at the end: what is cut off teaches nobody to stop."""
    if share > MANY_CUT:
        text = (
            f"{share:.0%} of the answers were cut by capture.max_tokens={max_tokens}, so a student hardly learns to "
            "end its own; raise capture.max_tokens, or ask for short answers with capture.system"
        )
        listen(Event(STAGE, "warning", text))


def _run_session(session: _Capture, seconds: float, before: int, run: Run, listen: Listener) -> None:
    try:
        session.run(seconds, before, listen)
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
        session.jobs.clear()  # threads still out there find nothing more to ask


def _check(settings: CaptureSettings) -> None:
    if not 0 <= settings.top_logprobs <= MAX_TOP_LOGPROBS:
        raise BadInput(f"capture.top_logprobs={settings.top_logprobs}: must be 0 to {MAX_TOP_LOGPROBS}")
    if settings.max_tokens < 1:
        raise BadInput(f"capture.max_tokens={settings.max_tokens}: must be at least 1")
    if settings.minutes < 0:
        raise BadInput(f"capture.minutes={settings.minutes}: must be 0 (no limit) or more")


def _same_model(run: Run, teachers: Sequence[Teacher]) -> TeacherInfo:
    """What the first host has; raises RunMismatch where another host has something else under that name."""
    first, *others = [teacher.describe() for teacher in teachers]
    for number, other in enumerate(others, start=1):
        if (other.digest, other.template_digest) != (first.digest, first.template_digest):
            hosts = run.settings.teacher.hosts
            host = hosts[number] if number < len(hosts) else f"host {number + 1}"
            raise RunMismatch(
                f"{host}: has another {first.name} (digest {other.digest[:12]}) than the first host "
                f"({first.digest[:12]}); pull the same model on all hosts"
            )
    return first


def _jobs(prompts: Sequence[Prompt], info: TeacherInfo, settings: CaptureSettings, seed: int) -> list[_Job]:
    options = GenerateOptions(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        top_logprobs=settings.top_logprobs,
        system=settings.system,
    )
    jobs: list[_Job] = []
    for prompt in prompts:
        # A seed of the prompt's own: its answer doesn't depend on which prompts are asked beside or before it.
        digest = hashlib.sha256(f"{seed}\0{prompt.text}".encode()).digest()
        mine = replace(options, seed=int.from_bytes(digest[:4], "big") & 0x7FFFFFFF)
        jobs.append(_Job(prompt, mine, TraceStore.key(info, prompt.text, mine)))
    return jobs


def _summary(session: _Capture, prompts: int, seconds: float) -> dict[str, Any]:
    stats = session.store.stats()
    asking = time.monotonic() - session.started
    return {
        "prompts": prompts,
        "responses": stats.responses,
        "held_out": stats.held_out,
        "failed": session.failed,
        "asked_now": session.received,
        "tokens": stats.tokens,
        "soft_share": round(stats.soft_tokens / stats.tokens, 4) if stats.tokens else 0.0,
        "bytes_per_token": round(stats.bytes_per_token, 2),
        "tokens_per_second": round(session.tokens / asking, 1) if session.tokens else 0.0,
        "done_reasons": stats.done_reasons,
        "cut_share": round(stats.done_reasons.get("length", 0) / stats.responses, 4) if stats.responses else 0.0,
        "slots": [pool.bound.slots for pool in session.pools],
        "in_flight": [pool.bound.limit for pool in session.pools],
        "answered_by": [pool.teacher.describe().version for pool in session.pools],
        "seconds": round(seconds, 2),
    }
