"""`dream mine`."""

from typing import TYPE_CHECKING

import click

from cli.options import setting, stage_options
from cli.stages import stage_command

if TYPE_CHECKING:
    from distill.run import Run


@click.command()
@setting("--miner", "mine.miner", "How triplets are found.", type=click.Choice(["syntax", "teacher"]))
@stage_options()
def mine(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Find (what, action, result) triplets in RUN's answers and build the knowledge graph.

    \b
    Example:
      dream mine my-student --miner syntax
    """
    stage_command(run, "mine", force, as_json, quiet)
