"""`dream bench`."""

from pathlib import Path

import click

from cli.options import json_option, runs_dir_option
from cli.output import emit_json, table
from cli.runs import RunName


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
@click.option("--preset", default="nano", show_default=True, help="Student size.")
@click.option("--vocab", default=8192, show_default=True, type=click.IntRange(64), help="Vocabulary size.")
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(2), help="Tokens of an answer.")
@click.option("--prompt-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens of a prompt.")
@click.option(
    "--batch",
    "batches",
    default=(1, 32),
    show_default=True,
    multiple=True,
    type=click.IntRange(1),
    help="Rows at once.",
)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Answers of each, alternating.")
@json_option
def generate(
    preset: str, vocab: int, tokens: int, prompt_tokens: int, batches: tuple[int, ...], rounds: int, as_json: bool
) -> None:
    """Time our greedy answers against transformers' `generate`, same weights, both on a cache.

    \b
    Example:
      dream bench generate --batch 1 --preset micro
    """
    from cli.progress import Progress
    from distill.student.generation_bench import bench_generate

    with Progress() as listen:
        result = bench_generate(preset, tokens, prompt_tokens, batches, rounds, vocab, listen)
    if as_json:
        emit_json(result)
        return
    measured: list[tuple[str, ...]] = []
    for batch, found in result["batches"].items():
        for name, speed in found["tokens_per_second"].items():
            first = found["first_token_seconds"][name]["median"] * 1000
            speeds = (f"{speed[key]:,.0f}" for key in ("median", "min", "max"))
            measured.append((batch, name, f"{first:,.1f}", *speeds))
        measured.append((batch, "ratio", "", *(f"{found['ratio'][key]:.2f}" for key in ("median", "min", "max"))))
    click.echo(table(measured, ("rows", "", "first token, ms", "tokens a second", "min", "max")))
    click.echo(f"{result['parameters']:,} parameters, {prompt_tokens} + {tokens} tokens, {result['threads']} threads")


@bench.command()
@click.argument("target", type=RunName(), required=False)
@click.option("--prompt", default=None, help="What is asked [What happens when you drop a ball?].")
@click.option("--rounds", default=11, show_default=True, type=click.IntRange(1), help="Dreams of each, alternating.")
@runs_dir_option
@json_option
def dreams(target: Path | None, prompt: str | None, rounds: int, as_json: bool) -> None:
    """Time a whole dream up to the answer's first token: drafted by the engine, and decoded by the backbone.

    TARGET is a run, checkpoint or bundle with a dream engine; without one an untrained nano student is taken.

    \b
    Example:
      dream bench dreams runs/first
    """
    from bundle.load import load_dreaming
    from cli.progress import Progress
    from distill.student.generation_bench import QUESTION, bench_dreams

    parts = None if target is None else load_dreaming(target).parts
    with Progress() as listen:
        result = bench_dreams(parts, prompt or QUESTION, rounds, listen)
    if as_json:
        emit_json(result)
        return
    names = {"prompt": "no dream", "engine": "engine's dream", "backbone": "backbone's dream"}
    keys = ("median", "min", "max")
    measured = [(name, *(f"{result['seconds'][job][key] * 1000:.1f}" for key in keys)) for job, name in names.items()]
    measured.append(("ratio", *(f"{result['ratio'][key]:.2f}" for key in keys)))
    click.echo(table(measured, ("to the first token, ms", *keys)))
    size = f"{result['paths']} × {result['steps']} steps, {result['dream_tokens']} tokens"
    click.echo(f"{size}, after {result['prompt_tokens']} of prompt; {result['threads']} threads, {result['device']}")


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
@click.option("--dreams", default=10_000, show_default=True, type=click.IntRange(5), help="Dreams of 4 × 5 steps.")
@click.option("--max-nodes", default=1000, show_default=True, type=click.IntRange(1), help="The graph's bound.")
@click.option("--seed", default=0, show_default=True, help="Of the dreams.")
@json_option
def graph(dreams: int, max_nodes: int, seed: int, as_json: bool) -> None:
    """Let a persistent knowledge graph grow by many dreams: its nodes, its memory, and what a reload keeps.

    \b
    Example:
      dream bench graph --dreams 10000
    """
    from cli.progress import Progress
    from distill.corpus.graph_bench import bench_graph

    with Progress() as listen:
        result = bench_graph(dreams, max_nodes, seed, listen)
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
