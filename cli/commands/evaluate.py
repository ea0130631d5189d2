"""`dream evaluate`."""

from typing import TYPE_CHECKING, Any

import click

from cli.options import stage_options
from cli.stages import stage_command

if TYPE_CHECKING:
    from distill.run import Run

BASELINES = ("hard", "nodream")


def baselines(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """ "hard,nodream" → its names."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if name not in BASELINES:
            raise click.BadParameter(f"{name!r} is no baseline; choose among {', '.join(BASELINES)}")
    return names


def baselines_option(function: Any) -> Any:
    """--baselines hard,nodream → evaluate.baselines."""
    return click.option(
        "--baselines",
        "evaluate__baselines",
        metavar="hard,nodream",
        callback=baselines,
        help="Also train and measure: hard labels only, no dreams. [evaluate.baselines]",
    )(function)


@click.command()
@baselines_option
@stage_options()
def evaluate(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Measure RUN's student on the held-out prompts; results go to RUN/evaluation.

    \b
    Example:
      dream evaluate my-student --baselines hard,nodream
    """
    stage_command(run, "evaluate", force, as_json, quiet)
