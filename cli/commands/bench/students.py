"""`dream bench train`, `generate` and `dreams`: what is done with a student's weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.commands.bench.group import bench, counts_option, measured
from cli.options import Function, runs_dir_option
from cli.runs import RunName
from distill.errors import BadInput

if TYPE_CHECKING:
    from bench.result import BenchResult
    from bench.stopwatch import Stopwatch


def student_option(function: Function) -> Function:
    """TARGET → `target`, None where it isn't given, and --runs-dir."""
    return runs_dir_option(click.argument("target", type=RunName(), required=False)(function))


def size_options(function: Function) -> Function:
    """--preset → `preset`, --vocab → `vocab_size`: of a student with random weights."""
    preset = click.option("--preset", default="nano", show_default=True, help="Size of a student of random weights.")
    least = click.IntRange(64)
    vocab = click.option("--vocab", "vocab_size", default=8192, show_default=True, type=least, help="Its vocabulary.")
    return preset(vocab(function))


@bench.command()
@size_options
@click.option("--rows", default=8, show_default=True, type=click.IntRange(1), help="Packed rows a step.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(128), help="Tokens a row.")
@click.option("--layers", default=0, type=click.IntRange(0), help="In the place of the preset's, as those below.")
@click.option("--hidden", default=0, type=click.IntRange(0), help="Width of the residual stream.")
@click.option("--heads", default=0, type=click.IntRange(0), help="Attention heads.")
@click.option("--kv-heads", default=0, type=click.IntRange(0), help="Heads of keys and values.")
@click.option("--ffn", default=0, type=click.IntRange(0), help="Width of the feed-forward part.")
@click.option("--alone", is_flag=True, help="Without transformers' own steps.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A train setting, such as train.device.")
@measured(repeat=7)
def train(
    preset: str,
    vocab_size: int,
    rows: int,
    context: int,
    alone: bool,
    overrides: tuple[str, ...],
    watch: "Stopwatch",
    **sizes: int,
) -> "BenchResult":
    """Time our training step (packed, soft targets) against transformers' own in float32, same model and shape, and
    tell how much of the device's arithmetic it uses.

    \b
    Examples:
      dream bench train --repeat 11
      dream bench train --preset large --rows 8 --context 2048 --alone    1 billion parameters, on a GPU
      dream bench train --layers 12 --hidden 576 --heads 9 --kv-heads 3 --ffn 1536    12 layers of SmolLM2-135M
    """
    from bench.training import bench_train
    from distill.settings import load_settings

    settings = load_settings(None, list(overrides)).train
    return bench_train(watch, preset, vocab_size, rows, context, settings, sizes, alone)


@bench.command()
@student_option
@size_options
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(2), help="Tokens of an answer.")
@counts_option("--context", "prompt_tokens", default="64", help="Tokens of a prompt.")
@counts_option("--batch", "batches", default="1,32", help="Rows at once.")
@measured(repeat=7)
def generate(target: Path | None, watch: "Stopwatch", **asked: Any) -> "BenchResult":
    """Time our greedy answers against transformers' `generate`, same weights, both on a cache.

    TARGET is a run, checkpoint or bundle whose weights are taken; without one they are random.

    \b
    Example:
      dream bench generate --batch 1,8 --context 64,256 --preset micro
    """
    from bench.generation import bench_generate
    from bundle.load import load_student

    if target is not None:
        student = load_student(target)
        asked |= {"model": student.model, "preset": student.name}
    return bench_generate(watch, **asked)


@bench.command()
@click.argument("target", type=RunName())
@runs_dir_option
@click.option("--prompt", "prompts", multiple=True, help="Is asked; repeatable [What happens when you drop a ball?].")
@click.option("--split", help="Asked are 24 of the run's held-out prompts of this split, such as combination.")
@measured(repeat=11)
def dreams(target: Path, prompts: tuple[str, ...], split: str | None, watch: "Stopwatch") -> "BenchResult":
    """Time a dream up to the answer's first token: drafted by the engine, and decoded by the backbone.

    TARGET is a run, checkpoint or bundle with a dream engine. Times are means of all prompts.

    \b
    Examples:
      dream bench dreams runs/first
      dream bench dreams runs/world --split combination
    """
    from bench.generation import QUESTION, bench_dreams
    from bundle.load import load_dreaming

    if split is not None:
        prompts = (*prompts, *_held_out(target, split))
    return bench_dreams(watch, load_dreaming(target), prompts or (QUESTION,))


def _held_out(target: Path, split: str, most: int = 24) -> list[str]:
    """The first held-out prompts of a split, as an exam would ask them. Raises BadInput where there are none."""
    from distill.exam.questions import load_exam
    from distill.run import Run

    known = [(one.truth.split, one.prompt) for one in load_exam(Run.open(target), 0).questions if one.truth]
    if not (found := [prompt for name, prompt in known if name == split]):
        there = ", ".join(sorted({name for name, _ in known})) or "none"
        raise BadInput(f"--split {split}: {target} has no held-out prompt of it; its splits: {there}")
    return found[:most]


@bench.command()
@click.argument("runs", metavar="RUN...", type=RunName(), nargs=-1, required=True)
@click.option(
    "--agreement",
    "agreements",
    multiple=True,
    default=(0.9, 0.95),
    show_default=True,
    type=click.FloatRange(0.5, 1, max_open=True),
    help="Wanted of the student's answers; repeatable.",
)
@runs_dir_option
@measured(repeat=1, warmup=0)
def cascade(runs: tuple[Path, ...], agreements: tuple[float, ...], watch: "Stopwatch") -> "BenchResult":
    """Count what `dream gather --cascade` would let RUN's student answer, and how often as its teacher. Several runs,
    of one recipe and different seeds, make an interval.

    \b
    Example:
      dream bench cascade my-student --agreement 0.95
    """
    from bench.cascade import bench_cascade

    return bench_cascade(watch, runs, agreements)
