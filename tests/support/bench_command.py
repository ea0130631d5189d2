"""`dream bench` as a shell calls it."""

from collections.abc import Callable

import pytest

from cli import main as entry

Run = Callable[..., tuple[int, str, str]]


def bench(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        entry.main(["bench", *map(str, args)])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err
