"""`dream train`."""

from typing import TYPE_CHECKING

import click

from cli.options import setting, stage_options, weights_option
from cli.output import emit_json
from cli.progress import Progress
from cli.stages import run_stage, show

if TYPE_CHECKING:
    from distill.run import Run

PHASES = ("all", "backbone", "input", "dream", "end")


@click.command()
@setting("--steps", "train.steps", "Optimizer steps.", type=click.IntRange(1), metavar="N")
@setting("--minutes", "train.minutes", "Train so long instead.", type=click.FloatRange(0), metavar="M")
@setting("--layers", "student.layers", "Of the teacher's layers, keep so many.", type=click.IntRange(1), metavar="N")
@setting("--ffn", "student.ffn", "Of each layer's neurons, keep so many.", type=click.IntRange(1), metavar="N")
@setting(
    "--init", "student.init", "Begin as the teacher, by chance, or as another model.", metavar="teacher|chance|PATH"
)
@setting("--preset", "student.preset", "Of this size, from chance.", type=click.Choice(["nano", "micro", "small"]))
@weights_option
@setting("--processes", "train.processes", "Data-parallel processes.", type=click.IntRange(1), metavar="N")
@click.option(
    "--phase",
    default="all",
    show_default=True,
    type=click.Choice(PHASES),
    help="Train the backbone alone, or the dream engine up to this phase.",
)
@stage_options()
def train(run: "Run", phase: str, force: bool, as_json: bool, quiet: bool) -> None:
    """Train RUN's student: its backbone, then its dream engine. Stopped at any moment, it goes on from there.

    Losses go to RUN/metrics.jsonl and RUN/tensorboard (look with `tensorboard --logdir runs`), the engine's to
    RUN/engine/metrics.jsonl. --force does what --phase names anew: with `input`, `dream` and `end` the engine alone.

    \b
    Examples:
      dream train my-student --minutes 30 --set train.lr=1e-3
      dream train my-student --phase end --force --set dreaming.dream_steps=4000
    """
    with Progress(quiet) as listen:
        results = [run_stage(run, "train", force and phase in ("all", "backbone"), listen)]
        if phase != "backbone":
            results.append(run_stage(run, "engine", force, listen, phase=phase))
    if as_json:
        emit_json({"run": str(run.path), "stages": {result.stage: vars(result) for result in results}})
        return
    for result in results:
        show(result)
