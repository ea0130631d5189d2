"""`dream doctor`."""

from dataclasses import asdict

import click

from cli.options import json_option, runs_dir_option
from cli.output import answer, table
from cli.runs import runs_dir


@click.command()
@click.option("--host", "hosts", multiple=True, metavar="URL", help="Ollama server; repeatable.")
@runs_dir_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, hosts: tuple[str, ...], as_json: bool) -> None:
    """Check what the pipeline needs, and say which command mends what is missing. Exit 1 if it can't work.

    \b
    Example:
      dream doctor --host http://gpu-box:11434
    """
    from distill.teacher.doctor import diagnose

    findings = diagnose(list(hosts), runs_dir(ctx))
    text = table([(finding.name, finding.state, finding.detail) for finding in findings])
    if mend := [(finding.name, finding.remedy) for finding in findings if finding.remedy]:
        text += f"\n\nTo mend:\n{table(mend)}"
    answer(as_json, [asdict(finding) for finding in findings], text)
    ctx.exit(0 if all(finding.ok for finding in findings if finding.needed) else 1)
