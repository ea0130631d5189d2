"""`dream export`."""

from typing import TYPE_CHECKING

import click

from cli.options import setting, stage_options
from cli.output import command_line, install_lines
from cli.stages import stage_command

if TYPE_CHECKING:
    from distill.run import Run

DTYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@click.command()
@setting("--dtype", "export.dtype", "Of model.gguf.", type=click.Choice(DTYPES))
@stage_options()
def export(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Write RUN/bundle: one folder that transformers, llama.cpp and Ollama load as it is.

    An export that does not answer as the student it was made from is not published.

    \b
    Example:
      dream export my-student --dtype q8_0
    """
    stage_command(run, "export", force, as_json, quiet)
    if not as_json:
        click.echo(f"\n{run.bundle}\nNext: {command_line('chat', run.path)}, or {install_lines(run.path, run.name)[0]}")
