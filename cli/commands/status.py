"""`dream status`."""

from pathlib import Path

import click

from cli.options import json_option, run_argument
from cli.output import answer
from cli.overview import overview, render
from cli.runs import open_run


@click.command()
@run_argument
@json_option
def status(run_path: Path, as_json: bool) -> None:
    """Say what RUN has: each stage done, stale or missing, its counts, checkpoints and the bundle.

    \b
    Example:
      dream status my-student --json
    """
    found = overview(open_run(run_path, None, [], {}))
    answer(as_json, found, render(found))
