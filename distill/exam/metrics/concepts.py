"""How near own answers come to the teacher's in meaning: their words in the exam's concept space, and their triplets.

Both are measured in the exam's codebook, the same for all targets, and both have a chance level: the same number with
the teacher's answers to the other prompts in place of its answer to this one. Such spaces have a high floor.
Formulas and sources are in docs/metrics.md.

Shape legend: P prompts, T triplets of one answer, D = 512.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distill.exam.metrics.statistics import Ratio
from distill.exam.questions import Question
from distill.mining.inflect import STOP_WORDS
from distill.mining.triplets import Triplet, clean_phrase
from distill.tokens.concepts import words_of
from distill.tokens.image_tokens import Codebook

STEPS = 5
"""Triplets that are mined of an answer under each lens, at most."""
OTHERS = 50
"""Other prompts, drawn by the prompt's own seed, whose triplets stand for chance."""

Codes = NDArray[np.int64]
"""(T, 3): codes of what, action and result, no row twice."""


def concept_metrics(answers: Sequence[str], questions: Sequence[Question], codebook: Codebook) -> dict[str, Ratio]:
    """Concept similarity and triplet agreement, each with its chance level. Not defined where the teacher said nothing.

    Raises MissingDependency without a spaCy model, and what an embedding model's server raises (TeacherError) where
    the codebook was made with one.
    """
    theirs = [question.text for question in questions]
    own_vectors, their_vectors = np.split(text_vectors([*answers, *theirs], codebook), 2)
    prompts = [question.prompt for question in questions]
    own, teacher = mined_of(prompts, answers), mined_of(prompts, theirs)
    codes = coded([*own, *teacher], codebook)
    seeds = [question.seed(0, 0) for question in questions]
    return {
        **_similarity(own_vectors, their_vectors),
        **_agreement(codes[: len(own)], codes[len(own) :], seeds),
    }


# Concept similarity.


def text_vectors(texts: Sequence[str], codebook: Codebook) -> NDArray[np.float64]:
    """(P, D): the mean of the concept vectors of a text's content words, scaled to length 1; 0 where it has none.

    Content words are those that are no stop words, as often as they occur. Words rather than phrases: they need no
    parser, and no answer is left without a vector because nothing was mined from it.
    """
    counts = [Counter(word for word in words_of(text) if word not in STOP_WORDS) for text in texts]
    vocabulary = sorted({word for count in counts for word in count})
    place = {word: i for i, word in enumerate(vocabulary)}
    vectors = codebook.encoder.encode(vocabulary).astype(np.float64)
    means = np.zeros((len(texts), vectors.shape[1]))
    for row, count in zip(means, counts, strict=True):
        if count:
            weights = np.fromiter(count.values(), np.float64)
            row[:] = (vectors[[place[word] for word in count]] * weights[:, None]).sum(axis=0)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(lengths > 0, lengths, 1.0)


def _similarity(own: NDArray[np.float64], teacher: NDArray[np.float64]) -> dict[str, Ratio]:
    known = teacher.any(axis=1)
    others = known.sum() - known
    # Σ over the other prompts of a cosine is the cosine with their sum: vectors have length 1, or 0.
    by_chance = (own * (teacher.sum(axis=0) - teacher)).sum(axis=1)
    chance = np.where(known & (others > 0), by_chance / np.maximum(others, 1), np.nan)
    return {
        "concept_similarity": Ratio.of(np.where(known, (own * teacher).sum(axis=1), np.nan)),
        "concept_similarity_chance": Ratio.of(chance),
    }


# Triplet agreement.


def mined_of(prompts: Sequence[str], texts: Sequence[str]) -> list[list[Triplet]]:
    """Triplets of each text by the syntax miner, whoever mined for training: both sides are read alike.

    A text's last sentence counts even where it was cut. Raises MissingDependency without a spaCy model.
    """
    return [list(found) for found in _mined(tuple(zip(prompts, texts, strict=True)))]


@lru_cache(maxsize=4)  # the teacher's answers are the same for all targets
def _mined(pairs: tuple[tuple[str, str], ...]) -> list[list[Triplet]]:
    from distill.mining.syntax_miner import mine_texts  # spaCy takes seconds to import

    rows = ((str(i), prompt, text, "stop") for i, (prompt, text) in enumerate(pairs))
    return [found.triplets for found in mine_texts(rows, STEPS)]


def coded(mined: Sequence[Sequence[Triplet]], codebook: Codebook) -> list[Codes]:
    """Each text's triplets as codes, whatever their lens. A phrase of which the space knows nothing has a code of its
    own, below 0: it equals itself alone."""
    phrases = sorted({clean_phrase(phrase) for triplets in mined for t in triplets for phrase in t.phrases})
    place = {phrase: i for i, phrase in enumerate(phrases)}
    codes = -1 - np.arange(len(phrases))
    if phrases and len(codebook):
        vectors = codebook.encoder.encode(phrases)
        codes = np.where(vectors.any(axis=1), codebook.nearest(vectors), codes)
    found: list[Codes] = []
    for triplets in mined:
        rows = sorted({tuple(int(codes[place[clean_phrase(p)]]) for p in t.phrases) for t in triplets})
        found.append(np.array(rows, np.int64).reshape(-1, 3))
    return found


def soft_f1(own: Codes, teacher: Codes) -> float:
    """F1 of a soft match: two triplets match by the share of the three roles in which their codes are equal.

    Precision is the mean over own triplets of the best match, recall that over the teacher's. 0 where either is empty.
    """
    if not len(own) or not len(teacher):
        return 0.0
    match = (own[:, None] == teacher[None]).mean(axis=-1)
    precision, recall = float(match.max(axis=1).mean()), float(match.max(axis=0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _agreement(own: Sequence[Codes], teacher: Sequence[Codes], seeds: Sequence[int]) -> dict[str, Ratio]:
    known = [i for i, codes in enumerate(teacher) if len(codes)]
    agreed, by_chance = np.full(len(own), np.nan), np.full(len(own), np.nan)
    for i in known:
        agreed[i] = soft_f1(own[i], teacher[i])
        others = [j for j in known if j != i]
        if len(others) > OTHERS:
            others = np.random.default_rng(seeds[i]).choice(others, OTHERS, replace=False).tolist()
        if others:
            by_chance[i] = np.mean([soft_f1(own[i], teacher[j]) for j in others])
    return {"triplet_agreement": Ratio.of(agreed), "triplet_agreement_chance": Ratio.of(by_chance)}
