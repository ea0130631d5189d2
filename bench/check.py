"""Is a benchmark's result worse than a saved one, beyond noise?"""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

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
    _require_settings(saved, now, source)
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


def _require_settings(saved: BenchResult, now: BenchResult, source: str) -> None:
    other = [
        f"{key} {saved.settings.get(key)!r}, now {now.settings.get(key)!r}"
        for key in dict.fromkeys([*saved.settings, *now.settings])
        if saved.settings.get(key) != now.settings.get(key)
    ]
    if other:
        raise BadInput(f"{source}: measured with other settings ({'; '.join(other)}); nothing to compare")


def _some(series: list[Series]) -> str:
    names = [entry.name for entry in series]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _change(saved: Series, now: Series, threshold: float) -> Change:
    lost = (saved.median - now.median) * now.better
    if saved.median:
        worse = lost / abs(saved.median)
    else:
        worse = 0.0 if not lost else float("inf") if lost > 0 else float("-inf")
    (low, high), (low_now, high_now) = saved.interval, now.interval
    apart = high < low_now or high_now < low
    verdict: Verdict = "same"
    if abs(worse) > threshold:
        verdict = ("worse" if worse > 0 else "better") if apart else "unsure"
    return Change(now.name, now.unit, saved.median, now.median, worse, verdict)


def _warnings(now: BenchResult, saved: BenchResult, source: str, compared: list[Series]) -> list[str]:
    found: list[str] = []
    changed = {
        key: f"{key} {saved.machine.get(key)}, now {now.machine.get(key)}"
        for key in dict.fromkeys([*saved.machine, *now.machine])
        if saved.machine.get(key) != now.machine.get(key)
    }
    if other := [text for key, text in changed.items() if key not in NOT_SPEED]:
        found.append(
            f"{source} was measured on another machine or set-up ({'; '.join(other)}): differences may come from that"
        )
    if upgraded := [text for key, text in changed.items() if key in NOT_SPEED]:
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
    found: list[str] = []
    if saved.get("host") and now.get("host") and saved["host"] != now["host"]:
        found.append("another server")
    if saved.get("server") and now.get("server") and saved["server"] != now["server"]:
        found.append(f"version {saved['server']}, now {now['server']}")
    for model, entry in now.items():
        before = saved.get(model)
        if not isinstance(entry, dict) or not isinstance(before, dict):
            continue
        was, digest = (cast("dict[str, Any]", about).get("digest") for about in (before, entry))
        if was and digest and was != digest:
            found.append(f"{model} with digest {was}, now {digest}")
    return found
