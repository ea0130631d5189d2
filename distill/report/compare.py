"""Several systems on one exam: what each can, where they differ, what it costs, and how far to believe it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import TeacherSettings
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.exam.measured import Measured
from distill.report.measure import Measurement, Systems, keep, samples_of


def compare(
    measurement: Measurement,
    systems: Systems,
    folder: Path,
    *,
    baseline: str = "",
    cost: bool = True,
    judge: TeacherSettings | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Examine every target of every system and compare each system with `baseline` (the first, where none is named).

    Writes results.json, samples.jsonl, report.md and report.html into `folder`, and returns the results. judge: who
    also says which answer is better. warnings: what the caller has to say before the numbers are believed. Raises
    BadInput for fewer than two systems or an unknown baseline; what a target or a judge raises, having kept what was
    measured (where there is no such judge: before measuring).
    """
    baseline = baseline or next(iter(systems), "")
    if len(systems) < 2:
        raise BadInput(f"{baseline or 'nothing'}: there is nothing to compare it with; name two targets or more")
    if baseline not in systems:
        raise BadInput(f"--baseline {baseline}: is none of the systems {', '.join(systems)}")
    if judge is not None:
        _check_judge(judge, measurement.listen)
    measured, failed = measurement.measure(systems)
    for spec, error in failed.items():
        raise type(error)(f"{spec}: {error}; what was measured is kept, the same command goes on from there")
    results = measurement.results(systems, measured, baseline, cost)
    results["warnings"] = [*warnings, *results["warnings"]]
    samples = samples_of(measurement.exam, measured, several=True)
    keep(folder, results, samples)
    if judge is not None:  # a judge that fails takes nothing of the rest along
        results["judge"] = _judged(measurement, measured, baseline, judge)
        results["warnings"] += results["judge"].pop("warnings", [])
        keep(folder, results, samples)
    measurement.listen(Event("compare", "done", f"{folder / 'report.html'}"))
    return results


def _check_judge(settings: TeacherSettings, listen: Listener) -> None:
    """A judge that isn't there is told before hours of measuring. It is opened again when it is needed: an embedded
    one would take memory from those that are measured."""
    from distill.teacher import opened
    from distill.teacher.crew import Crew

    with opened(settings, listen) as teachers:
        Crew(teachers, lambda teacher, what: None, stage="judge", listen=listen)


def _judged(
    measurement: Measurement, measured: Mapping[str, Sequence[Measured]], baseline: str, settings: TeacherSettings
) -> dict[str, Any]:
    """What the judge says of each system's answers (of its first training) beside the baseline's; a question that it
    wasn't asked is no empty answer."""
    from distill.report.judge import context_for, judge
    from distill.teacher import opened

    exam, listen = measurement.exam, measurement.listen
    answers = {
        name: [
            None if key in first.left_out else answer for key, answer in zip(first.keys, first.answers, strict=False)
        ]
        for name, (first, *_) in measured.items()
    }
    with opened(settings, listen, context_for(answers, exam.questions, baseline)) as teachers:
        return judge(
            answers,
            exam.questions,
            teachers,
            baseline=baseline,
            folder=exam.folder / "verdicts",
            resamples=measurement.settings.bootstrap,
            seed=measurement.seed,
            listen=listen,
            force=measurement.force,
        )
