"""`dream compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import FILE, common_options, config_options
from cli.output import answer
from cli.progress import Progress
from cli.targets import exam_for, exam_options, find_systems, report_text

if TYPE_CHECKING:
    from distill.exam.questions import Exam

COMMANDLINE = click.core.ParameterSource.COMMANDLINE
WRITING = ("source", "out", "as_json", "quiet", "runs_dir")
"""What goes with --from."""


@click.command()
@click.argument("targets", nargs=-1, metavar="[NAME=]TARGET[,TARGET…]…")
@click.option("--baseline", default="", metavar="NAME", help="Whom the others are compared with [the first].")
@exam_options
@click.option("--judge", metavar="TEACHER", help="Also ask a teacher which answers are better: ollama:llama3.2:1b.")
@click.option("--cost/--no-cost", default=True, help="Measure speed too, one prompt at a time.")
@click.option(
    "--from", "source", type=FILE, metavar="RESULTS.json", help="Write an earlier comparison's reports again, no more."
)
@config_options
@common_options
@click.pass_context
def compare(
    ctx: click.Context, targets: tuple[str, ...], source: Path | None, out: Path | None, as_json: bool, **asked: Any
) -> None:
    """Compare students, files and models of Ollama on the same prompts: report.md, report.html, results.json.

    A TARGET is a run, checkpoint, bundle, .gguf, transformers folder or ollama:NAME. NAME=A,B,C is one system trained
    with three seeds. What is measured is kept: the same command goes on where it was.

    \b
    Example:
      dream compare my-student ollama:my-student --judge ollama:llama3.2:1b
      dream compare soft=s0,s1,s2 hard=h0,h1,h2 --baseline soft --out soft-or-hard
    """
    from distill.report.measure import publish, read_results

    if source is not None:
        given = [p for p in ctx.command.params if ctx.get_parameter_source(p.name or "") is COMMANDLINE]
        if unused := [p.opts[0] for p in given if p.name not in WRITING]:
            raise click.UsageError(f"--from writes an earlier comparison's reports again; it takes no {unused[0]}")
        results, folder = read_results(source), out or source.parent
        publish(folder, results)
    else:
        results, folder = _measured(targets, out, **asked)
    answer(as_json, {"folder": str(folder), **results}, f"{report_text(results)}\n\nReport: {folder / 'report.html'}")


def _measured(
    specs: tuple[str, ...],
    out: Path | None,
    *,
    baseline: str,
    judge: str | None,
    host: str,
    cost: bool,
    force: bool,
    quiet: bool,
    **asked: Any,
) -> tuple[dict[str, Any], Path]:
    from distill.address import Address
    from distill.config import TeacherSettings
    from distill.report.compare import compare as perform
    from distill.report.measure import Measurement

    if len(specs) < 2:
        raise click.UsageError("name two targets or more; `dream evaluate` measures one")
    systems = find_systems(specs, host)
    targets = [target for each in systems.values() for target in each]
    exam, settings = exam_for(targets, out=out, **asked)
    folder = out or _folder(exam, list(systems), asked["prompts"])
    hosts = [Address(host)] if host else list(settings.teacher.hosts)
    with Progress(quiet) as listen:
        measurement = Measurement.of(exam, settings, targets, listen, force)
        asked_too = TeacherSettings(model=judge, hosts=hosts) if judge else None
        results = perform(measurement, systems, folder, baseline=baseline, cost=cost, judge=asked_too)
    return results, folder


def _folder(exam: "Exam", names: list[str], prompts: str | None) -> Path:
    """RUN/comparisons/A-vs-B, shortened where the names are long; with --prompts N a folder of its own."""
    from distill.exam.examine import safe_name
    from distill.run import fingerprint

    assert exam.run is not None, "a prompt file goes with --out"
    name = "-vs-".join(map(safe_name, names))
    if len(name) > 80:
        name = f"{name[:70]}-{fingerprint(names)[:8]}"
    if prompts is not None:
        name += f"-{prompts}-prompts"
    return exam.run.path / "comparisons" / name
