"""Paired bootstrap intervals over prompts.

Every metric here is a ratio of sums over prompts, Σ numerator / Σ denominator; a mean is one whose
denominators are 1. The prompts are drawn again with replacement (Efron & Tibshirani 1993, chapter 13) and
the percentile interval is taken. All systems and metrics share the same draws, so the difference between two
systems is paired: what makes a prompt hard cancels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
"""Coverage that the intervals aim at."""


@dataclass(frozen=True)
class Ratio:
    """A metric before division: numerators and denominators, (prompts,) float64 each.

    A prompt for which the metric is not defined has a numerator and a denominator of 0.
    """

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]

    @classmethod
    def of(cls, numerator: ArrayLike, denominator: ArrayLike = 1.0) -> "Ratio":
        """From lists; NaN in either counts as not defined."""
        top, bottom = np.broadcast_arrays(
            np.atleast_1d(np.asarray(numerator, np.float64)), np.asarray(denominator, np.float64)
        )
        undefined = np.isnan(top) | np.isnan(bottom)
        return cls(np.where(undefined, 0.0, top), np.where(undefined, 0.0, bottom))

    @property
    def defined(self) -> bool:
        return bool(self.denominator.sum() > 0)

    @property
    def value(self) -> float:
        return float(self.numerator.sum() / self.denominator.sum())


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class PairedBootstrap:
    """The same resamples of `prompts` prompts for every metric; `seed` decides them."""

    def __init__(self, prompts: int, resamples: int, seed: int) -> None:
        generator = np.random.default_rng([seed, prompts, resamples])
        self.weights: NDArray[np.float64] = generator.multinomial(
            prompts, np.full(prompts, 1 / prompts), size=resamples
        ).astype(np.float64)
        """(resamples, prompts): how often each prompt was drawn."""

    def interval(self, metric: Ratio) -> Interval | None:
        """Of one metric; None where it is defined for no prompt."""
        return self._interval(metric.value, self._draws(metric)) if metric.defined else None

    def difference(self, metric: Ratio, other: Ratio) -> Interval | None:
        """Of metric − other."""
        if not (metric.defined and other.defined):
            return None
        return self._interval(metric.value - other.value, self._draws(metric) - self._draws(other))

    def fall(self, start: Ratio, end: Ratio) -> Interval | None:
        """Of 1 − end / start: by what share a metric fell."""
        if not (start.defined and end.defined and start.value > 0):
            return None
        return self._interval(1 - end.value / start.value, 1 - self._draws(end) / self._draws(start))

    def _draws(self, metric: Ratio) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            # Summed by prompt, not by matrix product: BLAS may sum in another order next time.
            top = np.einsum("rp,p->r", self.weights, metric.numerator, optimize=False)
            bottom = np.einsum("rp,p->r", self.weights, metric.denominator, optimize=False)
            return top / bottom

    def _interval(self, value: float, draws: NDArray[np.float64]) -> Interval:
        draws = draws[np.isfinite(draws)]
        if not len(draws):
            return Interval(value, value, value)
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(value, float(low), float(high))
