"""Several systems on one exam: what each can, where they differ, what it costs, and how far to believe it.

A system is one target, or several trainings of the same recipe that differ by their seed. Everything that is measured
is kept (each target's answers and scores under the exam's folder, each judge's verdict beside it), so an interrupted
comparison goes on where it was; what is reported is a pure function of what is kept.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import EvaluateSettings, TeacherSettings
from distill.errors import BadInput, DistillError
from distill.events import Event, Listener, silent
from distill.exam.contamination import of_target
from distill.exam.cost import kept_cost
from distill.exam.examine import Measured, examine
from distill.exam.metrics.catalogue import in_order
from distill.exam.provenance import machine, versions
from distill.exam.questions import Exam
from distill.exam.targets import Target
from distill.exam.trained_on import curve, trained_on
from distill.report.comparison import render_markdown
from distill.report.doubts import doubts, mixed
from distill.report.numbers import compare_numbers
from distill.run import write_atomic, write_json_lines

VERSION = 1
"""Raised when results.json changes its shape or its meaning."""
PERMUTATIONS = 10_000


def compare(
    systems: Mapping[str, Sequence[Target]],
    exam: Exam,
    folder: Path,
    settings: EvaluateSettings,
    listen: Listener = silent,
    *,
    seed: int = 0,
    baseline: str = "",
    dream_tokens: int = 66,
    device: str = "auto",
    cost: bool = True,
    judge: TeacherSettings | None = None,
    force: bool = False,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Examine every target of every system and compare each system with `baseline` (the first, where none is named).

    Writes results.json, samples.jsonl, report.md and report.html into `folder`, and returns the results. judge: who
    also says which answer is better. force: measure everything again. warnings: what the caller has to say before the
    numbers are believed. Raises BadInput for fewer than two systems or an unknown baseline; what a target or a judge
    raises, having kept what was measured (where there is no such judge: before measuring).
    """
    names = list(systems)
    if len(names) < 2:
        raise BadInput(
            f"{', '.join(names) or 'nothing'}: there is nothing to compare it with; name two targets or more"
        )
    baseline = baseline or names[0]
    if baseline not in systems:
        raise BadInput(f"--baseline {baseline}: is none of the systems {', '.join(names)}")
    if judge is not None:
        _check_judge(judge, listen)
    comparison = Comparison(systems, exam, settings, listen, seed, dream_tokens, device, force)
    measured = comparison.measure()
    results = comparison.results(measured, baseline, cost)
    results["warnings"] = [*warnings, *results["warnings"]]
    samples = samples_of(exam, measured)
    write_json_lines(folder / "samples.jsonl", samples)
    _keep(folder, results)
    if judge is not None:  # a judge that fails takes nothing of the rest along
        results["judge"] = comparison.judged(measured, baseline, judge, results["warnings"])
        _keep(folder, results)
    listen(Event("compare", "done", f"{folder / 'report.html'}"))
    return results


def _keep(folder: Path, results: dict[str, Any]) -> None:
    write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    publish(folder, results)


def _check_judge(settings: TeacherSettings, listen: Listener) -> None:
    """A judge that isn't there is told before hours of measuring. It is opened again when it is needed: an embedded
    one would take memory from those that are measured."""
    from distill.teacher import open_teacher

    teacher = open_teacher(settings, listen)[0]
    try:
        teacher.describe()
    finally:
        teacher.close()


def publish(folder: Path, results: dict[str, Any]) -> None:
    """Both reports, from the results alone."""
    from distill.report.page import render_html

    write_atomic(folder / "report.md", render_markdown(results))
    write_atomic(folder / "report.html", render_html(results))


def read_results(path: Path) -> dict[str, Any]:
    """A comparison's results.json. Raises BadInput where it is missing, empty, or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: can't read it: {error.strerror}; `dream compare` writes it") from error
    if not text.strip():
        raise BadInput(f"{path}: is empty; run the comparison again, it goes on with what was measured")
    try:
        results = json.loads(text)
        if results["version"] != VERSION or not results["systems"] or "differences" not in results:
            raise ValueError("not of this version")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is no comparison's results.json ({error}); run `dream compare` again") from error
    return results


class Comparison:
    """One comparison: who, on what, and how."""

    def __init__(
        self,
        systems: Mapping[str, Sequence[Target]],
        exam: Exam,
        settings: EvaluateSettings,
        listen: Listener,
        seed: int,
        dream_tokens: int,
        device: str,
        force: bool,
    ) -> None:
        self.systems, self.exam, self.settings, self.listen = systems, exam, settings, listen
        self.seed, self.dream_tokens, self.device, self.force = seed, dream_tokens, device, force

    def measure(self) -> dict[str, list[Measured]]:
        """System → what each of its targets did, one after the other: only one is in memory at a time.

        A target that fails doesn't keep the others from being measured: it is told, and raised, at the end.
        """
        measured: dict[str, list[Measured]] = {name: [] for name in self.systems}
        problems: list[tuple[str, DistillError]] = []
        for name, targets in self.systems.items():
            for target in targets:
                try:
                    found = examine(
                        target,
                        self.exam,
                        self.settings,
                        self.seed,
                        self.listen,
                        dream_tokens=self.dream_tokens,
                        device=self.device,
                        force=self.force,
                    )
                except DistillError as error:
                    problems.append((target.spec, error))
                    self.listen(Event("compare", "warning", f"{target.spec}: {error}"))
                else:
                    measured[name].append(found)
        if problems:
            spec, error = problems[0]
            raise type(error)(f"{spec}: {error}; what was measured is kept, the same command goes on from there")
        return measured

    def results(self, measured: dict[str, list[Measured]], baseline: str, cost: bool) -> dict[str, Any]:
        """results.json, but for the judge."""
        exam, warnings = self.exam, list[str]()
        costs = {name: self._cost(targets[0]) if cost else None for name, targets in self.systems.items()}
        numbers = compare_numbers(
            measured,
            baseline,
            resamples=self.settings.bootstrap,
            permutations=PERMUTATIONS,
            seed=self.seed,
            questions=exam.questions,
            costs=costs,
        )
        entries: dict[str, Any] = {}
        for name, targets in self.systems.items():
            runs, abouts = [target.run for target in targets], [self._trained_on(target) for target in targets]
            warnings += mixed(name, runs, abouts)
            entries[name] = {
                "targets": [target.spec for target in targets],
                "kind": targets[0].kind,
                "seeds": len(targets),
                "card": asdict(measured[name][0].card),
                "left_out": len({key for found in measured[name] for key in found.left_out}),
                "metrics": numbers["metrics"][name],
                "missing": {metric: why for found in measured[name] for metric, why in found.missing.items()},
                "cost": costs[name],
                "trained_on": abouts[0],
                "contamination": self._contamination(targets),
                "curves": [curve(target) for target, run in zip(targets, runs, strict=True) if run is not None],
            }
        warnings += doubts(entries, len(exam.questions))
        return {
            "version": VERSION,
            "title": ", ".join(self.systems),
            "exam": {
                "name": exam.name,
                "teacher": exam.teacher,
                "prompts": len(exam.questions),
                "answer_bytes": sum(question.bytes for question in exam.questions),
                "teacher_ended": exam.teacher_ended,
                "has_answers": exam.has_answers,
                "has_truths": exam.has_truths,
                "digest": exam.digest,
            },
            "decoding": {
                "temperature": self.settings.temperature,
                "max_tokens": self.settings.max_tokens,
                "dreams": self.settings.dreams,
                "dream_tokens": self.dream_tokens,
                "seed": self.seed,
            },
            "baseline": baseline,
            "metrics": in_order({name for entry in entries.values() for name in entry["metrics"]}),
            "systems": entries,
            "differences": numbers["differences"],
            "tests": numbers["tests"],
            "disagreements": numbers["disagreements"],
            "judge": None,
            "frontier": numbers["frontier"],
            "warnings": warnings,
            "versions": versions(),
            "machine": machine(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _cost(self, target: Target) -> dict[str, Any]:
        self.listen(Event("compare", "note", f"{target.spec}: speed and memory, in a process of its own"))
        return kept_cost(
            target,
            self.exam,
            self.settings,
            seed=self.seed,
            dream_tokens=self.dream_tokens,
            device=self.device,
            force=self.force,
        )

    def _contamination(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Of the first target: trainings of one recipe share their data."""
        try:
            return of_target(targets[0], self.exam).to_json()
        except DistillError as error:
            self.listen(Event("compare", "warning", f"{targets[0].spec}: {error}"))
            return {"checked": False, "reason": str(error)}

    def _trained_on(self, target: Target) -> dict[str, Any] | None:
        """None where it isn't known, or can't be read."""
        try:
            return trained_on(target)
        except DistillError as error:
            self.listen(Event("compare", "warning", f"{target.spec}: {error}"))
            return None

    def judged(
        self, measured: dict[str, list[Measured]], baseline: str, settings: TeacherSettings, warnings: list[str]
    ) -> dict[str, Any]:
        """What the judge says of each system's answers (of its first training) beside the baseline's."""
        from distill.report.judge import context_for, judge
        from distill.teacher import open_teacher

        answers = {name: self._asked_answers(found[0]) for name, found in measured.items()}
        context = context_for(answers, self.exam.questions, baseline)
        teacher = open_teacher(settings, self.listen, context=context)[0]
        try:
            verdicts = judge(
                answers,
                self.exam.questions,
                teacher,
                baseline=baseline,
                folder=self.exam.folder / "verdicts",
                resamples=self.settings.bootstrap,
                seed=self.seed,
                listen=self.listen,
                force=self.force,
            )
        finally:
            teacher.close()
        warnings += verdicts.pop("warnings", [])
        return verdicts

    @staticmethod
    def _asked_answers(found: Measured) -> list[str | None]:
        """None for a question that it wasn't asked: that is no empty answer to be judged."""
        pairs = zip(found.keys, found.answers, strict=bool(found.answers))
        return [None if key in found.left_out else answer for key, answer in pairs]


def samples_of(exam: Exam, measured: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Per prompt: the teacher's answer, and what each target dreamed and said."""
    samples: list[dict[str, Any]] = []
    for i, question in enumerate(exam.questions):
        systems: dict[str, Any] = {}
        for name, each in measured.items():
            systems[name] = [
                {
                    "dream": found.dreams[i] if found.dreams else None,
                    "answer": found.answers[i] if found.answers else None,
                    "left_out": found.left_out.get(question.key),
                    "metrics": {
                        metric: value
                        for metric, ratio in found.metrics.items()
                        if ratio.numerator.ndim == 1 and (value := found.at(metric, i)) is not None
                    },
                }
                for found in each
            ]
        samples.append({**question.about(), "systems": systems})
    return samples
