"""The same student trained otherwise, on the same data, for as many tokens: what soft targets and dreams bring."""

import contextlib
import copy
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from distill.config import Settings, settings_yaml
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.run import Run, publish_folder, write_atomic
from distill.training.plan import train_settings


def _hard(settings: Settings) -> None:
    settings.train.soft_weight = 0.0


def _nodream(settings: Settings) -> None:
    settings.train.dreams = False


BASELINES: dict[str, Callable[[Settings], None]] = {"hard": _hard, "nodream": _nodream}
"""Name → what it changes in the student's settings."""

SHARED_STAGES = ("capture", "mine", "tokenize")


def check_baselines(names: list[str]) -> None:
    """Raise BadInput for a name that is none."""
    for name in names:
        if name not in BASELINES:
            raise BadInput(f"evaluate.baselines: {name!r} is none of {', '.join(BASELINES)}")


def train_baseline(run: Run, name: str, steps: int, listen: Listener) -> Run:
    """Train a baseline as a run of its own under baselines/NAME; a trained or interrupted one is taken up.

    It gets the student's settings but for one, its data, and `steps` steps of as many packed tokens.
    """
    from distill.training.loop import train

    settings = copy.deepcopy(run.settings)
    settings.train.steps, settings.train.minutes = steps, 0.0
    settings.evaluate.baselines = []
    BASELINES[name](settings)
    folder = run.path / "baselines" / name
    child = _child(run, folder, settings)

    def renamed(event: Event) -> None:
        listen(replace(event, stage=f"baseline {name}"))

    train(child, listen=renamed)
    return child


def _child(run: Run, folder: Path, settings: Settings) -> Run:
    """The baseline's run: the one that is there if it is trained in the same way on the same data, or a new one."""
    shared = {name: record for name, record in run.records().items() if name in SHARED_STAGES}
    if (folder / "config.yaml").exists():
        there = Run.open(folder)
        same = {name: there.records().get(name) for name in shared} == shared
        if same and train_settings(there) == train_settings(Run(folder, settings)):
            return Run.create(folder, settings)  # what training doesn't read may have changed
    with publish_folder(folder) as aside:
        for output in sorted({output for record in shared.values() for output in record.outputs}):
            copy_file(run.path / output, aside / output)
        if (run.path / "run.json").exists():
            write_atomic(aside / "run.json", _records_of(run, SHARED_STAGES))
        write_atomic(aside / "config.yaml", settings_yaml(settings))
    return Run(folder, settings)


def _records_of(run: Run, stages: tuple[str, ...]) -> str:
    content = json.loads((run.path / "run.json").read_text())
    content["stages"] = {name: record for name, record in content["stages"].items() if name in stages}
    return json.dumps(content, indent=2) + "\n"


def copy_file(source: Path, target: Path) -> None:
    """Copy a file or a folder; a database consistently, its write-ahead log included."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.suffix == ".db":
        with (
            contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as read,
            contextlib.closing(sqlite3.connect(target)) as write,
        ):
            read.backup(write)
    else:
        shutil.copyfile(source, target)
