"""`dream tokenize`."""

from typing import TYPE_CHECKING

import click

from cli.options import setting, stage_options
from cli.stages import stage_command

if TYPE_CHECKING:
    from distill.run import Run


@click.command()
@setting("--kind", "tokenize.kind", "Kind of tokenizer.", type=click.Choice(["auto", "aligned", "sentencepiece"]))
@stage_options()
def tokenize(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
    """Build RUN's tokenizer: BPE, control tokens, lenses and image tokens.

    \b
    Example:
      dream tokenize my-student --set tokenize.image_tokens=256
    """
    stage_command(run, "tokenize", force, as_json, quiet)
