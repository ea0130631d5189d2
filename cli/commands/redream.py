"""`dream redream`."""

from typing import TYPE_CHECKING

import click

from cli.options import setting, stage_options
from cli.stages import stage_command

if TYPE_CHECKING:
    from distill.run import Run


@click.command()
@setting("--samples", "redream.samples", "Dreams sampled an answer.", type=click.IntRange(1), metavar="K")
@setting("--prior", "redream.prior", "What a dream's own likelihood counts.", type=click.FloatRange(0), metavar="W")
@setting("--minutes", "redream.minutes", "Stop after so long.", type=click.FloatRange(0), metavar="M")
@stage_options()
def redream(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Let RUN's trained student dream of each training answer, and keep the dream under which the answer is likeliest
    in the place of the mined one (RUN/dreams.jsonl). The next `dream train` learns from those dreams, from the start.
    Stopped at any moment, it goes on from there.

    \b
    Example, a round:
      dream redream my-student --samples 8 && dream train my-student
    """
    stage_command(run, "redream", force, as_json, quiet)
