"""Paired bootstrap intervals over prompts, and over training seeds and prompts.

Every metric here is a ratio of sums over prompts, Σ numerator / Σ denominator; a mean is one whose
denominators are 1. The prompts are drawn again with replacement (Efron & Tibshirani 1993, chapter 13) and
the percentile interval is taken. All systems and metrics share the same draws, so the difference between two
systems is paired: what makes a prompt hard cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri, ndtri

LEVEL = 0.95
"""Coverage that the intervals aim at."""


@dataclass(frozen=True)
class Ratio:
    """A metric before division. Denominators are (prompts,) float64; numerators are (prompts,) or (prompts, parts).

    Its value is Σ numerator / Σ denominator; with parts Σ_parts |Σ_prompts numerator| / Σ denominator, which is what an
    expected calibration error is (parts are bins, numerators Σ confidence − Σ correct). A prompt for which the metric
    is not defined has numerators and a denominator of 0.
    """

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]

    @classmethod
    def of(cls, numerator: ArrayLike, denominator: ArrayLike = 1.0) -> "Ratio":
        """From lists, numerators (prompts,) or (prompts, parts); NaN in any counts as not defined."""
        top = np.atleast_1d(np.asarray(numerator, np.float64))
        bottom = np.broadcast_to(np.asarray(denominator, np.float64), top.shape[:1])
        undefined = np.isnan(top).reshape(len(top), -1).any(axis=1) | np.isnan(bottom)
        return cls(top, bottom).within(~undefined)

    @property
    def defined(self) -> bool:
        return bool(self.denominator.sum() > 0)

    @property
    def value(self) -> float:
        top = self.numerator.sum(axis=0)
        return float((top if self.numerator.ndim == 1 else np.abs(top).sum()) / self.denominator.sum())

    def within(self, inside: NDArray[np.bool_]) -> "Ratio":
        """The metric over some of the prompts alone, (prompts,) bool; it is not defined for the others."""
        wide = inside if self.numerator.ndim == 1 else inside[:, None]
        return Ratio(np.where(wide, self.numerator, 0.0), np.where(inside, self.denominator, 0.0))


def paired(one: Ratio, other: Ratio) -> tuple[Ratio, Ratio]:
    """Both over the prompts for which both are defined: what is undefined in either is undefined in both."""
    both = (one.denominator != 0) & (other.denominator != 0)
    return one.within(both), other.within(both)


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
        return self._interval(metric.value, self.draws(metric)) if metric.defined else None

    def difference(self, metric: Ratio, other: Ratio) -> Interval | None:
        """Of metric − other."""
        if not (metric.defined and other.defined):
            return None
        return self._interval(metric.value - other.value, self.draws(metric) - self.draws(other))

    def fall(self, start: Ratio, end: Ratio) -> Interval | None:
        """Of 1 − end / start: by what share a metric fell."""
        if not (start.defined and end.defined and start.value > 0):
            return None
        return self._interval(1 - end.value / start.value, 1 - self.draws(end) / self.draws(start))

    def draws(self, metric: Ratio) -> NDArray[np.float64]:
        """The metric on every resample, (resamples,)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            # Summed by prompt, not by matrix product: BLAS may sum in another order next time.
            top = np.einsum("rp,p...->r...", self.weights, metric.numerator, optimize=False)
            bottom = np.einsum("rp,p->r", self.weights, metric.denominator, optimize=False)
            return (top if top.ndim == 1 else np.abs(top).sum(axis=1)) / bottom

    def _interval(self, value: float, draws: NDArray[np.float64]) -> Interval:
        return Interval(value, *_bounds(value, draws))


def _bounds(value: float, draws: NDArray[np.float64]) -> tuple[float, float]:
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return value, value
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class SeedInterval(Interval):
    """The mean over training seeds, its 95 % interval, and each seed's own value."""

    seeds: tuple[float, ...]


class HierarchicalBootstrap:
    """Intervals of the mean over S training seeds, all measured on the same prompts.

    Two levels. Prompts are drawn again with replacement, the same draws for all seeds. The seeds' mean is drawn from a
    normal distribution around itself, whose variance is drawn too: what the spread of S values says of it,
    spread / χ²(S − 1), less what the choice of prompts explains (a generalized pivotal quantity, Weerahandi 1993).
    Were the seeds resampled like the prompts, three of them would never leave their range: such intervals hold the
    truth in 77 to 99 % of simulated cases, these in 93 to 99 % (docs/evaluation.md). One seed: prompts only.
    """

    def __init__(self, seeds: int, prompts: int, resamples: int, seed: int) -> None:
        self._prompts = PairedBootstrap(prompts, resamples, seed)
        draw = np.random.default_rng([seed, seeds, resamples])
        # One draw from each of as many equal slices of the distribution: less noise in the tails.
        normal, chi = ((draw.permutation(resamples) + 0.5) / resamples for _ in range(2))
        self._normal: NDArray[np.float64] = ndtri(normal)
        self._chi: NDArray[np.float64] = chdtri(max(seeds - 1, 1), chi)

    def interval(self, metric: Sequence[Ratio]) -> SeedInterval | None:
        """Of one metric, a ratio a seed; None where it is defined for no prompt."""
        if not all(ratio.defined for ratio in metric):
            return None
        return self._interval([ratio.value for ratio in metric], self._draws(metric))

    def difference(self, metric: Sequence[Ratio], other: Sequence[Ratio]) -> SeedInterval | None:
        """Of metric − other, paired by seed and by prompt."""
        if not all(ratio.defined for ratio in [*metric, *other]):
            return None
        values = [one.value - two.value for one, two in zip(metric, other, strict=True)]
        return self._interval(values, self._draws(metric) - self._draws(other))

    def _draws(self, metric: Sequence[Ratio]) -> NDArray[np.float64]:
        """(resamples, S)."""
        return np.stack([self._prompts.draws(ratio) for ratio in metric], axis=1)

    def _interval(self, values: list[float], draws: NDArray[np.float64]) -> SeedInterval:
        """values (S,) on the prompts as they are; draws (resamples, S)."""
        mean, size = float(np.mean(values)), len(values)
        of_mean = draws.mean(axis=1)
        if size > 1:
            spread = np.square(np.asarray(values) - mean).sum()
            by_prompts = np.nanvar(draws - of_mean[:, None], axis=0).sum() / (size - 1)
            beyond = np.maximum(0.0, spread / self._chi - by_prompts)
            of_mean = of_mean + self._normal * np.sqrt(beyond / size)
        return SeedInterval(mean, *_bounds(mean, of_mean), tuple(values))
