"""A comparison's numbers against counting by hand, prompt by prompt."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.exam.examinees.protocol import Card
from distill.exam.measured import Measured
from distill.exam.metrics.significance import holm, permutation_test
from distill.exam.metrics.statistics import HierarchicalBootstrap, PairedBootstrap, Ratio, shared
from distill.exam.questions import Question
from distill.report.numbers import SHOWN, compare_numbers

PROMPTS = 30
KEYS = [f"{i:03d}" for i in range(PROMPTS)]
QUESTIONS = [Question(key, f"Why {key}?", text=f"Because {key}.") for key in KEYS]


def target(
    seed: int, shift: float = 0.0, size: int | None = 1_000, speed: float | None = 50.0, **more: Ratio
) -> Measured:
    draw = np.random.default_rng(seed)
    hard, lengths = np.random.default_rng(99).normal(0, 0.2, PROMPTS), np.arange(20.0, 20 + PROMPTS)
    chrf = np.where(np.arange(PROMPTS) % 10 == seed % 10, np.nan, 50 - 20 * shift + draw.normal(0, 5, PROMPTS))
    metrics = {
        "bits_per_byte": Ratio.of((1.5 + shift + hard + draw.normal(0, 0.05, PROMPTS)) * lengths, lengths),
        "chrf": Ratio.of(chrf),
        "length_ratio": Ratio.of(draw.integers(5, 50, PROMPTS), lengths),
        "dream_recall": Ratio.of(draw.random(PROMPTS)),
        "dream_recall_chance": Ratio.of(draw.random(PROMPTS)),
        **more,
    }
    return Measured(
        keys=KEYS,
        metrics=metrics,
        missing={},
        dreams=[f"⟨dream {seed}.{i}⟩" for i in range(PROMPTS)],
        answers=[f"answer {seed}.{i}" for i in range(PROMPTS)],
        left_out={},
        tokens_per_second=speed,
        card=Card("run", f"run-{seed}", 10, size, 256, "float32", True),
    )


def numbers(systems: dict[str, list[Measured]], **more: Any) -> dict[str, Any]:
    how: dict[str, Any] = {"resamples": 300, "permutations": 400, "seed": 3, "questions": QUESTIONS}
    found = compare_numbers(systems, "a", **how | more)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def one_of(found: dict[str, Any], system: str, metric: str) -> dict[str, Any]:
    (difference,) = [d for d in found["differences"] if (d["system"], d["metric"]) == (system, metric)]
    assert difference["against"] == "a"
    return difference


def test_values_differences_and_wins_are_as_by_hand() -> None:
    a, b = target(1), target(2, 0.1)
    found = numbers({"a": [a], "b": [b]})
    bootstrap = PairedBootstrap(PROMPTS, 300, 3)
    for name, ratio in b.metrics.items():
        entry = found["metrics"]["b"][name]
        interval = bootstrap.interval(ratio)
        assert interval is not None
        assert (entry["value"], entry["low"], entry["high"]) == (interval.value, interval.low, interval.high)
        assert (entry["seeds"], entry["prompts"]) == ([ratio.value], int((ratio.denominator > 0).sum()))
    for name, better in (("bits_per_byte", -1), ("chrf", 1), ("dream_recall", 1)):
        one, two = b.metrics[name], a.metrics[name]
        both = [i for i in range(PROMPTS) if one.denominator[i] and two.denominator[i]]
        gains = [better * (one.numerator[i] / one.denominator[i] - two.numerator[i] / two.denominator[i]) for i in both]
        difference = one_of(found, "b", name)
        drawn = HierarchicalBootstrap(1, PROMPTS, 300, 3).contrast(*([ratio] for ratio in shared([one, two])))
        assert drawn is not None
        interval = drawn[0]
        assert difference["prompts"] == len(both) == (24 if name == "chrf" else 30)
        assert (difference["wins"], difference["losses"]) == (sum(g > 0 for g in gains), sum(g < 0 for g in gains))
        assert difference["ties"] == 0
        values = [sum(r.numerator[both]) / sum(r.denominator[both]) for r in (one, two)]
        assert difference["value"] == pytest.approx(values[0] - values[1])
        assert (difference["low"], difference["high"]) == (interval.low, interval.high)
        assert difference["p"] == permutation_test(one, two, 400, 3)


def test_what_is_compared_and_what_is_tested() -> None:
    b = target(2, 0.1)
    del b.metrics["dream_recall"]
    found = numbers({"a": [target(1)], "b": [b], "c": [target(3)]})
    assert {(d["system"], d["metric"]) for d in found["differences"]} == {
        *((s, m) for s in "bc" for m in ("bits_per_byte", "chrf", "length_ratio")),
        ("c", "dream_recall"),
    }
    length = one_of(found, "b", "length_ratio")
    assert (length["p"], length["p_corrected"], length["wins"], length["ties"], length["losses"]) == (None,) * 5
    assert length["low"] < length["value"] < length["high"]
    # What leads is corrected for the systems alone, all else together.
    for leads, count in ((True, 2), (False, 3)):
        family = [d for d in found["differences"] if (d["metric"] == "bits_per_byte") is leads]
        assert [d["p_corrected"] for d in family] == holm([d["p"] for d in family])
        assert found["tests"]["count_leading" if leads else "count"] == count
    assert found["tests"]["leading"] == "bits_per_byte"
    assert (found["tests"]["permutations"], found["tests"]["bootstrap"], found["tests"]["correction"]) == (
        400,
        300,
        "Holm",
    )
    assert "permutation" in found["tests"]["method"]
    assert found == numbers({"a": [target(1)], "b": [b], "c": [target(3)]})


def test_equal_values_are_ties() -> None:
    right = Ratio.of(np.arange(PROMPTS) < 10), Ratio.of(np.arange(PROMPTS) % 2 == 0)
    found = numbers({"a": [target(1, exact_match=right[0])], "b": [target(1, exact_match=right[1])]})
    exact, bits = one_of(found, "b", "exact_match"), one_of(found, "b", "bits_per_byte")
    assert (exact["wins"], exact["ties"], exact["losses"]) == (10, 15, 5)
    assert (bits["wins"], bits["ties"], bits["losses"], bits["p"], bits["value"]) == (0, PROMPTS, 0, 1.0, 0.0)
    assert found["disagreements"][0]["metric"] == "exact_match"
    assert [shown["key"] for shown in found["disagreements"]] == [
        KEYS[i] for i in (*range(1, 10, 2), *range(10, 30, 2))
    ]


def test_seeds_are_averaged_and_need_not_be_as_many() -> None:
    groups = {"a": [target(s) for s in (1, 2, 3)], "b": [target(s, 0.3) for s in (4, 5)], "c": [target(6)]}
    found = numbers(groups)
    bits = [[m.metrics["bits_per_byte"] for m in groups[name]] for name in "ab"]
    assert found["metrics"]["a"]["bits_per_byte"]["seeds"] == [ratio.value for ratio in bits[0]]
    difference = one_of(found, "b", "bits_per_byte")
    assert difference["value"] == pytest.approx(
        np.mean([r.value for r in bits[1]]) - np.mean([r.value for r in bits[0]])
    )
    means = [np.mean([r.numerator / r.denominator for r in group], axis=0) for group in bits]
    assert difference["wins"] == (means[1] < means[0]).sum()
    assert difference["losses"] == (means[1] > means[0]).sum() > 25
    assert difference["p"] < 0.05
    assert one_of(found, "c", "bits_per_byte")["p"] > 0.05
    assert one_of(found, "b", "chrf")["prompts"] == PROMPTS - 15  # none of the five leaves it undefined
    assert "seeds" in found["tests"]["method"]
    assert "permutation" not in found["tests"]["method"]
    assert found["disagreements"][0]["systems"]["a"]["answer"].startswith("answer 1.")
    mixed = numbers({"a": [target(1)], "b": [target(2), target(3)], "c": [target(4)]})["tests"]["method"]
    assert "permutation" in mixed
    assert "seeds" in mixed


def test_disagreements_lie_furthest_apart(tmp_path: Path) -> None:
    systems = {"a": [target(1)], "b": [target(2, 0.1)], "c": [target(3)]}
    systems["c"][0].dreams, systems["c"][0].answers = [], []
    found = numbers(systems)["disagreements"]
    values = {name: (m := each[0].metrics["bits_per_byte"]).numerator / m.denominator for name, each in systems.items()}
    spread = {KEYS[i]: max(v[i] for v in values.values()) - min(v[i] for v in values.values()) for i in range(PROMPTS)}
    assert [shown["key"] for shown in found] == sorted(KEYS, key=lambda key: -spread[key])[:SHOWN]
    first = found[0]
    i = KEYS.index(first["key"])
    assert first["values"] == {name: value[i] for name, value in values.items()}
    assert (first["prompt"], first["teacher"]) == (QUESTIONS[i].prompt, QUESTIONS[i].text)
    assert first["systems"]["b"] == {"dream": f"⟨dream 2.{i}⟩", "answer": f"answer 2.{i}"}
    assert first["systems"]["c"] == {"dream": None, "answer": None}
    Image.new("RGB", (400, 200), "red").save(tmp_path / "red.png")
    shown = [
        replace(question, pictures=(tmp_path / "red.png",) * (place == i)) for place, question in enumerate(QUESTIONS)
    ]
    first, *others = numbers(systems, questions=shown)["disagreements"]
    with Image.open(io.BytesIO(base64.b64decode(first["pictures"][0]))) as small:
        assert (small.format, small.size) == ("JPEG", (192, 96))
    assert not any(other["pictures"] for other in others)


def test_what_is_asked_of_none_but_students_can_lead() -> None:
    right = Ratio.of(np.arange(PROMPTS) < 10), Ratio.of(np.arange(PROMPTS) % 2 == 0)
    student, hard, start = target(1, exact_match=right[0]), target(2, exact_match=right[1]), target(3, 0.5)
    start.dreams, start.answers = [], []
    teacher = replace(target(4), card=Card("teacher", "t", None, None, None, "", False))
    del teacher.metrics["bits_per_byte"]
    found = numbers({"a": [student], "hard": [hard], "start": [start], "teacher": [teacher]})
    assert (found["tests"]["leading"], found["tests"]["count_leading"]) == ("exact_match", 1)
    exact = one_of(found, "hard", "exact_match")
    assert exact["p"] == exact["p_corrected"]
    assert found["disagreements"][0]["values"].keys() == {"a", "hard"}
    assert found["disagreements"][0]["systems"]["teacher"]["answer"].startswith("answer 4.")
    # Alone with its start it can be compared in likelihoods.
    found = numbers({"a": [student], "start": [start], "teacher": [teacher]})
    assert found["tests"]["leading"] == "bits_per_byte"
    assert found["disagreements"][0]["values"].keys() == {"a", "start"}
    assert numbers({"a": [student]})["tests"]["leading"] == "exact_match"


def test_systems_that_share_no_leading_metric() -> None:
    a, b = target(1), target(2)
    for name in ("bits_per_byte", "chrf"):
        del b.metrics[name]
    found = numbers({"a": [a], "b": [b]})
    assert found["disagreements"] == []
    undefined = target(3, bits_per_byte=Ratio.of(np.full(PROMPTS, np.nan)))
    entries = numbers({"a": [a], "b": [undefined]})["metrics"]["b"]
    assert entries["bits_per_byte"] == {"value": None, "low": None, "high": None, "seeds": [], "prompts": 0}
    apart = target(4, chrf=Ratio.of(np.where(a.metrics["chrf"].denominator > 0, np.nan, 1.0)))
    nothing = one_of(numbers({"a": [a], "b": [apart]}), "b", "chrf")
    assert (nothing["prompts"], nothing["value"], nothing["low"], nothing["p"], nothing["wins"]) == (
        0,
        None,
        None,
        None,
        0,
    )


def test_values_side_by_side_are_of_the_same_prompts() -> None:
    """One system leaves out the hardest prompts: by its own value it would be the best."""
    a, b, c = target(1), target(2, 0.1), target(3)
    bits = b.metrics["bits_per_byte"]
    hard = bits.numerator / bits.denominator > np.median(bits.numerator / bits.denominator)
    b.metrics["bits_per_byte"] = bits.within(~hard)
    found = numbers({"a": [a], "b": [b], "c": [c]})
    values = {
        name: float(r.numerator[~hard].sum() / r.denominator[~hard].sum())
        for name, r in (("a", a.metrics["bits_per_byte"]), ("b", bits), ("c", c.metrics["bits_per_byte"]))
    }
    whole = {name: entry["bits_per_byte"]["value"] for name, entry in found["metrics"].items()}
    assert whole["b"] < whole["a"]
    assert values["b"] > values["a"]
    difference = one_of(found, "b", "bits_per_byte")
    assert difference["own"] == pytest.approx(values["b"])
    assert difference["other"] == pytest.approx(values["a"])
    assert difference["own"] - difference["other"] == pytest.approx(difference["value"])
    assert one_of(found, "c", "bits_per_byte")["other"] == pytest.approx(whole["a"])


def test_a_metric_that_repeats_another_is_tested_once() -> None:
    def dreams(seed: int, used: str) -> Measured:
        made = target(seed, bits_per_byte_dreams=target(seed + 50, 0.2).metrics["bits_per_byte"])
        made.metrics["bits_per_byte_used"] = made.metrics[used]
        return made

    dreamer, other = dreams(1, "bits_per_byte_dreams"), dreams(2, "bits_per_byte_dreams")
    silent = dreams(3, "bits_per_byte")
    found = numbers({"a": [dreamer], "b": [other], "c": [silent]})
    repeats = {(d["system"], d["metric"]): d["same_as"] for d in found["differences"] if d["same_as"]}
    assert repeats == {("b", "bits_per_byte_dreams"): "bits_per_byte_used"}
    repeated = one_of(found, "b", "bits_per_byte_dreams")
    assert (repeated["p"], repeated["p_corrected"]) == (None, None)
    assert repeated["value"] == one_of(found, "b", "bits_per_byte_used")["value"]
    assert found["tests"]["count_leading"] == 2
    assert found["tests"]["count"] == sum(d["p"] is not None for d in found["differences"]) - 2
    # Where true answers lead, bits per byte are still one and not two of the rest.
    right = Ratio.of(np.arange(PROMPTS) % 2)
    for each in (dreamer, other):
        each.metrics["exact_match"] = right
    led = numbers({"a": [dreamer], "b": [other]})
    assert led["tests"]["leading"] == "exact_match"
    assert one_of(led, "b", "bits_per_byte_used")["p"] is not None
    assert one_of(led, "b", "bits_per_byte_dreams")["same_as"] == "bits_per_byte_used"


def test_it_is_said_which_tests() -> None:
    one, two = [target(1)], [target(2), target(3)]
    for systems, kinds in (
        ({"a": one, "b": [target(4)]}, ["permutation"]),
        ({"a": one, "b": two}, ["bootstrap"]),
        ({"a": two, "b": one}, ["bootstrap"]),
        ({"a": one, "b": two, "c": [target(4)]}, ["permutation", "bootstrap"]),
    ):
        assert numbers(systems)["tests"]["kinds"] == kinds
