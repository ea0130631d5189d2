"""`dream chat`."""

from pathlib import Path
from typing import Any

import click

from cli.options import Text, image_option, json_option, retrieve_option, runs_dir_option
from cli.output import emit_json
from cli.runs import RunName


@click.command()
@click.argument("target", metavar="RUN|BUNDLE", type=RunName())
@click.option("--prompt", metavar="TEXT", type=Text(), help="Print the answer to this and leave.")
@image_option
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 5))
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(1), help="Of an answer, at most.")
@retrieve_option
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--think/--no-think", default=True, show_default=True, help="Dream before answering.")
@click.option("--dreams/--no-dreams", default=True, show_default=True, help="Show the dream.")
@runs_dir_option
@json_option
def chat(
    target: Path,
    prompt: str | None,
    images: tuple[str, ...],
    tokens: int,
    retrieve: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Talk to a student: a run's best checkpoint, or any bundle folder. Runs natively, without Ollama.

    \b
    In the chat, /help lists the commands: /temp /tokens /stream /dreams /think /dream /good /bad /better /reset /quit.
    /dream shows the last dream with its tokens numbered; /dream 3 ⟨water⟩ replaces one, and answers again.
    Examples:
      dream chat my-student
      dream chat seer --image vase.png --prompt "What is in this picture?"
      dream chat runs/my-student/bundle --prompt "What happens when you drop a ball?" --json
    """
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    if images and prompt is None:
        raise click.UsageError("--image needs --prompt")
    from bundle.load import load_student, recalling
    from cli.progress import Progress
    from cli.repl import Chat, converse, show, together
    from distill.learning.feedback import FEEDBACK

    kept = target / FEEDBACK if (target / "run.json").exists() else None
    student = load_student(target)
    asked = None if prompt is None else student.asked(prompt, images)
    talk = Chat(student.shown(images), max_tokens=tokens, feedback=kept, **how)
    if retrieve is not None:
        talk.recall = recalling(target, retrieve, Progress())
    if asked is None:
        click.echo("Ask something; /help lists the commands.", err=True)
        converse(talk)
    elif as_json:
        emit_json({"prompt": prompt, **together(talk.pieces(asked)), "notes": talk.notes})
    else:
        show(talk, talk.pieces(asked))
