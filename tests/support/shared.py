"""What is slow to make is made once for all test processes of a run, and copied by whoever alters it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

root: Path | None = None
"""Set by conftest.py: the folder that all processes of this test run share."""


def made_once(name: str, make: Callable[[Path], object], to: Path) -> Path:
    """A copy at `to` of the folder that `make` makes; whoever asks first makes it, the others wait for it."""
    assert root is not None
    kept, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            make(kept)
            done.touch()
    return Path(shutil.copytree(kept, to))


def shared_root(base: Path) -> Path:
    """Of a process's base folder: with several, pytest-xdist gives each one of its own within a common one."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
