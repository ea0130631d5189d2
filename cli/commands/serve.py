"""`dream serve`."""

from pathlib import Path

import click

from cli.options import runs_dir_option
from cli.runs import RunName


@click.command()
@click.argument("targets", metavar="RUN|BUNDLE...", type=RunName(), nargs=-1, required=True)
@click.option("--port", default=11435, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond this machine only with --token.")
@click.option("--token", envvar="DREAM_TOKEN", default="", metavar="TOKEN", help="Ask it of everybody [$DREAM_TOKEN].")
@click.option("--origin", "origins", multiple=True, metavar="URL", help="A site whose pages may ask; repeatable.")
@click.option("--slots", default=64, show_default=True, type=click.IntRange(1), help="Answers written at once.")
@click.option("--queue", default=512, show_default=True, type=click.IntRange(1), help="Requests that may wait.")
@click.option(
    "--keep-alive", default="-1", show_default=True, metavar="TIME", help="In memory for, after use: 5m; -1: for ever."
)
@runs_dir_option
def serve(
    targets: tuple[Path, ...],
    port: int,
    host: str,
    token: str,
    origins: tuple[str, ...],
    slots: int,
    queue: int,
    keep_alive: str,
) -> None:
    """Answer other programs, in Ollama's API and OpenAI's: clients of either need only the address.

    \b
    Dreams are shown as thinking. Each student has the name of its run, as in Ollama. The address in a browser is a
    chat.
    Examples:
      dream serve my-student
      OLLAMA_HOST=127.0.0.1:11435 ollama run my-student
      curl http://127.0.0.1:11435/api/generate -d '{"model": "my-student", "prompt": "What falls?"}'
    """
    from bundle.serving import offer
    from distill.serve.app import create_app
    from distill.serve.fields import keep_alive_of
    from distill.serve.guard import Allowed
    from distill.serve.listen import bind, serve, url_of
    from distill.serve.shelf import Shelf

    allowed = Allowed(token, origins)
    listening = bind(host, port, bool(allowed.token))
    with listening:
        shelf = Shelf([offer(target) for target in targets], slots, queue, keep_alive_of(keep_alive))
        names = ", ".join(served.name for served in shelf.students.values())
        click.echo(f"{names}: at {url_of(listening)} (Ctrl-C ends)", err=True)
        serve(create_app(shelf, allowed), listening)
