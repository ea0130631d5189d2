"""`dream settings`."""

import sys

import click


@click.command()
def settings() -> None:
    """Print every setting, its default and its meaning, as YAML that --config takes.

    \b
    Example:
      dream settings > mine.yaml
    """
    from distill.documented import documented_yaml

    text = documented_yaml()
    click.echo(text if sys.stdout.isatty() else text.encode(), nl=False)  # a file of settings is UTF-8
