"""Prompts in rows that others wrote: chats, instructions and tables.

A row is a string, or has a column that holds the prompt. Alpaca's `instruction` goes with its `input`, a blank line
between them. Of a conversation, OpenAI's `messages` or ShareGPT's `conversations`, the first question is taken.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from distill.errors import BadInput
from distill.events import Event, Listener
from distill.written import whole

COLUMNS = ("prompt", "messages", "conversations", "conversation", "instruction", "question", "query")
"""Where a prompt is looked for, in this order."""
USER = ("user", "human")
SAYS = (("role", "content"), ("from", "value"))
"""Who speaks, and what: OpenAI's names and ShareGPT's."""
TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *TABLES, ".parquet")

_ENDED = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_ENDED_BY_LF = re.compile(r"[^\n]*\n|[^\n]+")

Row = tuple[str, object]
"""Where it stands, and what it holds."""


class Rows:
    """The prompts of one file. column: where they are; "" where they are to be found.

    Raises BadInput, naming file and row, for whatever holds no prompt. `listen` is told what is left out.
    """

    def __init__(self, path: Path, column: str, listen: Listener) -> None:
        self.path, self.column, self._listen = path, column, listen
        self._later = self._systems = 0

    def prompts(self, data: bytes, text: str) -> Iterator[str]:
        """data: the file's; text: the same, but of a Parquet file."""
        for place, row in self._rows(data, text):
            try:
                found = whole(self._prompt(row).strip())
                if not found:
                    raise ValueError("holds an empty prompt")
            except (ValueError, TypeError) as error:
                raise BadInput(f"{place}: {error}") from error
            yield found
        left = {"answers and later questions": self._later, "system messages (set capture.system)": self._systems}
        if said := ", ".join(f"{count} {what}" for what, count in left.items() if count):
            self._listen(Event("prompts", "note", f"{self.path}: of its conversations, {said} are left out"))

    def _rows(self, data: bytes, text: str) -> Iterator[Row]:
        kind = self.path.suffix.lower()
        if kind == ".parquet":
            return _parquet(self.path, data)
        if kind in TABLES:
            return _table(self.path, text, TABLES[kind])
        return _array(self.path, text) if kind == ".json" else _lines(self.path, text)

    def _prompt(self, row: object) -> str:
        """Raises ValueError or TypeError."""
        if isinstance(row, dict):
            fields = cast("dict[str, Any]", row)
            name = self.column or next((name for name in COLUMNS if fields.get(name)), "")
            if name not in fields:
                known = ", ".join(map(str, fields)) or "none"
                problem = f"no column {name!r}" if name else "no prompt"
                raise ValueError(f"holds {problem}; its columns are {known}: name one as in {self.path.name}:COLUMN")
            value, more = fields[name], fields.get("input") if name == "instruction" else None
            row = f"{value}\n\n{more}" if isinstance(value, str) and isinstance(more, str) and more.strip() else value
        if isinstance(row, list):
            return self._asked(cast("list[object]", row))
        if not isinstance(row, str):
            raise TypeError('write a string or {"prompt": "a string"}, no other value')
        return row

    def _asked(self, turns: list[object]) -> str:
        """The first question of a conversation."""
        found: str | None = None
        for turn in turns:
            who, what = _said(turn)
            if found is None and who in USER:
                found = what
            elif who == "system":
                self._systems += 1
            else:
                self._later += 1
        if found is None:
            raise ValueError("holds a conversation in which no user says anything")
        return found


def _said(turn: object) -> tuple[str, str]:
    """Who says what. Raises ValueError."""
    fields = cast("dict[str, Any]", turn) if isinstance(turn, dict) else {}
    for speaker, words in SAYS:
        who, what = fields.get(speaker), fields.get(words)
        if isinstance(what, list):  # OpenAI's parts
            parts = [cast("dict[str, Any]", part) for part in cast("list[object]", what) if isinstance(part, dict)]
            if any(part.get("type") != "text" for part in parts):
                raise ValueError("holds a turn with something else than text")
            what = "\n".join(str(part.get("text", "")) for part in parts)
        if isinstance(who, str) and isinstance(what, str):
            return who, what
        if isinstance(who, str) and what is None and who not in USER:
            return who, ""  # a call of a tool
    raise ValueError("holds a turn that is neither of role and content nor of from and value")


def _split(text: str, line: re.Pattern[str]) -> Iterator[str]:
    """Lines with their ends, one after the other: all at once, or in a StringIO, they take several times the memory."""
    return (match[0] for match in line.finditer(text))


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(_split(text, _ENDED_BY_LF), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise BadInput(f"{path}:{number}: is not JSON: {error}") from error


def _array(path: Path, text: str) -> Iterator[Row]:
    try:
        values: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}: is not JSON: {error.msg}") from error
    if not isinstance(values, list):
        raise BadInput(f"{path}: holds no array of prompts; write one a line into a .jsonl instead")
    for number, value in enumerate(cast("list[object]", values), start=1):
        yield f"{path}: item {number}", value


def _table(path: Path, text: str, separator: str) -> Iterator[Row]:
    rows = csv.reader(_split(text, _ENDED), delimiter=separator, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        if len(set(names)) < len(names):
            raise BadInput(f"{path}:1: two columns have the same name; the first line names them")
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise BadInput(f"{path}:{rows.line_num}: {len(cells)} cells, and the first line names {len(names)}")
            yield f"{path}:{rows.line_num}", dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}:{rows.line_num}: is no table with {separator!r} between cells: {error}") from error


def _parquet(path: Path, data: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path}: is no Parquet file that can be read ({str(error).splitlines()[0]})") from error
