"""`dream verify`."""

from dataclasses import asdict
from pathlib import Path

import click

from cli.options import common_options
from cli.output import answer, table
from cli.progress import Progress
from cli.runs import RunName, bundle_of


@click.command()
@click.argument("target", metavar="RUN|BUNDLE", type=RunName())
@click.option("--ollama", "model", metavar="NAME", help="Also compare with this model as installed in Ollama.")
@click.option("--host", metavar="URL", help="Ollama server [$OLLAMA_HOST or the default address].")
@common_options
@click.pass_context
def verify(ctx: click.Context, target: Path, model: str | None, host: str | None, quiet: bool, as_json: bool) -> None:
    """Check that a bundle's files are whole and that GGUF and native student answer alike. Exit 1 if not.

    \b
    Example:
      dream verify my-student
    """
    from bundle.verify import verify as verify_bundle

    with Progress(quiet) as listen:
        report = verify_bundle(bundle_of(target), listen, ollama_host=host, model=model)
    answer(as_json, {"ok": report.ok, **asdict(report)}, f"{table(report.rows())}\n{report.summary}")
    ctx.exit(0 if report.ok else 1)
