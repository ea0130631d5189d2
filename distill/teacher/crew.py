"""All hosts of one teacher at one queue of work: whoever is free takes the next, and some of them may fail.

A host that fails many times in a row, or has the model no more, is given up for a while, then tried again with one
question: none is given up for good. A question that a host refuses or fails at goes to another, whose last word was an
answer where there is one; after a few it is given up and told.
"""

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from distill.errors import DistillError, ModelNotFound, PromptRefused, RunMismatch, TeacherError
from distill.events import Event, Listener, silent
from distill.teacher.in_flight import InFlight
from distill.teacher.protocol import Teacher, TeacherInfo

TRIES = 3
"""Hosts that are asked a question at most."""
GIVE_UP_AFTER = 8
"""Failures in a row after which a host is given up for a while."""
FIRST_REST, LONGEST_REST = 1.0, 60.0
"""Seconds of that while: the first, and, doubled each time that it fails again, the longest."""
PATIENCE = 60.0
"""Seconds for which nobody of several may answer. One that is alone waits for itself, by `teacher.retries`."""
GREETING = 5.0
"""Seconds that the others have to say who they are, once one has. Later they are asked again."""
TICK = 0.2
"""Seconds after which a silent crew says so."""

AT_ONCE = 4
"""Requests in flight, where short answers are asked for, at a server that doesn't say how many it serves at once."""
MANY_LISTED = 10
"""Questions without an answer that are told one by one."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False)
class Host:
    """One teacher, and how it fares. `info` is None where it hasn't said who it is; `until` is when it is asked again;
    `rests` counts how often it was given up since its last answer, `given_up` how often in all. `gone`: it hasn't the
    model, as it said last; what it was asked before that and answers now says nothing else."""

    teacher: Teacher
    name: str
    bound: InFlight = field(default_factory=InFlight)
    info: TeacherInfo | None = None
    running: int = 0
    failures: int = 0
    rests: int = 0
    given_up: int = 0
    until: float = 0.0
    gone: bool = False

    @property
    def awake(self) -> bool:
        return time.monotonic() >= self.until

    def answered(self) -> None:
        self.failures = self.rests = 0

    def failed(self, lasting: bool) -> str:
        """What to say of it. What was in flight when it was given up doesn't count again. lasting: whether many in a
        row are its fault."""
        self.failures += 1
        if lasting and self.awake and (self.rests or self.failures >= GIVE_UP_AFTER):
            return f"given up for {self.rest():g} s"
        return "asking another host" if self.failures == 1 else ""

    def leave(self) -> None:
        """It has the model no more, or another: it is asked who it is again, after the longest rest."""
        self.gone = True
        self.rests = max(self.rests, math.ceil(math.log2(LONGEST_REST / FIRST_REST)))
        self.rest()

    def rest(self) -> float:
        """For so many seconds."""
        seconds = min(LONGEST_REST, FIRST_REST * 2.0**self.rests)
        self.until = time.monotonic() + seconds
        self.rests += 1
        self.given_up += 1
        return seconds


@dataclass(frozen=True)
class Outcome(Generic[T, R]):
    """Of one question: its answer, or, after all tries, why there is none."""

    what: T
    answer: R | None
    problem: DistillError | None = None


@dataclass(eq=False)
class _Job(Generic[T]):
    """failed: hosts that failed at it, each with its `given_up` at that time."""

    what: T
    failed: dict[Host, int] = field(default_factory=dict[Host, int])
    problem: DistillError | None = None

    @property
    def tried(self) -> set[Host]:
        """Hosts that failed at it for no fault of their own: none that was given up then, or already had been."""
        return {host for host, given_up in self.failed.items() if host.given_up == given_up}


@dataclass(frozen=True)
class _Reply(Generic[T, R]):
    """note: what to say of its host, where it failed."""

    job: _Job[T]
    answer: R | None
    problem: BaseException | None
    note: str


class Crew(Generic[T, R]):
    """Asks everybody who they are; `run` hands out the questions.

    ask: one question to one teacher; called from many threads. at_once: requests in flight at a host that doesn't say
    how many it serves, 0: found out, by `service`, the seconds that a slot was busy with an answer. fixed: whatever it
    says. Raises, beside what the first host raises where none answers, RunMismatch where hosts have different models
    under one name, ModelNotFound where one has none.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        ask: Callable[[Teacher, T], R],
        *,
        stage: str,
        listen: Listener = silent,
        fixed: int = 0,
        at_once: int = 0,
        service: Callable[[R], float] = lambda answer: 0.0,
    ) -> None:
        self.hosts = [
            Host(teacher, str(getattr(teacher, "host", "")) or f"host {number}")
            for number, teacher in enumerate(teachers, 1)
        ]
        self._ask, self._service = ask, service
        self._stage, self._listen = stage, listen
        self.received = 0
        self._open = 0
        self._new: deque[_Job[T]] = deque()
        self._again: list[_Job[T]] = []
        self._replies: queue.SimpleQueue[_Reply[T, R]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._answered = time.monotonic()
        self._any = False
        self._first = self.hosts[0]
        self._greet()
        for host in self.hosts:
            host.bound = InFlight(host.teacher.slots or at_once or None, fixed)

    # Who they are.
    @property
    def first(self) -> Host:
        """The first of those that said at the start who they are: what the others are compared with."""
        return self._first

    @property
    def info(self) -> TeacherInfo:
        assert self._first.info is not None
        return self._first.info

    def _greet(self) -> None:
        greeted: queue.SimpleQueue[tuple[Host, TeacherInfo | BaseException]] = queue.SimpleQueue()

        def greet(host: Host) -> None:
            try:
                said = host.teacher.describe()
            except BaseException as error:  # carried to the thread that waits, bugs too
                said = error
            host.until = 0.0  # where nobody waits any more, it is asked again with its first question
            greeted.put((host, said))

        for host in self.hosts:
            host.until = math.inf
            threading.Thread(target=greet, args=(host,), daemon=True).start()
        self._hear(greeted)

    def _hear(self, greeted: queue.SimpleQueue[tuple[Host, TeacherInfo | BaseException]]) -> None:
        """Take in what they say, until one has said who it is and the others had their time."""
        infos: dict[Host, TeacherInfo] = {}
        problems: dict[Host, BaseException] = {}
        end = math.inf
        with contextlib.suppress(queue.Empty):
            while len(infos) + len(problems) < len(self.hosts):
                host, said = greeted.get(timeout=max(0.0, end - time.monotonic()) if infos else None)
                if isinstance(said, BaseException):
                    problems[host] = said
                else:
                    infos[host] = said
                    end = min(end, time.monotonic() + GREETING)
        for host in self.hosts:
            if problem := problems.get(host):
                if not infos or not isinstance(problem, TeacherError) or isinstance(problem, ModelNotFound):
                    raise problem
                host.rest()
        self._first = next(host for host in self.hosts if host in infos)
        self._first.info = infos[self._first]
        for host in self.hosts:
            if host in infos:
                self._check(host, infos[host])
                host.info = infos[host]
            else:
                problem = problems.get(host, f"{host.name}: doesn't say who it is within {GREETING:g} s")
                self._listen(Event(self._stage, "warning", f"going on without it for now: {problem}"))

    def _check(self, host: Host, info: TeacherInfo) -> None:
        if (info.digest, info.template_digest) != (self.info.digest, self.info.template_digest):
            getattr(host.teacher, "forget", lambda: None)()  # it may have the right one by the next time
            raise RunMismatch(
                f"{host.name}: has another {self.info.name} (digest {info.digest[:12]}) than {self.first.name} "
                f"({self.info.digest[:12]}); pull the same model on all hosts"
            )

    # Who asks what.
    @property
    def in_flight(self) -> int:
        return sum(host.running for host in self.hosts)

    def run(self, questions: Iterable[T], seconds: float = 0.0, some: bool = False) -> Iterator[Outcome[T, R] | None]:
        """Outcomes as they come, each question's once; None now and then where none comes. After `seconds`, if any,
        nothing new is asked. some: whether others like these were answered before.

        Raises a bug as it is; ModelNotFound where no host has the model any more; TeacherError where all are given up.
        """
        self._any = self._any or some
        self._new.extend(_Job(what) for what in questions)
        self._open += len(self._new)
        end = time.monotonic() + seconds if seconds else math.inf
        self._answered = time.monotonic()
        while True:
            if time.monotonic() > end:
                self.stop()
            self._fill()
            if not self._open:
                return
            try:
                outcome = self._take_in(self._replies.get(timeout=TICK))
            except queue.Empty:
                yield from self._hopeless()
                yield None
                continue
            if outcome is not None:
                self._open -= 1
                yield outcome

    def rescue(self) -> Iterator[Outcome[T, R]]:
        """The answers that have come but were not told yet."""
        with contextlib.suppress(queue.Empty):
            while True:
                reply = self._replies.get_nowait()
                if reply.answer is not None:
                    yield Outcome(reply.job.what, reply.answer)

    def stop(self) -> None:
        """Ask nothing more."""
        with self._lock:
            self._open -= len(self._new) + len(self._again)
            self._new.clear()
            self._again.clear()

    def _fill(self) -> None:
        """Start threads up to each host's bound. Daemons: nobody waits for a server in order to quit."""
        for host in self.hosts:
            while (job := self._next(host)) is not None:
                threading.Thread(target=self._work, args=(host, job), daemon=True).start()

    def _next(self, host: Host) -> _Job[T] | None:
        with self._lock:
            if not host.awake or host.running >= self._limit(host):
                return None
            job = None
            if not (host.rests and self._new):  # what others failed at is no trial
                job = next((job for job in self._again if self._may(host, job)), None)
            if job is not None:
                self._again.remove(job)
            elif self._new:
                job = self._new.popleft()
            else:
                return None
            host.running += 1
            return job

    def _limit(self, host: Host) -> int:
        """As many as it serves, but no more than its share of what is left; one where it was given up before."""
        awake = sum(other.awake for other in self.hosts)
        left = len(self._new) + len(self._again) + self.in_flight
        return 1 if host.rests else min(host.bound.limit, -(-left // awake))

    def _may(self, host: Host, job: _Job[T]) -> bool:
        """Whether a question that another host failed at is for this one."""
        if job.failed.get(host) == host.given_up:  # at once: one that refuses everything looks through all of it
            return False
        tried = job.tried
        if len(tried) >= TRIES:
            return False
        return not host.failures or not any(o.awake and not o.failures and o not in tried for o in self.hosts)

    def _work(self, host: Host, job: _Job[T] | None) -> None:
        while job is not None:
            started = time.monotonic()
            answer, problem = None, None
            try:
                if said := host.info is None or host.gone:
                    info = host.teacher.describe()
                    self._check(host, info)
                    host.info = info
                answer = self._ask(host.teacher, job.what)
                host.gone = host.gone and not said  # not before: it may tell who it is, and have no such model
            except BaseException as error:  # carried to the thread that runs, bugs too
                problem = error
            note = self._note(host, job, problem, started, 0.0 if answer is None else self._service(answer))
            self._replies.put(_Reply(job, answer, problem, note))
            job = self._next(host)

    def _note(self, host: Host, job: _Job[T], problem: BaseException | None, started: float, service: float) -> str:
        """At once, before the host takes the next: one that fails fast would else fail at them all."""
        now = time.monotonic()
        with self._lock:
            host.running -= 1
            if problem is None or isinstance(problem, PromptRefused):
                host.answered()
                self._answered = now
                host.bound.completed(now, now - started, service)
                self._any = self._any or problem is None
            if isinstance(problem, PromptRefused):  # it is the prompt's fault, or this host takes less than others
                job.failed[host] = host.given_up
                job.problem = problem
            elif isinstance(problem, DistillError):
                if isinstance(problem, ModelNotFound | RunMismatch):
                    host.leave()
                job.failed[host] = host.given_up if host.awake else -1
                job.problem = problem
                return host.failed(lasting=not self._ending)
        return ""

    @property
    def _ending(self) -> bool:
        """Whether what is left are but the questions that can't be answered: then nobody is given up for them."""
        return self._any and len(self._new) < GIVE_UP_AFTER

    # What comes of it.
    def _take_in(self, reply: _Reply[T, R]) -> Outcome[T, R] | None:
        """None where it is to be asked again, or given up in the end."""
        self.received += 1
        problem = reply.problem
        if problem is None:
            return Outcome(reply.job.what, reply.answer)
        if not isinstance(problem, DistillError):
            raise problem
        if isinstance(problem, PromptRefused):
            if len(reply.job.tried) >= min(TRIES, sum(not host.gone for host in self.hosts)):
                return Outcome(reply.job.what, None, problem)
        else:
            self._check_anybody(problem)
        if reply.note and len(self.hosts) > 1:
            self._listen(Event(self._stage, "warning", f"{reply.note}: {problem}"))
        with self._lock:
            self._again.append(reply.job)
        return None

    def _check_anybody(self, problem: DistillError) -> None:
        """Raises where nobody is left to be asked."""
        if all(host.gone for host in self.hosts):
            raise problem
        if self._ending or any(host.awake for host in self.hosts):
            return
        if len(self.hosts) == 1 or time.monotonic() - self._answered > PATIENCE:
            kind = type(problem) if isinstance(problem, TeacherError) else TeacherError
            kept = "what was answered is kept, the same command goes on from there"
            raise kind(f"{problem} (given up after {GIVE_UP_AFTER} failures in a row; {kept})")

    def _hopeless(self) -> Iterator[Outcome[T, R]]:
        """Once nothing else is going on: the questions that nobody is left for."""
        with self._lock:
            idle = self._open == len(self._new) + len(self._again)
            awake = [host for host in self.hosts if host.awake] if idle else []
            lost = [job for job in self._again if awake and not any(self._may(host, job) for host in awake)]
            self._again = [job for job in self._again if job not in lost]
            self._open -= len(lost)
        for job in lost:
            yield Outcome(job.what, None, job.problem)
