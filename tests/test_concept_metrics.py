"""Concept similarity and triplet agreement against loops over words, pairs and prompts, and by what they mean."""

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.exam.metrics import concepts as module
from distill.exam.metrics.concepts import coded, concept_metrics, mined_of, soft_f1, text_vectors
from distill.exam.metrics.statistics import Ratio
from distill.exam.questions import Question
from distill.mining.inflect import STOP_WORDS
from distill.mining.syntax_miner import mine_texts
from distill.mining.triplets import Triplet
from distill.tokens.image_tokens import Codebook, build_codebook

SAID = {
    "What happens when you drop a ball?": "The ball falls to the floor and bounces. Gravity pulls the ball down.",
    "What happens when ice lies in the sun?": "The sun warms the ice. The ice melts into water.",
    "What happens when you water a plant?": "The plant takes water with its roots. The plant grows new leaves.",
    "What happens when a cup falls?": "The cup hits the floor. The cup breaks into pieces.",
    "What happens if it rains all night?": "Rain wets the street. The river rises and floods the meadow.",
    "Say nothing of it.": "Of it.",
}
QUESTIONS = [Question(f"{i}", prompt, text=text) for i, (prompt, text) in enumerate(SAID.items())]
TEXTS = [question.text for question in QUESTIONS]


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    rows = ((question.key, question.prompt, question.text, "stop") for question in QUESTIONS)
    triplets = [triplet for mined in mine_texts(rows, 5) for triplet in mined.triplets]
    assert len(triplets) > 8
    return build_codebook(triplets, size=24, texts=[*SAID, *TEXTS])[0]


def brute_vector(text: str, codebook: Codebook) -> list[float]:
    """Word by word: its vector, encoded alone, added up."""
    total = [0.0] * 512
    for word in re.split(r"[^a-z']+", text.lower()):
        if word and word not in STOP_WORDS:
            for place, value in enumerate(codebook.encoder.encode([word])[0].tolist()):
                total[place] += value
    return total


def brute_cosine(one: list[float], other: list[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


ANSWERS = [
    "A ball falls down and rolls over the floor.",
    "Ice melts in the warm sun.",
    "Of that, and so on.",  # stop words alone
    "The cup breaks on the floor, and the floor is wet.",
    "Fish swim.",
    "The ball falls.",
]


def test_similarity_equals_cosines_word_by_word(codebook: Codebook) -> None:
    found = concept_metrics(ANSWERS, QUESTIONS, codebook)
    own, teacher = ([brute_vector(text, codebook) for text in texts] for texts in (ANSWERS, TEXTS))
    known = range(5)  # the last of the teacher's answers has no content word
    similar, chance = found["concept_similarity"], found["concept_similarity_chance"]
    assert similar.denominator.tolist() == chance.denominator.tolist() == [1] * 5 + [0]
    assert similar.numerator[:5].tolist() == pytest.approx([brute_cosine(own[i], teacher[i]) for i in known], abs=1e-6)
    by_chance = [np.mean([brute_cosine(own[i], teacher[j]) for j in known if j != i]) for i in known]
    assert chance.numerator[:5].tolist() == pytest.approx(by_chance, abs=1e-6)
    assert similar.numerator[2] == 0


def test_what_the_teacher_said_is_most_similar(codebook: Codebook) -> None:
    same = concept_metrics(TEXTS, QUESTIONS, codebook)
    assert same["concept_similarity"].value == pytest.approx(1)
    assert same["triplet_agreement"].value == 1
    near = concept_metrics(ANSWERS, QUESTIONS, codebook)
    assert near["concept_similarity_chance"].value < near["concept_similarity"].value < 1
    assert near["triplet_agreement_chance"].value < near["triplet_agreement"].value < 1
    # Answers to other questions are as near as chance says: each in turn for each is chance itself.
    turns = [concept_metrics(TEXTS[i:5] + TEXTS[:i], QUESTIONS[:5], codebook) for i in range(1, 5)]
    for name in ("concept_similarity", "triplet_agreement"):
        others = np.mean([turn[name].value for turn in turns])
        assert same[f"{name}_chance"].value == pytest.approx(others, abs=1e-6)


def test_order_and_stop_words_make_no_difference_to_a_vector(codebook: Codebook) -> None:
    one, other, none = text_vectors(["The ball hits the FLOOR", "floor: ball, and it hits", "of the"], codebook)
    np.testing.assert_allclose(one, other, atol=1e-12)
    assert math.hypot(*one) == pytest.approx(1)
    assert not none.any()


# Triplets.


def phrases(mined: list[Triplet]) -> set[tuple[str, str, str]]:
    return {triplet.phrases for triplet in mined}


def brute_f1(own: set[Any], teacher: set[Any]) -> Fraction:
    """Each triplet's best match on the other side, in thirds; precision and recall; their harmonic mean."""
    if not own or not teacher:
        return Fraction(0)

    def best(one: Any, others: set[Any]) -> Fraction:
        return max(Fraction(sum(a == b for a, b in zip(one, other, strict=True)), 3) for other in others)

    precision = sum((best(one, teacher) for one in own), Fraction(0)) / len(own)
    recall = sum((best(one, own) for one in teacher), Fraction(0)) / len(teacher)
    return 2 * precision * recall / (precision + recall) if precision + recall else Fraction(0)


triples = st.sets(st.tuples(*(st.integers(0, 3) for _ in range(3))), max_size=8)


@given(triples, triples)
def test_soft_f1_equals_its_definition(own: set[tuple[int, int, int]], teacher: set[tuple[int, int, int]]) -> None:
    rows = [np.array(sorted(codes), np.int64).reshape(-1, 3) for codes in (own, teacher)]
    assert soft_f1(rows[0], rows[1]) == pytest.approx(float(brute_f1(own, teacher)), abs=1e-12)
    assert soft_f1(rows[0], rows[1]) == soft_f1(rows[1], rows[0])


def test_soft_f1_by_hand() -> None:
    teacher = np.array([[1, 2, 3], [4, 5, 6]])
    assert soft_f1(teacher, teacher) == 1
    assert soft_f1(np.array([[1, 2, 9]]), teacher) == pytest.approx(2 * (2 / 3) * (1 / 3) / (2 / 3 + 1 / 3))
    assert soft_f1(np.array([[3, 1, 2]]), teacher) == 0  # the same codes in other roles


def test_agreement_equals_mining_and_matching_one_by_one(codebook: Codebook) -> None:
    def code(phrase: str) -> int | str:
        known = codebook.encoder.encode([phrase]).any()
        return int(codebook.encode([phrase])[0]) if known else phrase

    def codes(prompt: str, text: str) -> set[tuple[int | str, ...]]:
        (mined,) = mine_texts([("k", prompt, text, "stop")], 5)
        return {tuple(code(phrase) for phrase in triple) for triple in phrases(mined.triplets)}

    own = [codes(question.prompt, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    teacher = [codes(question.prompt, question.text) for question in QUESTIONS]
    assert [bool(found) for found in teacher] == [True] * 5 + [False]
    assert not own[2]
    want = [float(brute_f1(own[i], teacher[i])) for i in range(5)]
    chance = [float(np.mean([float(brute_f1(own[i], teacher[j])) for j in range(5) if j != i])) for i in range(5)]
    found = concept_metrics(ANSWERS, QUESTIONS, codebook)
    for name, values in {"triplet_agreement": want, "triplet_agreement_chance": chance}.items():
        # Where the teacher's answer holds no triplet nothing is known; where only ours holds none it is a miss.
        assert found[name].denominator.tolist() == [1] * 5 + [0]
        assert found[name].numerator.tolist() == pytest.approx([*values, 0], abs=1e-12)


def test_chance_of_many_prompts_is_drawn_the_same_each_time(
    codebook: Codebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = concept_metrics(ANSWERS[:5], QUESTIONS[:5], codebook)["triplet_agreement_chance"]
    monkeypatch.setattr(module, "OTHERS", 2)
    draws = [concept_metrics(ANSWERS[:5], QUESTIONS[:5], codebook)["triplet_agreement_chance"] for _ in range(2)]
    assert draws[0].numerator.tolist() == draws[1].numerator.tolist()
    assert draws[0].numerator.tolist() != whole.numerator.tolist()
    assert draws[0].value == pytest.approx(whole.value, abs=0.15)


def test_both_sides_are_mined_alike() -> None:
    prompt, text = next(iter(SAID.items()))
    (cut,) = mined_of([prompt], [text[:-6]])
    (whole,) = mined_of([prompt], [text])
    assert any(t.what.endswith("ball") and t.result.endswith("floor") for t in whole)
    assert phrases(cut) & phrases(whole)
    assert mined_of([prompt], [""]) == [[]]


def test_phrases_that_the_space_does_not_know_equal_themselves_alone(codebook: Codebook) -> None:
    def triplet(*phrase: str) -> Triplet:
        return Triplet(*phrase, "causal", 0, "k", 0, "syntax")

    strange = [triplet("ξψω", "ζζζ", "the floor")], [triplet("ξψω", "ққққ", "the floor")]
    one, other = coded(strange, codebook)
    assert (one < 0).tolist() == [[True, True, False]]
    assert (one == other).tolist() == [[True, False, True]]


def test_an_empty_codebook_defines_nothing() -> None:
    empty = build_codebook([], size=8)[0]
    found = concept_metrics(ANSWERS, QUESTIONS, empty)
    assert not found["concept_similarity"].defined
    assert isinstance(found["triplet_agreement"], Ratio)


def test_a_single_prompt_has_no_chance_level(codebook: Codebook) -> None:
    found = concept_metrics(ANSWERS[:1], QUESTIONS[:1], codebook)
    assert found["concept_similarity"].defined
    assert not found["concept_similarity_chance"].defined
    assert not found["triplet_agreement_chance"].defined
