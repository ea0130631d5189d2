"""What a student would save its teacher, and how often it would then say something else."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch
from bundle.serving import offer
from distill.run import Run
from distill.serve.cascade import Calibration, calibrated
from distill.serve.shelf import Shelf


def bench_cascade(watch: Stopwatch, paths: Sequence[Path], agreements: Sequence[float]) -> BenchResult:
    """Series, a value a run: the share of held-out questions that its student answers where a share of its answers is
    wanted to be its teacher's, and the share that is, both on questions that the threshold wasn't chosen on."""
    found = {wanted: [_calibrated(path, wanted) for path in paths] for wanted in agreements}
    series = [
        Series(f"{name}, {wanted:.0%} wanted", "%", 1, tuple(100 * getattr(one, what) for one in each))
        for wanted, each in found.items()
        for name, what in (("answered", "share"), ("as the teacher", "agreement"))
    ]
    questions = next(iter(found.values()))[0].questions
    return watch.result("cascade", series, {}, {"runs": len(paths), "questions": questions})


def _calibrated(path: Path, wanted: float) -> Calibration:
    shelf = Shelf([offer(path)])
    try:
        (served,) = shelf.students.values()
        return asyncio.run(calibrated(served, Run.open(path), wanted))
    finally:
        shelf.close()
