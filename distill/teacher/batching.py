"""Many requests answered together: one thread owns the model, and rows join and leave the batch as they come and end.

What a request is answered depends on its prompt and its seed, never on its neighbours (but for float rounding): each
row draws its own uniform numbers beforehand.

Shape legend: B rows, N tokens of an answer, K alternatives, V vocabulary.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.backbone.likeliest import Likeliest, draw, likeliest
from distill.backbone.prepared import Prepared
from distill.backbone.rows import Rows
from distill.errors import PromptRefused, TeacherUnavailable
from distill.teacher.protocol import UNKNOWN_ID, GenerateOptions

GATHER = 0.01
"""Seconds without a new request after which an empty batch begins: read together, prompts cost less."""
GROUP = 16
"""A running batch takes in a sixteenth of its rows at once …"""
PATIENCE = 4
"""… or what there is after so many steps."""
NARROW = 256
"""Up to this top_k a row draws from its likeliest tokens; else (0 too) its whole distribution is sorted."""


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


@dataclass
class _Row:
    """A request and what was written so far: `count` tokens of at most `room`."""

    prompt: list[int]
    room: int
    options: GenerateOptions
    future: Future[Written] = field(default_factory=Future[Written])
    count: int = 0
    taken: float = 0.0
    begun: float = 0.0

    def __post_init__(self) -> None:
        width = self.options.top_logprobs
        self.next = self.prompt[-1]
        self.ids = np.empty(self.room, np.int32)
        self.logprobs = np.empty(self.room, np.float32)
        self.top_ids = np.full((self.room, width), UNKNOWN_ID, np.int32)
        self.top_logprobs = np.full((self.room, width), -np.inf, np.float32)
        warm = self.options.temperature > 0
        self.uniforms = np.random.default_rng(self.options.seed % 2**64).random(self.room) if warm else None
        self.narrow = not warm or 0 < self.options.top_k <= NARROW

    @property
    def columns(self) -> int:
        return len(self.prompt) + self.room

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
        self._memory = memory
        self._threads = threads
        self._rows = Rows(weights)
        self._batch: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._hungry = 0
        self.moved = time.monotonic()
        """When it last did anything."""
        self._logits = torch.empty(0)
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
            left = [*self._batch, *self._waiting]
            self._waiting.clear()
        for row in left:
            row.future.set_exception(problem)
        self._batch, self._rows, self._logits = [], Rows(self.weights), torch.empty(0)
        torch.set_num_threads(before)

    def _admit(self) -> bool:
        """Take in requests that wait; with nothing to do, wait for one. False: closed."""
        with self._wake:
            if not self._batch:
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
            new = self._fitting() if enough or not self._batch else []
        self.moved = time.monotonic()
        if new:
            self._hungry = 0
            self._read(new)
        return True

    def _fitting(self) -> list[_Row]:
        """Of those that wait, in their order, as many as there are slots and memory for; one, if the batch is empty."""
        new: list[_Row] = []
        columns = max((row.columns for row in self._batch), default=0)
        while self._waiting and (count := len(self._batch) + len(new)) < self.slots:
            columns = max(columns, self._waiting[0].columns)
            if count and (count + 1) * Rows.bytes_of(self.weights, columns) > self._memory:
                break
            new.append(self._waiting.popleft())
        return new

    def _read(self, new: list[_Row]) -> None:
        taken = time.monotonic()
        self._batch += new
        self._rows.reserve(len(self._batch), max(row.columns for row in self._batch))
        self._rows.join([row.prompt[:-1] for row in new])  # the last token is read by the first step
        begun = time.monotonic()
        for row in new:
            row.taken, row.begun = taken, begun
        if len(self._logits) < len(self._batch):
            shape = (len(self._batch), self.weights.config.vocab_size)
            self._logits = torch.empty(shape, device=self.weights.embed.device)

    def _step(self) -> None:
        batch, device = self._batch, self.weights.embed.device
        states = self._rows.advance(torch.tensor([row.next for row in batch], device=device))
        width = max(row.options.top_logprobs for row in batch)
        count = max(width, 1, *(row.options.top_k for row in batch if row.narrow))
        found = likeliest(self.weights, states, count, self._logits)
        chosen = self._choose(found)
        logprobs = found.logprobs.gather(1, chosen[:, None])[:, 0].cpu().numpy()
        tokens = chosen.tolist()
        top_ids, top_logprobs = (x[:, :width].cpu().numpy() for x in (found.top_ids, found.top_logprobs))
        for i, row in enumerate(batch):
            at, kept = row.count, min(row.options.top_logprobs, top_ids.shape[1])
            row.next = row.ids[at] = tokens[i]
            row.logprobs[at] = logprobs[i]
            row.top_ids[at, :kept], row.top_logprobs[at, :kept] = top_ids[i, :kept], top_logprobs[i, :kept]
            row.count += 1
        for i in reversed(range(len(batch))):  # from the end: who takes a free place has been looked at
            row = batch[i]
            if (ended := row.next in self._stop_ids) or row.count == row.room:
                self._rows.leave(i)
                batch[i] = batch[-1]
                batch.pop()
                row.future.set_result(row.written(ended))

    def _choose(self, found: Likeliest) -> Tensor:
        """The next token of each row, (B,)."""
        chosen = found.top_ids[:, 0].clone()
        for narrow in (True, False):
            rows = [i for i, row in enumerate(self._batch) if row.uniforms is not None and row.narrow is narrow]
            if rows:
                at = torch.tensor(rows, device=chosen.device)
                values, ids = found.top_logprobs[at], found.top_ids[at]
                if not narrow:
                    values, ids = found.logprobs[at].sort(descending=True)
                place = draw(values, *self._how(rows, values.shape[1], chosen.device))
                chosen[at] = ids.gather(1, place[:, None])[:, 0]
        return chosen

    def _how(self, rows: list[int], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """top_k, top_p, temperature and a uniform number of each of these rows."""
        those = [self._batch[i] for i in rows]
        top_k = torch.tensor([min(row.options.top_k or size, size) for row in those], device=device)
        floats = [
            (row.options.top_p, row.options.temperature, row.uniforms[row.count])
            for row in those
            if row.uniforms is not None
        ]
        top_p, temperature, uniform = torch.tensor(floats, dtype=torch.float64, device=device).unbind(1)
        return top_k, top_p, temperature, uniform
