"""One cell of a sweep: its data, made once and shared, and its training, here or in a process of its own."""

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config import Settings, settings_yaml
from distill.errors import BadInput, DistillError, RunMismatch
from distill.events import Event, Listener
from distill.exam.baselines import SHARED_STAGES, copy_file, records_of, renamed, train_child
from distill.run import Run, fingerprint, publish_folder, write_atomic
from distill.stopping import terminable
from distill.sweep.plan import Cell

KEPT = ("steps", "tokens", "epochs", "parameters", "best_step", "validation_loss", "tokens_per_second", "numerics")
"""What the sweep writes down of a training's summary."""


class CellFailed(DistillError):
    """A cell's training failed by a bug, or its process died. trace: what to show whoever mends it."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


# Data.
def shared_stages(source: Run, data: Settings) -> list[str]:
    """The first stages of `source` that were run with the very settings of `data`."""
    run = Run(source.path, data)
    found: list[str] = []
    for stage in SHARED_STAGES:
        if stage not in run.records() or run.stale(stage):
            break
        found.append(stage)
    return found


def data_key(data: Settings) -> str:
    """Short, of all settings that a cell's data is made with."""
    tree = asdict(data)
    used = {name: tree[name] for name in ("seed", "capture", "mine", "tokenize")}
    return fingerprint({**used, "teacher": tree["teacher"]["model"]})[:8]


def best_source(sources: Sequence[Run], data: Settings) -> tuple[Run | None, list[str]]:
    """Which of the runs has most of that data already, and the stages of it."""
    found = [(shared_stages(source, data), source) for source in sources]
    stages, source = max(found, key=lambda pair: len(pair[0]), default=([], None))
    return (source, stages) if stages else (None, [])


def prepare_data(folder: Path, data: Settings, sources: Sequence[Run], listen: Listener) -> Run:
    """A run with that data, finished: one of `sources` that has it all, or one in `folder` with copies of what
    they have, in which the other stages are run. Raises what those raise."""
    source, stages = best_source(sources, data)
    if source is not None and len(stages) == len(SHARED_STAGES):
        return source
    if not (folder / "config.yaml").exists():
        with publish_folder(folder) as aside:
            if source is not None:
                for path in shared_files(source, stages):
                    copy_file(path, aside / path.relative_to(source.path))
                write_atomic(aside / "run.json", records_of(source, tuple(stages)))
            write_atomic(aside / "config.yaml", settings_yaml(data))
    run = Run.create(folder, data)
    with run.working():
        for stage, perform in _performers().items():
            if stage not in run.records() or run.stale(stage):
                perform(run, listen)
    return run


def shared_files(source: Run, stages: Sequence[str]) -> list[Path]:
    """What those stages wrote."""
    records = source.records()
    paths = {source.path / output for stage in stages for output in records[stage].outputs}
    return sorted(path for path in paths if path.exists())


def _performers() -> dict[str, Callable[[Run, Listener], Any]]:
    from distill.corpus.capture import capture
    from distill.knowledge.mine import mine
    from distill.vision.seeing import tokenize

    return {"capture": capture, "mine": mine, "tokenize": tokenize}


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
    cell = job.cell
    child = train_child(job.source, job.folder, cell.settings, cell.settings.train.steps, job.stage, listen)
    record = child.require("train")
    found = {key: record.summary.get(key) for key in KEPT} | {"seconds": record.seconds}
    if job.engine:
        from distill.training.engine.phases import train_engine

        told = renamed(listen, f"{job.stage}, engine")
        try:
            train_engine(child, told)
        except RunMismatch:
            told(Event("engine", "note", "the settings of dreaming changed: training the engine anew"))
            train_engine(child, told, force=True)
        made = child.require("engine")
        found |= {"engine_seconds": made.seconds, "engine_skipped": made.summary.get("skipped")}
        found |= {"engine_parameters": made.summary.get("parameters")}
    return found


def train_apart(job: Job, threads: int, listen: Listener, stop: threading.Event) -> dict[str, Any]:
    """`train_cell` in a process of its own, with so many threads. Raises CellFailed besides.

    Once `stop` is set that process saves where it is, and has a minute for that.
    """
    import torch

    from distill.training.distributed import ask_to_stop

    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, job, threads))
    process.start()
    there.close()  # the child's end: without it here, its death ends the pipe
    result: dict[str, Any] | None = None
    try:
        while True:
            while not here.poll(1.0):
                if stop.is_set():
                    ask_to_stop([process])
                    process.kill()
            kind, *content = here.recv()
            if kind == "event":
                listen(content[0])
            elif kind == "done":
                result = content[0]
            elif kind == "stopped":
                raise KeyboardInterrupt
            elif kind == "error":
                raise BadInput(content[0])
            else:
                raise CellFailed(*content)
    except EOFError:
        process.join()
        if result is None and stop.is_set():  # before it could say so
            raise KeyboardInterrupt from None
        if result is None:
            code = process.exitcode
            text = f"its process ended with code {code}; was there too little memory for so many --jobs?"
            raise CellFailed(text, f"{job.cell.name}: exit code {code}\n") from None
        return result
    finally:
        here.close()
        process.join()


def _work(pipe: Any, job: Job, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    try:
        with terminable():
            pipe.send(("done", train_cell(job, lambda event: pipe.send(("event", event)))))
    except KeyboardInterrupt:
        pipe.send(("stopped",))
    except DistillError as error:
        pipe.send(("error", str(error)))
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("bug", one_line(error), traceback.format_exc()))


def _die_with_the_parent() -> None:
    """A sweep that was killed is started again: nobody else may be training its cells then."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def one_line(error: Exception) -> str:
    """What an unexpected error says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Together:
    """What several trainings at once tell, as one count of steps."""

    def __init__(self, totals: dict[str, int], listen: Listener) -> None:
        self.listen, self.total = listen, sum(totals.values())
        self.done: dict[str, float] = dict.fromkeys(totals, 0)
        self._lock = threading.Lock()

    def of(self, name: str) -> Listener:
        """The listener of one cell."""

        def listen(event: Event) -> None:
            if event.kind in ("note", "warning"):
                self.listen(event)
            elif event.kind == "progress" and event.unit == "step" and "engine" not in event.stage:
                self.count(name, event.done)

        return listen

    def count(self, name: str, done: float) -> None:
        with self._lock:
            self.done[name] = done
            self.listen(Event("sweep", "progress", done=sum(self.done.values()), total=self.total, unit="step"))
