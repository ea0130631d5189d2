"""A benchmark's result as CSV and Markdown, and writing it without spoiling a file that is something else."""

import csv
import io
import json
from pathlib import Path

from bench.result import KIND, BenchResult, Series, load_result
from distill.errors import BadInput
from distill.run import write_atomic

COLUMNS = (
    "bench",
    "series",
    "unit",
    "better",
    "setting",
    "repetitions",
    "warmup",
    "median",
    "min",
    "max",
    "quartile_1",
    "quartile_3",
    "interval_low",
    "interval_high",
    "values",
    "settings",
    "machine",
    "version",
    "time",
)
"""Of the CSV, one row a series. setting, settings, machine and values hold JSON; numbers are written in full."""

SUFFIXES = (".json", ".csv", ".md")


def to_csv(result: BenchResult) -> str:
    """As RFC 4180 has it: lines end with CR LF."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for series in result.series:
        writer.writerow(
            [
                result.name,
                series.name,
                series.unit,
                series.better,
                json.dumps(series.setting, ensure_ascii=False),
                len(series.values),
                result.warmup,
                *map(repr, (series.median, series.min, series.max, *series.quartiles, *series.interval)),
                json.dumps(series.values),
                json.dumps(result.settings, ensure_ascii=False),
                json.dumps(result.machine, ensure_ascii=False),
                result.version,
                result.time,
            ]
        )
    return out.getvalue()


def number(value: float) -> str:
    """Four digits, thousands apart."""
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def row(series: Series) -> tuple[str, ...]:
    """For a table: name, unit, median, least, most, interval, repetitions."""
    low, high = series.interval
    return (
        series.name,
        series.unit,
        number(series.median),
        number(series.min),
        number(series.max),
        f"{number(low)} to {number(high)}",
        str(len(series.values)),
    )


HEADER = ("", "unit", "median", "min", "max", "95 % interval", "n")


def to_markdown(result: BenchResult) -> str:
    """One table, with what was measured and where below it."""
    lines = [f"# `{KIND} {result.name}`", "", "| " + " | ".join(HEADER) + " |", "| --- | --- |" + " ---: |" * 5]
    lines += ["| " + " | ".join(map(_cell, row(series))) + " |" for series in result.series]
    facts = {"measured": result.settings, "machine": result.machine, "also": result.about}
    lines.append("")
    lines += [f"- {title}: {told(values)}" for title, values in facts.items() if values]
    lines.append(f"- warm-up rounds, not counted: {result.warmup}; dreaming-student {result.version}, {result.time}")
    lines.append("- the interval is of the median; below 6 repetitions it is the whole range")
    return "\n".join(lines) + "\n"


def told(values: dict[str, object]) -> str:
    """A mapping in one line."""
    shown = {key: value for key, value in values.items() if value is not None}
    return _cell(", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in shown.items()))


def _plain(value: object) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def check_out(path: Path) -> None:
    """Raises BadInput where a result can't be written there: an unknown ending, or something else in its place."""
    if path.suffix not in SUFFIXES:
        raise BadInput(f"--out {path}: ends in none of {', '.join(SUFFIXES)}, which say how it is written")
    if not path.exists():
        return
    if path.is_dir():
        raise BadInput(f"--out {path}: is a folder; name a file")
    if not _is_ours(path):
        raise BadInput(
            f"--out {path}: is there already and holds no result of `{KIND}`; remove it or choose another name"
        )


def _is_ours(path: Path) -> bool:
    if path.suffix == ".json":
        try:
            load_result(path)
        except BadInput:
            return False
        return True
    start = ",".join(COLUMNS) if path.suffix == ".csv" else f"# `{KIND} "
    with path.open("rb") as file:
        return file.read(len(start)) == start.encode()


def write_result(result: BenchResult, path: Path) -> None:
    """As JSON, CSV or Markdown, by its ending. Raises BadInput as `check_out` does, DistillError where it can't be
    written."""
    check_out(path)
    if path.suffix == ".json":
        write_atomic(path, json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")
    else:
        write_atomic(path, to_csv(result) if path.suffix == ".csv" else to_markdown(result))
