"""Tables of README and docs that hold measured figures have a file of results, and are what the file says."""

import json
import re
from pathlib import Path

import pytest

from bench.figures import PAGES, PLACE, RESULTS, rendered, write
from bench.result import BenchResult, Series, write_result
from distill.errors import BadInput

CONTENT = {
    "command": "dream sweep x.yaml",
    "machine": "a laptop",
    "commit": "0123abc",
    "columns": {
        "name": {"label": "student"},
        "parameters": {"label": "parameters", "digits": 0},
        "top1": {"label": "top-1", "digits": 1, "percent": True},
    },
    "rows": [{"name": "small", "parameters": 1234567, "top1": [0.5, 0.25, 0.75]}, {"name": "other", "top1": 1}],
}
TABLE = re.compile(r"^(\|.*)\n\|[ :|-]+\n((?:\|.*\n)+)", re.MULTILINE)
FIGURE = re.compile(r"\d\.\d|\d ?%|\[[+−-]?\d")
"""A decimal, a percentage or an interval."""
NO_FIGURE = re.compile(r"`[^`]*`|arXiv:\S+|95 % interval")
DEFINITIONS = {
    "| `vision.backbone` | what it is | where its weights come from |",
    "| check | passes when |",
    "| architectures | from | not |",
    "| column | what |",
    "| kind | a training prompt |",
    "| think block | share | loss on it |",
}
"""Headings of tables whose figures are thresholds, settings and names."""
PAGE = "Before.\n<!-- results/x.json -->\nold\n<!-- end -->\nAfter.\n"


def typed(page: str) -> list[str]:
    """Headings of a page's tables that hold figures of no file."""
    found = TABLE.findall(PLACE.sub("", page))
    return [heading for heading, body in found if FIGURE.search(NO_FIGURE.sub("", body)) and heading not in DEFINITIONS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_their_files_say_and_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert rendered(text, RESULTS) == text, "run: python -m bench.figures"
    assert not typed(text), "give it a file: docs/benchmarks.md, The figures of the docs"


@pytest.mark.parametrize(
    ("cell", "measured"),
    [
        ("1.5", True),
        ("-3 %", True),
        ("18 [−2, 3]", True),
        ("`1.5`", False),
        ("`x`, a 95 % interval", False),
        ("7", False),
    ],
)
def test_what_a_figure_is(cell: str, measured: bool) -> None:
    table = f"| what | how |\n| --- | ---: |\n| x | {cell} |\n"
    assert typed(table) == (["| what | how |"] if measured else [])
    assert not typed(f"<!-- results/x.json -->\n{table}<!-- end -->\n")


def test_a_table_is_made_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(CONTENT), encoding="utf-8")
    table = (
        "| student | parameters | top-1 |\n| --- | ---: | ---: |\n| small | 1,234,567 | 50.0 % [25.0, 75.0] |\n"
        "| other | – | 100.0 % |\n\n(`dream sweep x.yaml`; a laptop, commit 0123abc)\n"
    )
    page = rendered(PAGE, tmp_path)
    assert page == f"Before.\n<!-- results/x.json -->\n{table}<!-- end -->\nAfter.\n"
    assert rendered(page, tmp_path) == page


def test_digits_of_a_row_signs_and_text(tmp_path: Path) -> None:
    columns = {"name": {"label": "what"}, "value": {"label": "value"}, "change": {"label": "change", "signed": True}}
    rows = [{"name": "a", "digits": 3, "value": 1, "change": [0.5, -0.25, 1]}, {"name": "b", "value": "1 to 2"}]
    (tmp_path / "x.json").write_text(json.dumps({**CONTENT, "columns": columns, "rows": rows}), encoding="utf-8")
    page = rendered(PAGE, tmp_path)
    assert "| a | 1.000 | +0.500 [−0.250, +1.000] |\n| b | 1 to 2 | – |\n" in page


def test_a_result_of_dream_bench_is_a_table(tmp_path: Path) -> None:
    machine = {"processor": "a laptop", "threads": 1, "cores": 2}
    series = [Series("ours", "s", -1, (1.0, 3.0, 2.0))]
    write_result(BenchResult("x", series, machine=machine, time="today", version="1"), tmp_path / "x.json")
    page = rendered(PAGE, tmp_path)
    assert (
        "| ours | s | 2 | 1 | 3 | 1 to 3 | 3 |\n\n(`dream bench x`; a laptop, 1 of 2 threads, version 1, today)" in page
    )


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"x\.json: is no table of results"):
        rendered(PAGE, tmp_path)
    (tmp_path / "x.json").write_text('{"rows": 3}', encoding="utf-8")
    with pytest.raises(BadInput, match=r"x\.json: is no table of results"):
        rendered(PAGE, tmp_path)


def test_pages_are_written_and_a_plot_names_its_points_the_same_each_time(tmp_path: Path) -> None:
    rows = [
        {"name": "small", "parameters": 1e6, "top1": [0.5, 0.25, 0.75]},
        {"name": "large", "parameters": 2e6, "top1": 1},
    ]
    plot = {"x": "parameters", "y": "top1", "name": "name", "level": [0.8, "teacher"]}
    (tmp_path / "x.json").write_text(json.dumps({**CONTENT, "rows": rows, "plot": plot}), encoding="utf-8")
    (tmp_path / "y.json").write_text(json.dumps(CONTENT), encoding="utf-8")
    (page := tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    drawn: list[str] = []
    for _ in range(2):
        write([page], tmp_path)
        drawn.append((tmp_path / "x.svg").read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == rendered(PAGE, tmp_path) != PAGE
    assert not (tmp_path / "y.svg").exists(), "there is nothing to plot"
    assert drawn[0] == drawn[1]
    assert all(f"<!-- {text} -->" in drawn[0] for text in ("small", "large", "teacher", "parameters", "top-1"))
