"""`dream traces`."""

from dataclasses import asdict
from pathlib import Path

import click

from cli.options import FILE, json_option, run_argument
from cli.output import answer, facts, table
from cli.progress import Progress
from cli.runs import open_run


@click.group()
def traces() -> None:
    """Export a run's captured answers, or count them.

    \b
    Example:
      dream traces export my-student traces.parquet
    """


@traces.command()
@run_argument
@json_option
def stats(run_path: Path, as_json: bool) -> None:
    """Count RUN's answers, tokens and soft targets, and their bytes on disk.

    \b
    Example:
      dream traces stats my-student --json
    """
    from distill.corpus.traces import TraceStore

    run = open_run(run_path, None, [], {})
    with TraceStore(run.traces, readonly=True) as store:
        found = asdict(store.stats())
    answer(as_json, found, table(facts(found)))


@traces.command()
@run_argument
@click.argument("file", type=FILE)
@json_option
def export(run_path: Path, file: Path, as_json: bool) -> None:
    """Write RUN's answers to FILE: Parquet or JSON lines, by its name (.parquet, .jsonl).

    \b
    Example:
      dream traces export my-student traces.jsonl
    """
    from distill.corpus.export_traces import export_traces

    run = open_run(run_path, None, [], {})
    with Progress() as listen:
        count = export_traces(run.traces, file, file.suffix.removeprefix("."), listen)
    answer(as_json, {"file": str(file), "responses": count}, f"{file}: {count:,} responses")
