"""`dream watch`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import Text, json_option, runs_dir_option
from cli.output import emit_json
from cli.runs import RunName

if TYPE_CHECKING:
    from distill.dream.record import DreamRecord
    from distill.dream.view.lanes import LiveLanes


@click.command()
@click.argument("target", metavar="RUN|CHECKPOINT|BUNDLE", type=RunName())
@click.argument("prompt", type=Text())
@click.option(
    "--dreamer",
    type=click.Choice(["engine", "checked", "backbone"]),
    help="Who dreams: the engine, all paths at once, or the backbone, token by token as in Ollama. "
    "[default: the engine where there is one]",
)
@click.option(
    "--guide", metavar="TOKENS", type=Text(), help='Up to three image tokens that each path begins with: "⟨a ball⟩".'
)
@click.option(
    "--dream",
    metavar="TOKENS",
    type=Text(),
    help='A dream to answer from, in the place of the student\'s own: "⟨causal⟩⟨ball⟩⟨fall⟩⟨ground⟩", or "none".',
)
@click.option(
    "--replace",
    multiple=True,
    metavar="N=TOKEN",
    type=Text(),
    help='Replace token N of the dream before the answer: "3=⟨water⟩". Repeatable.',
)
@click.option(
    "--retrieve",
    type=click.Choice(["neighbourhood", "walk", "sample"]),
    help="Put what the knowledge graph knows of the prompt after it, found in this way.",
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the dream too: a page (.html), a heatmap (.png) or data (.json). Repeatable.",
)
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 5))
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Of the answer.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("-q", "--quiet", is_flag=True, help="Print the answer alone.")
@runs_dir_option
@json_option
def watch(
    target: Path,
    prompt: str,
    replace: tuple[str, ...],
    retrieve: str | None,
    exports: tuple[Path, ...],
    max_tokens: int,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Watch a student dream: a lane per lens, drawn while it forms, then the answer.

    \b
    Under a lane's name stand the weights of the four experts and, at the end, what the arbiter made of the path:
    ★ won, ✓ read by the backbone, ✗ set aside, each with its score. Below the answer stands which step of the dream
    each of its words attended to most; the numbers of tokens there are those that --replace takes.

    \b
    Examples:
      dream watch my-student "What happens when you drop a ball?"
      dream watch my-student "What happens when you drop a ball?" --guide "⟨a ball⟩" --export dream.html
      dream watch my-student "What happens when you drop a ball?" --replace "3=⟨water⟩"
    """
    from bundle.load import load_dreaming
    from distill.dream.editor import parse_replacements
    from distill.dream.view.lanes import LiveLanes
    from distill.dream.view.viewer import check_format

    for path in exports:
        check_format(path)
    replaced = {number: label for text in replace for number, label in parse_replacements(text).items()}
    model = load_dreaming(target, enable_dream_viewer=True)
    lanes = None if quiet or as_json else LiveLanes.on(sys.stdout)
    shown = Shown(lanes)
    for piece in model.generate(
        prompt,
        output_mode="text",
        stream=True,
        replace=replaced,
        attention=bool(lanes or as_json or exports),
        retrieve=retrieve or "",
        max_length=max_tokens,
        on_dream=shown.dream,
        **how,
    ):
        shown.answer("" if as_json else piece)
    shown.answer("" if as_json else "\n")
    viewer = model.get_dream_viewer()
    if lanes is not None:
        lanes.words(viewer.records[-1])
    for path in exports:
        viewer.export(path)
        click.echo(f"wrote {path}", err=True)
    if as_json:
        emit_json(viewer.records[-1].to_json())


class Shown:
    """What is on the screen: first the dream, then the answer below it."""

    def __init__(self, lanes: "LiveLanes | None") -> None:
        self.lanes = lanes
        self.last: DreamRecord | None = None

    def dream(self, record: "DreamRecord") -> None:
        """Called after each step that forms, and last with the whole dream."""
        self.last = record
        if self.lanes is not None:
            self.lanes.draw(record)

    def answer(self, piece: str) -> None:
        """A piece of the answer; with the first of them the dream is finished."""
        if self.lanes is not None and self.last is not None:
            self.lanes.finish(self.last)
            click.echo()
        self.lanes = None
        click.echo(piece, nl=False)
