"""A sweep's end as tables: summary.md for people, sweep.csv for other programs."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.exam.metrics.catalogue import Metric, metric_of, shown

Entry = Mapping[str, Any]
"""What sweep.json says of a cell."""

VALIDATION = Metric("validation loss", -1, 4)
"""What cells are sorted by where nothing was compared."""

RESULT = ("value", "low", "high")
TRAINING = ("steps", "tokens", "epochs", "parameters", "validation_loss", "seconds", "tokens_per_second")
"""What is known of a training, in the order of the columns."""


def rows_of(cells: Mapping[str, Entry], results: Mapping[str, Any] | None, metric: str) -> list[dict[str, Any]]:
    """One row a cell, the best system first, then by seed. results: of the comparison, None where there was none.

    A system's value and interval are over all its seeds; `seed_value` is the cell's own.
    """
    rows: list[dict[str, Any]] = []
    for name, cell in cells.items():
        row: dict[str, Any] = {"cell": name, **{key: cell[key] for key in ("system", "seed", "state", "changes")}}
        row |= {key: cell.get(key) for key in TRAINING} | {"error": cell.get("error", "")}
        system = (results or {}).get("systems", {}).get(cell["system"], {})
        measured = system.get("metrics", {}).get(metric) or {}
        seeds = dict(zip(system.get("sweep_seeds", []), measured.get("seeds") or [], strict=False))
        row |= {key: measured.get(key) for key in RESULT} | {"seed_value": seeds.get(cell["seed"])}
        speed = (system.get("cost") or {}).get("tokens_per_second") or {}
        rows.append(row | {"answer_tokens_per_second": speed.get("median")})
    better = metric_of(metric).better if results else VALIDATION.better

    def place(row: dict[str, Any]) -> tuple[float, float, str, int]:
        value = row["value"] if results else _mean(rows, row["system"])
        if value is None or math.isnan(value):
            return 1, 0, row["system"], row["seed"]
        return 0, -(better or 1) * value, row["system"], row["seed"]

    return sorted(rows, key=place)


def _mean(rows: Sequence[Mapping[str, Any]], system: str) -> float | None:
    found = [row["validation_loss"] for row in rows if row["system"] == system and row["validation_loss"] is not None]
    return sum(found) / len(found) if found else None


def to_csv(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A line a cell; each setting that any cell changes is a column of its own."""
    settings = sorted({key for row in rows for key in row["changes"]})
    own = ["system", "seed", "state"]
    header = ["cell", *own, *settings, metric, f"{metric}_system", f"{metric}_low", f"{metric}_high"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, "answer_tokens_per_second", *(f"training_{key}" for key in TRAINING), "error"])
    for row in rows:
        values = [row["cell"], *(row[key] for key in own), *(row["changes"].get(key, "") for key in settings)]
        numbers = [row[key] for key in ("seed_value", *RESULT, "answer_tokens_per_second", *TRAINING)]
        writer.writerow([*values, *("" if number is None else number for number in numbers), row["error"]])
    return text.getvalue()


def to_markdown(name: str, rows: Sequence[Mapping[str, Any]], metric: str, compared: bool) -> str:
    """Systems by the metric, then each cell."""
    how = metric_of(metric) if compared else VALIDATION
    best = {1: ", the highest first", -1: ", the lowest first"}.get(how.better, "")
    lines = [f"# {name}: {len(rows)} cells by {how.label}{best}", ""]
    if not compared:
        lines += ["Nothing was compared: these are losses on the validation documents of each cell.", ""]
    head = ["system", "settings", how.label, *(["95 % interval", "answer tokens/s"] if compared else []), "seeds"]
    lines += _line(head) + _line(["---"] * len(head))
    for system in dict.fromkeys(row["system"] for row in rows):
        of = [row for row in rows if row["system"] == system]
        value = of[0]["value"] if compared else _mean(rows, system)
        cells = [_code(system), _settings(of[0]["changes"]), shown(value, how)]
        if compared:
            bounds = [shown(of[0][key], how) for key in ("low", "high")]
            speed = of[0]["answer_tokens_per_second"]
            cells += ["–" if value is None else " to ".join(bounds), "–" if speed is None else f"{speed:,.0f}"]
        lines += _line([*cells, ", ".join(str(row["seed"]) for row in of)])
    head = ["cell", "settings", "seed", how.label, "steps", "trained for (s)", "trained tokens/s", "state"]
    lines += ["", "Each cell:", "", *_line(head), *_line(["---"] * len(head))]
    for row in rows:
        value = row["seed_value"] if compared else row["validation_loss"]
        numbers = [f"{row[key]:,.0f}" if row[key] is not None else "–" for key in ("steps", "seconds")]
        speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "–"
        cells = [_code(row["cell"]), _settings(row["changes"]), str(row["seed"]), shown(value, how), *numbers, speed]
        lines += _line([*cells, f"{row['state']}: {row['error']}" if row["error"] else row["state"]])
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"]


def _code(text: str) -> str:
    return f"`{text}`"


def _settings(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in changes.items()) or "–"
