"""A sweep's cells as one table, for summary.md and for terminals."""

from collections.abc import Mapping
from typing import Any

from distill.exam.metrics.catalogue import Metric, metric_of, shown
from distill.sweep.plan import told

Cells = Mapping[str, Mapping[str, Any]]
"""Name → what sweep.json says of a cell."""

VALIDATION = Metric("validation loss", -1, 4)
"""Of a cell's training."""


def values_of(cells: Cells, results: Mapping[str, Any] | None, metric: str) -> dict[str, dict[str, float | None]]:
    """Cell → `seed_value`, its own, and `value`, `low` and `high`, its system's over all seeds; the best system first,
    then by seed. results: of the comparison; None where there was none: then cells are as the file has them."""
    found: dict[str, dict[str, float | None]] = {}
    for name, cell in cells.items():
        system = (results or {}).get("systems", {}).get(cell["system"], {})
        measured = system.get("metrics", {}).get(metric) or {}
        own = dict(zip(system.get("sweep_seeds", []), measured.get("seeds") or [], strict=False)).get(cell["seed"])
        found[name] = {"seed_value": own, **{key: measured.get(key) for key in ("value", "low", "high")}}
    if results is None:
        return found
    better = metric_of(metric).better or 1

    def place(name: str) -> tuple[bool, float, str, int]:
        value = found[name]["value"]
        return value is None, -better * (value or 0.0), cells[name]["system"], cells[name]["seed"]

    return {name: found[name] for name in sorted(found, key=place)}


def rows(state: Mapping[str, Any]) -> list[list[str]]:
    """sweep.json's cells in its order, the heading first; the metric's columns only where something was compared."""
    cells: Cells = {name: state["cells"][name] for name in state["order"]}
    how, compared = metric_of(state["metric"]), any(cell["value"] is not None for cell in cells.values())
    measured = [how.label, "of all its seeds, 95 % interval"] if compared else []
    found = [["cell", "settings", *measured, VALIDATION.label, "steps", "trained for (s)", "tokens/s", "state"]]
    for name, cell in cells.items():
        value, low, high = (shown(cell[key], how) for key in ("value", "low", "high"))
        columns = [shown(cell["seed_value"], how), f"{value} [{low}, {high}]"] if compared else []
        numbers = [_whole(cell.get(key)) for key in ("steps", "seconds", "tokens_per_second")]
        columns += [shown(cell.get("validation_loss"), VALIDATION), *numbers]
        failed = f": {cell['error']}" if cell.get("error") else ""
        found.append([name, told(cell["changes"]), *columns, cell["state"] + failed])
    return found


def _whole(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"
