"""Concept similarity against loops over words, pairs and prompts, and by what it means."""

import math
import re

import numpy as np
import pytest

from distill.exam.metrics.concepts import concept_metrics, text_vectors
from distill.exam.questions import Question
from distill.mining.inflect import STOP_WORDS
from distill.mining.syntax_miner import mine_texts
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
    found = concept_metrics(ANSWERS, TEXTS, codebook)
    own, teacher = ([brute_vector(text, codebook) for text in texts] for texts in (ANSWERS, TEXTS))
    known = range(5)  # the last of the teacher's answers has no content word
    similar, chance = found["concept_similarity"], found["concept_similarity_chance"]
    assert similar.denominator.tolist() == chance.denominator.tolist() == [1] * 5 + [0]
    assert similar.numerator[:5].tolist() == pytest.approx([brute_cosine(own[i], teacher[i]) for i in known], abs=1e-6)
    by_chance = [np.mean([brute_cosine(own[i], teacher[j]) for j in known if j != i]) for i in known]
    assert chance.numerator[:5].tolist() == pytest.approx(by_chance, abs=1e-6)
    assert similar.numerator[2] == 0


def test_what_the_teacher_said_is_most_similar(codebook: Codebook) -> None:
    same = concept_metrics(TEXTS, TEXTS, codebook)
    assert same["concept_similarity"].value == pytest.approx(1)
    near = concept_metrics(ANSWERS, TEXTS, codebook)
    assert near["concept_similarity_chance"].value < near["concept_similarity"].value < 1
    # Answers to other questions are as near as chance says: each in turn for each is chance itself.
    turns = [concept_metrics(TEXTS[i:5] + TEXTS[:i], TEXTS[:5], codebook) for i in range(1, 5)]
    others = np.mean([turn["concept_similarity"].value for turn in turns])
    assert same["concept_similarity_chance"].value == pytest.approx(others, abs=1e-6)


def test_order_and_stop_words_make_no_difference_to_a_vector(codebook: Codebook) -> None:
    one, other, none = text_vectors(["The ball hits the FLOOR", "floor: ball, and it hits", "of the"], codebook)
    np.testing.assert_allclose(one, other, atol=1e-12)
    assert math.hypot(*one) == pytest.approx(1)
    assert not none.any()


def test_an_empty_codebook_defines_nothing() -> None:
    empty = build_codebook([], size=8)[0]
    found = concept_metrics(ANSWERS, TEXTS, empty)
    assert not found["concept_similarity"].defined


def test_a_single_prompt_has_no_chance_level(codebook: Codebook) -> None:
    found = concept_metrics(ANSWERS[:1], TEXTS[:1], codebook)
    assert found["concept_similarity"].defined
    assert not found["concept_similarity_chance"].defined
