"""The `train` stage: train the run's student, alone or in several processes, or go on where it stopped."""

import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

from distill.backbone.device import pick_device
from distill.events import Event, Listener, silent
from distill.run import Run, sha256_file
from distill.teacher.open_source import open_source
from distill.tokens.packing import pack
from distill.training import checkpoint
from distill.training.distributed import World, launch
from distill.training.plan import check_settings, data_fingerprint, train_settings
from distill.training.start import begin
from distill.training.trainer import Trainer


def train(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """Train the run's student, or go on where it stopped; returns the summary.

    Raises MissingStage without a tokenizer, RunMismatch where checkpoints were made by other settings (with
    `force` they are deleted), CorruptFile where the newest checkpoint was altered.
    """
    for stage in ("capture", "mine", "tokenize"):
        run.require(stage)
    if force:  # before what is there goes
        check_settings(run.settings.train)
        pick_device(run.settings.train.device, "train.device")
        if run.settings.student.model:
            open_source(run.settings.student.model)
    if "WORLD_SIZE" not in os.environ or int(os.environ["RANK"]) == 0:
        begin(run, listen, force)
    record = None if force else run.fresh("train", train_settings(run))
    if record is not None:
        listen(Event("train", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    processes = run.settings.train.processes
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        pack(run)
        return launch(_train_path, run.path, processes, listen, force)
    return _train(run, listen, force)


def _train_path(path: Path, listen: Listener, force: bool) -> dict[str, Any]:
    return _train(Run.open(path), listen, force)


def _train(run: Run, listen: Listener, force: bool) -> dict[str, Any]:
    started = time.monotonic()
    world = World.join(run.settings.train.device)
    if world.first:
        if force:
            _delete_checkpoints(run)
        counts = pack(run, listen)
        set_aside_stale(run, listen)
        listen(Event("train", "start", f"{counts['train']['documents']} documents", data=counts))
    world.wait()
    trainer = Trainer(run, world, listen if world.first else silent)
    earlier = trainer.state.seconds
    summary = trainer.fit()
    if world.first:
        best = checkpoint.best(run)
        outputs = {
            str((best / name).relative_to(run.path)): sha256_file(best / name) for name in ("model.safetensors",)
        }
        run.record("train", train_settings(run), outputs, summary, earlier + time.monotonic() - started)
        listen(Event("train", "done", f"{summary['tokens']:,} tokens", data=summary))
    world.wait()
    return summary


def set_aside_stale(run: Run, listen: Listener) -> None:
    """Rename checkpoints that were trained on other data: what reads them must start anew, but nothing is lost."""
    found = checkpoint.list_checkpoints(run)
    checkpoint.refuse(run, "train")
    if not found or checkpoint.read_loop(found[-1]).settings.get("data") == data_fingerprint(run):
        return
    number = next(n for n in itertools.count(1) if not run.checkpoints.with_name(f"checkpoints.{n}").exists())
    for path in (run.checkpoints, run.path / "tensorboard", run.metrics):
        if path.exists():
            path.rename(path.with_name(f"{path.stem}.{number}{path.suffix}"))
    run.forget("train")
    text = f"the data changed: training anew; earlier checkpoints are in {run.checkpoints.name}.{number}"
    listen(Event("train", "note", text))


def _delete_checkpoints(run: Run) -> None:
    """Their records too: what comes next asks whether there is a student that was trained to its end."""
    for stage in ("train", *checkpoint.ONWARD):
        run.forget(stage)
    for path in checkpoint.list_checkpoints(run):
        checkpoint.delete(path)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    shutil.rmtree(run.path / "tensorboard", ignore_errors=True)
    run.metrics.unlink(missing_ok=True)
