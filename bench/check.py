"""Is a benchmark's result worse than a saved one, beyond noise?"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.result import BenchResult, Series
from distill.errors import BadInput

Verdict = Literal["worse", "better", "same", "unsure"]

NOT_SPEED = ("python", "torch")
"""Parts of `machine` that are named apart: an upgrade, and no other machine."""


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
    new: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]

    def to_json(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "regressions": len(self.regressions),
            "changes": [vars(change) for change in self.changes],
            "new": self.new,
            "missing": self.missing,
            "warnings": self.warnings,
        }


def check(now: BenchResult, saved: BenchResult, threshold: float, source: str = "the saved result") -> Check:
    """Compare series by name and setting. Raises BadInput where nothing can be compared."""
    require_bench(saved, now.name, source)
    if other := _differing(saved.settings, now.settings).values():
        raise BadInput(f"{source}: measured with other settings ({'; '.join(other)}); nothing to compare")
    before = {series.key: series for series in saved.series}
    after = {series.key: series for series in now.series}
    common = [key for key in after if key in before]
    if not common:
        raise BadInput(
            f"{source}: none of its series was measured now (it has {_some(saved.series)}; now: {_some(now.series)}); "
            "measure with the same options"
        )
    return Check(
        threshold,
        [_change(before[key], after[key], threshold) for key in common],
        [series.name for key, series in after.items() if key not in before],
        [series.name for key, series in before.items() if key not in after],
        _warnings(now, saved, source, [before[key] for key in common] + [after[key] for key in common]),
    )


def require_bench(saved: BenchResult, name: str, source: str) -> None:
    """Raises BadInput where a saved result is of another benchmark."""
    if saved.name != name:
        raise BadInput(f"{source}: is of `dream bench {saved.name}`, not of `dream bench {name}`; nothing to compare")


def _differing(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Key → what it was and is, of those that differ."""
    keys = [key for key in dict.fromkeys([*saved, *now]) if saved.get(key) != now.get(key)]
    return {key: f"{key} {_word(saved.get(key))}, now {_word(now.get(key))}" for key in keys}


def _word(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _some(series: list[Series]) -> str:
    names = [entry.name for entry in series]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _change(saved: Series, now: Series, threshold: float) -> Change:
    lost = (saved.median - now.median) * now.better
    worse = lost / abs(saved.median) if saved.median else math.copysign(math.inf, lost) if lost else 0.0
    (low, high), (low_now, high_now) = saved.interval, now.interval
    verdict: Verdict = "same"
    if abs(worse) > threshold:
        apart = high < low_now or high_now < low
        verdict = ("worse" if worse > 0 else "better") if apart else "unsure"
    return Change(now.name, now.unit, saved.median, now.median, worse, verdict)


def _warnings(now: BenchResult, saved: BenchResult, source: str, compared: list[Series]) -> list[str]:
    found: list[str] = []
    changed = _differing(saved.machine, now.machine)
    upgraded = [changed.pop(key) for key in NOT_SPEED if key in changed]
    if changed:
        told = "; ".join(changed.values())
        found.append(f"{source} was measured on another machine or set-up ({told}): differences may come from that")
    if upgraded:
        found.append(f"{source} was measured with other versions ({'; '.join(upgraded)})")
    if other := _other_server(saved.about, now.about):
        found.append(f"{source} was measured on another server or model ({'; '.join(other)})")
    if any(len(series.values) == 1 for series in compared):
        found.append("one repetition alone has no interval: noise counts as a change; measure with --repeat 5 or more")
    if now.warmup != saved.warmup:
        found.append(f"{source} has {saved.warmup} warm-up rounds, now {now.warmup}")
    return found


def _other_server(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two results of Ollama: the server, its version, a model of both under the same name."""

    def digests(about: dict[str, Any]) -> dict[str, str]:
        return {
            model: facts["digest"] for model, facts in about.items() if isinstance(facts, dict) and facts.get("digest")
        }

    was, known = digests(saved), digests(now)
    both = [model for model in known if model in was and known[model] != was[model]]
    found = [f"{model} with digest {was[model]}, now {known[model]}" for model in both]
    if saved.get("server") and now.get("server") and saved["server"] != now["server"]:
        found.insert(0, f"version {saved['server']}, now {now['server']}")
    if saved.get("host") and now.get("host") and saved["host"] != now["host"]:
        found.insert(0, "another server")
    return found
