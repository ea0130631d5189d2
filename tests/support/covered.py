"""Writes what the tests reach (`make coverage`) to docs/results/test-coverage.json, for a table in the docs.

`coverage json -o - | python -m support.covered COMMIT`, of an earlier commit's tests, adds a row to compare with.
"""

import json
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "results" / "test-coverage.json"


EARLIER = "all, at "


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Shares of each package and of all, from `coverage json`."""
    counts: dict[str, Counter[str]] = {}
    for name, file in report["files"].items():
        for of in (Path(name).parts[0], "all"):
            counts.setdefault(of, Counter()).update(file["summary"])
    return [
        {
            "package": name,
            "statements": count["num_statements"],
            "lines": round(count["covered_lines"] / count["num_statements"], 4),
            "branches": round(count["covered_branches"] / max(1, count["num_branches"]), 4),
        }
        for name, count in sorted(counts.items(), key=lambda of: -of[1]["num_statements"])
    ]


def table(rows: list[dict[str, Any]], commit: str) -> dict[str, Any]:
    share = {"digits": 1, "percent": True}
    return {
        "command": "make coverage",
        "machine": f"Python {platform.python_version()}",
        "commit": commit,
        "columns": {
            "package": {"label": "package"},
            "statements": {"label": "statements", "digits": 0},
            "lines": {"label": "lines reached", **share},
            "branches": {"label": "branches reached", **share},
        },
        "rows": rows,
    }


if __name__ == "__main__":
    rows = rows_of(json.load(sys.stdin))
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"rows": [], "commit": ""}
    if sys.argv[1:]:
        (earlier,) = (row for row in rows if row["package"] == "all")
        rows = [row for row in before["rows"] if row["package"] != EARLIER + sys.argv[1]]
        rows, commit = [*rows, earlier | {"package": EARLIER + sys.argv[1]}], before["commit"]
    else:
        rows += [row for row in before["rows"] if row["package"].startswith(EARLIER)]
        head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    FILE.write_text(json.dumps(table(rows, commit), indent=1) + "\n", encoding="utf-8")
