"""How every benchmark takes its time: in rounds that alternate, the first ones not counted."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from bench.result import BenchResult, Series, machine
from distill.events import Event, Listener, silent

Job = Callable[[], object]
Found = TypeVar("Found")
Numbers = Mapping[str, Sequence[float]]
"""Name → a number of each round."""


@dataclass(frozen=True)
class Stopwatch:
    """repeat: rounds that are counted; warmup: rounds before them that aren't. listen: hears of each."""

    repeat: int = 5
    warmup: int = 1
    listen: Listener = silent

    def alternate(self, jobs: Mapping[str, Callable[[], Found]], task: str) -> dict[str, list[Found]]:
        """What each job returns, once a round, in turn backwards and forwards: a machine that changes its speed changes
        all."""
        found: dict[str, list[Found]] = {name: [] for name in jobs}
        total = self.warmup + self.repeat
        for round_ in range(total):
            for name in list(jobs)[:: 1 if round_ % 2 else -1]:
                value = jobs[name]()
                if round_ >= self.warmup:
                    found[name].append(value)
            self.listen(Event(task, "progress", done=round_ + 1, total=total, unit="round"))
        return found

    def each(self, job: Callable[[], Found], task: str) -> list[Found]:
        """What it returns in each round."""
        return self.alternate({"": job}, task)[""]

    def seconds(self, jobs: Mapping[str, Job], task: str, device: str = "cpu") -> dict[str, list[float]]:
        """Seconds of each job, by rounds. device: torch's, that may be at it still when a job returns."""
        return self.alternate({name: partial(seconds_of, job, device) for name, job in jobs.items()}, task)

    def result(
        self,
        name: str,
        series: list[Series],
        settings: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
        device: str = "cpu",
    ) -> BenchResult:
        """What `dream bench NAME` hands back."""
        return BenchResult(name, series, settings or {}, about or {}, self.warmup, machine(device))


def seconds_of(job: Job, device: str = "cpu") -> float:
    """Of one call, until a CUDA device has done what it was told."""
    started = time.perf_counter()
    job()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - started


def listed(numbers: Numbers, unit: str = "s", better: Literal[1, -1] = -1) -> list[Series]:
    """A series a name."""
    return [Series(name, unit, better, tuple(each)) for name, each in numbers.items()]


def rates(amount: float, seconds: Numbers) -> dict[str, list[float]]:
    """So much a second."""
    return {name: [amount / each for each in taken] for name, taken in seconds.items()}


def ratio(
    name: str,
    top: Sequence[float],
    bottom: Sequence[float],
    setting: dict[str, Any] | None = None,
    better: Literal[1, -1] = 1,
) -> Series:
    """top / bottom of each round. Rounds are paired, so what slows a whole round cancels."""
    return Series(name, "ratio", better, tuple(a / b for a, b in zip(top, bottom, strict=True)), setting or {})
