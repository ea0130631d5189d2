"""The stages by name: where each lives, how one is run and told of."""

import contextlib
import importlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli.output import answer, facts, table
from cli.progress import Progress, duration

if TYPE_CHECKING:
    from distill.events import Listener
    from distill.run import Run

STAGES: dict[str, tuple[str, str]] = {
    "capture": ("distill.corpus.capture", "capture"),
    "mine": ("distill.knowledge.mine", "mine"),
    "tokenize": ("distill.vision.tokenize", "tokenize"),
    "train": ("distill.training.loop", "train"),
    "see": ("distill.learning.see", "see"),
    "engine": ("distill.training.engine.phases", "train_engine"),
    "evaluate": ("distill.report.evaluate", "evaluate"),
    "export": ("bundle.export", "export"),
}
"""Stage → (module, function), in order."""


ASKED_FOR: dict[str, tuple[str, str]] = {
    "redream": ("distill.training.redream", "redream"),
    "polish": ("distill.learning.polish", "polish"),
    "facts": ("distill.learning.facts", "learn_facts"),
    "learn": ("distill.learning.learn", "learn"),
    "reward": ("distill.learning.reinforce", "reinforce"),
}
"""Stages that only their own command runs."""


def stages_of(run: "Run") -> list[str]:
    """STAGES but for `see`, where no step of it is asked for."""
    return [stage for stage in STAGES if stage != "see" or run.settings.see.steps]


@dataclass(frozen=True)
class StageResult:
    """What a stage left; `skipped` where it was up to date already."""

    stage: str
    skipped: bool
    seconds: float
    finished: str
    summary: dict[str, Any]


def run_stage(run: "Run", stage: str, force: bool, listen: "Listener", **options: Any) -> StageResult:
    """Run one stage, or find that it is up to date. options: what the stage takes besides."""
    module, function = (STAGES | ASKED_FOR)[stage]
    perform = getattr(importlib.import_module(module), function)
    # The processes of one torchrun work on a run together.
    with run.working() if "WORLD_SIZE" not in os.environ else contextlib.nullcontext():
        before, started = _written(run), time.monotonic()
        summary = perform(run, listen=listen, force=force, **options)
        after = run.records().get(stage)
    return StageResult(
        stage=stage,
        skipped=any(before) and before == _written(run),
        seconds=after.seconds if after else time.monotonic() - started,
        finished=after.finished if after else "",
        summary=dict(summary or {}),
    )


def _written(run: "Run") -> list[int]:
    """When records were written: a stage that does anything writes one, one that is up to date doesn't.

    An engine of which some phases are still to come has a record of its own.
    """
    paths = (run.path / "run.json", run.engine / "loop.json")
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]


def headline(result: StageResult) -> str:
    """One line that says what became of a stage."""
    if reason := result.summary.get("skipped"):
        return f"{result.stage}: skipped, {reason}"
    if result.skipped:
        return f"{result.stage}: up to date (finished {result.finished}, took {duration(result.seconds)})"
    return f"{result.stage}: done in {duration(result.seconds)}"


def stage_command(run: "Run", stage: str, force: bool, as_json: bool, quiet: bool) -> None:
    """What each stage's command does: run it, then print its summary."""
    with Progress(quiet) as listen:
        result = run_stage(run, stage, force, listen)
    answer(as_json, {"run": str(run.path), **vars(result)}, told(result))


def told(result: StageResult) -> str:
    """A stage's headline and summary, for people."""
    rows = [] if "skipped" in result.summary else facts(result.summary)
    return "\n".join(filter(None, [headline(result), table(rows)]))
