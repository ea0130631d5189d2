"""One cell of a sweep: its data, made once and shared, and its training."""

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distill.config import Settings
from distill.corpus.asked import changed
from distill.errors import RunMismatch
from distill.events import Event, Listener
from distill.exam.baselines import SHARED_STAGES, copy_run, make_child, renamed
from distill.run import Run, fingerprint
from distill.sweep.plan import Cell

KEPT = ("steps", "tokens", "epochs", "parameters", "best_step", "validation_loss", "tokens_per_second", "numerics")
"""What the sweep writes down of a training's summary."""

PERFORMERS = {
    "capture": "distill.corpus.capture",
    "mine": "distill.knowledge.mine",
    "tokenize": "distill.vision.tokenize",
}
"""Stage → the module that has it."""


# Data.
def data_key(data: Settings) -> str:
    """Short, of all settings that a cell's data is made with."""
    tree = asdict(data)
    tree["mine"]["processes"] = 0  # they find the same
    used = {name: tree[name] for name in ("seed", "vision", *SHARED_STAGES)}
    return fingerprint({**used, "teacher": tree["teacher"]["model"]})[:8]


def best_source(sources: Sequence[Run], data: Settings) -> tuple[Run | None, list[str]]:
    """Which of the runs has most of that data already, and the first stages of it, run with the very same settings."""
    best: tuple[Run | None, list[str]] = None, []
    for source in sources:
        run, stages = Run(source.path, data), list[str]()
        for stage in SHARED_STAGES:
            if not _has(run, stage):
                break
            stages.append(stage)
        best = max(best, (source, stages), key=lambda found: len(found[1]))
    return best


def _has(run: Run, stage: str) -> bool:
    """Whether that stage is done, with the run's settings and what the files that it asks hold now."""
    return stage in run.records() and not run.stale(stage) and not (stage == "capture" and changed(run))


def prepare_data(folder: Path, data: Settings, sources: Sequence[Run], listen: Listener) -> Run:
    """A run with that data, finished: one of `sources` that has it all, or one in `folder` with copies of what
    they have, in which the other stages are run. Raises what those raise."""
    source, stages = best_source(sources, data)
    if source is not None and len(stages) == len(SHARED_STAGES):
        return source
    if source is not None and not (folder / "config.yaml").exists():
        paths = {source.path / output for stage in stages for output in source.records()[stage].outputs}
        copy_run(source, folder, data, tuple(stages), paths)
    run = Run.create(folder, data)

    def told(event: Event) -> None:
        listen(replace(event, stage=f"data {folder.name}, {event.stage}"))

    with run.working():
        for stage, module in PERFORMERS.items():
            if not _has(run, stage):
                getattr(importlib.import_module(module), stage)(run, told)
    return run


# Training.
@dataclass(frozen=True)
class Job:
    """A cell with the run whose data it gets, and the folder that it becomes."""

    cell: Cell
    source: Run
    folder: Path
    engine: bool
    stage: str


def train_cell(job: Job, listen: Listener) -> dict[str, Any]:
    """Train it, or go on, or find it trained; returns what is written down of it. Raises what training raises."""
    child = make_cell(job, listen)
    with child.working():
        learn_cell(child, job.engine, job.stage, listen)
    record = child.require("train")
    found = {key: record.summary.get(key) for key in KEPT} | {"seconds": record.seconds}
    if job.engine:
        made = child.require("engine")
        found |= {"engine_seconds": made.seconds, "engine_skipped": made.summary.get("skipped")}
        found |= {"engine_parameters": made.summary.get("parameters")}
    return found


def make_cell(job: Job, listen: Listener) -> Run:
    """Its run, with all that its training reads."""
    settings = job.cell.settings
    return make_child(job.source, job.folder, settings, settings.train.steps, renamed(listen, job.stage))


def learn_cell(child: Run, engine: bool, stage: str, listen: Listener) -> None:
    """Its training, and its engine's."""
    from distill.training.loop import train

    train(child, listen=renamed(listen, stage))
    if not engine:
        return
    from distill.training.engine.phases import train_engine

    told = renamed(listen, f"{stage}, engine")
    try:
        train_engine(child, told)
    except RunMismatch:
        told(Event("engine", "note", "the settings of dreaming changed: training the engine anew"))
        train_engine(child, told, force=True)
