"""Figures in the docs: each table is rendered from a file of docs/results/, so that none is typed.

    <!-- results/sizes.json -->
    | student | parameters |
    ...
    <!-- end -->

A file holds `command` (what measures it again), `machine`, `commit`, `columns` (key → label, digits, percent, signed)
and `rows` (key → text, number, or [value, low, high] of an interval; `digits` stands in where a column has none). With
`plot` (x, y, name: keys of columns, `level`: a value of y to compare with, and its name) it is drawn beside it, as
NAME.svg. Or it is what `dream bench --out` wrote. `python -m bench.figures` writes tables and plots.
"""

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.result import HEADER, KIND, BenchResult
from bench.result import row as series_row
from distill.errors import BadInput
from distill.report.tables import markdown_table
from distill.run import write_atomic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- (results/[a-z0-9-]+\.json) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def rendered(page: str, results: Path) -> str:
    """A page with each of its tables as its file says. Raises BadInput for a file that isn't there, or isn't one."""
    return PLACE.sub(lambda found: f"{found[1]}{_table(results / Path(found[2]).name)}", page)


def _table(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("kind") == KIND:
            return _bench_table(BenchResult.from_json(content, str(path)))
        columns: dict[str, dict[str, Any]] = content["columns"]
        rows = [[_cell(row.get(key), {**row, **how}) for key, how in columns.items()] for row in content["rows"]]
        about = f"(`{content['command']}`; {content['machine']}, commit {content['commit']})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is no table of results ({error})") from error
    return f"{markdown_table([[how['label'] for how in columns.values()], *rows])}\n\n{about}\n"


def _bench_table(result: BenchResult) -> str:
    threads = f"{result.machine['threads']} of " if result.machine.get("threads") else ""  # unknown of a server
    where = f"{result.machine['processor']}, {threads}{result.machine['cores']} threads"
    about = f"(`dream bench {result.name}`; {where}, version {result.version}, {result.time})"
    return f"{markdown_table([list(HEADER), *(list(series_row(series)) for series in result.series)])}\n\n{about}\n"


def _cell(value: Any, how: dict[str, Any]) -> str:
    if value is None:
        return "–"
    if isinstance(value, str) or "digits" not in how:
        return str(value)
    scale, unit = (100, " %") if how.get("percent") else (1, "")
    form = f"{'+' if how.get('signed') else ''},.{how['digits']}f"
    values = value if isinstance(value, list) else [value]
    numbers = [format(scale * number, form).replace("-", "−") for number in values]
    return numbers[0] + unit + (f" [{', '.join(numbers[1:])}]" if len(numbers) > 1 else "")


def draw(path: Path) -> None:
    """Points with their names and intervals, into an SVG beside the file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    content = json.loads(path.read_text(encoding="utf-8"))
    x, y, name, (level, called) = (content["plot"][key] for key in ("x", "y", "name", "level"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for row in content["rows"]:
        value, low, high = row[y] if isinstance(row[y], list) else [row[y]] * 3
        axes.errorbar(row[x], value, yerr=[[value - low], [high - value]], fmt="o", capsize=4)
        axes.annotate(row[name], (row[x], value), xytext=(7, 5), textcoords="offset points", fontsize=9)
    axes.axhline(level, linestyle="--", color="gray")
    axes.annotate(called, (axes.get_xlim()[0], level), xytext=(4, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel=content["columns"][x]["label"], ylabel=content["columns"][y]["label"])
    axes.set_ylim(bottom=0)
    with rc_context({"svg.hashsalt": path.stem}):  # alike each time
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def write_table(
    name: str, command: str, machine: str, columns: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Keep what was measured of the commit that is checked out, as docs/results/NAME.json."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, encoding="utf-8").strip()
    told = {"command": command, "machine": machine, "commit": commit, "columns": columns, "rows": rows}
    write_atomic(RESULTS / f"{name}.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def write(pages: Iterable[Path], results: Path) -> None:
    """All tables of the pages, and all plots."""
    for page in pages:
        write_atomic(page, rendered(page.read_text(encoding="utf-8"), results))
    for file in results.glob("*.json"):
        if "plot" in json.loads(file.read_text(encoding="utf-8")):
            draw(file)


if __name__ == "__main__":
    write(PAGES, RESULTS)
