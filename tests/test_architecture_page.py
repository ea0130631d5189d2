"""docs/architecture.md: what it shows how to add works when it is added as it says."""

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import dream as command
from distill import teacher
from distill.corpus.datasets import stage
from distill.exam.metrics import catalogue, text
from distill.exam.metrics.statistics import Ratio

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(heading: str) -> tuple[str, list[str]]:
    """What it says, and its pieces of code."""
    said = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    assert len(said.splitlines()) < 50
    return said, re.findall(r"```python\n(.*?)```", said, re.DOTALL)


def shown(heading: str) -> tuple[str, str]:
    """The module that a section shows, added to the running program; and the line that it adds to a table."""
    said, (code,) = section(heading)
    name, module = re.findall(r'`"([a-z]+)": "([a-z_.]+)"`', said)[0]
    spec = spec_from_loader(module, loader=None)
    assert spec is not None
    sys.modules[module] = added = module_from_spec(spec)
    exec(compile(code, f"docs/architecture.md: {heading}", "exec"), vars(added))
    return name, module


def dream(*args: str) -> str:
    done = CliRunner().invoke(command, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_teacher_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(teacher.TEACHERS, *shown("Add a teacher"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why is the sky blue?\nWhat is a lake?\n", encoding="utf-8")
    run = str(tmp_path / "run")
    asked = json.loads(
        dream("capture", run, "--teacher", "parrot:polly", "--prompts", str(prompts), "--json", "--quiet")
    )
    assert asked["summary"]["responses"] == 2
    dream("traces", "export", run, str(tmp_path / "said.jsonl"))
    assert "You ask: What is a lake?" in (tmp_path / "said.jsonl").read_text(encoding="utf-8")


def test_a_dataset_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stage.DATASETS, *shown("Add a dataset"))
    run = str(tmp_path / "run")
    options = ("--dataset", "sums", "--set", "capture.dataset_size=40", "--json", "--quiet")
    captured = json.loads(dream("capture", run, *options))["summary"]
    assert captured["responses"] - captured["held_out"] == 40
    mined = json.loads(dream("mine", run, "--json", "--quiet"))["summary"]
    assert mined["triplets"] == captured["responses"]


def test_a_metric_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (function, line) = section("Add a metric")
    names = {"Ratio": Ratio, "Metric": catalogue.Metric, "METRICS": {}}
    exec(function + line, names)
    monkeypatch.setitem(text.OWN, "questions_back", names["questions_back"])
    monkeypatch.setitem(catalogue.METRICS, "questions_back", names["METRICS"]["questions_back"])
    measured = text.text_metrics(["It falls.", "Why do you ask? ", "?", ""])
    assert measured["questions_back"].value == 0.5
    assert catalogue.metric_of("questions_back").percent
