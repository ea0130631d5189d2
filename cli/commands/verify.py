"""`dream verify`."""

from dataclasses import asdict
from pathlib import Path

import click

from cli.options import json_option, quiet_option, runs_dir_option
from cli.output import emit_json, table
from cli.runs import RunName


@click.command()
@click.argument("target", metavar="RUN|BUNDLE", type=RunName())
@click.option("--ollama", "model", metavar="NAME", help="Also compare with this model as installed in Ollama.")
@click.option("--host", metavar="URL", help="Ollama server [$OLLAMA_HOST or the default address].")
@runs_dir_option
@quiet_option
@json_option
@click.pass_context
def verify(ctx: click.Context, target: Path, model: str | None, host: str | None, quiet: bool, as_json: bool) -> None:
    """Check that a bundle's files are whole and that GGUF and native student answer alike. Exit 1 if not.

    \b
    Example:
      dream verify my-student
    """
    from bundle.verify import verify as verify_bundle
    from cli.progress import Progress
    from cli.runs import bundle_of

    with Progress(quiet) as listen:
        report = verify_bundle(bundle_of(target), listen, ollama_host=host, model=model)
    if as_json:
        emit_json({"ok": report.ok, **asdict(report)})
    else:
        click.echo(table(report.rows()))
        click.echo(report.summary)
    ctx.exit(0 if report.ok else 1)
