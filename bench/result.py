"""What every benchmark hands back: repetitions with their median and spread, and where they were measured.

All repetitions are kept, in order. Of a handful of them a mean says little (one hiccup moves it), so the median stands
for them, with an interval that supposes nothing about how they are spread.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.errors import BadInput
from distill.exam import provenance
from distill.exam.provenance import versions
from distill.run import write_atomic

KIND = "dream bench"
"""Marks our files."""
FORMAT = 1
COVERAGE = 0.95


@dataclass(frozen=True)
class Series:
    """One thing measured several times. better: 1 where more is better, −1 where less is.

    setting: what was measured (batch, context …), JSON scalars; series of two results belong together where name, unit
    and setting are the same.
    """

    name: str
    unit: str
    better: Literal[1, -1]
    values: tuple[float, ...]
    setting: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(map(float, self.values)))
        if not self.values or not all(map(math.isfinite, self.values)) or self.better not in (1, -1):
            raise ValueError(f"series {self.name}")

    @property
    def key(self) -> str:
        """Equal for series that can be compared."""
        return json.dumps([self.name, self.unit, self.better, self.setting], sort_keys=True)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Holds the true median in at least 95 % of cases, whatever the distribution (David & Nagaraja, Order
        Statistics, 2003, section 7.1): from the l-th least to the l-th most value, 2 · P(Binomial(n, ½) < l) ≤ 0.05.
        Below 6 values, no such l: from the least to the most (n = 5: 94 %; 3: 75 %)."""
        ordered, count = sorted(self.values), len(self.values)
        below, rank = 0.0, 0
        while 2 * (below := below + math.comb(count, rank) / 2**count) <= 1 - COVERAGE:
            rank += 1
        place = max(rank, 1) - 1
        return ordered[place], ordered[count - 1 - place]

    def to_json(self) -> dict[str, Any]:
        spread = {"median": self.median, "min": min(self.values), "max": max(self.values)}
        return {**vars(self), **spread, "interval": list(self.interval), "values": list(self.values)}


@dataclass(frozen=True)
class BenchResult:
    """All that one `dream bench NAME` measured.

    settings: what was measured, as far as it is the same for all series; results of other settings don't compare.
    about: what else there is to know; never compared. machine: see `machine`. time: UTC, when it was finished.
    """

    name: str
    series: list[Series]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    warmup: int = 0
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    version: str = field(default_factory=lambda: versions().get("dreaming-student", "not installed"))
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def named(self, name: str) -> Series:
        """The series of a name."""
        return next(series for series in self.series if series.name == name)

    def to_json(self) -> dict[str, Any]:
        return {"kind": KIND, "format": FORMAT, **vars(self), "series": [series.to_json() for series in self.series]}

    @classmethod
    def from_json(cls, found: Any, source: str = "result") -> "BenchResult":
        """The inverse of `to_json`; medians and spreads are taken from the values again.

        Raises BadInput, naming `source`, for what is no result of a benchmark.
        """
        try:
            if (found["kind"], found["format"]) != (KIND, FORMAT):
                raise ValueError(f"{found['kind']} of format {found['format']}")
            parts = ("name", "unit", "better", "values", "setting")
            series = [Series(*(entry[part] for part in parts)) for entry in found["series"]]
            facts = {part: dict(found[part]) for part in ("settings", "about", "machine")}
            told = {part: found[part] for part in ("name", "warmup", "version", "time")}
            if not series:
                raise ValueError("no series")
            return cls(series=series, **facts, **told)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{source}: holds no result of `{KIND}` ({error!r}); `--out FILE.json` saves one") from error


def load_result(path: Path, name: str = "") -> BenchResult:
    """A saved result. Raises BadInput where there is none, or where it is of another benchmark than `name`."""
    try:
        found = BenchResult.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; save a result: `dream bench … --out {path}`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: can't be read as a result of `{KIND}` ({error})") from error
    if name and found.name != name:
        raise BadInput(f"{path}: is of `{KIND} {found.name}`, not of `{KIND} {name}`; nothing to compare")
    return found


def write_result(result: BenchResult, path: Path) -> None:
    """As JSON. Raises DistillError where it can't be written."""
    write_atomic(path, json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where a benchmark ran, as far as it matters for speed; nothing that tells whose machine it is."""
    return {**provenance.machine(device), "platform": f"{platform.system()} {platform.machine()}", **versions()}


def combined(name: str, results: Mapping[str, BenchResult], failed: Mapping[str, str]) -> BenchResult:
    """Several results as one; `failed` (bench → why) is kept in about. A series takes its bench's settings along, so
    that a bench with other settings is a new one beside the rest."""
    series = [
        Series(f"{bench}: {one.name}", one.unit, one.better, one.values, {**result.settings, **one.setting})
        for bench, result in results.items()
        for one in result.series
    ]
    about: dict[str, Any] = {bench: result.about for bench, result in results.items() if result.about}
    about |= {"failed": dict(failed)} if failed else {}
    where = next((result.machine for result in results.values() if result.machine.get("threads")), machine())
    warmup = max((result.warmup for result in results.values()), default=0)
    return BenchResult(name, series, about=about, warmup=warmup, machine=where)


# As text.
HEADER = ("", "unit", "median", "min", "max", "95 % interval", "n")


def row(series: Series) -> tuple[str, ...]:
    """Under HEADER."""
    spread = [number(value) for value in (series.median, min(series.values), max(series.values))]
    interval = " to ".join(number(bound) for bound in series.interval)
    return series.name, series.unit, *spread, interval, str(len(series.values))


def number(value: float) -> str:
    """Four digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
