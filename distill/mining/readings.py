"""What the syntax miner reads in all answers of a run: in parts, on as many cores as there are, and kept on disk until
all is read, as only then it shows what is rare.

Parts are the same however many processes read them, and come in order, so that what is found is, too. A process is one
of Python's own that is told keys on stdin and writes lines to stdout: it ends when whoever started it has gone.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from distill import errors
from distill.corpus.traces import TraceStore
from distill.errors import DistillError
from distill.mining.clauses import Candidate
from distill.mining.syntax_miner import Found, load_parser, read_texts
from distill.mining.thinking import thought_aloud
from distill.run import sweep

if TYPE_CHECKING:
    from distill.cluster import Cluster

PART = 512
"""Answers that are read together."""
PARTS = 4
"""That are worth a process: it takes seconds to start."""
_PROGRAM = """\
import sys
sys.modules["torch"] = None  # spaCy would load it, for seconds, and needs it not
from distill.mining.readings import main
main(sys.argv[1:], sys.stdin, sys.stdout)
"""
_FAILED = "!"
"""Begins a line that tells why a process can't go on."""


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def line_of(found: Found) -> str:
    """As `Readings` keeps it: a number that tells its prompt from others, and JSON."""
    said = [[*candidate.phrases, candidate.lenses, candidate.sentence] for candidate in found.candidates]
    words = [sorted(found.asked), sorted(found.said)]
    kept = [found.key, found.prompt, found.text, *words, said, found.proposed, found.grounded]
    return f"{_mark(found.prompt)} {json.dumps(kept, ensure_ascii=False)}"


def _found(text: str) -> Found:
    key, prompt, answer, asked, said, candidates, *counts = json.loads(text)
    read = [Candidate(what, does, result, tuple(lenses), at) for what, does, result, lenses, at in candidates]
    return Found(key, prompt, answer, set(asked), set(said), read, *counts)


def _mark(prompt: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), signed=True)


class Readings:
    """Each response's `Found`, in the order in which they were added; a context manager that leaves nothing behind."""

    def __init__(self, beside: Path) -> None:
        """beside: in the folder that holds them. Raises DistillError where they can't be written."""
        place = beside.with_name("readings")
        sweep(place)
        self.path, self._count = beside.with_name(f".readings.{os.getpid()}.partial"), 0
        with self._errors():
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
            self._db.execute("CREATE TABLE found (number INTEGER PRIMARY KEY, prompt INTEGER, found TEXT)")

    @contextlib.contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DistillError(f"{self.path}: can't keep what is read: {error} (free some space)") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self.path.unlink(missing_ok=True)

    def fill(self, lines: Iterable[str]) -> None:
        """Add them, as `line_of` writes them."""
        with self._errors():
            self._db.execute("BEGIN")
            for line in lines:
                mark, _, found = line.partition(" ")
                self._db.execute("INSERT INTO found VALUES (?, ?, ?)", (self._count, int(mark), found))
                self._count += 1
            self._db.execute("CREATE INDEX by_prompt ON found (prompt)")
            self._db.execute("COMMIT")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Found]:
        for (found,) in self._db.execute("SELECT found FROM found ORDER BY number"):
            yield _found(found)

    def answers_to(self, prompt: str) -> list[Found]:
        """All that answer a prompt."""
        found = self._db.execute("SELECT found FROM found WHERE prompt = ?", (_mark(prompt),))
        return [_found(text) for (text,) in found]


def read_all(traces: Path, details: bool, processes: int = 0, cluster: "Cluster | None" = None) -> Iterator[str]:
    """A line (`line_of`) of each selected response of a trace database, by key.

    processes: that read; 0: as many as cores. cluster: whose cores read in their place. Few answers are read here.
    Raises CorruptFile, MissingDependency, or DistillError where a process ends before its time.
    """
    with TraceStore(traces, readonly=True) as store:
        ranges = list(store.ranges(PART))
        several = min(processes or (cores() if cluster is None else len(ranges)), len(ranges) // PARTS)
        if several < 2:
            for between in ranges:
                yield from _read(store, between, details)
            return
        if cluster is not None:
            parts = (list(_texts(store, between)) for between in ranges)
            yield from chain.from_iterable(cluster.map(partial(read_part, details), parts))
            return
    workers = [Reader(traces, details) for _ in range(several)]
    idle: SimpleQueue[Reader] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def read(between: tuple[str, str]) -> list[str]:
        worker = idle.get()
        try:
            return worker.read(between)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(several)
    try:
        for lines in pool.map(read, ranges):
            yield from lines
    finally:
        for worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def _read(store: TraceStore, between: tuple[str, str], details: bool) -> list[str]:
    return read_part(details, _texts(store, between))


def _texts(store: TraceStore, between: tuple[str, str]) -> Iterator[tuple[str, str, str, str]]:
    for trace in map(thought_aloud, store.traces(between=between, soft=False)):
        yield trace.key, trace.prompt, trace.response.text, trace.response.done_reason


def read_part(details: bool, texts: Iterable[tuple[str, str, str, str]]) -> list[str]:
    """The lines of some responses: as `read_texts` takes them."""
    with load_parser().memory_zone():  # else it keeps every word that it ever met
        return [line_of(found) for found in read_texts(texts, details)]


class Reader:
    """A process that reads."""

    def __init__(self, traces: Path, details: bool) -> None:
        self._told = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS"), "1")
        self._process: Any = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(traces), str(int(details))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            encoding="utf-8",
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
            start_new_session=True,  # Ctrl-C is the business of whoever started it
        )

    def read(self, between: tuple[str, str]) -> list[str]:
        lines: list[str] = []
        with contextlib.suppress(OSError, ValueError):  # it has gone, or was ended
            self._process.stdin.write(" ".join(between) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line == "\n":
                    return lines
                if line.startswith(_FAILED):
                    kind, told = json.loads(line.removeprefix(_FAILED))
                    raise getattr(errors, kind)(told)
                lines.append(line)
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


def main(arguments: Sequence[str], asked: TextIO, answers: TextIO) -> None:
    """What such a process does: two keys a line are answered with the lines of what is between, and an empty one."""
    traces, details = arguments
    with TraceStore(Path(traces), readonly=True) as store:
        for line in asked:
            first, last = line.split()
            try:
                answers.writelines(f"{found}\n" for found in _read(store, (first, last), details == "1"))
            except DistillError as error:
                answers.write(f"{_FAILED}{json.dumps([type(error).__name__, str(error)])}")
            answers.write("\n")
            answers.flush()
