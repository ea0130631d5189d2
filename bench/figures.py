"""Figures in the docs: each table is rendered from a file of docs/results/, so that none is typed.

    <!-- results/sizes.json -->
    | student | parameters |
    ...
    <!-- end -->

A file holds `command` (what measures it again), `machine`, `commit`, `columns` (key → label, digits, percent) and
`rows` (key → text, number, or [value, low, high] of an interval). `python -m bench.figures` writes the tables.
"""

import json
import re
from pathlib import Path
from typing import Any

from distill.errors import BadInput
from distill.run import write_atomic

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- (results/[a-z0-9-]+\.json) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def rendered(page: str, results: Path) -> str:
    """A page with each of its tables as its file says. Raises BadInput for a file that isn't there, or isn't one."""
    return PLACE.sub(lambda found: f"{found[1]}{_table(results / Path(found[2]).name)}", page)


def _table(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        columns: dict[str, dict[str, Any]] = content["columns"]
        rows = [[_cell(row.get(key), how) for key, how in columns.items()] for row in content["rows"]]
        about = f"(`{content['command']}`; {content['machine']}, commit {content['commit']})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is no table of results ({error})") from error
    rule = ["---:" if "digits" in how else "---" for how in columns.values()]
    lines = [[how["label"] for how in columns.values()], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{about}\n"


def _cell(value: Any, how: dict[str, Any]) -> str:
    if value is None:
        return "–"
    if "digits" not in how:
        return str(value)
    scale, unit = (100, " %") if how.get("percent") else (1, "")
    numbers = [f"{scale * number:,.{how['digits']}f}" for number in (value if isinstance(value, list) else [value])]
    return numbers[0] + unit + (f" [{', '.join(numbers[1:])}]" if len(numbers) > 1 else "")


if __name__ == "__main__":
    for place in PAGES:
        write_atomic(place, rendered(place.read_text(encoding="utf-8"), ROOT / "docs" / "results"))
