"""`dream evaluate`."""

from typing import Any

import click

from cli.options import common_options, config_options
from cli.output import answer
from cli.progress import Progress
from cli.runs import RunName, open_run, resolve, runs_dir, undone_on_failure
from cli.stages import stage_command
from cli.targets import exam_for, exam_options, find_systems, report_text
from distill.errors import DistillError

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
@click.argument("targets", nargs=-1, required=True, metavar="TARGET…", shell_complete=RunName().shell_complete)
@exam_options
@click.option("--temperature", type=click.FloatRange(0, 5), help="Of their own answers. [evaluate.temperature]")
@click.option("--max-tokens", type=click.IntRange(1), help="Of an answer, the dream not counted. [evaluate.max_tokens]")
@click.option("--cost/--no-cost", default=None, help="Measure speed too [yes, but for one run alone].")
@baselines_option
@config_options
@common_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    targets: tuple[str, ...],
    temperature: float | None,
    max_tokens: int | None,
    host: str,
    cost: bool | None,
    evaluate__baselines: tuple[str, ...] | None,
    overrides: tuple[str, ...],
    force: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Measure students, files and models of Ollama on held-out prompts.

    A TARGET is a run, checkpoint, bundle, .gguf, transformers folder or ollama:NAME. One run alone, without --on,
    --prompts, --host, --out or --cost, has its evaluation brought up to date: results go to RUN/evaluation. Everything
    else is asked the held-out prompts of one run, and a table is printed; settings are then for this call only. What is
    measured is kept: the same command goes on where it was.

    \b
    Examples:
      dream evaluate my-student --baselines hard,nodream
      dream evaluate my-student ollama:my-student runs/other/bundle/model.gguf
      dream evaluate ollama:llama3.2:1b --on my-student --prompts 20
      dream evaluate my-student/bundle/model.gguf --prompts 200 --temperature 0.7
    """
    decoding = {"temperature": temperature, "max_tokens": max_tokens}
    overrides += tuple(f"evaluate.{name}={value}" for name, value in decoding.items() if value is not None)
    path = resolve(targets[0], runs_dir(ctx))
    elsewhere = len(targets) > 1 or asked["on"] or asked["prompts"] or asked["out"] or host or cost
    if not elsewhere and (path / "config.yaml").is_file():
        flags = {"evaluate.baselines": list(evaluate__baselines)} if evaluate__baselines else {}
        with undone_on_failure(path):
            run = open_run(path, asked["config"], list(overrides), flags)
            stage_command(run, "evaluate", force, as_json, quiet)
        return
    if evaluate__baselines:
        raise click.UsageError("--baselines go with one run alone: they are trained in it")
    from distill.report.compare import compare
    from distill.report.measure import Measurement

    systems, out = find_systems(targets, host), asked["out"]
    found = [target for each in systems.values() for target in each]
    exam, settings = exam_for(found, overrides=overrides, **asked)
    with Progress(quiet) as listen:
        measurement = Measurement.of(exam, settings, found, listen, force)
        results = compare(measurement, systems, out, cost=cost is not False, strict=False)
    where = f"Report: {out / 'report.html'}" if out else f"Kept in {exam.folder}"
    answer(as_json, results, f"{exam.name[:1].upper()}{exam.name[1:]}.\n\n{report_text(results)}\n\n{where}")
    if results["failed"]:
        failed = ", ".join(results["failed"])
        raise DistillError(f"{failed}: not measured; what was measured is kept, the same command goes on from there")
