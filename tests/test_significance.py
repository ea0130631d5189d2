"""Permutation tests against all permutations by hand, how often they err, and Holm's correction by hand."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from distill.exam.metrics.significance import holm, permutation_test
from distill.exam.metrics.statistics import Ratio


def brute(a: Ratio, b: Ratio) -> float:
    """Every swap of whole prompts, one at a time."""
    keep = [i for i in range(len(a.denominator)) if a.denominator[i] and b.denominator[i]]
    pairs = [((a.numerator[i], a.denominator[i]), (b.numerator[i], b.denominator[i])) for i in keep]

    def value(rows: list[tuple[np.ndarray, float]]) -> float:
        return float(np.abs(sum(np.atleast_1d(top) for top, _ in rows)).sum() / math.fsum(b for _, b in rows))

    def difference(swaps: tuple[bool, ...]) -> float:
        sides = [pair[::-1] if swap else pair for pair, swap in zip(pairs, swaps, strict=True)]
        return abs(value([one for one, _ in sides]) - value([two for _, two in sides]))

    observed = difference((False,) * len(pairs))
    found = [difference(swaps) >= observed - 1e-12 for swaps in itertools.product((False, True), repeat=len(pairs))]
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(4))
def test_all_swaps_are_as_by_hand(seed: int) -> None:
    draw = np.random.default_rng(seed)
    means = [Ratio.of(draw.gamma(2, size=8)) for _ in range(2)]
    ratios = [Ratio.of(draw.gamma(2, size=8), draw.integers(0, 4, 8)) for _ in range(2)]
    counts = [Ratio.of(draw.random(8) < 0.5) for _ in range(2)]
    for a, b in (means, ratios, counts):
        a = a.within(a.denominator > 0)
        b = b.within(b.denominator > 0)
        assert permutation_test(a, b, 256) == pytest.approx(brute(a, b))


def test_drawn_swaps_approach_all_of_them() -> None:
    draw = np.random.default_rng(3)
    a, b = (
        Ratio.of(draw.gamma(3, size=12), draw.gamma(4, size=12)),
        Ratio.of(draw.gamma(4, size=12), draw.gamma(4, size=12)),
    )
    exact = permutation_test(a, b, 2**12)
    drawn = permutation_test(a, b, 4_000)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4_000))
    assert drawn * 4_001 == pytest.approx(round(drawn * 4_001))
    assert drawn == permutation_test(a, b, 4_000) != permutation_test(a, b, 4_000, seed=1)
    assert drawn == permutation_test(b, a, 4_000)


def test_exact_matches_are_mcnemars_test() -> None:
    """Of 0 and 1, only prompts on which one alone is right tell anything: a binomial test of those."""
    a, b = np.repeat([1, 1, 0, 0], [3, 9, 2, 16]), np.repeat([1, 0, 1, 0], [3, 9, 2, 16])
    assert permutation_test(Ratio.of(a), Ratio.of(b), 2_048) == pytest.approx(binomtest(9, 11).pvalue)


def test_no_difference_at_all_and_nothing_to_compare() -> None:
    same = Ratio.of(np.arange(30.0), np.arange(1.0, 31))
    assert permutation_test(same, same) == 1.0
    assert permutation_test(Ratio.of([1.0, np.nan]), Ratio.of([np.nan, 1.0])) == 1.0


def test_p_is_never_0() -> None:
    a = Ratio.of(np.random.default_rng(0).normal(size=50))
    assert permutation_test(Ratio.of(a.numerator + 9), a, 99) == 1 / 100


def test_false_alarms_are_as_many_as_promised() -> None:
    """Systems that don't differ: p ≤ 0.05 in 4 to 6 % of cases. 1,500 are ± 0.6 by chance, hence the room for each.

    With 199 swaps p is a multiple of 1/200: p ≤ 0.05 is as often as p < 0.05 with many.
    """
    runs, shares = 1_500, list[float]()
    for prompts in (20, 64, 200):
        draw, alarms = np.random.default_rng([prompts, 5]), np.zeros(2)
        for number in range(runs):
            lengths, hard = np.exp(draw.normal(5, 0.8, prompts)), draw.normal(0, 0.4, prompts)
            rates = np.exp(hard + draw.normal(0, 0.2, (2, prompts)))
            bits = [Ratio.of(rate * lengths, lengths) for rate in rates]
            means = [Ratio.of(hard + draw.normal(0, 0.2, prompts)) for _ in range(2)]
            alarms += [permutation_test(*pair, 199, number) <= 0.05 for pair in (bits, means)]
        shares += (alarms / runs).tolist()
        print(f"\n{prompts} prompts: bits per byte {100 * shares[-2]:.1f} %, means {100 * shares[-1]:.1f} %", end="")
    assert 0.04 <= np.mean(shares) <= 0.06
    assert all(0.033 <= share <= 0.067 for share in shares)


def test_a_thousand_prompts_take_no_time() -> None:
    draw = np.random.default_rng(0)
    a, b = (Ratio.of(draw.gamma(2, size=1_000), draw.gamma(5, size=1_000)) for _ in range(2))
    start = time.process_time()
    assert 0 < permutation_test(a, b) < 1
    assert time.process_time() - start < 2  # 0.1 s where nothing else runs: 40 metrics are seconds


# Holm.


def test_holm_by_hand() -> None:
    """Four tests: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1 is lifted to what came before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.5]) == [1.0, None, 1.0]
    assert holm([]) == []


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_rejects_step_by_step(p: list[float | None]) -> None:
    """At every level it rejects what the step-down procedure does: the least p as long as p ≤ level / tests left."""
    corrected = holm(p)
    tested = sorted((value, i) for i, value in enumerate(p) if value is not None)
    for level in (0.013, 0.05, 0.4):
        rejected = set[int]()
        for rank, (value, i) in enumerate(tested):
            if (len(tested) - rank) * value > level:
                break
            rejected.add(i)
        assert {i for i, value in enumerate(corrected) if value is not None and value <= level} == rejected
    assert [value is None for value in corrected] == [value is None for value in p]
