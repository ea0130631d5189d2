"""`dream capture`, `mine`, `tokenize`, `train`, `redream`, `see`, `polish`, `learn`, `export`: a run's stages."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cli.options import Function, setting, stage_options, student_options, teacher_options
from cli.output import answer, command_line, install_lines
from cli.progress import Progress
from cli.stages import run_stage, stage_command, told

if TYPE_CHECKING:
    from distill.run import Run

DTYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
WAYS = ("auto", "weights", "server")
PHASES = ("all", "backbone", "input", "dream", "end")


def stage(create: bool = False) -> Callable[[Function], click.Command]:
    """Makes a command of a function: it runs the stage of that name, prints its summary, and calls the function with
    the run, for what is to be said besides. With `create` the run is made where there is none."""

    def decorate(function: Function) -> click.Command:
        @functools.wraps(function)
        def perform(run: "Run", force: bool, as_json: bool, quiet: bool) -> None:
            stage_command(run, function.__name__, force, as_json, quiet)
            if not as_json:
                function(run)

        return click.command()(stage_options(create)(perform))

    return decorate


@stage(create=True)
@teacher_options
def capture(run: "Run") -> None:
    """Ask the teacher every prompt and keep answers and soft targets in RUN/traces.db.

    Makes the run if there is none. What was asked before is not asked again, so a capture that was stopped
    goes on where it was.

    \b
    Example:
      dream capture my-student --teacher ollama:llama3.2:1b --prompts everyday
    """


@stage()
@setting("--miner", "mine.miner", "How triplets are found.", type=click.Choice(["syntax", "teacher"]))
def mine(run: "Run") -> None:
    """Find (what, action, result) triplets in RUN's answers and build the knowledge graph.

    \b
    Example:
      dream mine my-student --miner syntax
    """


@stage()
@setting("--kind", "tokenize.kind", "Kind of tokenizer.", type=click.Choice(["auto", "aligned", "sentencepiece"]))
def tokenize(run: "Run") -> None:
    """Build RUN's tokenizer: BPE, control tokens, lenses and image tokens.

    \b
    Example:
      dream tokenize my-student --set tokenize.image_tokens=256
    """


@stage()
@setting("--samples", "redream.samples", "Dreams sampled an answer.", type=click.IntRange(1), metavar="K")
@setting("--prior", "redream.prior", "What a dream's own likelihood counts.", type=click.FloatRange(0), metavar="W")
@setting("--minutes", "redream.minutes", "Stop after so long.", type=click.FloatRange(0), metavar="M")
def redream(run: "Run") -> None:
    """Let RUN's trained student dream of each training answer, and keep the dream under which the answer is likeliest
    in the place of the mined one (RUN/dreams.jsonl). The next `dream train` learns from those dreams, from the start.
    Stopped at any moment, it goes on from there.

    \b
    Example, a round:
      dream redream my-student --samples 8 && dream train my-student
    """


@click.command()
@setting("--steps", "see.steps", "Optimizer steps.", type=click.IntRange(1), metavar="N")
@setting("--image-size", "see.image_size", "Pixels of a side as it sees.", type=click.IntRange(14), metavar="PIXELS")
@click.option("--undo", is_flag=True, help="Go back to the student before.")
@stage_options()
def see(run: "Run", undo: bool, force: bool, as_json: bool, quiet: bool) -> None:
    """Let RUN's trained student learn to read pictures themselves: then Ollama shows them to it, too.

    What comes out is the run's best checkpoint, with mmproj.gguf, which export puts beside model.gguf. `dream run` does
    this after the training where see.steps says so.

    \b
    Example:
      dream see seer --steps 800 && dream export seer && dream install seer
    """
    if undo:
        return _undo(run, "see", as_json)
    stage_command(run, "see", force, as_json, quiet)


@click.command()
@setting("--minutes", "polish.minutes", "Stop after so long.", type=click.FloatRange(0), metavar="M")
@setting("--rounds", "polish.rounds", "Stop after so many rounds instead.", type=click.IntRange(1), metavar="N")
@setting("--through", "polish.through", "How the teacher is consulted.", type=click.Choice(WAYS))
@click.option("--undo", is_flag=True, help="Go back to what training left.")
@stage_options()
def polish(run: "Run", undo: bool, force: bool, as_json: bool, quiet: bool) -> None:
    """Let RUN's trained student answer training prompts itself, and learn what its teacher would have said after its
    own words: at each of them by the teacher's weights, else by asking it to go on with what the student begins.
    Stopped at any moment, it goes on from there, and asks nothing twice; so it does with more --minutes.

    What comes out is the run's best checkpoint: evaluate and export take it.

    \b
    Example:
      dream polish my-student --minutes 10 && dream evaluate my-student
    """
    if undo:
        return _undo(run, "polish", as_json)
    stage_command(run, "polish", force, as_json, quiet)


@click.command()
@click.option("--epochs", default=5, show_default=True, type=click.IntRange(1), help="Times all feedback is read.")
@click.option("--lr", default=2e-5, show_default=True, type=click.FloatRange(0, min_open=True), help="Learning rate.")
@click.option(
    "--beta", default=0.1, show_default=True, type=click.FloatRange(0, min_open=True), help="How short its leash is."
)
@click.option("--undo", is_flag=True, help="Go back to the student before any feedback; the feedback stays.")
@stage_options()
def learn(run: "Run", undo: bool, force: bool, as_json: bool, quiet: bool, **how: float) -> None:
    """Teach RUN's student what you said of its answers: /good, /bad and /better TEXT in `dream chat` write it into
    RUN/feedback.jsonl. Shows what changed on prompts that it never saw.

    It learns from all feedback, from the student before any. What comes out is the run's best checkpoint.

    \b
    Example:
      dream chat my-student, then dream learn my-student
    """
    if undo:
        return _undo(run, "learn", as_json)
    with Progress(quiet) as listen:
        result = run_stage(run, "learn", force, listen, **how)
    examples = result.summary.get("examples", [])
    rest = {name: value for name, value in result.summary.items() if name != "examples"}
    shown = [f"\n{each['prompt']}\n  before  {each['before']}\n  now     {each['after']}" for each in examples]
    text = "\n".join([told(replace(result, summary=rest)), *shown])
    answer(as_json, {"run": str(run.path), **vars(result)}, text)


def _undo(run: "Run", stage: str, as_json: bool) -> None:
    from distill.training import learn, polish, see

    with run.working():
        count = {"see": see, "polish": polish, "learn": learn}[stage].undo(run)
    answer(as_json, {"run": str(run.path), "deleted": count}, f"{stage}: {count or 'no'} checkpoints deleted")


@stage()
@setting("--dtype", "export.dtype", "Of model.gguf.", type=click.Choice(DTYPES))
def export(run: "Run") -> None:
    """Write RUN/bundle: one folder that transformers, llama.cpp and Ollama load as it is.

    An export that does not answer as the student it was made from is not published.

    \b
    Example:
      dream export my-student --dtype q8_0
    """
    click.echo(f"\n{run.bundle}\nNext: {command_line('chat', run.path)}, or {install_lines(run.path, run.name)[0]}")


@click.command()
@student_options
@setting("--processes", "train.processes", "Data-parallel processes.", type=click.IntRange(1), metavar="N")
@click.option(
    "--phase",
    default="all",
    show_default=True,
    type=click.Choice(PHASES),
    help="Train the backbone alone, or the dream engine up to this phase.",
)
@stage_options()
def train(run: "Run", phase: str, force: bool, as_json: bool, quiet: bool) -> None:
    """Train RUN's student: its backbone, then its dream engine. Stopped at any moment, it goes on from there.

    Losses go to RUN/metrics.jsonl and RUN/tensorboard (look with `tensorboard --logdir runs`), the engine's to
    RUN/engine/metrics.jsonl. --force does what --phase names anew: with `input`, `dream` and `end` the engine alone.

    \b
    Examples:
      dream train my-student --minutes 30 --set train.lr=1e-3
      dream train my-student --phase end --force --set dreaming.dream_steps=4000
    """
    with Progress(quiet) as listen:
        results = [run_stage(run, "train", force and phase in ("all", "backbone"), listen)]
        if phase != "backbone":
            results.append(run_stage(run, "engine", force, listen, phase=phase))
    found = {"run": str(run.path), "stages": {result.stage: vars(result) for result in results}}
    answer(as_json, found, "\n".join(map(told, results)))
