"""`dream install`."""

import shlex
from pathlib import Path

import click

from cli.options import common_options
from cli.output import answer, facts, table
from cli.progress import Progress
from cli.runs import RunName, bundle_to_ship


@click.command()
@click.argument("target", metavar="RUN|BUNDLE", type=RunName())
@click.option("--name", help="Of the model in Ollama [the bundle's own].")
@click.option("--host", metavar="URL", help="Ollama server [$OLLAMA_HOST or the default address].")
@click.option("--quantize", metavar="TYPE", help="Let Ollama quantize it: q8_0, q4_K_M, q4_K_S.")
@click.option("--force", is_flag=True, help="Replace a model of that name.")
@common_options
def install(
    target: Path, name: str | None, host: str | None, quantize: str | None, force: bool, quiet: bool, as_json: bool
) -> None:
    """Create the student in Ollama, dreams included; `ollama run NAME` then talks to it.

    \b
    Example:
      dream install my-student --quantize q8_0
    """
    from bundle.install import install as install_bundle

    with Progress(quiet) as listen:
        result = install_bundle(bundle_to_ship(target, listen), name, host, quantize, listen, force=force)
    answer(as_json, result, f"{table(facts(result))}\nNext: ollama run {shlex.quote(result['model'])}")
