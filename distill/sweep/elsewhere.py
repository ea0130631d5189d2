"""Cells that a cluster's machines train. A cell's folder travels there, and what changes in it comes back, with each
checkpoint and at the end: the one who sweeps writes it, and a cell whose machine dies goes on from its last checkpoint.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.cluster import Cluster, Tell
from distill.errors import DistillError
from distill.events import Event, Listener
from distill.exam.baselines import renamed
from distill.run import Run, publish_folder
from distill.sweep.cells import Job, learn_cell, make_cell
from distill.training.start import begin

OFTEN = 1.0
"""Seconds between two progress events that are handed on."""


@dataclass(frozen=True)
class Files:
    """Of a folder: names, of all files; content (bytes,) uint8, of those that changed."""

    names: list[str]
    content: dict[str, NDArray[np.uint8]]

    def write(self, folder: Path) -> None:
        """Make the folder so, at once."""
        with publish_folder(folder) as aside:
            for name in self.names:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                if name in self.content:
                    self.content[name].tofile(aside / name)
                else:
                    _link(folder / name, aside / name)


def _link(path: Path, other: Path) -> None:
    """One file under two names, for a moment; two files where the disk can't do that."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


Stamps = dict[str, tuple[int, int]]
"""File → its size, and when it was written."""


def stamps(folder: Path) -> Stamps:
    """Of all its files but what is being written, and what SQLite keeps of a database while it is read."""
    paths = ((path.relative_to(folder), path) for path in folder.rglob("*") if path.is_file())
    kept = [pair for pair in paths if not any(part.startswith(".") for part in pair[0].parts)]
    found = {name.as_posix(): path.stat() for name, path in kept if not path.name.endswith((".db-shm", ".db-wal"))}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def changed(folder: Path, known: Stamps) -> Files:
    """What it is now, for whoever knows it as it was then."""
    now = stamps(folder)
    return Files(list(now), {name: _content(folder / name) for name in now if known.get(name) != now[name]})


def _content(path: Path) -> NDArray[np.uint8]:
    """Mapped: it may be larger than the memory."""
    return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)


@dataclass(frozen=True)
class Lesson:
    """What a machine is sent of a cell. threads: that it trains with."""

    files: Files
    engine: bool
    stage: str
    threads: int


def learn(lesson: Lesson, tell: Tell) -> Files:
    """On such a machine: train it, or go on; what changed."""
    torch.set_num_threads(lesson.threads)
    with tempfile.TemporaryDirectory(prefix="dream-cell-") as place:
        folder = Path(place) / "cell"
        lesson.files.write(folder)
        run, sent = Run.open(folder), stamps(folder)
        start, checkpoints, told = run.records().get("start"), _checkpoints(run), 0.0

        def listen(event: Event) -> None:
            nonlocal checkpoints, told
            if checkpoints != (there := _checkpoints(run)):
                checkpoints = there
                tell(changed(folder, sent))
            if event.kind != "progress":
                tell(event)
            elif time.monotonic() - told > OFTEN:
                told = time.monotonic()
                tell(event)

        learn_cell(run, lesson.engine, lesson.stage, listen)
        if run.records().get("start") != start:
            raise DistillError("the machine that trained it has weights of the teacher that the others lack")
        return changed(folder, sent)


def _checkpoints(run: Run) -> list[Path]:
    return sorted([*run.checkpoints.glob("[!.]*"), *run.engine.glob("[!.]*")])


def learned_elsewhere(
    cluster: Cluster, jobs: Iterable[Job], listen: Listener
) -> Iterator[tuple[Job, Exception | None]]:
    """Each job, with its folder as its training left it, or with why there is none."""
    gpus = int(cluster.most("GPU") > 0)
    threads = 1 if gpus else max(1, min(torch.get_num_threads(), cluster.most("CPU")))

    def sent(job: Job) -> Lesson:
        run = make_cell(job, listen)
        begin(run, renamed(listen, job.stage))
        return Lesson(changed(run.path, {}), job.engine, job.stage, threads)

    doing: dict[Path, Event] = {}

    def heard(job: Job, said: Any) -> None:
        if isinstance(said, Files):
            said.write(job.folder)
        elif said.kind != "progress":
            listen(said)
        else:  # of all cells together: one bar shows no more
            doing[job.folder] = said
            done, total = (sum(getattr(one, what) or 0 for one in doing.values()) for what in ("done", "total"))
            data = {"cells": len(doing)}
            listen(Event("sweep", "progress", done=done, total=total or None, unit=said.unit, data=data))

    for job, result in cluster.results(learn, jobs, sent=sent, heard=heard, cpus=threads, gpus=gpus):
        doing.pop(job.folder, None)
        if isinstance(result, Files):
            result.write(job.folder)
            yield job, None
        else:
            yield job, result
