"""The report of a comparison in Markdown: it says what results.json holds, no more, and nothing becomes markup."""

import copy
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison_sample import HOSTILE, bare, big, small

from distill.exam.metrics.catalogue import metric_of
from distill.report.doubts import cautions, doubts
from distill.report.findings import dream_lines, fell, findings, headlines, minus, missing_reasons, verdict
from distill.report.page import render_markdown
from distill.report.tables import (
    _three,
    asked_rows,
    cost_rows,
    difference_rows,
    evaluation_rows,
    markdown_table,
    metric_rows,
    size,
    training_rows,
)


def tables(markdown: str) -> dict[str, list[list[str]]]:
    """Heading of a section → its table's rows, the rule left out."""
    found: dict[str, list[list[str]]] = {}
    for section in re.split(r"^## ", markdown, flags=re.M)[1:]:
        rows = [line for line in section.splitlines() if line.startswith("|")]
        if rows:
            cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
            found[section.split("\n")[0]] = [cells[0], *cells[2:]]
    return found


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[+-]?\d+(?:\.\d+)?", text.replace("−", "-").replace(",", " "))]


def change(results: dict[str, Any], name: str, **values: Any) -> dict[str, Any]:
    """The results with another difference in one metric."""
    changed = copy.deepcopy(results)
    (found,) = [d for d in changed["differences"] if d["metric"] == name]
    found.update(values)
    return changed


@pytest.mark.parametrize("sample", [small, big])
def test_tables_hold_the_numbers_of_the_results(sample: Any) -> None:
    results = sample()
    found = tables(render_markdown(results))
    heading, *rows = found["Measured"]
    assert heading[1:] == [f"{n} (baseline)" if n == results["baseline"] else n for n in results["systems"]]
    assert len(rows) == len(results["metrics"])
    for name, row in zip(results["metrics"], rows, strict=True):
        metric = metric_of(name)
        for system, cell in zip(results["systems"].values(), row[1:], strict=True):
            entry = system["metrics"].get(name)
            if name in system["missing"]:
                assert cell == "missing"
            elif entry is None or entry["value"] is None:
                assert cell == "–"
            else:
                times = 100 if metric.percent else 1
                expected = [times * entry[key] for key in ("value", "low", "high")]
                assert numbers(cell) == pytest.approx(expected, abs=0.5001 * 10**-metric.digits)
    _, *rows = found["Differences"]
    assert len(rows) == len(results["differences"])
    for difference, row in zip(results["differences"], rows, strict=True):
        assert row[1] == f"{difference['system']} − {difference['against']}"
        if difference["value"] is None:
            assert row[2:] == ["–", "–", "–", "–", "not defined"]
            continue
        metric = metric_of(difference["metric"])
        times = 100 if metric.percent else 1
        expected = [times * difference[key] for key in ("value", "low", "high")]
        assert numbers(row[2]) == pytest.approx(expected, abs=0.5001 * 10**-metric.digits)
        if difference["wins"] is None:
            assert row[5] == "–"
        elif metric.better:
            assert numbers(row[5]) == [difference["wins"], difference["ties"], difference["losses"]]


@pytest.mark.parametrize("sample", [small, big])
def test_tables_are_as_wide_as_their_headings(sample: Any) -> None:
    results = sample()
    for rows in tables(render_markdown(results)).values():
        assert {len(row) for row in rows} == {len(rows[0])}
    for rows in (metric_rows(results), difference_rows(results), cost_rows(results), training_rows(results)):
        assert {len(row) for row in rows} == {len(rows[0])}


def test_a_headline_flips_with_its_numbers() -> None:
    results = small()
    (finding,) = findings(results)
    assert finding.headline == "hard against soft: of 2 metrics: clearly worse in 1, no clear difference in 1."
    assert [difference["metric"] for difference in finding.tested] == ["bits_per_byte", "chrf"]
    for metric, values, told in (
        (
            "bits_per_byte",
            {"value": -0.137, "low": -0.204, "high": -0.07},
            "clearly better in 1, no clear difference in 1",
        ),
        ("bits_per_byte", {"p_corrected": 0.05}, "no clear difference in 2"),
        (
            "chrf",
            {"value": 1.0, "low": 0.5, "high": 1.5, "p_corrected": 0.049},
            "clearly better in 1, clearly worse in 1",
        ),
        ("chrf", {"value": -1.0, "low": -1.5, "high": -0.5, "p_corrected": 0.01}, "clearly worse in 2"),
    ):
        (found,) = findings(change(results, metric, **values))
        assert found.headline == f"hard against soft: of 2 metrics: {told}."


def test_the_leading_metric_is_told_first_and_by_itself() -> None:
    results = small()
    results["tests"] |= {"leading": "bits_per_byte", "count_leading": 1, "count": 1}
    (finding,) = findings(results)
    assert finding.headline == (
        "hard against soft: clearly worse in bits per byte, no dream, +0.137 [+0.070, +0.204], corrected p < 0.001. "
        "Of 1 other metrics: no clear difference in 1."
    )
    (nothing,) = findings(change(results, "bits_per_byte", p_corrected=0.05))
    assert nothing.headline.startswith("hard against soft: no clear difference in bits per byte, no dream, ")
    asked = dict(asked_rows(results))
    assert asked["p-values"].endswith("(Holm, for 1 tests, and by itself for 1 of what leads: bits per byte, no dream)")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "worse"),
        ({"p_corrected": 0.06}, "open"),
        ({"low": -0.01}, "open"),  # the interval and the test disagree: nothing is claimed
        ({"low": 0.0}, "open"),
        ({"p": None, "p_corrected": None}, "untested"),
        ({"low": None, "high": None}, "untested"),
        ({"value": None, "low": None, "high": None}, "undefined"),
        ({"metric": "chrf"}, "better"),
        ({"metric": "length_ratio"}, "untested"),
    ],
)
def test_nothing_is_claimed_that_is_not_clear(values: dict[str, Any], expected: str) -> None:
    (difference,) = [d for d in small()["differences"] if d["metric"] == "bits_per_byte"]
    assert verdict(difference | values) == expected


@given(st.floats(-2, 2), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_clear_words_need_a_small_p_and_an_interval_off_zero(
    value: float, below: float, above: float, p: float
) -> None:
    results = change(small(), "bits_per_byte", value=value, low=value - below, high=value + above, p_corrected=p)
    clear = p < 0.05 and (value - below > 0 or value + above < 0)
    text = render_markdown(results)
    row = next(row for row in tables(text)["Differences"] if row[0].startswith("bits per byte"))
    assert row[-1] == ("no clear difference" if not clear else "▲ clearly better" if value < 0 else "▼ clearly worse")
    assert ("clearly" in text.split("## ")[0]) == clear


def test_landmarks_make_no_headline() -> None:
    results = big()
    for difference in results["differences"]:
        if difference["metric"] == "dream_recall_chance":
            difference |= {"value": 0.5, "low": 0.4, "high": 0.6, "p": 0.0, "p_corrected": 0.0}
    assert not any(
        "by chance" in line or "chance" in d["metric"]
        for f in findings(results)
        for line in [f.headline]
        for d in f.tested
    )
    oracle = change(small(), "chrf", metric="bits_per_byte_oracle", value=-1.0, low=-2.0, high=-0.5, p_corrected=0.0)
    assert "oracle" not in render_markdown(oracle).split("## ")[0]


def test_what_is_missing_is_said_with_its_reason() -> None:
    text = render_markdown(big())
    assert "Ollama's API gives no likelihood of a given answer" in text
    row = next(row for row in tables(text)["Measured"] if row[0].startswith("bits per byte"))
    assert row[-1] == "missing"
    assert "ollama:llama3.2:1b: no dream recall; dream recall by chance: it does not dream." in text


def test_contamination_is_said() -> None:
    text = render_markdown(big())
    rows = {row[0]: row[1:] for row in tables(text)["Seen before?"][1:]}
    assert rows["hard"] == ["1 exact, 2 near copies, 1 contained in another text", "200"]
    assert rows["soft"] == ["none", "200"]
    assert rows["ollama:llama3.2:1b"] == ["not checked: nothing is known of what it was trained on", "–"]
    assert "near (91 % alike): “What happens when you drop a glass ball onto a stone floor?” is held out" in text
    why = "whether it had seen the prompts before was not checked: nothing is known of what it was trained on."
    assert f"ollama:llama3.2:1b: {why}" in cautions(big())
    partly = small()
    partly["systems"]["hard"]["contamination"]["reason"] = "only exact copies can be found"
    assert "none; only exact copies can be found" in render_markdown(partly)


def test_the_judge_is_told_with_its_nonsense_and_its_orders() -> None:
    results = big()
    text = render_markdown(results)
    assert "no usable verdict on some prompts, which count for nobody: 10 (hard)" in text
    assert "is one of those that it judges: ollama:llama3.2:1b" in text
    for judge, own in (("ollama:library/Llama3.2:1b", True), ("ollama:llama3.2", False)):
        results["judge"]["model"] = judge
        assert any("is one of those that it judges" in line for line in cautions(results)) == own
    assert len(tables(text)["Judge"]) == 5
    assert "## Judge" not in render_markdown(small())


def test_what_differs_between_trainings_stands_first() -> None:
    rows = {row[0]: (place, row[1:]) for place, row in enumerate(training_rows(big()))}
    assert rows["train.soft_weight"][1] == ["0.9", "0.0", "0.9", "0.9", "not known"]
    assert rows["packed tokens"][1] == ["983,040", "983,040", "491,520", "983,040", "not known"]
    assert rows["train.soft_weight"][0] < rows["steps"][0]
    assert rows["steps"][1] == ["120"] * 4 + ["not known"]
    assert rows["packed tokens"][0] < rows["steps"][0]


def test_what_went_on_from_trainings_is_told_where_it_differs() -> None:
    results = big()
    assert not any("go on" in text for text in doubts(results["systems"], 200))
    results["systems"]["soft"]["trained_on"]["onward"] = "polish, reward"
    rows = {row[0]: row[1:] for row in training_rows(results)}
    assert rows["gone on by"] == ["polish, reward", "–", "–", "–", "not known"]
    (told,) = (text for text in doubts(results["systems"], 200) if "go on" in text)
    assert "soft by polish, reward" in told
    assert "hard by nothing" in told


def test_how_it_was_asked() -> None:
    results = small()
    asked = dict(asked_rows(results))
    assert asked["answers"] == "sampled at temperature 0.7, at most 56 tokens; seed 0"
    assert asked["dreams"] == "at most 66 tokens"
    assert asked["own dreams before likelihoods"] == "4 sampled a prompt"
    assert asked["p-values"] == "10,000 draws; corrected (Holm, for 2 tests)"
    results["decoding"]["temperature"] = 0.0
    results["exam"] |= {"has_answers": False, "teacher": ""}
    asked = dict(asked_rows(results))
    assert asked["answers"].startswith("greedily")
    assert asked["answered by"] == "nobody"


def test_nothing_said_becomes_markup() -> None:
    text = render_markdown(big())
    assert "\u2028" not in text
    assert "\x00" not in text
    assert "\u202e" not in text
    assert not re.search(r"(?<!\\)<(?=[a-zA-Z/!])", text)
    assert "\\# \\*no\\* \\[markup\\](x) \\| here" in text
    assert "### (nothing)" in text
    assert "### two lines" in text
    named = small()
    named["systems"] = {"a|b*": named["systems"]["soft"], "[x](y)<i>": named["systems"]["hard"]}
    named["baseline"], named["title"], named["disagreements"] = "a|b*", "<b>", []
    for difference in named["differences"]:
        difference |= {"system": "[x](y)<i>", "against": "a|b*"}
    text = render_markdown(named)
    assert "<i>" not in text.replace("\\<i>", "")
    assert "](y)" not in text.replace("\\](y)", "")
    assert {len(row) for rows in tables(text).values() for row in rows[:1]} >= {3}


def test_a_report_of_hardly_anything() -> None:
    results = bare()
    text = render_markdown(results)
    assert headlines(results) == []
    assert "There is nothing to compare with: one system was measured." in text
    assert "not checked" in text
    assert "None" not in text
    assert HOSTILE not in text


def test_a_dream_has_a_line_for_each_lens_whatever_it_says() -> None:
    found = dream_lines("⟨stray⟩ hm ⟨spatial⟩⟨a⟩⟨b⟩ and\nso on⟨causal⟩⟩")
    assert found == ["⟨stray⟩ hm", "⟨spatial⟩⟨a⟩⟨b⟩ and so on", "⟨causal⟩⟩"]
    assert dream_lines(" \n") == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((None, "–"), (0, "0 B"), (999, "999 B"), (16_800_000, "16.8 MB"), (1_321_098_329, "1.32 GB")),
        *((999_499, "999 kB"), (999_600, "1 MB"), (999_960_000, "1 GB"), (1_234_000_000_000, "1.23 TB")),
        (1_234_000_000_000_000, "1,234 TB"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.00003, "0.00003"), (0.0, "0"), (3.14159, "3.14"), (99.96, "100"), (math.nan, "nan")]
)
def test_three_digits_are_no_power_of_ten(value: float, text: str) -> None:
    assert _three(value) == text


@pytest.mark.parametrize(("text", "expected"), [("-0.50", "−0.50"), ("-0.00", "0.00"), ("+0.0 %", "0.0 %"), ("–", "–")])
def test_a_zero_has_no_sign(text: str, expected: str) -> None:
    assert minus(text) == expected


def test_what_repeats_another_metric_is_told_as_such_and_not_counted() -> None:
    results = change(small(), "chrf", p=None, p_corrected=None, same_as="bits_per_byte")
    row = next(row for row in tables(render_markdown(results))["Differences"] if row[0].startswith("chrF2"))
    assert row[-1] == "the same as bits per byte, no dream"
    assert findings(results)[0].headline == "hard against soft: of 1 metrics: clearly worse in 1."


def test_whose_speed_it_is() -> None:
    results = small()
    for number, system in enumerate(results["systems"].values()):
        system["tokens_per_second"] = 1000.0 / (1 + number)
    text = render_markdown(results)
    assert "| tokens a second, one prompt at a time | 210 [195, 218] | 105 [97.7, 109] |" in text
    assert "| tokens a second, in batches | 1,000 | 500 |" in text


# A run's own evaluation, also one of an older version.


def entry(value: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    def system(bits: float, **others: Any) -> dict[str, Any]:
        return {"metrics": {"bits_per_byte": entry(bits), **others}, "tokens_per_second": None}

    targets = dict.fromkeys(("kl", "kl_dreams", "agreement"), "the answers have no soft targets")
    student = system(1.5, bits_per_byte_dreams=entry(1.4), chrf=entry(31.25), dream_recall=entry(0.5), kl=None)
    return {
        "run": "a-run",
        "systems": {
            "teacher": system(0.4),
            "student": {**student, "missing": targets, "tokens_per_second": 321.4},
            "start": system(3.0),
            "hard": {**system(1.55), "missing": {**targets, "dream_recall": "it was not made to dream"}},
        },
        "fall": {"bits_per_byte": entry(0.5)},
    }


def test_an_evaluation_has_a_column_a_system_in_order(evaluation: dict[str, Any]) -> None:
    heading, *rows = evaluation_rows(evaluation)
    assert heading == ["metric", "its start", "student", "hard labels only", "teacher"]
    assert all(len(row) == len(heading) for row in rows)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["bits per byte, no dream ↓"] == ["3.000", "1.500", "1.550", "0.400"]
    assert cells["bits per byte, own dreams ↓"] == ["–", "1.400", "–", "–"]
    assert cells["dream recall ↑"] == ["–", "50.0 %", "missing", "–"]
    assert cells["tokens a second"] == ["–", "321", "–", "–"]
    assert not any(label.startswith("KL") for label in cells)  # defined for nobody
    intervals = {row[0]: row for row in evaluation_rows(evaluation, intervals=True)}
    assert intervals["bits per byte, no dream ↓"][2] == "1.500 [1.400, 1.600]"


def test_what_is_missing_says_why_once(evaluation: dict[str, Any]) -> None:
    one, two = missing_reasons(evaluation)
    labels = "KL to the teacher (nats), no dream; KL, own dreams; top-1 agreement, no dream"
    assert one == f"student, hard: no {labels}: the answers have no soft targets."
    assert two == "hard: no dream recall: it was not made to dream."


def test_what_training_brought(evaluation: dict[str, Any]) -> None:
    assert fell(evaluation) == (
        "Bits per byte of the teacher's held-out answers fell by 50.0 % [40.0, 60.0], from 3.000 at the start to 1.500."
    )
    evaluation["fall"]["bits_per_byte"] = {"value": -0.06, "low": -0.081, "high": -0.043}
    evaluation["systems"]["start"]["metrics"]["bits_per_byte"]["value"] = 1.415
    assert "answers rose by 6.0 % [4.3, 8.1], from 1.415 at the start to 1.500: the student is no" in fell(evaluation)
    evaluation["fall"] = {}
    assert fell(evaluation) == "The student needs 1.500 bits per byte of the teacher's held-out answers."


def test_markdown_tables_survive_bars() -> None:
    with pytest.raises(AssertionError, match="as wide as the heading"):
        markdown_table([["a", "b"], ["x", "1", "2"]])
    table = markdown_table([["a", "b"], ["x|y", "1"]])
    assert table.splitlines() == ["| a | b |", "| --- | ---: |", r"| x\|y | 1 |"]
