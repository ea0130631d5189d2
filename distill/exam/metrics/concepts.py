"""How near own answers come to the teacher's in meaning: their words in the exam's concept space.

Measured in the exam's codebook, the same for all targets, with a chance level: the same with the teacher's answers to
the other prompts in place of its answer to this one. Such spaces have a high floor. Formulas are in docs/metrics.md.

Shape legend: P prompts, D = 512.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill.exam.metrics.statistics import Ratio
from distill.mining.inflect import STOP_WORDS
from distill.tokens.concepts import words_of
from distill.tokens.image_tokens import Codebook


def concept_metrics(answers: Sequence[str], references: Sequence[str], codebook: Codebook) -> dict[str, Ratio]:
    """Concept similarity and its chance level. Not defined where the teacher said nothing.

    Raises what an embedding model's server raises (TeacherError) where the codebook was made with one.
    """
    own, teacher = np.split(text_vectors([*answers, *references], codebook), 2)
    known = teacher.any(axis=1)
    others = known.sum() - known
    # Σ over the other prompts of a cosine is the cosine with their sum: vectors have length 1, or 0.
    by_chance = (own * (teacher.sum(axis=0) - teacher)).sum(axis=1)
    chance = np.where(known & (others > 0), by_chance / np.maximum(others, 1), np.nan)
    return {
        "concept_similarity": Ratio.of(np.where(known, (own * teacher).sum(axis=1), np.nan)),
        "concept_similarity_chance": Ratio.of(chance),
    }


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
