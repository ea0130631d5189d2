"""`dream prompts`."""

import click

from cli.options import json_option
from cli.output import answer, table
from cli.progress import Progress


@click.command()
@click.argument("names", metavar="[FILE|SET]...", nargs=-1)
@click.option("--show", default=0, metavar="N", type=click.IntRange(0), help="Also print N of them, spread evenly.")
@json_option
def prompts(names: tuple[str, ...], show: int, as_json: bool) -> None:
    """List the prompt sets that ship with us, or check and count the files and sets named.

    \b
    Examples:
      dream prompts
      dream prompts my-prompts.yaml --show 10
    """
    from distill.config import CaptureSettings
    from distill.corpus.prompts import load_prompts, prompt_sets

    share = CaptureSettings().held_out
    found = {name: load_prompts([name], share, listen=Progress()) for name in names or prompt_sets()}
    some = load_prompts(list(found), share, show) if show else []
    held = {name: sum(prompt.held_out for prompt in entries) for name, entries in found.items()}
    sets = {name: {"prompts": len(entries), "held_out": held[name]} for name, entries in found.items()}
    lines = [f"{'held out  ' if prompt.held_out else '          '}{prompt.text}" for prompt in some]
    rows = [(name, len(entries), held[name]) for name, entries in found.items()]
    text = "\n".join([table(rows, ("set", "prompts", "held out")), *lines])
    answer(as_json, {"sets": sets, "shown": [prompt.text for prompt in some]}, text)
