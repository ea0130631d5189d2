"""`dream doctor`."""

import click

from cli.options import json_option
from cli.output import emit_json, table


@click.command()
@click.option("--host", "hosts", multiple=True, metavar="URL", help="Ollama server; repeatable.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, hosts: tuple[str, ...], as_json: bool) -> None:
    """Check what the pipeline needs, and say which command mends what is missing. Exit 1 if it can't work.

    \b
    Example:
      dream doctor --host http://gpu-box:11434
    """
    from distill.teacher.doctor import diagnose

    checks = diagnose(list(hosts))
    if as_json:
        emit_json([vars(check) for check in checks])
    else:
        click.echo(table([(check.name, check.state, check.detail) for check in checks]))
    ctx.exit(0)
