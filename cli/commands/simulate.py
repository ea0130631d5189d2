"""`dream simulate`."""

from pathlib import Path
from typing import Any

import click

from cli.options import FILE, Text, json_option, retrieve_option, runs_dir_option
from cli.output import answer
from cli.runs import RunName


@click.command()
@click.argument("target", metavar="RUN|CHECKPOINT|BUNDLE", type=RunName())
@click.argument("prompt", type=Text())
@click.option("--branches", default=3, show_default=True, type=click.IntRange(1, 64), help="Rollouts.")
@retrieve_option
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 5))
@click.option(
    "--max-tokens", "max_length", default=256, show_default=True, type=click.IntRange(1), help="Of an answer."
)
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--html", metavar="FILE", type=FILE, help="Write a page of the branches and their dreams, too.")
@runs_dir_option
@json_option
def simulate(target: Path, prompt: str, retrieve: str | None, html: Path | None, as_json: bool, **how: Any) -> None:
    """Roll a prompt out several times, over the knowledge graph and the student's dreams, and choose an answer.

    \b
    Each branch takes facts from the graph (the first its likeliest, the others draw theirs), dreams and answers. It is
    scored by how likely its answer is after them, by how far the answers agree, and by how much of its dream the graph
    knows; the highest mean is chosen. A run that was trained with `train.retrieve` takes its facts in that way, others
    take none unless --retrieve says how.

    \b
    Example:
      dream simulate my-student "What happens when you drop a ball?" --branches 3 --retrieve attention --html b.html
    """
    from bundle.load import load_dreaming
    from cli.progress import Progress
    from distill.dream.simulate import simulate as roll_out
    from distill.dream.view.page import page
    from distill.run import Run, write_atomic
    from distill.student.made_with import made_with

    if retrieve is None and (target / "run.json").exists():
        retrieve = made_with(Run.open(target)).train.retrieve
    with Progress() as listen:
        model = load_dreaming(target, listen=listen)
        found = roll_out(model, prompt, retrieve=retrieve or "", **how)
    numbers = range(len(found.rollouts))
    told = [f"{line if place == 0 else f'    {line}'}" for n in numbers for place, line in enumerate(found.lines(n))]
    answer(as_json, found.to_json(), "\n".join([*told, "", found.rollouts[found.chosen].record.answer.strip()]))
    if html is not None:
        notes = ["\n".join(found.lines(number)) for number in numbers]
        write_atomic(html, page([one.record for one in found.rollouts], notes))
        if not as_json:
            click.echo(f"\nwrote {html}")
