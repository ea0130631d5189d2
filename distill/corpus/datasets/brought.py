"""Datasets that users bring as files: found, streamed and checked. However long a file is, little of it is held."""

import gzip
import hashlib
import heapq
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from distill.corpus.datasets.questions import Drawn
from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener, silent
from distill.run import fingerprint

Row = TypeVar("Row")

CHUNK = 1 << 20
"""Characters read at once."""
LONGEST = 1 << 26
"""Of one element of a JSON array."""
SIDE = 256
"""Pixels of the longer side with which a run keeps a picture."""
HELD_OUT_SHARE = 0.1
"""Of a file's subjects or pictures, by hash: never trained on."""


def find(files: str, dataset: str, pattern: str, source: str, listen: Listener = silent) -> Path:
    """The file of that pattern in the folder `files`, or `files` itself where that is a file; of several the first,
    which is told. Raises BadInput."""
    first, *others = find_all(files, dataset, pattern, source)
    if others:
        text = f"{first} is taken; {len(others)} more {pattern} beside it, such as {others[0].name}, are left"
        listen(Event("capture", "warning", f"{text}: name one in capture.dataset_files"))
    return first


def find_all(files: str, dataset: str, pattern: str, source: str) -> list[Path]:
    """All of them, one at least, and no archives. Raises BadInput."""
    remedy = f"download it from {source} and name its folder in capture.dataset_files"
    if not files:
        raise BadInput(f"capture.dataset={dataset}: needs {pattern}; {remedy}")
    path = Path(files).expanduser()
    there = [path] if path.is_file() else sorted(path.rglob(pattern))
    found = [file for file in there if file.suffix != ".zip"]
    if there and not found:
        raise BadInput(f"{there[0]}: is an archive; unpack it, and name its folder in capture.dataset_files")
    if not found:
        raise BadInput(f"{path}: {'holds' if path.is_dir() else 'is not there, so there is'} no {pattern}; {remedy}")
    return found


def digest(files: str) -> str:
    """Of the names and sizes of files and pictures: they may be too long to be read for it."""
    path = Path(files).expanduser()
    found = sorted([*path.rglob("*.[cj]s*"), *path.rglob("*.jpg")]) if path.is_dir() else [path]
    return fingerprint([[file.name, file.stat().st_size] for file in found if file.is_file()])


def opened(path: Path) -> TextIO:
    """As UTF-8 text, unpacked where it ends in .gz."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def elements(path: Path, key: str = "") -> Iterator[dict[str, Any]]:
    """The objects of the array that a JSON file is, or has under `key`. Raises CorruptFile, saying which is none."""
    opening = re.compile(rf'"{key}"\s*:\s*\[' if key else r"\A\s*\[")
    between, decoder, number = re.compile(r"[\s,]*"), json.JSONDecoder(), 0
    try:
        with opened(path) as file:
            text = file.read(CHUNK)
            while (found := opening.search(text)) is None:
                if not key or not (more := file.read(CHUNK)):
                    raise ValueError(f"no array {key}".strip())
                text = text[-len(key) - 64 :] + more
            at = found.end()
            while True:
                at = between.match(text, at).end()  # type: ignore[union-attr]
                if text.startswith("]", at):
                    return
                try:
                    value, at = decoder.raw_decode(text, at)
                except ValueError:
                    more = file.read(max(CHUNK, len(text) - at))
                    if not more or len(text) - at > LONGEST:
                        raise
                    text, at = text[at:] + more, 0
                    continue
                if not isinstance(value, dict):
                    raise TypeError("is no object")
                number += 1
                yield value
    except (OSError, EOFError, TypeError, ValueError) as error:
        where = f", {key or 'element'} {number + 1}"
        raise CorruptFile(f"{path}{where}: not as it should be ({error}); download it again") from error


def sampled(rows: Iterable[Row], count: int, seed: int, key: Callable[[Row], str]) -> list[Row]:
    """So many of the rows, evenly over all of them and the same each time, in one pass that holds no more."""
    return heapq.nsmallest(count, rows, lambda row: hashed(f"{seed} {key(row)}"))


def hashed(text: str) -> float:
    """From 0 to 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def dealt(
    rows: Iterable[Row], name: Callable[[Row], str], seed: int, train: int, aside: int
) -> Iterator[tuple[Row, bool]]:
    """At most so many rows to train on, then so many whose names are held out; the flag says which are."""
    rows = list(rows)
    for wanted, left in ((False, train), (True, aside)):
        fitting = (row for row in rows if (hashed(f"held out {seed} {name(row)}") < HELD_OUT_SHARE) == wanted)
        yield from ((row, wanted) for row in islice(fitting, left))


def pictures_in(folder: Path, source: str) -> dict[str, Path]:
    """File name → JPEG, of all in the folder and those in it. Raises BadInput where there are none."""
    if not (there := {file.name: file for file in folder.rglob("*.jpg")}):
        raise BadInput(f"{folder}: holds none of the pictures (.jpg); download them from {source} into it")
    return there


def picture(path: Path, labels: dict[str, tuple[float, float]]) -> Drawn:
    """A user's picture. labels: what it shows → where its middle is, in pixels. Raises CorruptFile."""
    from PIL import Image, ImageOps

    broken = f"{path}: is no whole picture; download it again"
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # whatever a decoder makes of bytes that it doesn't know
        raise CorruptFile(broken) from error

    def png() -> bytes:
        try:
            with Image.open(path) as image:
                small = ImageOps.exif_transpose(image).convert("RGB")
                small.thumbnail((SIDE, SIDE))
        except Exception as error:
            raise CorruptFile(broken) from error
        small.save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    name = hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).hexdigest()[:16]
    return Drawn(f"{name}.png", png, tuple(labels), tuple((x / width, y / height) for x, y in labels.values()))
