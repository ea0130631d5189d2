"""`dream bench all`."""

import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from cli.commands.bench.group import bench, measured

if TYPE_CHECKING:
    from bench.result import BenchResult
    from bench.stopwatch import Stopwatch


@bench.command("all")
@measured(repeat=3)
def everything(watch: "Stopwatch") -> "BenchResult":
    """A quick batch: startup, train, generate, export and capture, small, in a few minutes.

    One that fails is reported and makes the exit code 1; the others are measured all the same.

    \b
    Example:
      dream bench all --against before.json --out now.json
    """
    from bench.result import combined
    from distill.errors import DistillError

    results: dict[str, BenchResult] = {}
    failed: dict[str, str] = {}
    for name, run in _quick().items():
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


def _quick() -> "dict[str, Callable[..., BenchResult]]":
    """Name → what measures it."""
    from bench.capture import bench_capture
    from bench.export import bench_export
    from bench.generation import bench_generate
    from bench.startup import bench_startup
    from bench.training import bench_train
    from distill.config import TrainSettings

    return {
        "startup": bench_startup,
        # One precision, not compiled: trying them takes longer than all the rest.
        "train": partial(
            bench_train, rows=2, context=256, settings=TrainSettings(precision="float32", compile="never")
        ),
        "generate": partial(bench_generate, tokens=32, prompt_tokens=(64,), batches=(1, 8)),
        "export": partial(bench_export, dtypes=("f16",)),
        "capture": partial(bench_capture, slots=4, seconds=0.1, requests=80),
    }
