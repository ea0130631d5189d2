"""Does an answer follow its dream? Two answers to a prompt, each after the dream of another answer of the teacher's."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill.exam.metrics.concepts import text_vectors
from distill.exam.metrics.statistics import Ratio
from distill.exam.metrics.text import chrf
from distill.exam.questions import Question
from distill.tokens.image_tokens import Codebook


def steering(
    own: Sequence[str], others: Sequence[str], questions: Sequence[Question], codebook: Codebook | None
) -> dict[str, Ratio]:
    """How much closer an answer is to that of the teacher's two whose dream it was given than to the other.

    own, others: a target's answers after the dream mined from the question's answer, and from its sibling. Of a prompt,
    with s a similarity, a and a′ the target's two answers, y and y′ the teacher's:
    ½ (s(a, y) − s(a, y′) + s(a′, y′) − s(a′, y)). What makes y the easier one to come near cancels; a target that reads
    no dream has 0. Not defined where a question has no dream or no sibling. chrF in points, concepts in cosine; those
    need a codebook.
    """
    pairs = [(question.text, question.sibling.text if question.sibling else "") for question in questions]
    steered = np.array([bool(question.triplets and question.sibling) for question in questions])

    def ratio(near: NDArray[np.float64]) -> Ratio:
        """near (prompts, 2, 2): similarity of own and other answer to both of the teacher's."""
        moved = (near[:, 0, 0] - near[:, 0, 1] + near[:, 1, 1] - near[:, 1, 0]) / 2
        return Ratio.of(np.where(steered, moved, math.nan))

    answers = list(zip(own, others, strict=True))
    letters = [
        [[chrf(answer, text) if there else 0.0 for text in two] for answer in said]
        for said, two, there in zip(answers, pairs, steered, strict=True)
    ]
    metrics = {"steering_chrf": ratio(np.array(letters, np.float64))}
    if codebook is not None:
        texts = [text for each in (answers, pairs) for two in each for text in two]
        vectors = text_vectors(texts, codebook)
        said, wanted = np.split(vectors.reshape(2 * len(pairs), 2, -1), 2)
        metrics["steering_concepts"] = ratio(said @ wanted.transpose(0, 2, 1))
    return metrics
