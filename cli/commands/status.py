"""`dream status`."""

from pathlib import Path

import click

from cli.options import json_option, run_argument
from cli.output import emit_json


@click.command()
@run_argument
@json_option
def status(run_path: Path, as_json: bool) -> None:
    """Say what RUN has: each stage done, stale or missing, its counts, checkpoints and the bundle.

    \b
    Example:
      dream status my-student --json
    """
    from cli.overview import overview, render
    from cli.runs import open_run

    found = overview(open_run(run_path, None, [], {}))
    if as_json:
        emit_json(found)
    else:
        click.echo(render(found))
