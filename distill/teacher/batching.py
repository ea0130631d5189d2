"""Many requests answered together: one thread owns the model, and rows join and leave the batch as they come and end.

Shape legend: N tokens of an answer, K alternatives.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from distill.backbone.batch import Batch, Row, Step
from distill.backbone.prepared import Prepared
from distill.errors import PromptRefused, TeacherUnavailable
from distill.teacher.protocol import UNKNOWN_ID, GenerateOptions

GATHER = 0.01
"""Seconds without a new request after which an empty batch begins: read together, prompts cost less."""
GROUP = 16
"""A running batch takes in a sixteenth of its rows at once …"""
PATIENCE = 4
"""… or what there is after so many steps."""


@dataclass(frozen=True)
class Written:
    """An answer: ids (N,) int32, logprobs (N,) float32, top_ids (N, K) int32, top_logprobs (N, K) float32.

    ended: its last id ended it. reading, writing: seconds from its turn to its first step, and from there to its end.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    ended: bool
    reading: float
    writing: float


@dataclass(eq=False)
class _Row(Row):
    """A request and what was written of its answer so far."""

    future: Future[Written] = field(default_factory=Future[Written])
    taken: float = 0.0
    begun: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.how.top_logprobs
        self.ids = np.empty(self.room, np.int32)
        self.logprobs = np.empty(self.room, np.float32)
        self.top_ids = np.full((self.room, width), UNKNOWN_ID, np.int32)
        self.top_logprobs = np.full((self.room, width), -np.inf, np.float32)

    def keep(self, step: Step, i: int) -> None:
        """Its token of a step, where it was row i."""
        at, kept = self.count - 1, min(self.how.top_logprobs, step.top_ids.shape[1])
        self.ids[at], self.logprobs[at] = step.tokens[i], step.logprobs[i]
        self.top_ids[at, :kept], self.top_logprobs[at, :kept] = step.top_ids[i, :kept], step.top_logprobs[i, :kept]

    def written(self, ended: bool) -> Written:
        whole = slice(self.count)
        seconds = self.begun - self.taken, time.monotonic() - self.begun
        return Written(
            self.ids[whole], self.logprobs[whole], self.top_ids[whole], self.top_logprobs[whole], ended, *seconds
        )


class Batcher:
    """Answers requests with one model. Thread-safe.

    slots: rows at once at most; fewer where their past would take more than `memory` bytes. context: tokens of a
    prompt and its answer at most. stop_ids end an answer. threads: torch's; 0: as many as it has now.
    """

    def __init__(
        self, weights: Prepared, *, slots: int, context: int, stop_ids: frozenset[int], memory: int, threads: int = 0
    ) -> None:
        self.weights = weights
        self.slots = slots
        self.context = context
        self._stop_ids = stop_ids
        self._threads = threads
        self._batch = Batch[_Row](weights, slots, memory)
        self._waiting: deque[_Row] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._hungry = 0
        self.moved = time.monotonic()
        """When it last did anything."""
        self._thread = threading.Thread(target=self._work, name="torch-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], options: GenerateOptions) -> Future[Written]:
        """Ask for a continuation of a prompt of at least one token. Raises PromptRefused where it doesn't fit."""
        if len(prompt) >= self.context:
            raise PromptRefused(
                f"the prompt's {len(prompt)} tokens are too many: it exceeds the available context size "
                f"({self.context} tokens); shorten it, or raise teacher.context"
            )
        row = _Row(prompt, min(options.room, self.context - len(prompt)), options)
        with self._wake:
            if self._closed:
                raise TeacherUnavailable("the engine is closed")
            self._waiting.append(row)
            self._wake.notify()
        return row.future

    def close(self) -> None:
        """Stop after the present step and free the memory; what is not answered yet fails with TeacherUnavailable."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        problem: BaseException = TeacherUnavailable("the engine was closed before it had answered")
        try:
            while self._admit():
                self._step()
                self.moved = time.monotonic()
        except BaseException as error:  # whoever waits must hear of it
            problem = error
        with self._wake:
            self._closed = True
            left = [*self._batch.rows, *self._waiting]
            self._waiting.clear()
        for row in left:
            row.future.set_exception(problem)
        self._batch = Batch[_Row](self.weights, 0, 0)  # the memory is free
        torch.set_num_threads(before)

    def _admit(self) -> bool:
        """Take in requests that wait; with nothing to do, wait for one. False: closed."""
        with self._wake:
            if not self._batch.rows:
                self._wake.wait_for(lambda: self._closed or self._waiting)
                while len(self._waiting) < self.slots and not self._closed:
                    before = len(self._waiting)
                    self._wake.wait(GATHER)
                    if len(self._waiting) == before:
                        break
            if self._closed:
                return False
            self._hungry += bool(self._waiting)
            enough = len(self._waiting) * GROUP >= self.slots or self._hungry > PATIENCE
            new = self._batch.fitting(self._waiting) if enough or not self._batch.rows else []
        self.moved = time.monotonic()
        if new:
            self._hungry = 0
            self._read(new)
        return True

    def _read(self, new: list[_Row]) -> None:
        taken = time.monotonic()
        self._batch.join(new, max(row.columns for row in (*self._batch.rows, *new)))
        begun = time.monotonic()
        for row in new:
            row.taken, row.begun = taken, begun

    def _step(self) -> None:
        step, rows = self._batch.step(), self._batch.rows
        for i in reversed(range(len(rows))):  # from the end: who takes a free place has been looked at
            row = rows[i]
            row.keep(step, i)
            if (ended := row.next in self._stop_ids) or row.count == row.room:
                self._batch.leave(i)
                row.future.set_result(row.written(ended))
