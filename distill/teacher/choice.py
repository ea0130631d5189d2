"""Which engine is faster here: found out by a trial of a few seconds, once there is enough to answer."""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from distill.errors import DistillError
from distill.events import Event, Listener
from distill.teacher.engine import Engine
from distill.teacher.llama_engine import LlamaEngine
from distill.teacher.protocol import GenerateOptions, Response
from distill.teacher.torch_engine import TorchEngine

ENOUGH = 2
"""Times llama.cpp's slots that must be in flight for a trial: few requests are answered at once by what is loaded."""
GATHER = 0.02
"""Seconds in which they come, where they come together."""
LONELY = 3
"""After so many requests that came alone, nobody waits for others any more."""


class MeasuredEngine:
    """llama.cpp until many requests are in flight at once; then, for good, what wrote more tokens a second."""

    def __init__(self, llama: LlamaEngine, ours: TorchEngine, listen: Listener) -> None:
        self._llama, self._ours, self._listen = llama, ours, listen
        self._chosen: Engine | None = None
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._in_flight = 0
        self._lonely = 0

    @property
    def slots(self) -> int:
        return max(self._ours.slots, self._llama.slots) if self._chosen is None else self._chosen.slots

    @property
    def version(self) -> str:
        """Until it is chosen, both: what came alone was answered by the first."""
        return f"{self._llama.version} or {self._ours.version}" if self._chosen is None else self._chosen.version

    def answer(self, prompt: str, options: GenerateOptions) -> Response:
        with self._counted():
            if self._chosen is None:
                with self._lock:
                    if self._chosen is None and self._many():
                        self._chosen = self._faster(prompt, options)
            return (self._chosen or self._llama).answer(prompt, options)

    def close(self) -> None:
        self._ours.close()

    @contextmanager
    def _counted(self) -> Generator[None]:
        with self._counting:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._counting:
                self._in_flight -= 1

    def _many(self) -> bool:
        enough = ENOUGH * self._llama.slots
        if self._in_flight < enough and self._lonely < LONELY:
            time.sleep(GATHER)
            self._lonely += self._in_flight == 1
        return self._in_flight >= enough

    def _faster(self, prompt: str, options: GenerateOptions) -> Engine:
        rows = min(self._in_flight, self._ours.slots)
        try:
            ours = self._ours.speed(rows, options)
            theirs = self._llama.speed(prompt, options, ours)
            if ours > theirs:
                self._ours.load()
        except DistillError as error:
            self._listen(Event("teacher", "note", f"answers come from llama.cpp ({error})"))
            return self._llama
        chosen: Engine = self._ours if ours > theirs else self._llama
        if chosen is self._llama:
            self._ours.close()
        beside = f"{theirs:.0f} ({self._llama.slots} at once)" if theirs else "less than half as many"
        found = f"our engine wrote {ours:.0f} tokens/s in a trial ({rows} at once), llama.cpp {beside}"
        self._listen(Event("teacher", "note", f"answers come from {chosen.version}: {found}"))
        return chosen
