"""`dream compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import json_option, quiet_option, runs_dir_option
from cli.output import emit_json
from cli.progress import Progress
from cli.targets import exam_for, find_systems, report_text

if TYPE_CHECKING:
    from distill.exam.questions import Exam


@click.command()
@click.argument("targets", nargs=-1, metavar="[NAME=]TARGET[,TARGET…]…")
@click.option("--baseline", default="", metavar="NAME", help="Whom the others are compared with [the first].")
@click.option("--on", metavar="RUN", help="Whose held-out prompts are asked [of the run that the targets come from].")
@click.option("--prompts", metavar="N|FILE", help="Only the first N of them; or a file of prompts nobody answered.")
@click.option("--judge", metavar="TEACHER", help="Also ask a teacher which answers are better: ollama:llama3.2:1b.")
@click.option("--host", default="", metavar="URL", help="Ollama server of targets and judge [$OLLAMA_HOST].")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Where the report goes."
)
@click.option("--cost/--no-cost", default=True, help="Measure speed and memory too, each in a process of its own.")
@click.option(
    "--from",
    "source",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="RESULTS.json",
    help="Measure nothing: write the reports of an earlier comparison again.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting for this comparison: evaluate.dreams=2."
)
@click.option("--force", is_flag=True, help="Measure everything again.")
@runs_dir_option
@quiet_option
@json_option
def compare(
    targets: tuple[str, ...],
    baseline: str,
    on: str | None,
    prompts: str | None,
    judge: str | None,
    host: str,
    out: Path | None,
    cost: bool,
    source: Path | None,
    overrides: tuple[str, ...],
    force: bool,
    as_json: bool,
    quiet: bool,
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
        given = {"targets": targets, "--baseline": baseline, "--on": on, "--prompts": prompts, "--judge": judge}
        given |= {"--host": host, "--set": overrides, "--force": force, "--no-cost": not cost}
        if unused := [name for name, value in given.items() if value]:
            raise click.UsageError(f"--from writes an earlier comparison's reports again; it takes no {unused[0]}")
        results, folder = read_results(source), out or source.parent
        publish(folder, results)
    else:
        results, folder = _measure(
            targets, baseline, on, prompts, judge, host, out, cost, overrides, force=force, quiet=quiet
        )
    if as_json:
        emit_json({"folder": str(folder), **results})
        return
    click.echo(f"{report_text(results)}\n\nReport: {folder / 'report.html'}")


def _measure(
    specs: tuple[str, ...],
    baseline: str,
    on: str | None,
    prompts: str | None,
    judge: str | None,
    host: str,
    out: Path | None,
    cost: bool,
    overrides: tuple[str, ...],
    *,
    force: bool,
    quiet: bool,
) -> tuple[dict[str, Any], Path]:
    from distill.address import Address
    from distill.config import TeacherSettings
    from distill.exam.examine import dream_tokens_of
    from distill.report.compare import compare as perform

    if len(specs) < 2:
        raise click.UsageError("name two targets or more; `dream evaluate` measures one")
    systems = find_systems(specs, host)
    targets = [target for each in systems.values() for target in each]
    exam, settings = exam_for(targets, on, prompts, out, overrides)
    folder = out or _folder(exam, list(systems), prompts)
    hosts = [Address(host)] if host else list(settings.teacher.hosts)
    who = TeacherSettings(model=judge, hosts=hosts) if judge else None
    with Progress(quiet) as listen:
        results = perform(
            systems,
            exam,
            folder,
            settings.evaluate,
            listen,
            seed=settings.seed,
            baseline=baseline,
            dream_tokens=dream_tokens_of(exam.run, targets),
            device=settings.train.device,
            cost=cost,
            judge=who,
            force=force,
        )
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
