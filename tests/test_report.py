"""The report: a pure function of what was saved, whose every number can be found again."""

import copy
import json
from typing import Any

import pytest

from distill.report import evaluation as report


def entry(value: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


NO_TARGETS = dict.fromkeys(("kl", "kl_dreams", "agreement"), "the answers have no soft targets")


@pytest.fixture
def results() -> dict[str, Any]:
    def system(bits: float, **others: Any) -> dict[str, Any]:
        return {
            "metrics": {"bits_per_byte": entry(bits), **others},
            "versus_student": {"bits_per_byte": entry(bits - 1.5)},
            "tokens_per_second": None,
        }

    student = system(1.5, bits_per_byte_dreams=entry(1.4), chrf=entry(31.25), dream_recall=entry(0.5))
    return {
        "run": "a-run",
        "checkpoint": "step-000100",
        "teacher": "ollama:tiny",
        "tokenizer": "aligned",
        "prompts": 2,
        "answer_tokens": 1234,
        "answer_bytes": 5678,
        "seed": 0,
        "settings": {"dreams": 7, "temperature": 0.7, "max_tokens": 96, "bootstrap": 2000},
        "systems": {
            "teacher": system(0.4),
            "student": {**student, "versus_student": {}, "missing": NO_TARGETS, "tokens_per_second": 321.4},
            "start": system(3.0),
            "hard": {**system(1.55), "missing": {**NO_TARGETS, "dream_recall": "it was not made to dream"}},
        },
        "fall": {"bits_per_byte": entry(0.5)},
    }


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    student = {"dream": "⟨spatial⟩⟨a ball⟩", "answer": "It *falls*.\n# really | <b>", "metrics": {}}
    return [{"prompt": f"Question {i}?", "teacher": "It falls.", "systems": {"student": student}} for i in range(9)]


def test_table_has_a_column_a_system_in_order(results: dict[str, Any]) -> None:
    heading, *rows = report.table_rows(results)
    assert heading == ["metric", "its start", "student", "hard labels only", "teacher"]
    assert all(len(row) == len(heading) for row in rows)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["bits per byte, no dream ↓"] == ["3.000", "1.500", "1.550", "0.400"]
    assert cells["bits per byte, own dreams ↓"] == ["–", "1.400", "–", "–"]
    assert cells["dream recall ↑"] == ["–", "50.0 %", "missing", "–"]
    assert cells["tokens a second"] == ["–", "321", "–", "–"]
    assert not any(label.startswith("KL") for label in cells)  # defined for nobody


def test_what_is_missing_says_why_once(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    headings = {"student": "student", "hard": "hard labels only"}
    one, two = report.missing_lines(results["systems"], headings)
    # With dreams KL is missing for the same reason: it isn't named twice.
    why = "no KL to the teacher (nats); top-1 agreement: the answers have no soft targets."
    assert one == f"student, hard labels only: {why}"
    assert two == "hard labels only: no dream recall: it was not made to dream."
    assert "- hard labels only: no dream recall" in report.render(results, samples)
    results["systems"]["hard"].pop("missing")  # as written before there was any
    assert report.missing_lines(results["systems"], {"hard": "hard"}) == []


def test_intervals_stand_in_brackets(results: dict[str, Any]) -> None:
    rows = {row[0]: row for row in report.table_rows(results, intervals=True)}
    assert rows["bits per byte, no dream ↓"][2] == "1.500 [1.400, 1.600]"


def test_differences_say_which_are_clear(results: dict[str, Any]) -> None:
    heading, bits = report.difference_rows(results)
    assert heading == ["metric", "its start − student", "hard labels only − student", "teacher − student"]
    assert bits[1] == "+1.500 [+1.400, +1.600] *"
    assert bits[2] == "+0.050 [-0.050, +0.150]"
    assert bits[3].endswith("*")


def test_report_is_a_pure_function_of_saved_json(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    before = copy.deepcopy((results, samples))
    text = report.render(results, samples)
    assert (results, samples) == before
    assert report.render(json.loads(json.dumps(results)), json.loads(json.dumps(samples))) == text
    assert "fell by 50.0 % [40.0, 60.0], from 3.000 at the start to 1.500." in text
    assert "1,234 answer tokens" in text
    assert "own dreams: 7 sampled a prompt" in text
    assert text.count("**Question") == report.SHOWN


def test_what_a_student_says_is_no_markup(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    text = report.render(results, samples)
    assert r"*Student:* It \*falls\*. \# really \| \<b\>" in text
    samples[0]["systems"]["student"]["answer"] = "  \n"
    assert "*Student:* (nothing)" in report.render(results, samples)


def test_a_report_without_start_dreams_or_soft_targets(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    del results["systems"]["start"], results["systems"]["hard"], results["systems"]["teacher"]
    results["fall"] = {}
    del samples[0]["systems"]["student"]["dream"]  # all samples share it
    text = report.render(results, samples)
    assert "The student needs 1.500 bits per byte" in text
    assert "## Differences" not in text
    assert "*Dream:*" not in text
    assert "no soft targets" in text  # why KL is missing


def test_markdown_tables_survive_bars() -> None:
    with pytest.raises(AssertionError, match="as wide as the heading"):
        report.markdown_table([["a", "b"], ["x", "1", "2"]])
    table = report.markdown_table([["a", "b"], ["x|y", "1"]])
    assert table.splitlines() == ["| a | b |", "| --- | ---: |", r"| x\|y | 1 |"]
