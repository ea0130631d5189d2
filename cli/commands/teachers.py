"""`dream teachers`."""

import click

from cli.options import json_option
from cli.output import answer, table


@click.command()
@click.option("--host", "hosts", multiple=True, metavar="URL", help="Ollama server; repeatable.")
@json_option
def teachers(hosts: tuple[str, ...], as_json: bool) -> None:
    """List the teachers that can be asked: the embedded one, and the models of the Ollama servers.

    \b
    Example:
      dream teachers --host http://gpu-box:11434
    """
    from distill.teacher.doctor import list_teachers

    found = list_teachers(list(hosts))
    answer(as_json, found, table([(entry["spec"], entry["detail"]) for entry in found], ("teacher", "")))
