"""Results on stdout: text for people, one JSON value for scripts."""

import codecs
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cli.progress import shown
from distill.address import masked


def command_line(*args: object) -> str:
    """A `dream` command to paste, called as this one was where the shell wouldn't find it by its name."""
    called = sys.argv[0]
    name = called if Path(called).stem == "dream" and shutil.which("dream") is None else "dream"
    return shlex.join([name, *(masked(str(arg)) for arg in args)])


def install_lines(run: Path, name: str) -> tuple[str, str]:
    """The command that puts the student of a run into Ollama, and the one that talks to it there."""
    from distill.teacher.names import fitting_name

    fitting = fitting_name(name)
    named = () if fitting == name else ("--name", fitting)
    return command_line("install", run, *named), f"ollama run {shlex.quote(fitting)}"


def emit_json(value: Any) -> None:
    """One JSON value; what JSON lacks (paths, NaN) as strings and null. Between programs it is UTF-8 (RFC 8259): where
    stdout isn't, letters beyond ASCII are escaped."""
    utf_8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name == "utf-8"
    click.echo(json.dumps(_plain(value), indent=2, ensure_ascii=not utf_8, default=str))


def answer(as_json: bool, value: Any, text: str) -> None:
    """A command's result: the value for scripts, or the text for people."""
    if as_json:
        emit_json(value)
    else:
        click.echo(text)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Aligned columns, two spaces between; the last column is never padded. Numbers keep to the right."""
    cells = [[shown(cell) for cell in row] for row in rows]
    lines = [list(header), *cells] if header else cells
    if not lines:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(widths))]
    align = [str.rjust if right else str.ljust for right in numeric]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)).rstrip()
        for line in lines
    )


def facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The scalars of a nested summary as (dotted name, value) rows; short lists of scalars in one row."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += facts(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            if value and len(value) <= 6 and all(isinstance(entry, (str, int, float)) for entry in value):
                rows.append((name, ", ".join(shown(entry) for entry in value)))
        elif value is not None:
            rows.append((name, shown(value)))
    return rows
