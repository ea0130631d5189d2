"""What the syntax miner reads in all answers of a run: in parts, on as many cores as there are, and kept on disk until
all is read, as only then it shows what is rare.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Self

from distill.corpus.traces import TraceStore
from distill.errors import DistillError
from distill.mining.clauses import Candidate
from distill.mining.syntax_miner import Found, load_parser, read_texts
from distill.mining.thinking import thought_aloud
from distill.mining.triplets import mark_of
from distill.run import sweep
from distill.spread import cores, spread

if TYPE_CHECKING:
    from distill.cluster import Cluster

PART = 512
"""Answers that are read together."""
PARTS = 4
"""That are worth a process: it takes seconds to start."""


def line_of(found: Found) -> str:
    """As `Readings` keeps it: a number that tells its prompt from others, and JSON."""
    said = [[*candidate.phrases, candidate.lenses, candidate.sentence] for candidate in found.candidates]
    words = [sorted(found.asked), sorted(found.said)]
    kept = [found.key, found.prompt, *words, said, found.proposed, found.grounded]
    return f"{mark_of(found.prompt, signed=True)} {json.dumps(kept, ensure_ascii=False)}"


def _found(text: str) -> Found:
    key, prompt, asked, said, candidates, *counts = json.loads(text)
    read = [Candidate(what, does, result, tuple(lenses), at) for what, does, result, lenses, at in candidates]
    return Found(key, prompt, set(asked), set(said), read, *counts)


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

    def __exit__(self, *_error: object) -> None:
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
        found = self._db.execute("SELECT found FROM found WHERE prompt = ?", (mark_of(prompt, signed=True),))
        return [_found(text) for (text,) in found]


def read_all(traces: Path, details: bool, processes: int = 0, cluster: "Cluster | None" = None) -> Iterator[str]:
    """A line (`line_of`) of each selected response of a trace database, by key.

    processes: that read; 0: as many as cores. cluster: whose cores read in their place. Few answers are read here.
    Raises CorruptFile, MissingDependency, or DistillError where a process ends before its time.
    """
    with TraceStore(traces, readonly=True) as store:
        ranges = list(store.ranges(PART))
        several = min(processes or (cores() if cluster is None else len(ranges)), len(ranges) // PARTS)
        if cluster is not None and several > 1:
            parts = (list(_texts(store, between)) for between in ranges)
            yield from chain.from_iterable(cluster.map(partial(read_part, details), parts))
            return
    for _, lines in spread(reading, [str(traces), details], ranges, several):
        yield from lines.decode().split("\n")


@contextmanager
def reading(about: tuple[str, bool]) -> Generator[Callable[[tuple[str, str]], bytes]]:
    """The lines of all between two keys. about: the traces, and whether details are read, too."""
    traces, details = about
    with TraceStore(Path(traces), readonly=True) as store:
        yield lambda between: "\n".join(read_part(details, _texts(store, between))).encode()


def _texts(store: TraceStore, between: tuple[str, str]) -> Iterator[tuple[str, str, str, str]]:
    for trace in map(thought_aloud, store.traces(between=between, soft=False)):
        yield trace.key, trace.prompt, trace.response.text, trace.response.done_reason


def read_part(details: bool, texts: Iterable[tuple[str, str, str, str]]) -> list[str]:
    """The lines of some responses: as `read_texts` takes them."""
    with load_parser().memory_zone():  # else it keeps every word that it ever met
        return [line_of(found) for found in read_texts(texts, details)]
