"""`dream bench`."""

import click

from cli.options import json_option
from cli.output import emit_json, table


@click.group()
def bench() -> None:
    """Measure how fast the parts are, each against a fair reference in the same run.

    \b
    Example:
      dream bench train
    """


@bench.command()
@click.option("--preset", default="nano", show_default=True, help="Student size.")
@click.option("--vocab", default=8192, show_default=True, type=click.IntRange(64), help="Vocabulary size.")
@click.option("--rows", default=8, show_default=True, type=click.IntRange(1), help="Packed rows a step.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(128), help="Tokens a row.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Steps of each, alternating.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A train setting, such as train.device.")
@json_option
def train(
    preset: str, vocab: int, rows: int, context: int, rounds: int, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Time our training step (packed, soft targets) against transformers' own in float32, same model and shape.

    \b
    Example:
      dream bench train --rounds 11
    """
    from cli.progress import Progress
    from distill.config import load_settings
    from distill.training.bench import bench_train

    settings = load_settings(None, list(overrides)).train
    with Progress() as listen:
        result = bench_train(preset, vocab, rows, context, rounds, settings, listen)
    if as_json:
        emit_json(result)
        return
    speeds = {name: result[f"{name}_tokens_per_second"] for name in ("ours", "transformers")}
    measured = [(name, *(f"{speed[key]:,.0f}" for key in ("median", "min", "max"))) for name, speed in speeds.items()]
    measured.append(("ratio", *(f"{result['ratio'][key]:.2f}" for key in ("median", "min", "max"))))
    click.echo(table(measured, ("tokens a second", "median", "min", "max")))
    click.echo(
        f"ours: {result['numerics']}; {result['parameters']:,} parameters, {rows} × {context}, {result['device']}"
    )


@bench.command()
@click.option(
    "--slots", default=4, show_default=True, type=click.IntRange(1), help="Requests the server takes at once."
)
@click.option("--seconds", default=0.5, show_default=True, type=float, help="Seconds that each answer takes.")
@click.option("--requests", default=160, show_default=True, type=click.IntRange(1), help="Prompts.")
@json_option
def capture(slots: int, seconds: float, requests: int, as_json: bool) -> None:
    """Time a whole capture against a server of known speed; 1.0 is the best that any client could do.

    \b
    Example:
      dream bench capture --slots 7
    """
    from cli.progress import Progress
    from distill.corpus.capture_bench import bench_capture

    with Progress() as listen:
        result = bench_capture(slots, seconds, requests, listen)
    if as_json:
        emit_json(result)
        return
    click.echo(table(list(result.items()), ("measure", "value")))


@bench.command()
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(3), help="Processes of each kind.")
@json_option
def startup(repeats: int, as_json: bool) -> None:
    """Time `dream --help` against the smallest click program, whole processes, alternating.

    \b
    Example:
      dream bench startup --repeats 31
    """
    from cli.startup import measure

    result = measure(repeats)
    if as_json:
        emit_json(result)
        return
    rows = [("dream --help", result["dream"] * 1000), ("bare click --help", result["click"] * 1000)]
    click.echo(table(rows, ("program", "median ms")))
    click.echo(f"ratio {result['ratio']:.2f} (at most 1.5 is wanted)")
