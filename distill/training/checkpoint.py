"""Checkpoints: folders that say how to rebuild themselves, published whole or not at all.

`checkpoints/step-000500/` holds config.json and model.safetensors (as transformers reads them), tokenizer/,
optimizer.safetensors, loop.json, the student's dream drafts once there are some, and checksums.json, the
SHA-256 of every other file. With `train.average` model.safetensors is the mean of the weights, and those that training
goes on from are in raw.safetensors. Of a sharded student the folder optimizer/ holds what each process kept, and the
first one gathers the weights: whatever reads a student reads one file.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.backbone.model import Backbone, save_backbone
from distill.errors import CorruptFile, MissingStage, RunMismatch
from distill.run import COMMANDS, Run, publish_folder, sha256_file, sweep, write_atomic
from distill.training import sharding
from distill.training.distributed import ALONE, World

FORMAT = 1
STEP = re.compile(r"step-(\d{6,})$")
ONWARD = {
    "see": "learned to read pictures",
    "polish": "been polished",
    "facts": "learned new facts",
    "learn": "learned from feedback",
    "reward": "learned by rewards",
}
"""The stages that go on from a trained student, in their order, and what it has done then."""
SHARDS = "optimizer"
"""The folder of what the optimizer of a sharded student keeps."""
STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
"""What an optimizer keeps of a parameter: AdamW, Muon."""
BEFORE = "go on from the checkpoint before it"
"""What deleting a broken checkpoint is good for."""


@dataclass
class LoopState:
    """Where a training stands; with weights, optimizer and data it determines all that follows.

    step: optimizer steps done. tokens: packed tokens read. seconds: spent training, over all sessions.
    epoch, row: the next packed row to read. drafts: whether the student's own dreams are in use; drafts_row: the row
    of the epoch from which on they are. stopped: a stop had it saved, so it goes once a later one is there.
    best_step, best_loss: the checkpoint with the lowest validation loss so far. optimizer: `adamw` or `muon`.
    settings: what must not change.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    row: int = 0
    drafts: bool = False
    drafts_row: int = 0
    stopped: bool = False
    best_step: int = 0
    best_loss: float = float("inf")
    optimizer: str = "adamw"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


def folder_of(run: Run, step: int) -> Path:
    return run.checkpoints / f"step-{step:06d}"


def list_checkpoints(run: Run) -> list[Path]:
    """Published checkpoints, by step."""
    if not run.checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in run.checkpoints.iterdir() if (match := STEP.match(path.name))]
    return [path for _, path in sorted(found)]


def of_stage(run: Run, *stages: str) -> list[Path]:
    """Those that these stages left: "train", or what went on from there: ONWARD."""
    return [path for path in list_checkpoints(run) if stage_of(path) in stages]


def stage_of(folder: Path) -> str:
    """The last stage that its weights went through."""
    settings = read_loop(folder).settings
    return next((stage for stage in reversed(ONWARD) if stage in settings), "train")


def refuse(run: Run, stage: str) -> None:
    """Raise RunMismatch where the run has gone on by a stage that comes after this one, which can't any more then."""
    if found := of_stage(run, *_from(stage)[1:]):
        stage = stage_of(found[-1])
        command = COMMANDS.get(stage, stage)
        text = f"{found[-1]}: has {ONWARD[stage]}, the work of `dream {command}`"
        raise RunMismatch(f"{text}; `dream {command} {run.path} --undo` goes back first")


def drop(run: Run, stage: str) -> int:
    """Delete what a stage and those after it left, and their records; returns how many checkpoints that were. Where the
    stage itself left nothing, the others keep what they did."""
    stages = _from(stage)
    found = of_stage(run, *stages)
    if stage in ONWARD and not any(stage in read_loop(path).settings for path in found):
        run.forget(stage)
        return 0
    for path in found:
        delete(path)
    for stage in stages:
        run.forget(stage)
    return len(found)


def delete(folder: Path) -> None:
    """Delete a checkpoint at once: a kill leaves no part of it that would be taken for one."""
    gone = folder.with_name("gone")
    sweep(gone)
    folder.rename(aside := gone.with_name(f".{gone.name}.{os.getpid()}.partial"))
    shutil.rmtree(aside)


def _from(stage: str) -> list[str]:
    """It and the stages that go on from it."""
    stages = ["train", *ONWARD]
    return stages[stages.index(stage) :]


def latest(run: Run, before: str = "") -> Path:
    """The newest checkpoint, of what comes before a stage. Raises MissingStage where there is none."""
    later = _from(before) if before else []
    found = [path for path in list_checkpoints(run) if not later or stage_of(path) not in later]
    if not found:
        raise MissingStage(f"{run.path}: no checkpoint yet; run `dream train {run.path}` first")
    return found[-1]


def trained_steps(run: Run) -> int:
    """Of the training alone, without what went on from it. Raises MissingStage."""
    return read_loop(latest(run, next(iter(ONWARD)))).step


def best(run: Run, before: str = "") -> Path:
    """The checkpoint with the lowest validation loss, of what comes before a stage: what is evaluated and shipped.
    Where a stop came before any was validated, the newest: it has learned more than the start. Raises MissingStage."""
    newest = latest(run, before)
    loop = read_loop(newest)
    path = folder_of(run, loop.best_step)
    return path if path.is_dir() and (loop.best_step or not loop.stopped) else newest


def as_trained(run: Run) -> Path:
    """The best of the training alone, whatever was learned since. Raises MissingStage."""
    return best(run, next(iter(ONWARD)))


def read_loop(folder: Path) -> LoopState:
    """The loop's state. Raises CorruptFile."""
    path = folder / "loop.json"
    try:
        return LoopState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); delete {folder} to go on from the one before") from error


def verify_checkpoint(folder: Path, remedy: str = BEFORE) -> None:
    """Compare every file with checksums.json. Raises CorruptFile naming the first that differs."""
    for name, digest in _checksums(folder, remedy).items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != digest:
            state = "is missing" if not file.is_file() else "was cut short or altered (SHA-256 differs)"
            raise CorruptFile(f"{file}: {state}; delete {folder} to {remedy}")


def _checksums(folder: Path, remedy: str) -> dict[str, str]:
    path = folder / "checksums.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); delete {folder} to {remedy}") from error


def save_checkpoint(
    run: Run,
    model: Backbone,
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    drafts: dict[str, Tensor],
    raw: dict[str, Tensor],
    beside: Callable[[Path], Any] | None = None,
    world: World = ALONE,
) -> Path:
    """Publish `step-NNNNNN` atomically. raw: the weights to go on from, where the model holds others. beside:
    writes into its folder what it holds besides. world: of the processes, which all call this."""
    from safetensors.torch import save_file

    final, sharded = folder_of(run, state.step), sharding.is_sharded(model)
    if not world.first and not sharded:
        return final
    kept = optimizer_tensors(model, optimizer)
    if sharded:
        model, raw = sharding.whole(model, "cpu", world.first), sharding.gathered(raw, "cpu", world.first)
        if not world.first:
            sharding.save(kept)
            return final
    with publish_folder(final) as folder:
        save_backbone(model, folder)
        shutil.copytree(run.tokenizer, folder / "tokenizer")
        if sharded:
            sharding.save(kept, folder / SHARDS)
        else:
            save_file(kept, folder / "optimizer.safetensors")
        for name, tensors in (("drafts", drafts), ("raw", raw)):
            if tensors:
                save_file(tensors, folder / f"{name}.safetensors")
        if beside is not None:
            beside(folder)
        (folder / "loop.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        write_checksums(folder)
    return final


def weights_of(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, as it was written down. Two students may have the same number of steps. Raises
    CorruptFile."""
    sums = _checksums(folder, BEFORE)
    if (name := "model.safetensors") not in sums:
        raise CorruptFile(f"{folder / 'checksums.json'}: knows no {name}; delete {folder} to {BEFORE}")
    return sums[name]


def trim_metrics(path: Path, kept: Callable[[dict[str, Any]], bool]) -> None:
    """A file of metrics, where there is one, loses the lines that aren't kept, and one that a kill cut short."""

    def whole(line: str) -> bool:
        try:
            return kept(json.loads(line))
        except (ValueError, KeyError, TypeError):
            return False

    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        write_atomic(path, "".join(f"{line}\n" for line in lines if whole(line)))


def write_checksums(folder: Path) -> None:
    """checksums.json: the SHA-256 of every file that is there now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): sha256_file(path) for path in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, remedy: str = BEFORE) -> None:
    """Restore AdamW's moments and Muon's momentum, as bits; sharded as the model is, however they were written. Raises
    CorruptFile."""
    parameters = dict(model.named_parameters())
    if (folder / SHARDS).is_dir():
        counts = torch.zeros(1)
        tensors = sharding.load(
            folder / SHARDS, lambda key: counts if key.endswith(".step") else parameters[key.rpartition(".")[0]]
        )
    else:
        tensors = _read(folder / "optimizer.safetensors", remedy)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        states.setdefault(name, {})[kind] = tensor
    for name, parameter in parameters.items():
        if (state := states.get(name)) is None:
            continue  # it never had a gradient
        if set(state) not in STATES:
            path = folder / "optimizer.safetensors"
            raise CorruptFile(f"{path}: has {', '.join(sorted(state))} of {name}; delete {folder} to {remedy}")
        optimizer.state[parameter] = {
            kind: tensor.reshape(()).to(parameter.device) if kind == "step" else sharding.part_of(tensor, parameter)
            for kind, tensor in state.items()
        }


def load_drafts(folder: Path) -> dict[str, Tensor]:
    """The student's own dreams; empty where it has none yet. Raises CorruptFile."""
    path = folder / "drafts.safetensors"
    return _read(path) if path.exists() else {}


def load_raw(folder: Path) -> dict[str, Tensor]:
    """The weights to go on from, where model.safetensors is a mean. Raises CorruptFile."""
    return _read(folder / "raw.safetensors")


def _read(path: Path, remedy: str = BEFORE) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); delete {path.parent} to {remedy}") from error


def prune(run: Run, keep_last: int, best_step: int) -> None:
    """Delete all but the last few, the best, and the start (evaluation compares with it). What a stop left is not among
    the last few but as the very last: a training that was stopped ends with the files of one that wasn't."""
    found = list_checkpoints(run)
    planned = [path for path in found if path == found[-1] or not _left_by_a_stop(path)]
    kept = {folder_of(run, 0), folder_of(run, best_step), *planned[-max(keep_last, 1) :]}
    for path in found:
        if path not in kept:
            delete(path)


def _left_by_a_stop(folder: Path) -> bool:
    try:
        return read_loop(folder).stopped
    except CorruptFile:  # nobody goes on from it
        return False


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter, as safetensors can hold it; of a sharded one, where it is."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value).detach()
            if not sharding.is_sharded(tensor):
                tensor = tensor.cpu().reshape(-1 if key == "step" else value.shape)
            tensors[f"{name}.{key}"] = tensor
    return tensors
