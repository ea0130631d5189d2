"""Is a benchmark's result worse than a saved one, beyond noise?"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bench.result import BenchResult, Series
from distill.errors import BadInput

Verdict = Literal["worse", "better", "same", "unsure"]


@dataclass(frozen=True)
class Change:
    """One series, saved and now.

    worse: by what share of the saved median the new one is worse; negative where it is better. verdict: "worse" and
    "better" are past the threshold with intervals apart; "unsure" is past it with intervals that overlap.
    """

    name: str
    unit: str
    saved: float
    now: float
    worse: float
    verdict: Verdict


@dataclass(frozen=True)
class Check:
    """What became of a saved result. new, missing: names of series that only one of the two has."""

    threshold: float
    changes: list[Change]
    new: list[str]
    missing: list[str]
    warnings: list[str]

    @property
    def regressions(self) -> int:
        return sum(change.verdict == "worse" for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "regressions": self.regressions}


def check(now: BenchResult, saved: BenchResult, threshold: float, source: str = "the saved result") -> Check:
    """Compare series by name and setting. Raises BadInput where nothing can be compared."""
    require_bench(saved, now.name, source)
    if other := _differing(saved.settings, now.settings):
        raise BadInput(f"{source}: measured with other settings ({other}); nothing to compare")
    before = {series.key: series for series in saved.series}
    after = {series.key: series for series in now.series}
    common = [key for key in after if key in before]
    if not common:
        raise BadInput(f"{source}: none of its series was measured now; measure with the same options")
    warnings: list[str] = []
    if other := _differing(saved.machine, now.machine):
        warnings.append(f"{source} was measured elsewhere ({other}): differences may come from that")
    if any(len(series[key].values) == 1 for key in common for series in (before, after)):
        warnings.append("one repetition alone has no interval: noise counts as a change; use --repeat 5 or more")
    return Check(
        threshold,
        [_change(before[key], after[key], threshold) for key in common],
        [series.name for key, series in after.items() if key not in before],
        [series.name for key, series in before.items() if key not in after],
        warnings,
    )


def require_bench(saved: BenchResult, name: str, source: str) -> None:
    """Raises BadInput where a saved result is of another benchmark."""
    if saved.name != name:
        raise BadInput(f"{source}: is of `dream bench {saved.name}`, not of `dream bench {name}`; nothing to compare")


def _differing(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What those that differ were and are; "" where none does."""
    keys = [key for key in dict.fromkeys([*saved, *now]) if saved.get(key) != now.get(key)]
    return "; ".join(f"{key} {saved.get(key)}, now {now.get(key)}" for key in keys)


def _change(saved: Series, now: Series, threshold: float) -> Change:
    lost = (saved.median - now.median) * now.better
    worse = lost / abs(saved.median) if saved.median else math.copysign(math.inf, lost) if lost else 0.0
    (low, high), (low_now, high_now) = saved.interval, now.interval
    verdict: Verdict = "same"
    if abs(worse) > threshold:
        apart = high < low_now or high_now < low
        verdict = ("worse" if worse > 0 else "better") if apart else "unsure"
    return Change(now.name, now.unit, saved.median, now.median, worse, verdict)
