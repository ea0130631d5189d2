"""From targets to results: every system on one exam, and all that is known of it in one structure.

A system is one target, or several trainings of the same recipe that differ by their seed. What is measured is kept
(each target's answers and scores under the exam's folder), so what was interrupted goes on where it was; what is
reported is a pure function of the results.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config import EvaluateSettings
from distill.errors import BadInput, DistillError
from distill.events import Event, Listener, silent
from distill.exam.contamination import of_target
from distill.exam.cost import kept_cost
from distill.exam.examine import examine
from distill.exam.measured import Measured
from distill.exam.metrics.catalogue import in_order
from distill.exam.provenance import machine, versions
from distill.exam.questions import Exam
from distill.exam.targets import Target
from distill.exam.trained_on import curve, trained_on
from distill.report.doubts import doubts, mixed
from distill.report.numbers import compare_numbers
from distill.report.page import render_html, render_markdown
from distill.run import write_atomic, write_json_lines

VERSION = 4
"""Raised when results.json changes its shape or its meaning, so that what is kept is measured anew."""
READABLE = (1, VERSION)
"""Versions of comparisons whose reports can be written again."""
PERMUTATIONS = 10_000

Systems = Mapping[str, Sequence[Target]]


@dataclass(frozen=True)
class Measurement:
    """What is asked, and how. dream_tokens: a dream has at most so many; force: measure everything again."""

    exam: Exam
    settings: EvaluateSettings
    listen: Listener = silent
    seed: int = 0
    dream_tokens: int = 66
    device: str = "auto"
    force: bool = False

    def measure(
        self, systems: Systems, only: Mapping[str, Sequence[str]] | None = None
    ) -> tuple[dict[str, list[Measured]], dict[str, DistillError]]:
        """System → what each of its targets did, one after the other: only one is in memory at a time; and the spec of
        each target that failed → why. One that fails keeps nobody else from being measured.

        only: system → phases of an examination that are enough of it (see `examine`).
        """
        measured: dict[str, list[Measured]] = {}
        failed: dict[str, DistillError] = {}
        for name, targets in systems.items():
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
                        only=(only or {}).get(name, ()),
                    )
                except DistillError as error:
                    failed[target.spec] = error
                    self.listen(Event("evaluate", "warning", f"{target.spec}: {error}"))
                else:
                    measured.setdefault(name, []).append(found)
        return measured, failed

    def results(
        self, systems: Systems, measured: Mapping[str, Sequence[Measured]], baseline: str, cost: bool
    ) -> dict[str, Any]:
        """The content of results.json. measured: may hold more than `systems`, as the teacher, who is no target."""
        exam, warnings = self.exam, list[str]()
        costs = {name: self._cost(targets[0]) if cost else None for name, targets in systems.items()}
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
        for name, found in measured.items():
            targets = systems.get(name, ())
            abouts = [self._trained_on(target) for target in targets]
            warnings += mixed(name, [target.run for target in targets], abouts)
            entries[name] = {
                "targets": [target.spec for target in targets],
                "kind": found[0].card.kind if not targets else targets[0].kind,
                "seeds": len(found),
                "card": asdict(found[0].card),
                "left_out": len({key for each in found for key in each.left_out}),
                "metrics": numbers["metrics"][name],
                "missing": {metric: why for each in found for metric, why in each.missing.items()},
                "tokens_per_second": found[0].tokens_per_second,
                "cost": costs.get(name),
                "trained_on": abouts[0] if abouts else None,
                "contamination": self._contamination(targets[0]) if targets else None,
                "curves": [curve(target) for target in targets if target.run is not None],
            }
        return {
            "version": VERSION,
            "title": ", ".join(measured),
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
            "failed": {},
            "warnings": warnings + doubts(entries, len(exam.questions)),
            "versions": versions(),
            "machine": machine(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _cost(self, target: Target) -> dict[str, Any]:
        self.listen(Event("evaluate", "note", f"{target.spec}: speed and memory, in a process of its own"))
        return kept_cost(
            target,
            self.exam,
            self.settings,
            seed=self.seed,
            dream_tokens=self.dream_tokens,
            device=self.device,
            force=self.force,
        )

    def _contamination(self, target: Target) -> dict[str, Any]:
        """Of the first target: trainings of one recipe share their data."""
        try:
            return asdict(of_target(target, self.exam))
        except DistillError as error:  # a broken training set doesn't make the numbers wrong
            self.listen(Event("evaluate", "warning", f"{target.spec}: {error}"))
            return {"checked": False, "reason": str(error)}

    def _trained_on(self, target: Target) -> dict[str, Any] | None:
        """None where it isn't known, or can't be read."""
        try:
            return trained_on(target)
        except DistillError as error:
            self.listen(Event("evaluate", "warning", f"{target.spec}: {error}"))
            return None


def samples_of(exam: Exam, measured: Mapping[str, Sequence[Measured]], several: bool = False) -> list[dict[str, Any]]:
    """Per prompt: the teacher's answer, and what each system dreamed and said, and its metrics.

    several: a list a system, an entry for each of its targets; else of its first alone. Prompts that nobody was asked
    are left out.
    """
    samples: list[dict[str, Any]] = []
    for i, question in enumerate(exam.questions):
        if any(question.key not in found.left_out for each in measured.values() for found in each):
            said = {name: [_said(found, question.key, i) for found in each] for name, each in measured.items()}
            systems = said if several else {name: each[0] for name, each in said.items()}
            samples.append({**question.about(), "systems": systems})
    return samples


def _said(found: Measured, key: str, i: int) -> dict[str, Any]:
    """dream and answer are None where there is none, as the teacher's, which stands beside all systems."""
    if key in found.left_out:
        return {"dream": None, "answer": None, "left_out": found.left_out[key], "metrics": {}}
    spoke = bool(found.answers) and found.card.kind != "teacher"
    return {
        "dream": found.dreams[i] if spoke and found.card.dreams else None,
        "answer": found.answers[i] if spoke else None,
        "left_out": None,
        "metrics": {metric: found.at(metric, i) for metric in found.metrics},
    }


def publish(folder: Path, results: dict[str, Any]) -> None:
    """Both reports, from the results alone."""
    write_atomic(folder / "report.md", render_markdown(results))
    write_atomic(folder / "report.html", render_html(results))


def keep(folder: Path, results: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """results.json, samples.jsonl and both reports."""
    write_json_lines(folder / "samples.jsonl", samples)
    write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    publish(folder, results)


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
        if results["version"] not in READABLE or not results["systems"] or "differences" not in results:
            raise ValueError("not of this version")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is no comparison's results.json ({error}); run `dream compare` again") from error
    return results
