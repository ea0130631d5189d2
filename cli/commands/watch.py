"""`dream watch`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import FILE, Function, Text, image_option, json_option, retrieve_option, runs_dir_option
from cli.output import emit_json
from cli.runs import RunName
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.dream.record import DreamRecord


def token_option(flag: str, metavar: str, help: str, multiple: bool = False) -> Callable[[Function], Function]:
    """Image tokens, as they are printed."""
    return click.option(flag, metavar=metavar, type=Text(), multiple=multiple, help=help)


@click.command()
@click.argument("target", metavar="RUN|CHECKPOINT|BUNDLE", type=RunName())
@click.argument("prompt", type=Text())
@click.option(
    "--dreamer",
    type=click.Choice(["engine", "checked", "backbone"]),
    help="Who dreams: the engine, all paths at once; the backbone, token by token as in Ollama; or (checked) the "
    "backbone, with a draft of the engine's. [default: checked where there is an engine]",
)
@image_option
@token_option("--guide", "TOKENS", 'Up to three image tokens that each path begins with: "⟨ball⟩".')
@token_option("--dream", "TOKENS", 'Answer from this dream: "⟨causal⟩⟨ball⟩⟨fall⟩⟨ground⟩", or "none".')
@token_option("--replace", "N=TOKEN", 'Replace token N of the dream before the answer: "3=⟨water⟩".', multiple=True)
@retrieve_option
@click.option(
    "--export", "exports", multiple=True, metavar="FILE", type=FILE, help="Write the dream too: .html, .png or .json."
)
@click.option("--picture", metavar="FILE.png", type=FILE, help="Write a picture of the outcome: the run's nearest.")
@click.option("--painter", default="", metavar="MODEL", help="Have this model of diffusers paint it, a folder or name.")
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 5))
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Of the answer.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("-q", "--quiet", is_flag=True, help="Print the answer alone.")
@runs_dir_option
@json_option
def watch(
    target: Path,
    prompt: str,
    images: tuple[str, ...],
    replace: tuple[str, ...],
    retrieve: str | None,
    exports: tuple[Path, ...],
    picture: Path | None,
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
      dream watch my-student "What happens when you drop a ball?" --guide "⟨ball⟩" --export dream.html
      dream watch my-student "What happens when you drop a ball?" --replace "3=⟨water⟩"
      dream watch seer "What is in this picture?" --image scene.png --export dream.html --picture dream.png
    """
    from bundle.load import load_dreaming
    from cli.progress import Progress
    from distill.dream.editor import parse_replacements
    from distill.dream.view.lanes import LiveLanes
    from distill.dream.view.viewer import check_format

    for path in exports:
        check_format(path)
    replaced = {number: label for text in replace for number, label in parse_replacements(text).items()}
    model = load_dreaming(target, enable_dream_viewer=True, listen=Progress(quiet))
    lanes = None if quiet or as_json else LiveLanes.on(sys.stdout)
    dreamed: list[DreamRecord] = []

    def drawn(record: "DreamRecord") -> None:
        """After each step that forms, and last the whole dream."""
        dreamed[:] = [record]
        if lanes is not None:
            lanes.draw(record)

    viewer, failed = model.get_dream_viewer(), None
    try:
        for piece in model.generate(
            prompt,
            images=list(images) or None,
            output_mode="text",
            stream=True,
            replace=replaced,
            attention=bool(lanes or as_json or exports),
            retrieve=retrieve or "",
            max_length=max_tokens,
            picture=picture,
            on_dream=drawn,
            **how,
        ):
            if lanes is not None and dreamed:  # the answer begins
                lanes.finish(dreamed.pop())
                click.echo()
            click.echo("" if as_json else piece, nl=False)
    except DistillError as error:
        if not viewer.records:
            raise
        failed = error  # of the picture: the rest is there
    if lanes is not None and dreamed:  # there was none
        lanes.finish(dreamed.pop())
    click.echo("" if as_json else "\n", nl=False)
    if viewer.records and viewer.records[-1].cut and not as_json:
        click.echo(f"(cut: it didn't end within {max_tokens} tokens, or within the context)", err=True)
    if lanes is not None:
        lanes.words(viewer.records[-1])
    if as_json:
        emit_json(viewer.records[-1].to_json())
    for path in exports:
        viewer.export(path)
    for path in (*exports, *([picture] if picture and not failed else [])):
        click.echo(f"wrote {path}", err=True)
    if failed is not None:
        raise failed
