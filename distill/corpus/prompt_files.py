"""Rows of files that others wrote, one after the other: however large a file is, little of it is in memory."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from distill.errors import BadInput
from distill.events import Event, Listener

TABLES = {".csv": ",", ".tsv": "\t"}
COLUMNAR = (".parquet", ".arrow", ".feather")
SUFFIXES = (*COLUMNAR, ".jsonl", ".json", *TABLES)
"""In a folder with several of them, files of the first kind that is there are taken."""
ZIPPED = ".gz"
HUB = "hf:"

BATCH = 256
"""Rows that are read at a time where a file holds columns."""

_PIECE = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*")
csv.field_size_limit(2**31 - 1)  # the default refuses a long answer; a C long holds this everywhere
_NEAR = 16
"""Characters before the end of what has been read within which a fault may be its cut: `-Infinit` is the longest."""
_DECODER = json.JSONDecoder()
_OWN = re.compile(r"dataset_.*\.json|state\.json|cache-.*\.arrow")
"""What `datasets` keeps beside the rows."""
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?:ing)?(?=[-_./])")

Row = tuple[str, object]
"""Where it stands, and what it holds: a ValueError where it can't be read, and those after it can."""
Columns = Callable[[list[str]], list[str]]
"""Which of a file's columns are of use."""


def kind_of(path: Path) -> str:
    """Its suffix in lower case, the one before .gz of what is zipped."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix == ZIPPED and inner not in COLUMNAR else suffix


def rows(path: Path, columns: Columns) -> Iterator[Row]:
    """All of a file's. Raises BadInput, naming the line where it can, for a file that can't be read on."""
    kind = kind_of(path)
    if kind in COLUMNAR:
        return _columnar(path, columns)
    if kind in TABLES:
        return _table(path, TABLES[kind])
    return _array(path) if kind == ".json" else _lines(path)


@contextlib.contextmanager
def text_of(path: Path, newline: str = "") -> Generator[IO[str]]:
    """A text file, unzipped where it is zipped. Raises BadInput, whatever is wrong with it."""
    try:
        with _bytes_of(path) as opened, io.TextIOWrapper(opened, "utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:{_strange_line(path)}: is not UTF-8; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: can't read it: {getattr(error, 'strerror', None) or error}") from error
    except RecursionError as error:
        raise BadInput(f"{path}: brackets are nested too deeply for prompts") from error


def files_in(folder: Path, listen: Listener) -> list[Path]:
    """Files of rows in a folder, as `datasets` saves it or a hub keeps it; of splits `train` alone, which is said.

    Raises BadInput where there is none.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _OWN.fullmatch(path.name)]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    kinds = {kind: [path for path in found if kind_of(path) == kind] for kind in SUFFIXES}
    files = next((files for files in kinds.values() if files), [])
    if not files:
        raise BadInput(f"{folder}: is a folder without a file of prompts ({', '.join(SUFFIXES)})")
    # The last name counts: train_data/test.jsonl is a test.
    splits = {path: _SPLIT.findall(str(path.relative_to(folder)))[-1:] for path in files}
    train = [path for path in files if "train" in splits[path]]
    taken = train or [path for path in files if not splits[path]] or files
    left = sorted({name for path in files if path not in taken for name in splits[path]} or {"others"})
    rest = f"; {'of its splits train is taken, ' if train else ''}{', '.join(left)} left out (name a file for those)"
    rest = "" if taken == files else rest
    shown = (
        taken[0].relative_to(folder) if len(taken) == 1 else f"{len(taken)} files ({taken[0].relative_to(folder)} …)"
    )
    listen(Event("prompts", "note", f"{folder}: {shown}{rest}"))
    return taken


def from_hub(name: str, listen: Listener) -> Path:
    """The folder that a hub's data set was fetched into: `hf:USER/NAME`, or `hf:USER/NAME/FOLDER` of it.

    Raises BadInput where there is no such one, or no hub. What was fetched before needs none.
    """
    from huggingface_hub import snapshot_download

    repository, below = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    kinds = [f"{below and f'{below}/'}**{suffix}{zipped}" for suffix in SUFFIXES for zipped in ("", ZIPPED)]
    kinds += [below] if below else []
    listen(Event("prompts", "note", f"{HUB}{name}: fetched from the hub, where it isn't here yet"))
    try:
        found = snapshot_download(repository, repo_type="dataset", allow_patterns=kinds)
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub stands on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"{HUB}{name}: can't be had ({reason}); check the name, and that the hub can be reached ($HF_ENDPOINT)"
        ) from error
    return Path(found, below)


@contextlib.contextmanager
def _bytes_of(path: Path) -> Generator[Any]:
    with path.open("rb") as file:
        yield gzip.GzipFile(fileobj=file) if path.suffix.lower() == ZIPPED else file


def _strange_line(path: Path) -> int:
    """The first that isn't UTF-8."""
    with _bytes_of(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _lines(path: Path) -> Iterator[Row]:
    with text_of(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:
                    yield f"{path}:{number}", ValueError(f"is not JSON: {error}")


def _array(path: Path) -> Iterator[Row]:
    """Items of a JSON array, or values one after the other, which many a .json holds."""
    with text_of(path) as file:
        text = _Pieces(path, file)
        if text.mark() != "[":
            first = text.value() if text.mark() else None
            if not isinstance(first, dict) or not text.mark():
                raise BadInput(f"{path}: holds no array of prompts; write one a line into a .jsonl instead")
            yield f"{path}: item 1", first
            for number in itertools.count(2):
                if not text.mark():
                    return
                yield f"{path}: item {number}", text.value()
        text.at += 1
        for number in itertools.count(1) if text.mark() != "]" else ():
            yield f"{path}: item {number}", text.value()
            if text.mark() != ",":
                break
            text.at += 1
        if text.mark() != "]":
            raise text.fault("expecting ',' or ']'")
        text.at += 1
        if text.mark():
            raise text.fault("something follows the array")


class _Pieces:
    """A file's text from `at` on, as much of it as the next JSON value takes. line: of where `text` begins."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file, self.text, self.at, self.line = path, file, "", 0, 1

    def mark(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self) -> object:
        """Raises BadInput where it is none."""
        self.mark()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end + 3 <= len(self.text) or not self._more():  # 1e- may be the beginning of 1e-5
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _NEAR
                if not (cut and self._more()):
                    raise self.fault(error.msg, error.pos) from error

    def fault(self, why: str, at: int | None = None) -> BadInput:
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        return BadInput(f"{self.path}:{line}: is not JSON: {why}")

    def _more(self) -> bool:
        """At least as much again as is left: a long value isn't read over and over."""
        piece = self.file.read(max(_PIECE, len(self.text) - self.at))
        if piece:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)


def _table(path: Path, usual: str) -> Iterator[Row]:
    with text_of(path) as file:
        first = file.readline()
        separator = _separator(first, usual)
        cells = csv.reader(itertools.chain([first], file), delimiter=separator, strict=True)
        try:
            names = [name.strip() for name in next(cells, [])]
            if len(set(names)) < len(names):
                raise BadInput(f"{path}:1: two columns have the same name; the first line names them")
            for row in cells:
                if not any(cell.strip() for cell in row):
                    continue
                wrong = ValueError(f"{len(row)} cells, and the first line names {len(names)}")
                yield (
                    f"{path}:{cells.line_num}",
                    dict(zip(names, row, strict=True)) if len(row) == len(names) else wrong,
                )
        except csv.Error as error:
            problem = f"is no table with {separator!r} between cells: {error}"
            raise BadInput(f"{path}:{cells.line_num}: {problem}") from error


def _separator(first: str, usual: str) -> str:
    """What parts the names in a table's first line: in many countries spreadsheets write semicolons."""
    found = (each for each in (usual, ";", "\t") if len(next(csv.reader([first], delimiter=each), [])) > 1)
    return next(found, usual)


def _columnar(path: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow

    name = "Parquet" if kind_of(path) == ".parquet" else "Arrow"
    try:
        number = 0
        for batch in (_parquet if name == "Parquet" else _arrow)(path, columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path}: is no {name} file that can be read ({str(error).splitlines()[0]})") from error


def _parquet(path: Path, columns: Columns) -> Iterable[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(BATCH, columns=columns(file.schema_arrow.names))


def _arrow(path: Path, columns: Columns) -> Iterable[Any]:
    """As `datasets` writes it, a stream, or a file of batches. It isn't mapped into memory, which would stay there."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.OSFile(str(path)) as source:
        batches: Iterable[Any]
        try:
            stream = ipc.open_stream(source)
            names, batches = stream.schema.names, stream
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = ipc.open_file(source)
            names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
        wanted = columns(names)
        for batch in batches:
            for start in range(0, len(batch), BATCH):
                yield batch.select(wanted).slice(start, BATCH)
