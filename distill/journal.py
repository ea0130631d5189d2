"""What is kept of long work while it goes on: a file of JSON lines that only ever grows."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self, cast

from distill.errors import CorruptFile, DistillError, unwritable


class Journal:
    """Lines of JSON objects, appended one by one and flushed to disk. A context manager: one process writes it.

    A process killed in the middle of a line leaves a broken tail: what follows the last whole line is cut off when the
    file is opened again. Raises DistillError where another process writes it, or the disk is full, and CorruptFile for
    a broken line that others follow.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            text = "another dream command is at the same work; wait for it, the same command then goes on"
            lock(self._file, f"{path.parent}: {text}")
            if force:
                self._file.truncate(0)
            self.lines: list[dict[str, Any]] = self._whole_lines()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def clear(self) -> None:
        """Begin anew."""
        self._file.truncate(0)
        self.lines.clear()

    def append(self, line: dict[str, Any]) -> None:
        """One more line, on disk when this returns."""
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.lines.append(line)

    def _whole_lines(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        lines: list[dict[str, Any]] = []
        end = 0
        for raw in self._file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                break
            lines.append(cast("dict[str, Any]", line))
            end += len(raw)
        if next(iter(self._file), None) is not None:  # no kill did that
            text = "is broken, and others follow it; mend or delete it"
            raise CorruptFile(f"{self.path}, line {len(lines) + 1}: {text}")
        self._file.truncate(end)
        return lines


def lock(file: IO[Any] | int, busy: str = "") -> None:
    """Keep other processes from locking an open file until it is closed, which the operating system does for a process
    that dies. Waits for one that has it, or raises DistillError, saying `busy`."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError as error:
        raise DistillError(busy) from error


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """One more line in a file that nobody keeps open, on disk when this returns. What a kill cut short before it, or an
    editor left without an end, stays a line of its own. Raises DistillError where it can't be written."""
    said = json.dumps(line, ensure_ascii=False).encode() + b"\n"
    try:
        with path.open("a+b") as file:
            ended = not file.tell() or (file.seek(-1, os.SEEK_END) >= 0 and file.read() == b"\n")
            file.write(said if ended else b"\n" + said)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error
