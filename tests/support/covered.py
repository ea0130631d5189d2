"""Writes what the tests reach (`make coverage`) to docs/results/test-coverage.json, for a table in the docs."""

import json
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "results" / "test-coverage.json"


def table(report: dict[str, Any], commit: str) -> dict[str, Any]:
    """Shares of each package and of all, from `coverage json`."""
    counts: dict[str, Counter[str]] = {}
    for name, file in report["files"].items():
        for of in (Path(name).parts[0], "all"):
            counts.setdefault(of, Counter()).update(file["summary"])
    rows = [
        {
            "package": name,
            "statements": count["num_statements"],
            "lines": round(count["covered_lines"] / count["num_statements"], 4),
            "branches": round(count["covered_branches"] / count["num_branches"], 4),
        }
        for name, count in sorted(counts.items(), key=lambda of: -of[1]["num_statements"])
    ]
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
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    FILE.write_text(json.dumps(table(json.load(sys.stdin), commit), indent=1) + "\n", encoding="utf-8")
