"""`dream sweep`."""

import sys
from pathlib import Path
from typing import Any

import click

from cli.options import CLUSTER, json_option, quiet_option, runs_dir_option
from cli.output import emit_json, table
from cli.progress import Progress
from cli.runs import make_absolute, resolve, runs_dir


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.yaml")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and write nothing.")
@click.option("--compare/--no-compare", default=True, help="Compare the cells at the end, or only train them.")
@click.option("--force", is_flag=True, help="Train cells anew whose settings changed, and measure all again.")
@click.option("--cluster", default="", metavar="ADDRESS", help=f"{CLUSTER} [runtime.cluster]")
@runs_dir_option
@quiet_option
@json_option
@click.pass_context
def sweep(
    ctx: click.Context,
    file: Path,
    dry_run: bool,
    compare: bool,
    force: bool,
    cluster: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train many settings on the same data, each a run of its own, and compare them.

    FILE.yaml names the settings: variants, and how many seeds (docs/sweeping.md). What is
    trained is kept, so the same command goes on where it was stopped; a cell that failed is tried again.

    \b
    Examples:
      dream sweep losses.yaml --dry-run
      dream sweep losses.yaml
    """
    from distill.sweep.plan import read_plan
    from distill.sweep.sweep import overview
    from distill.sweep.sweep import sweep as perform
    from distill.sweep.table import rows

    folder = runs_dir(ctx)
    plan = read_plan(file, lambda name: resolve(name, folder), make_absolute, cluster)
    place = resolve(plan.name, folder)
    if dry_run:
        found = overview(plan, place)
        emit_json(found) if as_json else click.echo(_planned(found))
        return
    with Progress(quiet) as listen:
        state = perform(plan, place, listen, compare=compare, force=force)
    now = {cell.name for cell in plan.cells}  # the file may have had others before
    failed = [name for name, cell in state["cells"].items() if name in now and cell["state"] == "failed"]
    if as_json:
        emit_json({"folder": str(place), **state})
    else:
        heading, *cells = rows(state)
        click.echo(table(cells, heading))
        click.echo(f"\nSweep: {place / 'summary.md'}")
        if "compared_with" in state:
            click.echo(f"Report: {place / 'report.html'}")
        for name in failed:
            click.echo(f"Failed: {name}: {state['cells'][name]['error']}", err=True)
    if failed:
        sys.exit(1)


def _planned(found: dict[str, Any]) -> str:
    from distill.sweep.plan import told

    rows = [(c["cell"], c["state"], told(c["changes"]), c["steps"], ", ".join(c["runs"])) for c in found["cells"]]
    lines = [table(rows, ("cell", "state", "settings", "steps", "stages to run")), ""]
    lines += [f"{c['cell']}: {'; '.join(c['differs'])} (needs --force)" for c in found["cells"] if c["differs"]]
    lines.append(f"{len(rows)} cells in {found['folder']}")
    return "\n".join(lines)
