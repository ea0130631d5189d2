"""`dream bench`."""

import click

from cli.options import json_option
from cli.output import emit_json, table


@click.group()
def bench() -> None:
    """Measure how fast the parts are, each against a fair reference in the same run.

    \b
    Example:
      dream bench startup
    """


@bench.command()
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(3), help="Processes of each kind.")
@json_option
def startup(repeats: int, as_json: bool) -> None:
    """Time `dream --help` against the smallest click program, whole processes, alternating.

    \b
    Example:
      dream bench startup --repeats 31
    """
    from cli.startup import measure

    result = measure(repeats)
    if as_json:
        emit_json(result)
        return
    rows = [("dream --help", result["dream"] * 1000), ("bare click --help", result["click"] * 1000)]
    click.echo(table(rows, ("program", "median ms")))
    click.echo(f"ratio {result['ratio']:.2f} (at most 1.5 is wanted)")
