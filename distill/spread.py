"""Work on a run's answers in parts, by as many processes as there are cores.

Parts are the same however many do them, and come in order, so that what is made of them is, too. A process is one of
Python's own that is told tasks on stdin and answers on stdout: it ends when whoever started it has gone.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeVar

from distill import errors
from distill.errors import DistillError

Task = TypeVar("Task")
Work = Callable[[Any], AbstractContextManager[Callable[[Any], bytes]]]
"""Told what it is about, once in each process; then it does tasks. A function of a module; all that it is told is
JSON."""

WORTH = 8192
"""Answers that are worth a process, where each takes a fraction of a millisecond: it takes a second to start."""
AHEAD = 2
"""Tasks for each process that are begun before the first of them is wanted."""
_PROGRAM = """\
import sys
sys.modules["torch"] = None  # spaCy would load it, for seconds, and none of this needs it
from distill.spread import main
main(sys.stdin.buffer, sys.stdout.buffer)
"""
_DONE, _FAILED = b"=", b"!"
"""Begins what came of a task, or why a process can't do it."""


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worth(processes: int, answers: int) -> int:
    """Processes for so many answers, that of `processes` (0: as many as cores) are worth it."""
    return min(processes or cores(), answers // WORTH)


def spread(work: Work, about: Any, tasks: Iterable[Task], processes: int) -> Generator[tuple[Task, bytes]]:
    """Each task with what the work makes of it, in order; of both no more are held than keep all processes busy.

    processes: of them one does its tasks here. Raises what the work raises; DistillError where a process ends before
    its time.
    """
    if processes < 2:
        with work(about) as do:
            yield from ((task, do(task)) for task in tasks)
        return
    workers = [Worker(work, about) for _ in range(processes)]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def ask(task: Task) -> bytes:
        worker = idle.get()
        try:
            return worker.ask(task)
        finally:
            idle.put(worker)

    pool, flying = ThreadPoolExecutor(processes), deque[tuple[Task, Future[bytes]]]()

    def first() -> tuple[Task, bytes]:
        task, asked = flying.popleft()
        return task, asked.result()

    try:
        for task in tasks:
            flying.append((task, pool.submit(ask, task)))
            if len(flying) > AHEAD * processes:
                yield first()
        while flying:
            yield first()
    finally:
        for worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class Worker:
    """A process that does tasks."""

    def __init__(self, work: Work, about: Any) -> None:
        self._begin: Sequence[Any] = [work.__module__, work.__name__, about]
        self._told = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "BLIS", "RAYON")}
        self._process: Any = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],  # -P: not the current folder's modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
            start_new_session=True,  # Ctrl-C is the business of whoever started it
        )

    def ask(self, task: Any) -> bytes:
        with contextlib.suppress(OSError, ValueError):  # it has gone, or was ended
            for what in (self._begin, task) if self._begin else (task,):
                self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._begin = ()
            self._process.stdin.flush()
            size = int.from_bytes(self._process.stdout.read(8))
            said = self._process.stdout.read(size)
            if said[:1] == _FAILED:
                kind, told = json.loads(said[1:])
                raise getattr(errors, kind)(told)
            if size and len(said) == size:
                return said[1:]
        self._told.seek(0)
        why = (self._told.read().decode(errors="replace").strip().splitlines() or ["it was killed"])[-1]
        text = f"a process that reads answers ended with code {self._process.wait()} ({why})"
        raise DistillError(f"{text}; with mine.processes=1 this one reads them all")

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """After `kill`."""
        with contextlib.suppress(OSError):
            self._process.communicate()
        self._told.close()


def main(asked: BinaryIO, answers: BinaryIO) -> None:
    """What such a process does: it is told a work and what it is about, then tasks, a line each. What comes of one is
    told with its size before it."""
    module, name, about = json.loads(asked.readline())
    with contextlib.ExitStack() as stack:
        work = cache(lambda: stack.enter_context(getattr(import_module(module), name)(about)))
        for line in asked:
            try:
                said = _DONE + work()(json.loads(line))
            except DistillError as error:
                said = _FAILED + json.dumps([type(error).__name__, str(error)]).encode()
            answers.write(len(said).to_bytes(8) + said)
            answers.flush()
