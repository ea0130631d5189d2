"""The stages by name: where each lives, how one is run and told of."""

import contextlib
import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cli.output import emit_json, facts, table
from cli.progress import Progress, duration

if TYPE_CHECKING:
    from distill.events import Listener
    from distill.run import Run

STAGES: dict[str, tuple[str, str]] = {
    "capture": ("distill.corpus.capture", "capture"),
    "mine": ("distill.corpus.mining", "mine"),
    "tokenize": ("distill.tokens.build", "build_tokenizer"),
    "train": ("distill.training.loop", "train"),
    "evaluate": ("distill.evaluation.evaluate", "evaluate"),
    "export": ("bundle.export", "export"),
}
"""Stage → (module, function), in order."""


@dataclass(frozen=True)
class StageResult:
    """What a stage left; `skipped` where it was up to date already."""

    stage: str
    skipped: bool
    seconds: float
    finished: str
    summary: dict[str, Any]


def run_stage(run: "Run", stage: str, force: bool, listen: "Listener") -> StageResult:
    """Run one stage, or find that it is up to date."""
    module, function = STAGES[stage]
    perform = getattr(importlib.import_module(module), function)
    # The processes of one torchrun work on a run together.
    with run.working() if "WORLD_SIZE" not in os.environ else contextlib.nullcontext():
        before = _written(run)
        summary = perform(run, listen=listen, force=force)
        after = run.records().get(stage)
    return StageResult(
        stage=stage,
        skipped=before is not None and before == _written(run),
        seconds=after.seconds if after else 0.0,
        finished=after.finished if after else "",
        summary=dict(summary or {}),
    )


def _written(run: "Run") -> int | None:
    """When run.json was written last: a stage that does anything writes it, one that is up to date doesn't."""
    path = run.path / "run.json"
    return path.stat().st_mtime_ns if path.exists() else None


def headline(result: StageResult) -> str:
    """One line that says what became of a stage."""
    if result.skipped:
        return f"{result.stage}: up to date (finished {result.finished}, took {duration(result.seconds)})"
    return f"{result.stage}: done in {duration(result.seconds)}"


def stage_command(run: "Run", stage: str, force: bool, as_json: bool, quiet: bool) -> StageResult:
    """What each stage's command does: run it, then print its summary."""
    with Progress(quiet) as listen:
        result = run_stage(run, stage, force, listen)
    if as_json:
        emit_json({"run": str(run.path), **vars(result)})
        return result
    click.echo(headline(result))
    rows = facts(result.summary)
    if rows:
        click.echo(table(rows))
    return result
