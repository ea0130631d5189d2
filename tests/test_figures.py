"""Tables of README and docs that have a file of results are what the file says."""

import json
from pathlib import Path

import pytest

from bench.figures import PAGES, RESULTS, draw, rendered
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
PAGE = "Before.\n<!-- results/x.json -->\nold\n<!-- end -->\nAfter.\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_their_files_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert rendered(text, RESULTS) == text, "run: python -m bench.figures"


def test_a_table_is_made_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(CONTENT))
    table = (
        "| student | parameters | top-1 |\n| --- | ---: | ---: |\n| small | 1,234,567 | 50.0 % [25.0, 75.0] |\n"
        "| other | – | 100.0 % |\n\n(`dream sweep x.yaml`; a laptop, commit 0123abc)\n"
    )
    page = rendered(PAGE, tmp_path)
    assert page == f"Before.\n<!-- results/x.json -->\n{table}<!-- end -->\nAfter.\n"
    assert rendered(page, tmp_path) == page


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"x\.json: is no table of results"):
        rendered(PAGE, tmp_path)
    (tmp_path / "x.json").write_text('{"rows": 3}')
    with pytest.raises(BadInput, match=r"x\.json: is no table of results"):
        rendered(PAGE, tmp_path)


def test_a_plot_names_its_points_and_is_the_same_each_time(tmp_path: Path) -> None:
    rows = [
        {"name": "small", "parameters": 1e6, "top1": [0.5, 0.25, 0.75]},
        {"name": "large", "parameters": 2e6, "top1": 1},
    ]
    plot = {"x": "parameters", "y": "top1", "name": "name", "level": [0.8, "teacher"]}
    (tmp_path / "x.json").write_text(json.dumps({**CONTENT, "rows": rows, "plot": plot}))
    drawn: list[str] = []
    for _ in range(2):
        draw(tmp_path / "x.json")
        drawn.append((tmp_path / "x.svg").read_text())
    assert drawn[0] == drawn[1]
    assert all(f"<!-- {text} -->" in drawn[0] for text in ("small", "large", "teacher", "parameters", "top-1"))
