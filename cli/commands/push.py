"""`dream push`."""

import os
from pathlib import Path

import click

from cli.options import common_options
from cli.output import answer, facts, table
from cli.progress import Progress
from cli.runs import RunName, bundle_to_ship


@click.command()
@click.argument("target", metavar="RUN|BUNDLE", type=RunName())
@click.argument("to", metavar="hf:USER/NAME|ollama:USER/NAME")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@click.option("--public", is_flag=True, help="Make a new repository of the hub public [private].")
@click.option("--host", metavar="URL", help="Ollama server that pushes it [$OLLAMA_HOST or the default address].")
@click.option("--quantize", metavar="TYPE", help="Let Ollama quantize it first: q8_0, q4_K_M, q4_K_S.")
@click.option("--force", is_flag=True, help="Replace a model of that name in Ollama.")
@common_options
def push(
    target: Path,
    to: str,
    dry_run: bool,
    public: bool,
    host: str | None,
    quantize: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Give the bundle to others: its files to the Hugging Face hub, or its model to ollama.com by way of your Ollama.

    The hub knows you by `hf auth login` or $HF_TOKEN, ollama.com by `ollama signin`.

    \b
    Examples:
      dream push my-student hf:ada/my-student --dry-run
      dream push my-student ollama:ada/my-student --quantize q8_0
    """
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from bundle.card import megabytes
    from bundle.push import push as push_bundle

    with Progress(quiet) as listen:
        folder = bundle_to_ship(target, listen)
        result = push_bundle(folder, to, host, quantize, listen, public=public, dry_run=dry_run, force=force)
    sizes = [[name, megabytes(size)] for name, size in result["files"].items()]
    smaller = f" before Ollama makes it {quantize}" if quantize else ""
    told = {"licence": result["license"], "in all": megabytes(result["bytes"]) + smaller}
    end = f"Sent: {result['url']}" if result["sent"] else "Nothing was sent (dry run)."
    answer(as_json, result, "\n".join([table(sizes), table(facts(told)), end]))
