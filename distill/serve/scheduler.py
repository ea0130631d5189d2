"""One thread writes all answers of all students: who asks joins a student's batch, and is told each token as it comes.

Its listeners live in asyncio's loops: what a step wrote is handed over once a step, not once a token.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.backbone.batch import Batch, Row
from distill.backbone.generate import Grammar
from distill.backbone.prepared import Prepared
from distill.errors import DistillError

T = TypeVar("T")


class Busy(DistillError):
    """More requests wait than the queue takes, or the server is stopping."""

    status = 503


@dataclass(frozen=True)
class Wrote:
    """A token: its log-probability, and the likeliest in its place (K,), natural and at T = 1."""

    token: int
    logprob: float
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


@dataclass(eq=False)
class Job(Row):
    """A row, and who listens. It ends with one of `stop_ids`, with its room, or when it is cancelled.

    events: tokens, and last None, or what went wrong. arrived: set when there are any. taken, begun: when the reading
    of its prompt began and ended.
    """

    stop_ids: frozenset[int] = frozenset()
    cancelled: bool = False
    taken: float = 0.0
    begun: float = 0.0
    events: "deque[Wrote | BaseException | None]" = field(default_factory=deque[Any])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loop, self.arrived = asyncio.get_running_loop(), asyncio.Event()


class Lane:
    """One student's batch, and who waits for a place in it."""

    def __init__(self, weights: Prepared, slots: int, memory: int, grammar: Grammar) -> None:
        self._how = weights, slots, memory, grammar
        self.waiting: deque[Job] = deque()
        self.clear()

    def clear(self) -> None:
        self.batch = Batch[Job](*self._how)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.batch.rows)


class Scheduler:
    """queue: requests that may wait for a place, of all students together. Thread-safe."""

    def __init__(self, queue: int = 512) -> None:
        self.queue = queue
        self.lanes: list[Lane] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._told: dict[asyncio.AbstractEventLoop, list[tuple[Job, Wrote | BaseException | None]]] = {}
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, lane: Lane, job: Job) -> None:
        """Raises Busy."""
        with self._wake:
            if self._closed or sum(len(each.waiting) for each in self.lanes) >= self.queue:
                raise Busy("server busy, please try again.  maximum pending requests exceeded")
            lane.waiting.append(job)
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have something else done with a model, between two steps."""
        future = Future[T]()
        with self._wake:
            if self._closed or len(self._calls) >= self.queue:
                raise Busy("server busy, please try again.  maximum pending requests exceeded")
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def cancel(self, job: Job) -> None:
        """Nobody listens any more: it leaves before the next step."""
        job.cancelled = True

    def close(self) -> None:
        """Stop after the present step; who still listens is told."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _ready(self) -> bool:
        return self._closed or bool(self._calls) or any(lane.busy for lane in self.lanes)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._ready)
                if self._closed:
                    break
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
                lanes = [lane for lane in self.lanes if lane.busy]
            for function, future in calls:
                self._call(function, future)
            for lane in lanes:
                self._advance(lane)
            self._deliver()
        for lane in self.lanes:
            self._fail(lane, Busy("the server is stopping"))
        for _, future in self._calls:
            future.cancel()
        self._deliver()

    def _call(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _advance(self, lane: Lane) -> None:
        try:
            with self._wake:
                for job in [job for job in lane.waiting if job.cancelled]:
                    lane.waiting.remove(job)
            for i in reversed(range(len(lane.batch.rows))):
                if lane.batch.rows[i].cancelled:
                    lane.batch.leave(i)
            with self._wake:
                new = lane.batch.fitting(lane.waiting)
            if new:
                taken = time.monotonic()
                lane.batch.join(new)
                for job in new:
                    job.taken, job.begun = taken, time.monotonic()
            if lane.batch.rows:
                self._step(lane.batch)
            if not lane.batch.rows:
                lane.clear()  # the memory of many rows is not kept for none
        except Exception as error:  # whoever listens must hear of it, and the others are served on
            self._fail(lane, error)

    def _step(self, batch: Batch[Job]) -> None:
        step, rows = batch.step(), batch.rows
        for i in reversed(range(len(rows))):  # from the end: who takes a free place has been looked at
            job, width = rows[i], rows[i].how.top_logprobs
            self._tell(
                job,
                Wrote(step.tokens[i], float(step.logprobs[i]), step.top_ids[i, :width], step.top_logprobs[i, :width]),
            )
            if job.next in job.stop_ids or job.count == job.room:
                self._tell(job, None)
                batch.leave(i)

    def _fail(self, lane: Lane, error: Exception) -> None:
        with self._wake:
            left = [*lane.batch.rows, *lane.waiting]
            lane.waiting.clear()
        for job in left:
            self._tell(job, error)
        lane.clear()

    def _tell(self, job: Job, event: Wrote | BaseException | None) -> None:
        self._told.setdefault(job.loop, []).append((job, event))

    def _deliver(self) -> None:
        for loop, told in self._told.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_hand_over, told)
        self._told = {}


def _hand_over(told: list[tuple[Job, Wrote | BaseException | None]]) -> None:
    for job, event in told:
        job.events.append(event)
        job.arrived.set()
