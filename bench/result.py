"""What every benchmark hands back: repetitions with their median and spread, and where they were measured.

All repetitions are kept, in order. Of a handful of them a mean says little (one hiccup moves it), so the median stands
for them, with an interval that supposes nothing about how they are spread.
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from distill.errors import BadInput
from distill.events import Event, Listener, silent

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
        assert self.values, self.name
        object.__setattr__(self, "values", tuple(map(float, self.values)))  # counts too: they come back as such
        assert all(math.isfinite(value) for value in self.values), self.name

    @property
    def key(self) -> str:
        """Equal for series that can be compared."""
        return json.dumps([self.name, self.unit, self.better, self.setting], sort_keys=True)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between neighbours linearly, as numpy does."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def interval(self) -> tuple[float, float]:
        """Holds the true median in at least 95 % of cases, whatever the distribution (David & Nagaraja, Order
        Statistics, 2003, section 7.1): from the l-th least to the l-th most value, 2 · P(Binomial(n, ½) < l) ≤ 0.05.
        Below 6 values, no such l: from the least to the most (n = 5: 94 %; 3: 75 %). A bootstrap's would be narrower,
        and too narrow: of 7 values it holds the median in 88 %."""
        ordered, count = sorted(self.values), len(self.values)
        below, rank = 0.0, 0
        while 2 * (below := below + math.comb(count, rank) / 2**count) <= 1 - COVERAGE:
            rank += 1
        place = max(rank, 1) - 1
        return ordered[place], ordered[count - 1 - place]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "better": self.better,
            "setting": self.setting,
            "median": self.median,
            "min": self.min,
            "max": self.max,
            "quartiles": list(self.quartiles),
            "interval": list(self.interval),
            "values": list(self.values),
        }


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
    version: str = field(default_factory=lambda: importlib.metadata.version("dreaming-student"))
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def named(self, name: str) -> Series:
        """The series of a name."""
        return next(series for series in self.series if series.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "time": self.time,
            "warmup": self.warmup,
            "settings": self.settings,
            "machine": self.machine,
            "series": [series.to_json() for series in self.series],
            "about": self.about,
        }

    @classmethod
    def from_json(cls, value: Any, source: str = "result") -> "BenchResult":
        """The inverse of `to_json`; medians and spreads are taken from the values again.

        Raises BadInput, naming `source`, for what is no result of a benchmark.
        """
        if not isinstance(value, dict) or cast("dict[str, Any]", value).get("kind") != KIND:
            raise BadInput(f"{source}: holds no result of `dream bench`; save one with --out FILE.json")
        found = cast("dict[str, Any]", value)
        if found.get("format") != FORMAT:
            raise BadInput(
                f"{source}: is of format {found.get('format')}, this version reads {FORMAT}; measure it again"
            )
        try:
            return cls(
                name=_text(found["name"]),
                series=[_series(entry) for entry in found["series"]],
                settings=dict(found["settings"]),
                about=dict(found["about"]),
                warmup=int(found["warmup"]),
                machine=dict(found["machine"]),
                version=_text(found["version"]),
                time=_text(found["time"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{source}: a result of `dream bench`, but spoiled ({error!r}); measure it again") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _series(entry: dict[str, Any]) -> Series:
    """Raises KeyError, TypeError or ValueError where it is none."""
    values: list[Any] = list(entry["values"])
    usable = values and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    if not usable or type(entry["better"]) is not int or entry["better"] not in (1, -1):
        raise ValueError(f"series {entry['name']}")
    name, unit = _text(entry["name"]), _text(entry["unit"])
    return Series(name, unit, entry["better"], tuple(map(float, values)), dict(entry["setting"]))


def load_result(path: Path) -> BenchResult:
    """A saved result. Raises BadInput where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; save a result first: `dream bench … --out {path}`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't be read as a result of `dream bench` ({error})") from error
    if not text.strip():
        raise BadInput(f"{path}: is empty; save a result again: `dream bench … --out {path}`")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is no JSON ({error}); give what `--out FILE.json` wrote") from error
    result = BenchResult.from_json(value, str(path))
    if not result.series:
        raise BadInput(f"{path}: holds no measurements; save a result again: `dream bench … --out {path}`")
    return result


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where a benchmark ran, as far as it matters for speed; nothing that tells whose machine it is.

    device: as torch names it; an accelerator is named by its model. threads: torch's, null where it isn't loaded.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "device": device,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__) if torch is not None else None,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def seconds_of(run: Callable[[], object], settle: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call; `settle` waits until a device has done what it was told."""
    started = time.perf_counter()
    run()
    settle()
    return time.perf_counter() - started


def alternate(
    jobs: Mapping[str, Callable[[], object]],
    repeat: int,
    warmup: int,
    task: str,
    listen: Listener = silent,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each job, once a round, in turn forwards and backwards: a machine that changes its speed changes all.

    The first `warmup` rounds aren't counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(warmup + repeat):
        for name in list(jobs)[:: 1 if round_ % 2 else -1]:
            took = seconds_of(jobs[name], settle)
            if round_ >= warmup:
                seconds[name].append(took)
        listen(Event(task, "progress", done=round_ + 1, total=warmup + repeat, unit="round"))
    return seconds


def ratio(
    name: str,
    top: Sequence[float],
    bottom: Sequence[float],
    setting: dict[str, Any] | None = None,
    better: Literal[1, -1] = 1,
) -> Series:
    """top / bottom of each round. Rounds are paired, so what slows a whole round cancels."""
    return Series(name, "ratio", better, tuple(a / b for a, b in zip(top, bottom, strict=True)), setting or {})


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
    where = next((result.machine for result in results.values() if result.machine.get("torch")), machine())
    return BenchResult(
        name, series, about=about, warmup=max((r.warmup for r in results.values()), default=0), machine=where
    )
