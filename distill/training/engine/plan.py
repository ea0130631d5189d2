"""What a training of the dream engine is: its phases, its settings, when there is nothing to train, where it stands."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.config import DreamingConfig
from distill.dream.prompting import OUTPUT_MODES
from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener
from distill.run import Run, StageRecord, beside, sha256_file
from distill.tokens.packing import Documents, pack
from distill.training.checkpoint import verify_checkpoint
from distill.training.engine.data import has_dream, leaves_room

VERSION = 1
PHASES = ("input", "dream", "end")
PARTS = {
    "input": ("input_tokenizer",),
    "dream": ("input_tokenizer", "generator"),
    "end": ("input_tokenizer", "generator", "reasoner", "decoder"),
}
"""The parts of the engine that a phase trains."""
FREE = ("output_mode", "enable_visualization", "keep_above", "sure", "checkpoint_every")
"""Settings of dreaming that may change without training anew."""
REMEDY = "train the dream engine anew"


def engine_settings(run: Run) -> dict[str, Any]:
    """All that the stage depends on, besides the backbone and its data."""
    dreaming = asdict(run.settings.dreaming)
    del dreaming["checkpoint_every"]
    return {"dreaming": dreaming, "seed": run.settings.seed, "version": VERSION}


def check_settings(config: DreamingConfig) -> None:
    """Raise BadInput for a value that no engine, or no training, can have."""
    ones = ("num_dream_sequences", "dream_length", "graph_reasoning_hops", "batch", "checkpoint_every")
    for least, names in ((1, ones), (0, ("input_steps", "dream_steps", "end_steps", "epochs"))):
        for name in names:
            if getattr(config, name) < least:
                raise BadInput(f"dreaming.{name}: {getattr(config, name)} is too small; {least} is the least")
    if config.lr <= 0:
        raise BadInput(f"dreaming.lr: {config.lr:g} must be above 0")
    if not 0 <= config.keep_above <= 1:
        raise BadInput(f"dreaming.keep_above: {config.keep_above} is a share, from 0 to 1")
    if config.output_mode not in OUTPUT_MODES:
        raise BadInput(f"dreaming.output_mode: {config.output_mode!r} is none of {', '.join(OUTPUT_MODES)}")


def nothing_to_do(run: Run) -> str:
    """Why the run's student needs no engine; empty where it does."""
    context = run.settings.student.context
    if not run.settings.train.dreams:
        return "the student was trained without dreams (train.dreams=false)"
    if run.settings.train.pause:
        return "the student was trained on pauses, not on dreams (train.pause=true)"
    if not run.settings.dreaming.dream_steps:
        return "dreaming.dream_steps=0"
    if not pack(run)["train"]["dreams"]:
        return "no dreams were mined"
    documents = Documents.load(run.data / "train")
    if not (has_dream(documents) & leaves_room(documents, run.settings.dreaming.dream_length, context)).any():
        return f"no prompt leaves room for a dream in student.context={context}"
    return ""


def set_aside(run: Run, why: str, listen: Listener) -> None:
    """Rename an engine that no longer fits: nothing is lost, and nobody takes it for the run's."""
    if run.engine.exists():
        aside = beside(run.engine)
        run.engine.rename(aside)
        listen(Event("engine", "note", f"{why}; the earlier engine is in {aside.name}"))


@dataclass
class EngineState:
    """Where a training stands: `step` steps of `phase` are done. seconds: spent, over all sessions.

    backbone: SHA-256 of the weights that the engine reads. data: fingerprint of the documents. settings: what must
    not change from here on.
    """

    phase: str = PHASES[0]
    step: int = 0
    seconds: float = 0.0
    backbone: str = ""
    data: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def reached(self, phase: str, step: int) -> bool:
        return (PHASES.index(phase), step) <= (PHASES.index(self.phase), self.step)


def untouched(run: Run, record: StageRecord) -> bool:
    """Whether the engine that is there is the one of the record, and not one begun anew since."""
    paths = {run.path / output: digest for output, digest in record.outputs.items()}
    return all(path.is_file() and sha256_file(path) == digest for path, digest in paths.items())


def engine_of(run: Run, weights: Path) -> Path | None:
    """The folder of the run's finished engine, if it was trained on a backbone of these weights; else None.

    Raises CorruptFile where its files were altered.
    """
    record = run.records().get("engine")
    loop = run.engine / "loop.json"
    if record is None or not record.outputs or not loop.exists():
        return None
    if not untouched(run, record):
        verify_checkpoint(run.engine, REMEDY)
        return None
    try:
        trained_on: str = json.loads(loop.read_text(encoding="utf-8"))["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{loop}: can't be read ({error}); run `dream train {run.path} --force`") from error
    return run.engine if trained_on == sha256_file(weights) else None
