"""`dream capture`, `mine`, `tokenize`, `train`, `redream`, `see`, `polish`, `learn`, `reward`, `export`: stages."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import Function, cluster_option, setting, stage_options, student_options, teacher_options
from cli.output import answer, command_line, emit_json, install_lines, table
from cli.progress import Progress
from cli.runs import RunOrFile
from cli.stages import run_stage, stage_command, told
from distill.events import Event
from distill.ranges import CHOICES

if TYPE_CHECKING:
    from distill.run import Run

WAYS = ("auto", "weights", "server")
KEEPS = ("replay", "past", "ewc", "memory")
"""Options of `dream learn` for new answers alone."""
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
@cluster_option
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
@cluster_option
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
@setting("--prompts", "polish.prompts", "Further ones that it answers; repeatable.", multiple=True, metavar="FILE|SET")
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
@click.option(
    "--from",
    "source",
    type=RunOrFile(),
    metavar="FILE|RUN",
    help="New answers: JSON lines of prompt and answer, or another run.",
)
@click.option("--epochs", type=click.IntRange(1), help="Times all is read [5 of feedback, 10 of new answers].")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate [2e-5; a third of the training's].")
@click.option("--beta", type=click.FloatRange(0, min_open=True), help="How short feedback's leash is [0.1].")
@click.option("--replay", type=click.FloatRange(0), metavar="W", help="What old answers count beside new ones [1].")
@click.option("--past", type=click.FloatRange(0), metavar="W", help="What its own past counts on old prompts [0].")
@click.option(
    "--ewc", type=click.FloatRange(0), metavar="W", help="How firmly weights that matter to old answers are held [0]."
)
@click.option("--memory", type=click.IntRange(1), metavar="N", help="Old answers that are remembered [4096].")
@click.option("--follow", is_flag=True, help="Learn what comes, from a file or folder that grows, or from feedback.")
@click.option("--bound", type=click.FloatRange(0), help="Steps back where bits of old answers rise by more [0.05].")
@click.option("--undo", is_flag=True, help="Go back to the student before; feedback stays.")
@stage_options()
def learn(
    run: "Run", source: Path | None, follow: bool, undo: bool, force: bool, as_json: bool, quiet: bool, **how: Any
) -> None:
    """Teach RUN's student what you said of its answers: /good, /bad and /better TEXT in `dream chat` write it into
    RUN/feedback.jsonl. Or, with --from, new answers, while it keeps the old ones. Shows what changed on prompts that it
    never saw.

    It learns from all feedback, from the student before any; from new answers on top of those before. What comes out is
    the run's best checkpoint.

    \b
    Examples:
      dream chat my-student, then dream learn my-student
      dream learn my-student --from new.jsonl
      dream learn my-student --from folder --follow
    """
    if undo:
        return _undo(run, "learn", as_json)
    asked = {name: value for name, value in how.items() if value is not None}
    if source is not None or follow:
        return _learn_facts(run, source, follow, force, as_json, quiet, asked)
    if wrong := [name for name in (*KEEPS, "bound") if name in asked]:
        raise click.UsageError(f"--{wrong[0]} is for new answers; name them with --from")
    _taught(run, "learn", force, as_json, quiet, **asked)


@click.command()
@click.option("--by", metavar="REWARD", help="exact, feedback, pairs:FILE, schema:FILE or MODULE:FUNCTION.")
@click.option("--rounds", default=30, show_default=True, type=click.IntRange(0), help="Of answering and learning.")
@click.option("--prompts", default=16, show_default=True, type=click.IntRange(1), help="Answered in each round.")
@click.option("--samples", default=8, show_default=True, type=click.IntRange(2), help="Answers to each of them.")
@click.option("--lr", default=2e-5, show_default=True, type=click.FloatRange(0, min_open=True), help="Learning rate.")
@click.option("--beta", default=0.04, show_default=True, type=click.FloatRange(0), help="How short its leash is.")
@click.option("--undo", is_flag=True, help="Go back to the student before any reward.")
@stage_options()
def reward(run: "Run", by: str | None, undo: bool, force: bool, as_json: bool, quiet: bool, **how: float) -> None:
    """Let RUN's student answer training prompts several times each, and make likelier what was worth more than the
    rest, dreams and answers both (GRPO). What comes out is the run's best checkpoint.

    \b
    What an answer is worth, says REWARD:
      exact            1 for the true answer, which a dataset knows
      feedback         what /good, /bad and /better in `dream chat` prefer
      pairs:FILE       the same of lines {"prompt": …, "better": …, "worse": …}
      schema:FILE      1 for JSON as this JSON schema wants it, ½ for other JSON
      MODULE:FUNCTION  your Python: def FUNCTION(prompt, answer) -> number

    Of feedback and pairs a reward model is learned first, kept in RUN/reward, and judged on pairs held out; with
    --rounds 0 that is all. More --rounds go on from those before.

    \b
    Examples:
      dream reward my-student --by exact --rounds 50
      dream reward my-student --by my_rewards:short
    """
    if undo:
        return _undo(run, "reward", as_json)
    if not by:
        raise click.UsageError("--by is missing: exact, feedback, pairs:FILE, schema:FILE or MODULE:FUNCTION")
    _taught(run, "reward", force, as_json, quiet, by=by, **how)


def _taught(run: "Run", stage: str, force: bool, as_json: bool, quiet: bool, **how: Any) -> None:
    """Run a stage, and show besides what it changed in answers."""
    with Progress(quiet) as listen:
        result = run_stage(run, stage, force, listen, **how)
    examples = result.summary.get("examples", [])
    rest = {name: value for name, value in result.summary.items() if name != "examples"}
    shown = [f"\n{each['prompt']}\n  before  {each['before']}\n  now     {each['after']}" for each in examples]
    text = "\n".join([told(replace(result, summary=rest)), *shown])
    answer(as_json, {"run": str(run.path), **vars(result)}, text)


def _learn_facts(
    run: "Run", source: Path | None, following: bool, force: bool, as_json: bool, quiet: bool, asked: dict[str, Any]
) -> None:
    from distill.learning.keeping import Keeping
    from distill.learning.online import follow

    if "beta" in asked:
        raise click.UsageError("--beta is for feedback; leave it out with --from")
    keeping = Keeping(**{name: asked.pop(name) for name in KEEPS if name in asked})
    if following:
        if force:
            raise click.UsageError("--force is for what was learned before; --follow learns what comes")
        learned: list[dict[str, Any]] = []
        with Progress(quiet) as tell, run.working():

            def listen(event: Event) -> None:
                tell(event)
                if event.stage == "online" and event.data:
                    learned.append(event.data)

            try:
                follow(run, source, listen, keeping=keeping, **asked)
            except KeyboardInterrupt:  # nothing else ends it
                if as_json:
                    emit_json({"run": str(run.path), "learned": learned})
                raise
        return
    if "bound" in asked:
        raise click.UsageError("--bound is for what comes; say --follow")
    with Progress(quiet) as listen:
        result = run_stage(run, "facts", force, listen, source=source, keeping=keeping, **asked)
    found = result.summary
    keys = [key for key in ("bits_per_byte", "exact_match") if f"old_{key}" in found]
    header = ["held out", *chain.from_iterable((f"{key.replace('_', ' ')} before", "now") for key in keys)]
    new = "new answers" if found["held_out"] else "new answers (learned)"
    rows = [
        [label, *(found[f"{name}_{key}{when}"] for key in keys for when in ("_before", ""))]
        for name, label in (("new", new), ("old", "old answers"))
    ]
    counts = {name: found[name] for name in ("answers", "held_out", "steps")}
    text = "\n".join([told(replace(result, summary=counts)), "", table(rows, header)])
    answer(as_json, {"run": str(run.path), **vars(result)}, text)


def _undo(run: "Run", stage: str, as_json: bool) -> None:
    from distill.learning import facts, polish, see
    from distill.learning.onward import take_back
    from distill.training import checkpoint

    with run.working():
        if stage == "learn":
            checkpoint.refuse(run, stage)
        own = {"see": see, "polish": polish}.get(stage)
        count = own.undo(run) if own else take_back(run, stage)
        if stage == "learn" and not count:
            count = facts.undo(run)
    answer(as_json, {"run": str(run.path), "deleted": count}, f"{stage}: {count or 'no'} checkpoints deleted")


@stage()
@setting("--dtype", "export.dtype", "Of model.gguf.", type=click.Choice(CHOICES["export.dtype"]))
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
    Of a run that `dream gather` fills, what came since is mined and tokenized first.

    \b
    Examples:
      dream train my-student --minutes 30 --set train.lr=1e-3
      dream train my-student --phase end --force --set dreaming.dream_steps=4000
    """
    with Progress(quiet) as listen:
        first = ("capture", "mine", "tokenize") if run.settings.capture.gathered else ()
        results = [run_stage(run, stage, False, listen) for stage in first]
        results.append(run_stage(run, "train", force and phase in ("all", "backbone"), listen))
        if phase != "backbone":
            results.append(run_stage(run, "engine", force, listen, phase=phase))
    found = {"run": str(run.path), "stages": {result.stage: vars(result) for result in results}}
    answer(as_json, found, "\n".join(map(told, results)))
