"""Expected calibration error against loops in Python over every token, and cases known by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.exam.examinees.protocol import AnswerScore
from distill.exam.metrics.calibration import BINS, calibration_bins, calibration_error

Token = tuple[float, bool]
"""Confidence, and whether it was right."""


def score_of(tokens: list[Token]) -> AnswerScore:
    score = AnswerScore.unknown(len(tokens))
    score.confidence[:] = [confidence for confidence, _ in tokens]
    score.correct[:] = [right for _, right in tokens]
    return score


def brute_error(tokens: list[Token]) -> float:
    """Guo et al. 2017, equation 3: Σ_m |B_m| / n · |acc(B_m) − conf(B_m)| over 15 bins ((m − 1)/15, m/15]."""
    total = 0.0
    for m in range(1, 16):
        inside = [
            (confidence, right)
            for confidence, right in tokens
            if (m - 1) / 15 < confidence <= m / 15 or (m == 1 and confidence == 0)
        ]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = math.fsum(confidence for confidence, _ in inside) / len(inside)
            total += len(inside) / len(tokens) * abs(accuracy - confidence)
    return total


tokens = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30)


@given(st.lists(tokens, min_size=1, max_size=6))
def test_error_equals_its_definition_over_all_tokens(answers: list[list[Token]]) -> None:
    ratio = calibration_error(np.stack([calibration_bins(score_of(answer)) for answer in answers]))
    everything = [token for answer in answers for token in answer]
    assert ratio.defined == bool(everything)
    if everything:
        assert ratio.value == pytest.approx(brute_error(everything), abs=1e-12)
    assert ratio.denominator.tolist() == [len(answer) for answer in answers]


def test_bins_hold_their_upper_edge() -> None:
    edges = [float(Fraction(m, BINS)) for m in range(BINS + 1)]
    counts = calibration_bins(score_of([(edge, True) for edge in edges]))[:, 0]
    assert counts.tolist() == [2, *[1] * (BINS - 1)]  # 0 is in the first, too
    above = calibration_bins(score_of([(math.nextafter(edge, 1), True) for edge in edges[:-1]]))[:, 0]
    assert above.tolist() == [1] * BINS


def test_known_cases() -> None:
    sure_and_right = calibration_bins(score_of([(1.0, True)] * 4))
    sure_and_wrong = calibration_bins(score_of([(1.0, False)] * 4))
    assert calibration_error(sure_and_right[None]).value == 0
    assert calibration_error(sure_and_wrong[None]).value == 1
    # Three of four right at 75 %: as sure as it is right, though no single token shows it.
    fair = calibration_bins(score_of([(0.75, True), (0.75, True), (0.75, True), (0.75, False)]))
    assert calibration_error(fair[None]).value == pytest.approx(0)
    # 80 % sure and always wrong, but only for half of the tokens.
    assert calibration_error(np.stack([fair, calibration_bins(score_of([(0.8, False)] * 4))])).value == pytest.approx(
        0.4
    )


def test_errors_of_two_prompts_cancel_within_a_bin() -> None:
    """The error is of all tokens together, not a mean of prompts' own errors."""
    under, over = (calibration_bins(score_of([(0.5, right)])) for right in (True, False))
    assert calibration_error(under[None]).value == 0.5
    assert calibration_error(np.stack([under, over])).value == 0


def test_what_a_target_cannot_tell_is_left_out() -> None:
    score = score_of([(0.9, True), (math.nan, True), (0.4, False)])
    score.correct[2] = math.nan
    assert calibration_bins(score).sum(axis=0).tolist() == [1, 0.9, 1]
    nothing = calibration_error(calibration_bins(AnswerScore.unknown(5))[None])
    assert not nothing.defined
    both = calibration_error(np.stack([calibration_bins(score), calibration_bins(AnswerScore.unknown(5))]))
    assert both.value == pytest.approx(0.1)
