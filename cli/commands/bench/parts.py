"""`dream bench capture`, `ollama`, `pictures`, `startup` and `scale`: what needs no student; and `all`."""

import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cli.commands.bench.group import bench, counts_option, measured

if TYPE_CHECKING:
    from bench.result import BenchResult
    from bench.stopwatch import Stopwatch


SECONDS = click.FloatRange(0, min_open=True)


@bench.command()
@click.option(
    "--slots", default=4, show_default=True, type=click.IntRange(1), help="Requests the server takes at once."
)
@click.option("--seconds", default=0.5, show_default=True, type=SECONDS, help="Seconds that each answer takes.")
@click.option("--requests", default=160, show_default=True, type=click.IntRange(1), help="Prompts.")
@measured(repeat=1, warmup=0)
def capture(slots: int, seconds: float, requests: int, watch: "Stopwatch") -> "BenchResult":
    """Time a whole capture against a server of known speed; 1.0 is the best that any client could do.

    \b
    Example:
      dream bench capture --slots 7
    """
    from bench.capture import bench_capture

    return bench_capture(watch, slots, seconds, requests)


@bench.command()
@click.option("--requests", default=1000, show_default=True, type=click.IntRange(1), help="Answers that are kept.")
@click.option(
    "--kills", default=3, show_default=True, type=click.IntRange(0), help="Times that it is killed meanwhile."
)
@click.option("--clients", default=8, show_default=True, type=click.IntRange(1), help="Who ask at once.")
@measured(repeat=1, warmup=0)
def gather(requests: int, kills: int, clients: int, watch: "Stopwatch") -> "BenchResult":
    """Time what the proxy of `dream gather` adds to a first token, and count the answers lost where it is killed.

    \b
    Example:
      dream bench gather --requests 10000 --kills 10
    """
    from bench.gather import bench_gather

    return bench_gather(watch, requests, kills, clients)


@bench.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--host", default="", metavar="URL", help="Of the server [$OLLAMA_HOST, else this machine's].")
@counts_option("--words", default="64", help="Words of a prompt.")
@counts_option("--concurrency", "at_once", default="1", help="Requests at once.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2), help="Written at most, thinking too.")
@click.option("--timeout", default=300.0, show_default=True, type=SECONDS, help="Of silence.")
@measured(repeat=5)
def ollama(models: tuple[str, ...], watch: "Stopwatch", **asked: Any) -> "BenchResult":
    """Time any models of an Ollama server over its API, streaming: by its own clock, and by ours.

    \b
    Example:
      dream bench ollama llama3.2:1b my-student --concurrency 1,4 --words 32,512
    """
    from bench.ollama import bench_ollama

    return bench_ollama(watch, [model.removeprefix("ollama:") for model in models], **asked)


@bench.command()
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Pictures at once.")
@click.option("--many", default=0, type=click.IntRange(0), help="Then tell the memory that so many pictures take.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A vision setting: its weights, its size.")
@measured(repeat=5)
def pictures(batch: int, many: int, overrides: tuple[str, ...], watch: "Stopwatch") -> "BenchResult":
    """Time DINOv2's embeddings of pictures against transformers' own processor and model on the same weights.

    \b
    Example:
      dream bench pictures --set vision.image_size=56 --many 10000
    """
    from bench.pictures import bench_pictures
    from distill.settings import load_settings

    settings = load_settings(None, ["vision.embedding_dim=0", *overrides]).vision
    return bench_pictures(watch, settings, 2 * batch, batch, many)


@bench.command()
@measured(repeat=15)
def startup(watch: "Stopwatch") -> "BenchResult":
    """Time `dream --help` against the smallest click program, whole processes, alternating.

    At most 1.5 times as long is wanted.

    \b
    Example:
      dream bench startup --repeat 31
    """
    from bench.startup import bench_startup

    return bench_startup(watch)


@bench.command()
@counts_option("--answers", "counts", default="1000,10000", help="Answers that are made up.")
@click.option("--mined", default=10000, show_default=True, type=click.IntRange(0), help="More than these aren't mined.")
@click.option("--processes", default=0, type=click.IntRange(0), help="At work at once [as many as cores].")
@measured(repeat=1, warmup=0)
def scale(counts: tuple[int, ...], mined: int, processes: int, watch: "Stopwatch") -> "BenchResult":
    """Time mining, tokenizing and packing of made-up answers, and tell the memory that they take, by their number.

    \b
    Example:
      dream bench scale --answers 10000,100000,1000000 --mined 100000
    """
    from bench.scale import bench_scale

    return bench_scale(watch, counts, mined, processes)


@bench.command("all")
@measured(repeat=3)
def everything(watch: "Stopwatch") -> "BenchResult":
    """A quick batch: startup, train, generate and capture, small, in a few minutes.

    One that fails is reported and makes the exit code 1; the others are measured all the same.

    \b
    Example:
      dream bench all --against before.json --out now.json
    """
    from bench.result import combined
    from distill.errors import DistillError

    results: dict[str, BenchResult] = {}
    failed: dict[str, str] = {}
    for name, run in quick().items():
        try:
            results[name] = run(watch)
        except DistillError as error:
            failed[name] = str(error)
        except Exception as error:  # a bug in one is no reason to lose what the others measure; it keeps its traceback
            failed[name] = f"{type(error).__name__}: {error}"
            click.echo(traceback.format_exc(), err=True)
    if not results:
        raise DistillError("; ".join(f"{name}: failed: {why}" for name, why in failed.items()))
    return combined("all", results, failed)


def quick() -> "dict[str, Callable[[Stopwatch], BenchResult]]":
    """Name → what measures it."""
    from bench.capture import bench_capture
    from bench.generation import bench_generate
    from bench.startup import bench_startup
    from bench.training import bench_train
    from distill.config import TrainSettings

    # One precision, not compiled: trying them takes longer than all the rest.
    settings = TrainSettings(precision="float32", compile="never")
    return {
        "startup": bench_startup,
        "train": partial(bench_train, rows=2, context=256, settings=settings),
        "generate": partial(bench_generate, tokens=32, prompt_tokens=(64,), batches=(1, 8)),
        "capture": partial(bench_capture, slots=4, seconds=0.1, requests=80),
    }
