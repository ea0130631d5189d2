"""`dream install`."""

from pathlib import Path

import click

from cli.options import json_option, quiet_option, runs_dir_option
from cli.output import emit_json
from cli.runs import RunName


@click.command()
@click.argument("target", metavar="RUN|BUNDLE", type=RunName())
@click.option("--name", help="Of the model in Ollama [the run's name].")
@click.option("--host", metavar="URL", help="Ollama server [$OLLAMA_HOST or the default address].")
@click.option("--quantize", metavar="TYPE", help="Let Ollama quantize it: q8_0, q4_K_M, q4_K_S.")
@runs_dir_option
@quiet_option
@json_option
def install(target: Path, name: str | None, host: str | None, quantize: str | None, quiet: bool, as_json: bool) -> None:
    """Create the student in Ollama, dreams included; `ollama run NAME` then talks to it.

    \b
    Example:
      dream install my-student --quantize q8_0
    """
    from bundle.install import install as install_bundle
    from cli.progress import Progress
    from cli.runs import bundle_of

    bundle = bundle_of(target)
    name = name or (bundle.resolve().parent.name if bundle.name == "bundle" else bundle.resolve().name)
    with Progress(quiet) as listen:
        result = install_bundle(bundle, name, host=host, quantize=quantize, listen=listen)
    if as_json:
        emit_json(result)
    else:
        click.echo(f"Installed {name}. Next: ollama run {name}")
