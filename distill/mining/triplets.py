"""Triplets (what, action, result): what they are, and how they are stored.

A dream is, for each of four lenses, a chain of at most `mine.steps` triplets. Every triplet knows where it
was found: the trace, the sentence and the miner.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from distill.errors import BadInput, CorruptFile
from distill.run import write_json_lines

LENSES = ("spatial", "temporal", "causal", "abstract")
"""The four paths of a dream, in the order in which they are dreamed."""

FACT = "fact:"
"""Begins the trace of triplets that no answer says and the graph knows all the same."""

MAX_WORDS = 4
MAX_CHARACTERS = 28
"""Of a phrase: it must read well as the label of one image token."""


@dataclass(frozen=True)
class Triplet:
    """One step of a dream.

    `step` counts from 0 within (trace, lens); `trace` is the key of the response it was found in, `sentence` the
    sentence's number there (-1 where the miner can't tell), `miner` is "syntax", "teacher" or "dream" (the teacher's).
    """

    what: str
    action: str
    result: str
    lens: str
    step: int
    trace: str
    sentence: int
    miner: str

    @property
    def phrases(self) -> tuple[str, str, str]:
        return self.what, self.action, self.result


_TYPES = {field.name: field.type for field in fields(Triplet)}
_TRACE = re.compile(rb'"trace": "([^"\\]*)"')


@dataclass(frozen=True)
class Mined:
    """What a miner found in one response: triplets, how many were ungrounded, whether its answer broke, and whether
    that is because nobody answered: then another time may bring more."""

    triplets: list[Triplet]
    proposed: int
    """Triplets found, the ungrounded included."""
    grounded: int
    broken: bool = False
    failed: bool = False


def clean_phrase(text: str) -> str:
    """Lower-case, single spaces, no brackets of image tokens and no control characters; "" if nothing is left."""
    kept = "".join(c if c.isprintable() and c not in "⟨⟩<>|" else " " for c in text.lower())
    return " ".join(kept.split()).strip(' .,;:!?"“”‘*_`()[]{}-–—')


def fits(phrase: str) -> bool:
    """Whether a clean phrase is short enough to be a label."""
    return bool(phrase) and len(phrase) <= MAX_CHARACTERS and len(phrase.split()) <= MAX_WORDS


# Files.


def write_triplets(path: Path, triplets: Iterable[Triplet]) -> None:
    """One JSON object a line, atomically."""
    write_json_lines(path, (asdict(triplet) for triplet in triplets))


def read_triplets(path: Path, traces: Container[bytes] | None = None) -> list[Triplet]:
    """All triplets of a file, or those of some traces: the other lines are looked at, not parsed. Raises BadInput where
    there is no file, and CorruptFile with the broken line's number."""
    return [triplet for _, triplet in _placed(path, traces)]


def each_triplet(path: Path) -> Iterator[Triplet]:
    """As `read_triplets`, one after the other."""
    return (triplet for _, triplet in _placed(path))


def _placed(path: Path, traces: Container[bytes] | None = None) -> Iterator[tuple[int, Triplet]]:
    """Each triplet, and the byte that it begins at."""
    place = 0
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; `dream mine` writes it") from error
    with file:
        for number, line in enumerate(file, 1):
            others = traces is not None and (named := _TRACE.search(line)) is not None and named[1] not in traces
            if line.strip() and not others:
                yield place, _parse(line, f"{path}:{number}")
            place += len(line)


def _parse(line: bytes, place: str) -> Triplet:
    try:
        value = json.loads(line)
        if not isinstance(value, dict) or value.keys() != _TYPES.keys():
            raise ValueError(f"needs exactly the fields {', '.join(_TYPES)}")
        for name, kind in _TYPES.items():
            if type(value[name]) is not kind:
                raise ValueError(f"{name} must be {'a number' if kind is int else 'text'}")
        if value["lens"] not in LENSES:
            raise ValueError(f"lens is {value['lens']!r}, not one of {', '.join(LENSES)}")
    except ValueError as error:
        raise CorruptFile(f"{place}: not a triplet ({error}); mend the line or run `dream mine --force`") from error
    return Triplet(**value)


class TripletFile(Mapping[str, list[Triplet]]):
    """`by_trace` of a file, read where it is asked for: it remembers 16 bytes a line, and where each is.

    Raises as `read_triplets` does.
    """

    def __init__(self, path: Path) -> None:
        self.path, marks, places = path, array("Q"), array("Q")
        for place, triplet in _placed(path):
            marks.append(mark_of(triplet.trace))
            places.append(place)
        order = np.argsort(np.array(marks, np.uint64), kind="stable")
        self._marks, self._places = np.array(marks, np.uint64)[order], np.array(places, np.int64)[order]
        self._file = path.open("rb")

    def close(self) -> None:
        self._file.close()

    def __getitem__(self, trace: str) -> list[Triplet]:
        mark = np.uint64(mark_of(trace))
        first, end = (int(np.searchsorted(self._marks, mark, side)) for side in ("left", "right"))
        found: list[Triplet] = []
        for place in self._places[first:end].tolist():
            self._file.seek(place)
            found.append(_parse(self._file.readline(), f"{self.path}: at byte {place}"))
        if not (found := by_trace(found).get(trace, [])):
            raise KeyError(trace)
        return found

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        """Each trace, in the order of the file."""
        seen: set[int] = set()
        for _, triplet in _placed(self.path):
            if (mark := mark_of(triplet.trace)) not in seen:
                seen.add(mark)
                yield triplet.trace


def mark_of(text: str, signed: bool = False) -> int:
    """64 bits that tell a text from others."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=signed)


def by_trace(triplets: Iterable[Triplet]) -> dict[str, list[Triplet]]:
    """Triplets of each trace, in lens order and within a lens by step."""
    found: dict[str, list[Triplet]] = {}
    for triplet in triplets:
        found.setdefault(triplet.trace, []).append(triplet)
    for group in found.values():
        group.sort(key=lambda triplet: (LENSES.index(triplet.lens), triplet.step))
    return found
