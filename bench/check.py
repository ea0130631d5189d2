"""Is a benchmark's result worse than a saved one, beyond noise?"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from bench.result import BenchResult, Series
from distill.errors import BadInput

Verdict = Literal["worse", "better", "same", "unsure"]


@dataclass(frozen=True)
class Change:
    """One series, saved and now.

    worse: by what share of the saved median the new one is worse; negative where it is better. verdict: "worse" and
    "better" are past the threshold with intervals apart; "unsure" is past it with intervals that overlap, or with one
    value alone on a side: that tells no noise.
    """

    name: str
    unit: str
    saved: float
    now: float
    worse: float
    verdict: Verdict


def check(now: BenchResult, saved: BenchResult, threshold: float, source: str = "the saved result") -> list[Change]:
    """Of the series that both have, by name and setting. Raises BadInput where nothing can be compared."""
    if other := differing(saved.settings, now.settings):
        raise BadInput(f"{source}: measured with other settings ({other}); nothing to compare")
    before, after = ({series.key: series for series in result.series} for result in (saved, now))
    found = [_change(before[key], series, threshold) for key, series in after.items() if key in before]
    if not found:
        raise BadInput(f"{source}: none of its series was measured now; measure with the same options")
    return found


def differing(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What those that differ were and are; "" where none does."""
    keys = [key for key in dict.fromkeys([*saved, *now]) if saved.get(key) != now.get(key)]
    return "; ".join(f"{key} {saved.get(key)}, now {now.get(key)}" for key in keys)


def _change(saved: Series, now: Series, threshold: float) -> Change:
    lost = (saved.median - now.median) * now.better
    worse = lost / abs(saved.median) if saved.median else math.copysign(math.inf, lost) if lost else 0.0
    (low, high), (low_now, high_now) = saved.interval, now.interval
    verdict: Verdict = "same"
    if abs(worse) > threshold:
        several = min(len(saved.values), len(now.values)) > 1
        apart = several and (high < low_now or high_now < low)
        verdict = ("worse" if worse > 0 else "better") if apart else "unsure"
    return Change(now.name, now.unit, saved.median, now.median, worse, verdict)
