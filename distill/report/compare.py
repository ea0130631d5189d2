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
    folder: Path | None,
    *,
    baseline: str = "",
    cost: bool = True,
    judge: TeacherSettings | None = None,
    warnings: Sequence[str] = (),
    strict: bool = True,
) -> dict[str, Any]:
    """Examine every target of every system and compare each system with `baseline` (the first, where none is named).

    Writes results.json, samples.jsonl, report.md and report.html into `folder`, if any, and returns the results. judge:
    who also says which answer is better. warnings: what the caller has to say before the numbers are believed. strict:
    all must be measured; else one that fails is in `failed` with its reason and in nothing else. Raises BadInput for an
    unknown baseline; what a target or a judge raises, having kept what was measured (where there is no such judge:
    before measuring), and if not strict what the first raised where all did.
    """
    baseline = baseline or next(iter(systems))
    if baseline not in systems:
        raise BadInput(f"--baseline {baseline}: is none of the systems {', '.join(systems)}")
    if judge is not None:
        _check_judge(judge, measurement.listen)
    measured, failed = measurement.measure(systems)
    for spec, error in failed.items():
        if strict:
            raise type(error)(f"{spec}: {error}; what was measured is kept, the same command goes on from there")
        if not measured:
            raise error
    if baseline not in measured:
        lost, baseline = baseline, next(iter(measured))
        told = f"{lost}, the baseline, could not be measured: compared with {baseline} in its place."
        warnings = [*warnings, told]
    whole = {name: [target for target in systems[name] if target.spec not in failed] for name in measured}
    results = measurement.results(whole, measured, baseline, cost)
    results["warnings"] = [*warnings, *results["warnings"]]
    results["failed"] = {spec: str(error) for spec, error in failed.items()}
    samples = samples_of(measurement.exam, measured)
    keep(folder, results, samples)
    if judge is not None:  # a judge that fails takes nothing of the rest along
        results["judge"] = _judged(measurement, measured, baseline, judge)
        results["warnings"] += results["judge"].pop("warnings", [])
        keep(folder, results, samples)
    measurement.listen(Event("compare", "done", f"{folder / 'report.html'}" if folder else ""))
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
