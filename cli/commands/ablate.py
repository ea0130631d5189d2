"""`dream ablate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import FILE, stage_options
from cli.output import answer
from cli.progress import Progress
from cli.targets import report_text

if TYPE_CHECKING:
    from distill.run import Run


def names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str]:
    """ "engine,pause" → its names."""
    if value is not None and not value.strip():
        raise click.BadParameter("names no arm; leave it out for the usual ones")
    return [name.strip() for name in (value or "").split(",") if name.strip()]


@click.command()
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Training seeds of each arm.")
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Of each training [as many as RUN's student had].")
@click.option(
    "--arms",
    metavar="NAME,…",
    callback=names,
    help="Only these (docs/evaluation.md tells them), or all [those that this run can tell apart, less retrieval].",
)
@click.option("--out", type=FILE, metavar="FILE.md", help="Also write it there.")
@stage_options()
def ablate(run: "Run", arms: list[str], out: Path | None, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Measure what dreaming is worth: RUN's student trained without dreams, with pauses and with dreams, alike in
    data and tokens.

    Each arm answers the held-out prompts. What is trained already is kept, what is measured already too (but for
    --force). Results go to RUN/ablation.

    \b
    Example:
      dream ablate my-world --seeds 3 --set evaluate.prompts=600 --out docs/ablation.md
    """
    from distill.report.page import render_markdown
    from distill.run import write_atomic
    from distill.sweep.ablation.ablate import ablate as perform

    with Progress(quiet) as listen, run.working():
        results = perform(run, listen, arms=arms, **asked)
    if out is not None:
        write_atomic(out, render_markdown(results))
    report = out or run.path / "ablation" / "report.html"
    answer(as_json, {"run": str(run.path), **results}, f"{report_text(results)}\n\nReport: {report}")
