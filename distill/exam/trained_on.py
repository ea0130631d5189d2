"""What a target was trained on: from the run that it came out of.

What is examined need not be the end of its training: a run's best checkpoint is often an earlier one. Tokens and steps
are those of the checkpoint itself.
"""

from dataclasses import replace
from typing import Any

from distill.config import Settings
from distill.errors import CorruptFile
from distill.exam.provenance import changed_settings
from distill.exam.targets import Target, read_object
from distill.training.checkpoint import ONWARD, LoopState, read_loop


def trained_on(target: Target) -> dict[str, Any] | None:
    """Teacher, data, tokens and settings of a training, up to what is examined; None where its run isn't here.

    What can't be read is None. seconds: of the whole training, so of its last checkpoint alone. onward: the stages that
    went on from the training, "" for none.
    """
    run = target.trained_in
    if run is None:
        return None
    records, loop = run.records(), _loop(target)
    capture, train = (records[stage].summary if stage in records else {} for stage in ("capture", "train"))
    documents = read_object(run.data / "data.json", "counts", "train")
    ended = loop is not None and "train" in records and loop.step == train.get("steps")
    return {
        "teacher": run.settings.source,
        "answers": documents.get("documents") or capture.get("responses", 0) - capture.get("held_out", 0) or None,
        "answer_tokens": documents.get("answer_tokens"),
        "tokens": loop.tokens if loop else None,
        "steps": loop.step if loop else None,
        "epochs": loop.epoch if loop else None,
        "onward": ", ".join(stage for stage in ONWARD if stage in loop.settings) if loop else None,
        "seconds": records["train"].seconds if ended else None,
        "numerics": train.get("numerics"),
        "parameters": train.get("parameters"),
        "settings": changed_settings(_settings(run.settings, loop)),
        "data": str(read_object(run.data / "data.json").get("fingerprint", ""))[:16] or None,
    }


def _settings(settings: Settings, loop: LoopState | None) -> Settings:
    """A run's, where they may have been changed since; what its training must not change is as it was then."""
    if loop is None:
        return settings
    fixed = loop.settings
    train = {name: value for name, value in fixed.items() if hasattr(settings.train, name)}
    student = {name: value for name, value in fixed.get("student", {}).items() if hasattr(settings.student, name)}
    return replace(
        settings,
        seed=fixed.get("seed", settings.seed),
        train=replace(settings.train, **train),
        student=replace(settings.student, **student),
    )


def _loop(target: Target) -> LoopState | None:
    """Where the training stood whose weights these are; None where nothing says so any more."""
    if target.checkpoint is None:
        return None
    try:
        return read_loop(target.checkpoint)
    except CorruptFile:  # also where there is none
        return None
