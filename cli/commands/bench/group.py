"""The group, and what all its subcommands have in common: repetitions, files to write, a result to compare with."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import Function, json_option
from cli.output import emit_json, facts, table

if TYPE_CHECKING:
    from bench.check import Change
    from bench.result import BenchResult


@click.group()
def bench() -> None:
    """Measure how fast the parts are, each against a fair reference in the same run.

    \b
    Example (keep a result, and fail later where something has become slower):
      dream bench train --repeat 11 --out before.json
      dream bench train --repeat 11 --against before.json
    """


def _counts(_ctx: click.Context, _param: click.Parameter, value: Sequence[str]) -> tuple[int, ...]:
    """("1,32", "8") → (1, 32, 8)."""
    parts = ",".join(value).split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{','.join(value)!r} is no number of at least 1, nor several with commas between")
    return tuple(dict.fromkeys(map(int, parts)))


def counts_option(*names: str, default: str, help: str) -> Callable[[Function], Function]:
    """An option that takes several numbers: `--batch 1,32` or `--batch 1 --batch 32`."""
    return click.option(
        *names, multiple=True, default=(default,), show_default=True, callback=_counts, help=f"{help} Several: 1,32."
    )


def measured(repeat: int, warmup: int = 1) -> Callable[[Function], Function]:
    """Makes a command of a function that takes a Stopwatch as `watch`, and returns a BenchResult.

    The command prints the result, writes and compares it; its exit code is 1 where something became worse.
    """
    path: Any = click.Path(path_type=Path, dir_okay=False)
    options = (
        click.option("--repeat", default=repeat, show_default=True, type=click.IntRange(1), help="Rounds that count."),
        click.option("--warmup", default=warmup, show_default=True, type=click.IntRange(0), help="Rounds before them."),
        json_option,
        click.option("--out", multiple=True, type=path, metavar="FILE.json", help="Keep the result. Repeatable."),
        click.option(
            "--against",
            type=path,
            metavar="FILE.json",
            help="Compare with a saved result; exit code 1 if something is worse, beyond its noise.",
        ),
        click.option(
            "--threshold",
            default=0.1,
            show_default=True,
            type=click.FloatRange(0, min_open=False),
            help="Share by which a median may be worse than the saved one.",
        ),
    )

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def measure(
            *, as_json: bool, out: tuple[Path, ...], against: Path | None, threshold: float, **values: Any
        ) -> int:
            from bench.result import load_result
            from bench.stopwatch import Stopwatch
            from cli.progress import Progress

            name = str(click.get_current_context().info_name)
            saved = None if against is None else load_result(against, name)
            with Progress() as listen:
                result = function(watch=Stopwatch(values.pop("repeat"), values.pop("warmup"), listen), **values)
            return _report(result, as_json, out, against, saved, threshold)

        command: Function = measure
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _report(
    result: "BenchResult",
    as_json: bool,
    out: Sequence[Path],
    against: Path | None,
    saved: "BenchResult | None",
    threshold: float,
) -> int:
    """Print, write, compare; the exit code. A result that can't be compared is printed and written all the same."""
    from bench.check import check, differing
    from bench.result import write_result
    from distill.errors import BadInput

    found: list[Change] = []
    problem: BadInput | None = None
    try:
        found = check(result, saved, threshold, str(against)) if saved is not None else []
    except BadInput as error:
        problem = error
    if as_json:
        emit_json(result.to_json() | ({"against": {"changes": [vars(change) for change in found]}} if found else {}))
    else:
        _print(result)
        if found:
            _print_changes(found, str(against), threshold)
    if saved is not None and (other := differing(saved.machine, result.machine)):
        click.echo(f"warning: {against} was measured elsewhere ({other}): differences may come from that", err=True)
    worse = problem is not None or any(change.verdict == "worse" for change in found)
    for path in out:
        if worse and against is not None and path.resolve() == against.resolve():
            click.echo(f"{path}: kept as it was, for it is what the new result fails against", err=True)
        else:
            write_result(result, path)
    if problem is not None:
        raise problem
    failed = result.about.get("failed", {})
    for name, why in failed.items():
        click.echo(f"{name}: failed: {why}", err=True)
    return 1 if worse or failed else 0


def _print(result: "BenchResult") -> None:
    from bench.result import HEADER, row

    click.echo(table([row(series) for series in result.series], HEADER))
    for told in filter(None, (result.settings, result.about, result.machine)):
        click.echo(", ".join(f"{name} {value}" for name, value in facts(told)))


def _print_changes(found: "list[Change]", source: str, threshold: float) -> None:
    from bench.result import number

    rows = [(c.name, c.unit, number(c.saved), number(c.now), f"{c.worse:+.1%}", c.verdict) for c in found]
    click.echo("\n" + table(rows, (f"against {source}", "unit", "saved", "now", "worse by", "")))
    worse = sum(change.verdict == "worse" for change in found)
    click.echo(f"{worse} of {len(found)} worse by more than {threshold:.0%} with intervals apart")
