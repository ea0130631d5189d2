"""`dream settings`."""

import click


@click.command()
def settings() -> None:
    """Print every setting, its default and its meaning, as YAML that --config takes.

    \b
    Example:
      dream settings > mine.yaml
    """
    from distill.documented import documented_yaml

    click.echo(documented_yaml(), nl=False)
