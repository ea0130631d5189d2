"""Metrics of text and of dreams against independent implementations: definitions spelled out, or known numbers."""

import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from distill.corpus.truth import Truth
from distill.exam.metrics.catalogue import METRICS, in_order, metric_of, shown
from distill.exam.metrics.dreams import chance_recalled, dream_metrics, labels_of, recalled
from distill.exam.metrics.text import chrf, distinct, exact_match, repeated, rouge_l, text_metrics
from distill.mining.triplets import LENSES

PACKAGE = RougeScorer(["rougeL"], use_stemmer=False)


def own_chrf(answer: str, reference: str, beta: float = 2.0) -> float:
    """chrF from its definition (Popović 2015): mean precision and recall over the orders that both texts have."""
    answer, reference = ("".join(text.split()) for text in (answer, reference))
    precisions, recalls = [], []
    for order in range(1, 7):
        a, r = (Counter(t[i : i + order] for i in range(len(t) - order + 1)) for t in (answer, reference))
        if not a or not r:
            continue
        same = sum((a & r).values())
        precisions.append(same / sum(a.values()))
        recalls.append(same / sum(r.values()))
    if not precisions:
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0


def ascii_words(text: str) -> list[str]:
    """Lin's words: runs of a–z and 0–9 after lower-casing, character by character."""
    found, word = [], ""
    for character in text.lower() + " ":
        if character in "abcdefghijklmnopqrstuvwxyz0123456789":
            word += character
        elif word:
            found.append(word)
            word = ""
    return found


def own_rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence, found by trying what to leave out (Lin 2004, equations 2 to 4, β = 1)."""
    a, r = ascii_words(answer), ascii_words(reference)
    known: dict[tuple[int, int], int] = {}

    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(r):
            return 0
        if (i, j) not in known:
            skip = max(longest(i + 1, j), longest(i, j + 1))
            known[i, j] = max(skip, 1 + longest(i + 1, j + 1)) if a[i] == r[j] else skip
        return known[i, j]

    common = longest(0, 0)
    return 2 * common / (len(a) + len(r)) if common else 0.0


some_text = st.text("abcd e.É", max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.text("abcd e", min_size=1, max_size=40), st.text("abcd e", min_size=1, max_size=40))
def test_chrf_equals_its_definition(answer: str, reference: str) -> None:
    assert chrf(answer, reference) == pytest.approx(own_chrf(answer, reference), abs=0.01)


@settings(max_examples=100, deadline=None)
@given(some_text, some_text)
def test_rouge_l_equals_its_definition(answer: str, reference: str) -> None:
    found = rouge_l(answer, reference)
    if ascii_words(reference):
        assert found == pytest.approx(own_rouge_l(answer, reference), abs=1e-12)
    else:
        assert math.isnan(found)


@settings(max_examples=100, deadline=None)
@given(st.text("ab c.É9-\n", max_size=60), st.text("ab c.É9-\n", max_size=60))
def test_rouge_l_is_that_of_its_package_to_the_last_digit(answer: str, reference: str) -> None:
    if ascii_words(reference):
        assert rouge_l(answer, reference) == PACKAGE.score(reference, answer)["rougeL"].fmeasure


REFERENCE = "When you release it, the ball falls to the floor and rolls under the table."
ANSWER = "The ball falls to the floor and bounces, then it rolls away."


def test_scores_of_real_text() -> None:
    assert chrf(ANSWER, REFERENCE) == pytest.approx(own_chrf(ANSWER, REFERENCE), abs=0.01)
    assert chrf(REFERENCE, REFERENCE) == pytest.approx(100)
    assert chrf("", REFERENCE) == 0
    # the ball falls to the floor and … rolls: 8 words of 12 and of 15.
    assert rouge_l(ANSWER, REFERENCE) == pytest.approx(2 * 8 / (12 + 15))
    assert rouge_l(REFERENCE.upper(), REFERENCE) == 1
    assert rouge_l("", REFERENCE) == 0
    # Lin's example 2004, section 3: S2 keeps the order of S1's words better than S3 does.
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)


def test_other_alphabets_have_no_rouge() -> None:
    assert math.isnan(rouge_l("雪花静静地落下。", "雪花静静地落下。"))
    assert math.isnan(rouge_l("It snows.", "Снег идёт"))
    found = text_metrics(["雪花", "snow"], ["雪花", "snow"])
    assert found["rouge_l"].denominator.tolist() == [0, 1]
    assert found["chrf"].value == pytest.approx(100)


def test_repetition_by_hand() -> None:
    # 4-grams of "a b c d a b c d": abcd bcda cdab dabc abcd: one of five was there before.
    assert repeated("a b c d A b c d") == (1, 5)
    assert repeated("a b c") == (0, 0)
    assert repeated(" ".join(["no"] * 10)) == (6, 7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=8).map(" ".join), max_size=6), st.integers(1, 3))
def test_distinct_shares_add_up_to_the_distinct_ngrams(texts: list[str], order: int) -> None:
    shares, totals = distinct(texts, order)
    rows = [[tuple(text.split()[i : i + order]) for i in range(len(text.split()) - order + 1)] for text in texts]
    assert math.fsum(shares) == pytest.approx(len({gram for row in rows for gram in row}))
    assert totals == [len(row) for row in rows]


def test_all_text_metrics_of_some_answers() -> None:
    answers, references = ["a b a b", "", "c d", "e"], ["a b a b", "f", "c d e f", ""]
    found = text_metrics(answers, references)
    assert found["chrf"].numerator.tolist() == pytest.approx(
        [own_chrf(a, r) if r else 0 for a, r in zip(answers, references, strict=True)], abs=0.01
    )
    assert found["chrf"].denominator.tolist() == [1, 1, 1, 0]
    assert found["rouge_l"].value == pytest.approx((1 + 0 + 2 * 2 / 6) / 3)
    assert found["length_ratio"].value == pytest.approx((7 + 0 + 3) / (7 + 1 + 7))
    assert found["distinct_1"].value == pytest.approx(5 / 7)
    assert found["distinct_2"].value == pytest.approx(3 / 4)
    assert found["repetition"].value == 0
    alone = text_metrics(answers)
    assert set(alone) == {"repetition", "distinct_1", "distinct_2"}
    assert all(np.array_equal(alone[name].numerator, found[name].numerator) for name in alone)
    assert set(found) <= set(METRICS)


def test_exact_match_by_split() -> None:
    truths = [Truth("near", "it breaks", 1), Truth("far", "it melts", 2), None, Truth("far", "it burns", 3)]
    questions = [SimpleNamespace(truth=truth) for truth in truths]
    found = exact_match([" it  breaks\n", "it melts.", "it melts", "it burns"], questions)
    assert {name: ratio.value for name, ratio in found.items()} == pytest.approx(
        {"exact_match": 2 / 3, "exact_match_far": 0.5, "exact_match_near": 1.0}
    )
    assert found["exact_match_far"].denominator.tolist() == [0, 1, 0, 1]


def test_scores_cost_nothing_before_they_are_wanted() -> None:
    code = (
        "import sys, distill.exam.metrics.text as text; loaded = {'nltk', 'rouge_score', 'sacrebleu'}\n"
        "print(loaded & set(sys.modules)); text.rouge_l('a b', 'a'); print(loaded & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.stdout.split("\n")[:2] == ["set()", "{'rouge_score'}"], done.stderr


# Dreams.


def test_recall_and_its_chance_level() -> None:
    assert recalled([1, 1, 2, 9], [1, 2, 2, 3]) == (2, 3)
    assert recalled([], [4]) == (0, 1)
    generator = np.random.default_rng(0)
    own = [generator.integers(0, 12, 5).tolist() for _ in range(7)]
    mined = [generator.integers(0, 12, 5).tolist() for _ in range(7)]
    brute = [np.mean([len(set(own[j]) & set(mined[i])) for j in range(7) if j != i]) for i in range(7)]
    np.testing.assert_allclose(chance_recalled(own, mined), brute)
    assert math.isnan(chance_recalled([[1]], [[1]])[0])


def printed(chains: dict[str, list[str]]) -> str:
    return "".join(f"⟨{lens}⟩" + "".join(f"⟨{label}⟩" for label in chains.get(lens, [])) for lens in LENSES)


labels = st.text("ab é'", min_size=1, max_size=4).filter(lambda label: label not in LENSES)


@given(st.dictionaries(st.sampled_from(LENSES), st.lists(labels, max_size=7)))
def test_dreams_are_read_as_they_are_printed(chains: dict[str, list[str]]) -> None:
    text = printed(chains)
    assert labels_of(text) == [label for lens in LENSES for label in chains.get(lens, [])]


def test_all_dream_metrics_of_some_dreams() -> None:
    whole = {"spatial": ["a ball", "release", "falls"], "causal": ["a ball", "hits", "the floor"]}
    dreams = [printed(whole), printed({"spatial": ["a cup"]}), "⟨spatial⟩⟨a ball⟩", ""]
    mined = [["a ball", "falls", "rolls"], ["a cup", "falls"], [], ["a ball"]]
    found = dream_metrics(dreams, mined)
    assert found["dream_recall"].value == pytest.approx((2 + 1 + 0) / (3 + 2 + 1))
    assert found["dream_precision"].value == pytest.approx((2 + 1) / (5 + 1))  # where nothing was mined: not known
    # For the first: "a ball" is in one other dream; for the second: "falls" in one; for the last: "a ball" in two.
    assert found["dream_recall_chance"].value == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 6)
    assert set(dream_metrics(dreams, None)) == {"tokens_dreamed"}
    assert set(found) <= set(METRICS)


# How they are shown.


def test_numbers_are_shown_with_their_unit() -> None:
    assert shown(0.1234, METRICS["agreement"]) == "12.3 %"
    assert shown(-0.0214, METRICS["bits_per_byte"], "+") == "-0.021"
    assert shown(0.5, METRICS["exact_match"], "+") == "+50.0 %"
    assert shown(41.26, METRICS["chrf"]) == "41.3"
    assert shown(None, METRICS["kl"]) == shown(math.nan, METRICS["kl"]) == "–"


def test_splits_of_exact_match_are_metrics() -> None:
    assert metric_of("exact_match_far").label == "exact match, far"
    assert metric_of("exact_match_far").percent
    assert metric_of("kl") is METRICS["kl"]
    assert metric_of("dream_form").label == "well-formed dreams", "results of old are still shown"
    assert in_order({"dream_form", "kl", "ended"}) == ["kl", "ended", "dream_form"]
    with pytest.raises(KeyError):
        metric_of("charm")
    names = {"chrf", "exact_match", "kl", "exact_match_far", "bits_per_byte", "exact_match_combination"}
    assert in_order(names) == [
        "exact_match",
        "exact_match_combination",
        "exact_match_far",
        "bits_per_byte",
        "kl",
        "chrf",
    ]


def test_every_metric_is_explained() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in page] == []
