"""The notebooks run from their first cell to their last, on small students, and what is committed of them is small."""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from support.evaluation_run import trained_run

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def outputs(cells: list[Any]) -> list[str]:
    found = [part for cell in cells if cell.cell_type == "code" for part in cell.outputs]
    return [str(part.get("text") or part.get("data")) for part in found]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, dreamer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book: Any = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert len(outputs(book.cells)) >= 3, "committed without its outputs"
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 20_000
    monkeypatch.setenv("DREAM_RUN", str(trained_run(tmp_path / "run").path))
    for key, value in {"TEACHER": f"embedded:{dreamer}", "STEPS": "2", "LAYERS": "1", "THINGS": "6"}.items():
        monkeypatch.setenv(f"DREAM_{key}", value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = outputs(book.cells)
    assert all("Error:" not in text for text in said), said
    shown = {"quickstart": "validation loss", "dreams": "image token", "your-own-teacher": "Bundle: mine/bundle"}
    assert shown[name] in "".join(said)
