"""`dream sweep`."""

import sys
from pathlib import Path
from typing import Any

import click

from cli.options import json_option, quiet_option, runs_dir_option
from cli.output import emit_json, table
from cli.progress import Progress, duration
from cli.runs import make_absolute, resolve, runs_dir


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.yaml")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="Cells at once.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and write nothing.")
@click.option("--compare/--no-compare", default=True, help="Compare the cells at the end, or only train them.")
@click.option("--force", is_flag=True, help="Train cells anew whose settings changed, and measure all again.")
@runs_dir_option
@quiet_option
@json_option
@click.pass_context
def sweep(
    ctx: click.Context,
    file: Path,
    jobs: int,
    dry_run: bool,
    compare: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train many settings on the same data, each a run of its own, and compare them.

    FILE.yaml names the settings: variants, a grid or a random search, and how many seeds (docs/sweeping.md). What is
    trained is kept, so the same command goes on where it was stopped; a cell that failed is tried again.

    \b
    Examples:
      dream sweep losses.yaml --dry-run
      dream sweep losses.yaml --jobs 2
    """
    from distill.sweep.plan import read_plan
    from distill.sweep.sweep import overview
    from distill.sweep.sweep import sweep as perform

    folder = runs_dir(ctx)
    plan = read_plan(file, lambda name: resolve(name, folder), make_absolute)
    place = resolve(plan.name, folder)
    if dry_run:
        found = overview(plan, place)
        emit_json(found) if as_json else click.echo(_planned(found))
        return
    with Progress(quiet) as listen:
        state = perform(plan, place, listen, jobs=jobs, compare=compare, force=force)
    failed = [name for name, cell in state["cells"].items() if cell["state"] == "failed"]
    if as_json:
        emit_json({"folder": str(place), **state})
    else:
        click.echo(_done(state))
        click.echo(f"\nSweep: {place / 'summary.md'}")
        if compare and (place / "report.html").is_file():
            click.echo(f"Report: {place / 'report.html'}")
        for name in failed:
            click.echo(f"Failed: {name}: {state['cells'][name]['error']}", err=True)
    if failed:
        sys.exit(1)


def _planned(found: dict[str, Any]) -> str:
    rows = [(c["cell"], c["state"], _words(c["changes"]), c["steps"], ", ".join(c["runs"])) for c in found["cells"]]
    lines = [table(rows, ("cell", "state", "settings", "steps", "stages to run")), ""]
    lines += [f"{c['cell']}: {'; '.join(c['differs'])} (needs --force)" for c in found["cells"] if c["differs"]]
    lines += [f"{name}: no longer in the file, would be left alone" for name in found["left_alone"]]
    copies = found["bytes"] / 1e6
    lines.append(f"{len(rows)} cells in {found['folder']}; copies of shared data take {copies:,.1f} MB")
    return "\n".join(lines)


def _words(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "-"


def _done(state: dict[str, Any]) -> str:
    from distill.exam.metrics.catalogue import metric_of, shown

    metric = metric_of(state["metric"])
    cells = {name: state["cells"][name] for name in state["order"]}
    compared = any(cell.get("value") is not None for cell in cells.values())
    rows = [
        (
            name,
            cell["state"],
            *([shown(cell.get("seed_value"), metric)] if compared else []),
            f"{cell['validation_loss']:.4f}" if cell.get("validation_loss") is not None else "",
            cell.get("steps") or "",
            duration(cell["seconds"]) if cell.get("seconds") else "",
        )
        for name, cell in cells.items()
    ]
    heading = ("cell", "state", *([metric.label] if compared else []), "validation loss", "steps", "trained for")
    return table(rows, heading)
