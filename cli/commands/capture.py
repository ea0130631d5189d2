"""`dream capture`."""

from typing import TYPE_CHECKING

import click

from cli.options import setting, stage_options, weights_option
from cli.stages import stage_command

if TYPE_CHECKING:
    from distill.run import Run


@click.command()
@setting("--teacher", "teacher.model", "ollama:NAME, embedded:smollm2 or embedded:/path/model.gguf.", metavar="SPEC")
@weights_option
@setting("--host", "teacher.hosts", "Ollama server; repeat it to share the work.", multiple=True, metavar="URL")
@setting("--prompts", "capture.prompts", "Prompt file or set; repeatable.", multiple=True, metavar="FILE|SET")
@setting("--limit", "capture.limit", "Prompts taken at most.", type=click.IntRange(0), metavar="N")
@setting("--dataset", "capture.dataset", "Ask no teacher: take a dataset, such as causal-world.", metavar="NAME")
@stage_options(create=True)
def capture(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Ask the teacher every prompt and keep answers and soft targets in RUN/traces.db.

    Makes the run if there is none. What was asked before is not asked again, so a capture that was stopped
    goes on where it was.

    \b
    Example:
      dream capture my-student --teacher ollama:llama3.2:1b --prompts everyday
    """
    stage_command(run, "capture", force, as_json, quiet)
