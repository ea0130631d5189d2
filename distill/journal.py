"""What is kept of long work while it goes on: a file of JSON lines that only ever grows."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from distill.errors import DistillError, unwritable


class Journal:
    """Lines of JSON objects, appended one by one and flushed to disk. A context manager: one process writes it.

    A process killed in the middle of a line leaves a broken tail: what follows the last whole line is cut off when the
    file is opened again. Raises DistillError where another process writes it, or the disk is full.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            self._lock()
            if force:
                self._file.truncate(0)
            self.lines: list[dict[str, Any]] = self._whole_lines()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        """One more line, on disk when this returns."""
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.lines.append(line)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = "another dream command is at the same work; wait for it, the same command then goes on"
            raise DistillError(f"{self.path.parent}: {text}") from error

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
        self._file.truncate(end)
        return lines


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
