"""`dream run`."""

from typing import TYPE_CHECKING

import click

from cli.commands.evaluate import baselines_option
from cli.options import json_option, quiet_option, runs_dir_option, setting, settings_options, weights_option
from cli.runs import RunName

if TYPE_CHECKING:
    from distill.run import Run


@click.command()
@click.option("--name", "run_path", default="student", show_default=True, type=RunName(), help="Of the run, or a path.")
@setting("--teacher", "teacher.model", "ollama:NAME, embedded:smollm2 or embedded:/path/model.gguf.", metavar="SPEC")
@weights_option
@setting("--host", "teacher.hosts", "Ollama server; repeat it to share the work.", multiple=True, metavar="URL")
@setting("--prompts", "capture.prompts", "Prompt file or set; repeatable.", multiple=True, metavar="FILE|SET")
@setting("--limit", "capture.limit", "Prompts taken at most.", type=click.IntRange(0), metavar="N")
@setting("--dataset", "capture.dataset", "Ask no teacher: take a dataset, such as causal-world.", metavar="NAME")
@setting("--layers", "student.layers", "Of the teacher's layers, keep so many.", type=click.IntRange(1), metavar="N")
@setting("--ffn", "student.ffn", "Of each layer's neurons, keep so many.", type=click.IntRange(1), metavar="N")
@setting(
    "--init", "student.init", "Begin as the teacher, by chance, or as another model.", metavar="teacher|chance|PATH"
)
@setting("--preset", "student.preset", "Of this size, from chance.", type=click.Choice(["nano", "micro", "small"]))
@setting("--steps", "train.steps", "Optimizer steps.", type=click.IntRange(1), metavar="N")
@setting("--minutes", "train.minutes", "Train so long instead.", type=click.FloatRange(0), metavar="M")
@baselines_option
@click.option("--force", is_flag=True, help="Do every stage again.")
@settings_options(create=True)
@runs_dir_option
@quiet_option
@json_option
def run(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Go the whole way: capture, mine, tokenize, train, evaluate, export, verify.

    Stages that are up to date are skipped, so the same command goes on where it was stopped, and a changed
    setting runs again only what it reaches.

    \b
    Examples:
      dream run --name my-student --minutes 20
      dream run --teacher ollama:llama3.2:1b --prompts everyday --name my-student
      dream run --dataset causal-world --name world --config causal-world
    """
    from cli.output import emit_json
    from cli.pipeline import report, run_all

    results = run_all(run, force, quiet, say=None if as_json else click.echo)
    if as_json:
        emit_json(results)
    else:
        click.echo(report(run, "evaluate" in results["stages"]))
