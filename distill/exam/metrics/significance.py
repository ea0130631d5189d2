"""Is a difference more than chance? Paired permutation tests over prompts, corrected for how many are made.

Were two systems alike, it would not matter which of them gave which result to a prompt: the results can be swapped
prompt by prompt, and every swap is as likely as what was observed (Fisher 1935, Pitman 1937). The p-value is the share
of swaps whose difference is at least as large. How often it is below 5 % without a difference is measured in
docs/statistics.md.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from distill.exam.metrics.statistics import Ratio, shared

BLOCK = 1_000
"""Swaps that are in memory at once."""


def permutation_test(a: Ratio, b: Ratio, permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a − b, over the prompts for which both are defined; 1 where there are none.

    A swap exchanges numerator and denominator of a prompt together, and the difference of the ratios is taken anew.
    Prompts on which both are the same are left out: swapping them changes nothing. Where 2^prompts ≤ permutations,
    all swaps are taken and p is exact; else as many are drawn, and p = (1 + as large) / (1 + drawn), which is never 0
    and never too small (Phipson & Smyth 2010).
    """
    a, b = shared([a, b])
    if not a.defined:
        return 1.0
    one, two = (np.stack([each.numerator, each.denominator], axis=1) for each in (a, b))
    differs = (one != two).any(axis=1)
    prompts, change = int(differs.sum()), (two - one)[differs]
    observed = abs(a.value - b.value)
    # Sums in another order differ in their last digits: what is equal but for those counts as equal.
    least = observed - 1e-9 * max(observed, 1e-3 * (abs(a.value) + abs(b.value)))
    extreme, exact = 0, 2.0**prompts <= permutations
    for swaps in _all(prompts) if exact else _drawn(prompts, permutations, seed):
        # Not by matrix product: BLAS may sum in another order next time.
        moved = np.einsum("rp,pk->rk", swaps, change, optimize=False)
        top, bottom = one.sum(axis=0) + moved, two.sum(axis=0) - moved
        extreme += int(np.count_nonzero(np.abs(top[:, 0] / top[:, 1] - bottom[:, 0] / bottom[:, 1]) >= least))
    return extreme / 2**prompts if exact else (1 + extreme) / (1 + permutations)


def _all(prompts: int) -> Iterator[NDArray[np.float64]]:
    """Every choice of prompts that are swapped, (block, prompts) of 0 and 1."""
    for start in range(0, 2**prompts, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, 2**prompts))
        yield ((numbers[:, None] >> np.arange(prompts)) & 1).astype(np.float64)


def _drawn(prompts: int, permutations: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Some of these, at random."""
    draw = np.random.default_rng([seed, prompts, permutations])
    for start in range(0, permutations, BLOCK):
        yield draw.integers(0, 2, (min(BLOCK, permutations - start), prompts), np.int8).astype(np.float64)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for how many there are, in their order; None is no test and stays None.

    The i-th least of m is multiplied by m − i + 1, and none is less than one before it: whichever differences are real,
    the chance that any other falls below 5 % is at most 5 % (Holm 1979).
    """
    tested = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    least = 0.0
    for rank, (value, i) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * value))
        corrected[i] = least
    return corrected
