"""`dream train`."""

from typing import TYPE_CHECKING

import click

from cli.options import setting, stage_options
from cli.stages import stage_command

if TYPE_CHECKING:
    from distill.run import Run


@click.command()
@setting("--steps", "train.steps", "Optimizer steps.", type=click.IntRange(1), metavar="N")
@setting("--minutes", "train.minutes", "Train so long instead.", type=click.FloatRange(0), metavar="M")
@setting("--preset", "student.preset", "Size of the student.", type=click.Choice(["nano", "micro", "small"]))
@setting("--init", "student.init", "Start from a Llama-architecture checkpoint.", metavar="DIR")
@setting("--processes", "train.processes", "Data-parallel processes.", type=click.IntRange(1), metavar="N")
@stage_options()
def train(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Train RUN's student. Stopped at any moment, it goes on from its last checkpoint.

    Losses go to RUN/metrics.jsonl and RUN/tensorboard (look with `tensorboard --logdir runs`).

    \b
    Example:
      dream train my-student --minutes 30 --set train.lr=1e-3
    """
    stage_command(run, "train", force, as_json, quiet)
