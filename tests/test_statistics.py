"""Intervals: what they are of, by brute force, and how often they hold the truth in simulated evaluations."""

import numpy as np
import pytest

from distill.evaluation.statistics import HierarchicalBootstrap, PairedBootstrap, Ratio, paired

# Metrics with parts.


def bins_of(generator: np.random.Generator, prompts: int, parts: int = 4) -> Ratio:
    """A calibration error: sums of confidence − correct in each bin, and tokens."""
    return Ratio.of(generator.normal(0, 3, (prompts, parts)), generator.integers(5, 30, prompts))


def test_ratio_with_parts_sums_what_each_part_comes_to() -> None:
    ratio = Ratio.of([[1.0, -2.0], [-3.0, -1.0], [np.nan, 5.0]], [4.0, 4.0, 9.0])
    assert ratio.value == (abs(1 - 3) + abs(-2 - 1)) / 8
    assert ratio.numerator.tolist() == [[1, -2], [-3, -1], [0, 0]]
    assert ratio.denominator.tolist() == [4, 4, 0]
    assert not Ratio.of([[np.nan, 1.0]]).defined
    assert ratio.within(np.array([True, False, True])).value == 3 / 4


def test_bootstrap_of_parts_equals_resampling_by_hand() -> None:
    ratio = bins_of(np.random.default_rng(0), 12)
    bootstrap = PairedBootstrap(12, 50, 1)
    for weights, draw in zip(bootstrap.weights, bootstrap.draws(ratio), strict=True):
        chosen = np.repeat(np.arange(12), weights.astype(int))
        brute = sum(abs(ratio.numerator[chosen, part].sum()) for part in range(4)) / ratio.denominator[chosen].sum()
        assert draw == pytest.approx(brute)
    seeds = HierarchicalBootstrap(2, 12, 50, 1).interval([ratio, bins_of(np.random.default_rng(1), 12)])
    assert seeds is not None
    assert seeds.seeds[0] == ratio.value


def test_paired_leaves_what_both_define() -> None:
    one, other = Ratio.of([1.0, np.nan, 3.0, 4.0], [1, 1, 0, 2]), bins_of(np.random.default_rng(0), 4)
    other = other.within(np.array([True, True, True, False]))
    a, b = paired(one, other)
    assert a.denominator.astype(bool).tolist() == b.denominator.astype(bool).tolist() == [True, False, False, False]
    assert (a.value, b.numerator[0].tolist()) == (1.0, other.numerator[0].tolist())
    assert not paired(one, one.within(np.zeros(4, bool)))[0].defined
