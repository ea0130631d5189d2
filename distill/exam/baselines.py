"""The same student trained otherwise, on the same data, for as many tokens: what soft targets and dreams bring."""

import contextlib
import copy
import json
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.config import Settings
from distill.errors import BadInput, DistillError
from distill.events import Event, Listener
from distill.run import Run, StageRecord, beside, publish_folder, write_atomic
from distill.settings import settings_yaml
from distill.training.checkpoint import of_stage
from distill.training.engine.plan import engine_settings, untouched
from distill.training.plan import FREE, train_settings
from distill.training.start import begin_alike, start_settings

BASELINES: dict[str, dict[str, Any]] = {"hard": {"soft_weight": 0.0}, "nodream": {"dreams": False}}
"""Name → what it changes in the student's `train` settings."""

SHARED_STAGES = ("capture", "mine", "tokenize")


def check_baselines(names: list[str]) -> None:
    """Raise BadInput for a name that is none."""
    if strange := [name for name in names if name not in BASELINES]:
        raise BadInput(f"evaluate.baselines: {strange[0]!r} is none of {', '.join(BASELINES)}")


def train_baseline(run: Run, name: str, steps: int, listen: Listener) -> Run:
    """Train a baseline as a run of its own under baselines/NAME, for `steps` steps of as many packed tokens."""
    settings = copy.deepcopy(run.settings)
    settings.train = replace(settings.train, **BASELINES[name])
    return train_child(run, run.path / "baselines" / name, settings, steps, f"baseline {name}", listen)


def train_child(run: Run, folder: Path, settings: Settings, steps: int, stage: str, listen: Listener) -> Run:
    """Train on the run's data with other settings, as a run of its own; a trained or interrupted one is taken up.

    Where the run itself was trained in that very way, its training is copied. Events are told as of `stage`. Raises
    DistillError where another process works on it.
    """
    from distill.training.loop import train

    child = make_child(run, folder, settings, steps, renamed(listen, stage))
    with child.working():
        train(child, listen=renamed(listen, stage))
    return child


def make_child(run: Run, folder: Path, settings: Settings, steps: int, listen: Listener) -> Run:
    """The run that `train_child` trains, with all that its training reads."""
    settings.train.steps, settings.train.minutes = steps, 0.0
    settings.evaluate.baselines = []
    child = _child(run, folder, settings, listen)
    begin_alike(child)
    return child


def renamed(listen: Listener, stage: str) -> Listener:
    """Tells events as of another stage."""
    return lambda event: listen(replace(event, stage=stage))


def _child(run: Run, folder: Path, settings: Settings, listen: Listener) -> Run:
    """The child's run: the one that is there if it is trained in the same way on the same data, or a new one. A
    training that doesn't fit any more is renamed."""
    child, records = Run(folder, settings), run.records()
    with child.working() if folder.is_dir() else contextlib.nullcontext():
        pass  # nobody trains what is renamed below
    wanted = train_settings(child)
    shared = {name: record for name, record in records.items() if name in (*SHARED_STAGES, "redream")}
    if (start := run.fresh("start", start_settings(child))) is not None:
        shared["start"] = start
    if (folder / "config.yaml").exists():
        there = Run.open(folder)
        known = there.records()
        same = all(_made(known, name) == _made(records, name) for name in (*SHARED_STAGES, "redream"))
        begun = "start" not in known or there.fresh("start", start_settings(child)) is not None
        if same and begun and _of_its_own(train_settings(there)) == _of_its_own(wanted):
            return Run.create(folder, settings)  # what training doesn't read may have changed
    if of_stage(child, "train"):
        folder.rename(aside := beside(folder))
        what = f"{folder}: was made with other settings or of other data: trained anew; what was there is in {aside}"
        listen(Event("train", "note", what))
    if run.fresh("train", wanted) is not None:
        shared["train"] = records["train"]
        engine = run.fresh("engine", engine_settings(child))
        if engine is not None and untouched(run, engine):
            shared["engine"] = engine
    paths = {run.path / output for record in shared.values() for output in record.outputs} | {run.data}
    if "train" in shared:
        # Not what went on from it: a cell is what its settings say.
        paths |= {*of_stage(run, "train"), run.checkpoints / "numerics.json", run.metrics}
    if "engine" in shared:
        paths.add(run.engine)
    copy_run(run, folder, settings, tuple(shared), paths)
    return child


def _of_its_own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a training another one: all but where and how it runs."""
    return {name: value for name, value in settings.items() if name not in FREE - {"steps", "minutes"}}


def _made(records: Mapping[str, StageRecord], stage: str) -> dict[str, str]:
    """What a stage left: done again to the same end, it is the same."""
    return records[stage].outputs if stage in records else {}


def copy_run(run: Run, folder: Path, settings: Settings, stages: tuple[str, ...], paths: Iterable[Path]) -> None:
    """A new run with those settings, and what of these paths and records there is."""
    with publish_folder(folder) as aside:
        for path in sorted(path for path in paths if path.exists()):
            copy_file(path, aside / path.relative_to(run.path))
        if (run.path / "run.json").exists():
            content = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
            content["stages"] = {name: record for name, record in content["stages"].items() if name in stages}
            write_atomic(aside / "run.json", json.dumps(content, indent=2) + "\n")
        write_atomic(aside / "config.yaml", settings_yaml(settings))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file or a folder; a database consistently, its write-ahead log included. Raises OSError, DistillError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.suffix == ".db":
        try:
            with (
                contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as read,
                contextlib.closing(sqlite3.connect(target)) as write,
            ):
                read.backup(write)
        except sqlite3.Error as error:
            raise DistillError(
                f"{source}: can't copy it to {target}: {error} (free some space, or check the rights)"
            ) from error
    else:
        shutil.copyfile(source, target)
