"""`dream run`."""

from typing import TYPE_CHECKING

import click

from cli.commands.evaluate import baselines_option
from cli.options import cluster_option, common_options, settings_options, size_options, teacher_options
from cli.output import answer
from cli.pipeline import report, run_all
from cli.runs import RunName

if TYPE_CHECKING:
    from distill.run import Run


@click.command()
@click.option("--name", "run_path", default="student", show_default=True, type=RunName(), help="Of the run, or a path.")
@teacher_options
@size_options
@baselines_option
@cluster_option
@click.option("--force", is_flag=True, help="Do every stage again.")
@settings_options(create=True)
@common_options
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
    results = run_all(run, force, quiet, say=None if as_json else click.echo)
    answer(as_json, results, "" if as_json else report(run, "evaluate" in results["stages"]))
