"""Is a target as sure as it is right? Expected calibration error of its next token (Guo et al. 2017).

At each token of the teacher's answer, confidence is the probability of the target's likeliest token, and it is right
where that token is the one in the answer. Formula, bias and sources are in docs/metrics.md.
"""

import numpy as np
from numpy.typing import NDArray

from distill.exam.examinees.protocol import AnswerScore
from distill.exam.metrics.statistics import Ratio

BINS = 15
"""Of equal width; each holds its upper edge, the first holds 0, too."""

_EDGES = np.arange(BINS + 1) / BINS


def calibration_bins(score: AnswerScore) -> NDArray[np.float64]:
    """(BINS, 3): tokens in each bin of confidence, Σ confidence, Σ correct. Tokens with NaN in either are left out.

    Bins of several scores of one question (its dreams) may be added up.
    """
    known = ~(np.isnan(score.confidence) | np.isnan(score.correct))
    confidence, correct = score.confidence[known], score.correct[known]
    place = np.clip(np.searchsorted(_EDGES, confidence, side="left") - 1, 0, BINS - 1)
    sums = [np.bincount(place, weights, BINS) for weights in (None, confidence, correct)]
    return np.stack(sums, axis=1).astype(np.float64)


def calibration_error(bins: NDArray[np.float64]) -> Ratio:
    """(P, BINS, 3) → Σ_bins |Σ confidence − Σ correct| / Σ tokens, both sums over prompts.

    As a sum over prompts: each bin's sign is that of all of them. A part of the prompts would have other signs, so
    there is no interval of it and no difference.
    """
    gaps = bins[:, :, 1] - bins[:, :, 2]
    return Ratio.of(gaps @ np.sign(gaps.sum(axis=0)), bins[:, :, 0].sum(axis=1))
