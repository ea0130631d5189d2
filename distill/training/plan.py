"""What a training is: its settings, which of them may change, and its learning rate."""

import json
import math
from dataclasses import asdict
from typing import Any

from distill.config import TrainSettings
from distill.errors import BadInput
from distill.run import Run
from distill.student.grammar import longest_path
from distill.training import numerics

VERSION = 2
OPTIMIZERS = ("auto", "adamw", "muon")
SHARD = ("auto", "always", "never")
SHARES = (
    *("soft_weight", "empty_dreams", "drafts_from", "drafts_share", "warmup", "noise"),
    *("bottleneck", "prompt_dropout", "unread_until", "gaps", "stutter", "dream_weight"),
)
"""Train settings from 0 to 1."""
DECAY_SHARE = 0.2
"""Last share of training in which `wsd` lowers the learning rate (arXiv:2404.06395 uses a tenth to a fifth)."""

CHANCE_LR, INHERITED_LR = 2e-3, 3e-4
"""Peaks of the learning rate where `train.lr` is 0."""
NEW_ROWS = CHANCE_LR / INHERITED_LR
"""How much quicker an inherited student's rows of tags, lenses and image tokens learn: its teacher has none of them."""

RUNNING = ("steps", "minutes", "checkpoint_every", "keep_last", "log_every", "validate_every")
FREE = {*RUNNING, "device", "processes", "precision", "compile", "micro_rows", "recompute", "shard"}
"""Train settings that may change between sessions of one training."""


def train_settings(run: Run) -> dict[str, Any]:
    """All that training depends on, besides its data."""
    settings = run.settings
    # What bounds dreams where they are stuttered, and what `train.strict` charges for.
    longer = {"dream_length": longest} if (longest := longest_path(settings)) > settings.mine.steps else {}
    how = {"student": asdict(settings.student), "seed": settings.seed, "version": VERSION}
    return {**asdict(settings.train), **how, **longer}


def fixed_settings(run: Run) -> dict[str, Any]:
    """Those that no session of one training may change."""
    return {key: value for key, value in train_settings(run).items() if key not in FREE}


def data_fingerprint(run: Run) -> str:
    """Of the packed documents that a training reads."""
    return json.loads((run.data / "data.json").read_text(encoding="utf-8"))["fingerprint"]


def schedule(kind: str, progress: float, floor: float) -> float:
    """Learning rate as a share of its peak, after warm-up. progress 0…1; floor: the share that it ends at."""
    if kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if kind == "wsd":
        return floor + (1 - floor) * min(1.0, max(0.0, 1 - progress) / DECAY_SHARE)
    raise BadInput(f"train.schedule: {kind!r} is none of wsd, cosine")


def optimizer_for(settings: TrainSettings, inherited: bool) -> str:
    """`adamw` or `muon`. Muon won by measurement where weights begin from chance (docs/training.md)."""
    if settings.optimizer == "auto":
        return "adamw" if inherited else "muon"
    return settings.optimizer


def learning_rate(settings: TrainSettings, peak: float, step: int, progress: float) -> float:
    """Of the step after `step` steps, which are `progress` of the training, by steps or by the clock. It rises with the
    progress that this step will have made: the first isn't lost, but by the clock, where its length isn't known."""
    first = 0.0 if settings.minutes > 0 else 1 / max(settings.steps, 1)
    after = progress * (step + 1) / step if step else first
    risen = min(1.0, after / settings.warmup) if settings.warmup else 1.0
    return peak * risen * schedule(settings.schedule, progress, settings.min_lr / peak)


def unread(settings: TrainSettings, progress: float) -> float:
    """What is left of `bottleneck` and `prompt_dropout` at that progress: 1 at first, 0 from `unread_until` on."""
    return max(0.0, 1 - progress / settings.unread_until) if settings.unread_until else 0.0


def check_settings(settings: TrainSettings) -> None:
    """Raise BadInput for a value that no training can have."""
    numerics.check(settings)
    schedule(settings.schedule, 0.0, 0.0)
    for name in ("batch_rows", "log_every", "validate_every", "checkpoint_every", "keep_last", "processes"):
        if getattr(settings, name) < 1:
            raise BadInput(f"train.{name}: {getattr(settings, name)} is too small; 1 is the least")
    if settings.lr < 0 or settings.clip <= 0:
        raise BadInput(
            f"train.lr, train.clip: {settings.lr:g} and {settings.clip:g} must be above 0 (train.lr=0 chooses)"
        )
    for name in ("match", "strict", "micro_rows"):
        if getattr(settings, name) < 0:
            raise BadInput(f"train.{name}={getattr(settings, name):g}: must be 0 or more")
    if settings.shard not in SHARD:
        raise BadInput(f"train.shard: {settings.shard!r} is none of {', '.join(SHARD)}")
    if settings.optimizer not in OPTIMIZERS:
        raise BadInput(f"train.optimizer: {settings.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    if not 0 <= settings.average <= 0.5:
        raise BadInput(f"train.average: {settings.average:g} is an age in shares of the training, from 0 to 0.5")
    if len(settings.betas) != 2:
        raise BadInput(f"train.betas: {settings.betas} should be two numbers, such as [0.9, 0.95]")
    for name in SHARES:
        if not 0 <= getattr(settings, name) <= 1:
            raise BadInput(f"train.{name}: {getattr(settings, name):g} is a share, from 0 to 1")
