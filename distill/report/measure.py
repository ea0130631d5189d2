"""From targets to results: every system on one exam, and all that is known of it in one structure.

A system is one target, or several trainings of the same recipe that differ by their seed. What is measured is kept
(each target's answers and scores under the exam's folder), so what was interrupted goes on where it was; what is
reported is a pure function of the results.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from distill.config import EvaluateSettings, Settings
from distill.errors import BadInput, DistillError
from distill.events import Event, Listener, silent
from distill.exam.contamination import Searched, of_target
from distill.exam.cost import kept_cost
from distill.exam.examine import dream_tokens_of, examine
from distill.exam.measured import Measured
from distill.exam.metrics.catalogue import in_order
from distill.exam.provenance import machine, versions
from distill.exam.questions import Exam
from distill.exam.targets import How, Target
from distill.exam.trained_on import trained_on
from distill.report.doubts import cut_short, doubts, mixed
from distill.report.numbers import compare_numbers
from distill.report.page import render_html, render_markdown
from distill.run import write_atomic, write_json_lines

VERSION = 5
"""Raised when results.json changes its shape or its meaning, so that what is kept is measured anew."""
READABLE = (1, 4, VERSION)
"""Versions of comparisons whose reports can be written again."""
PERMUTATIONS = 10_000

Systems = Mapping[str, Sequence[Target]]


@dataclass(frozen=True)
class Measurement:
    """What is asked, and how. dream_tokens, thinking_tokens, timeout: see `How`; force: measure everything again."""

    exam: Exam
    settings: EvaluateSettings
    listen: Listener = silent
    seed: int = 0
    dream_tokens: int = How.dream_tokens
    thinking_tokens: int = How.thinking_tokens
    timeout: float = How.timeout
    device: str = "auto"
    force: bool = False

    @classmethod
    def of(
        cls,
        exam: Exam,
        settings: Settings,
        targets: Sequence[Target] = (),
        listen: Listener = silent,
        force: bool = False,
    ) -> Self:
        """As a run's settings have it; dreams are as long as the longest of the exam's run and of the targets."""
        teacher = settings.teacher
        limits = dream_tokens_of(exam.run, targets), teacher.thinking_tokens, teacher.timeout
        return cls(exam, settings.evaluate, listen, settings.seed, *limits, settings.train.device, force)

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
                        thinking_tokens=self.thinking_tokens,
                        timeout=self.timeout,
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
        self,
        systems: Systems,
        measured: Mapping[str, Sequence[Measured]],
        baseline: str,
        cost: bool,
        pairs: Sequence[tuple[str, str]] = (),
        by_seed: bool = False,
    ) -> dict[str, Any]:
        """The content of results.json. measured: may hold more than `systems`, as the teacher, who is no target.
        pairs, by_seed: see `compare_numbers`."""
        exam, settings, warnings = self.exam, self.settings, list[str]()
        searched: Searched = {}
        entries: dict[str, Any] = {}
        for name, found in measured.items():
            targets = systems.get(name, ())
            entries[name] = self._entry(targets, found, cost, searched)
            abouts = [self._tried(trained_on, target)[0] for target in targets]
            entries[name]["trained_on"] = abouts[0] if abouts else None
            warnings += mixed(name, abouts) + cut_short(name, found)
        numbers = compare_numbers(
            measured,
            baseline,
            resamples=settings.bootstrap,
            permutations=PERMUTATIONS,
            seed=self.seed,
            questions=exam.questions,
            pairs=pairs,
            by_seed=by_seed,
        )
        for name, metrics in numbers.pop("metrics").items():
            entries[name]["metrics"] = metrics
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
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
                "dreams": settings.dreams,
                "dream_tokens": self.dream_tokens,
                "seed": self.seed,
            },
            "baseline": baseline,
            "metrics": in_order({name for entry in entries.values() for name in entry["metrics"]}),
            "systems": entries,
            **numbers,
            "judge": None,
            "failed": {},
            "warnings": warnings + doubts(entries, len(exam.questions)),
            "versions": versions(),
            "machine": machine(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _entry(
        self, targets: Sequence[Target], found: Sequence[Measured], cost: bool, searched: Searched
    ) -> dict[str, Any]:
        """Of one system, its numbers apart. Trainings of one recipe share their data: the first stands for all."""

        def contamination(target: Target) -> dict[str, Any]:
            return asdict(of_target(target, self.exam, self.listen, searched))

        first = targets[0] if targets else None
        seen, reason = self._tried(contamination, first) if first else (None, "")
        return {
            "targets": [target.spec for target in targets],
            "kind": first.kind if first else found[0].card.kind,
            "seeds": len(found),
            "card": asdict(found[0].card),
            "left_out": len({key for each in found for key in each.left_out}),
            "metrics": {},
            "missing": {metric: why for each in found for metric, why in each.missing.items()},
            "tokens_per_second": found[0].tokens_per_second,
            "cost": self._cost(first) if first and cost else None,
            "contamination": seen or {"checked": False, "reason": reason} if first else None,
        }

    def _cost(self, target: Target) -> dict[str, Any]:
        self.listen(Event("evaluate", "note", f"{target.spec}: speed, one prompt at a time"))
        how = How(self.seed, self.dream_tokens, self.thinking_tokens, self.device, self.timeout)
        return kept_cost(target, self.exam, self.settings, how, force=self.force)

    def _tried(
        self, read: Callable[[Target], dict[str, Any] | None], target: Target
    ) -> tuple[dict[str, Any] | None, str]:
        """What can be read of a target, or None and why not: a broken training set doesn't make the numbers wrong."""
        try:
            return read(target), ""
        except DistillError as error:
            self.listen(Event("evaluate", "warning", f"{target.spec}: {error}"))
            return None, str(error)


def samples_of(exam: Exam, measured: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Per prompt: the teacher's answer, and what each of a system's targets dreamed and said, and its metrics. Prompts
    that nobody was asked are left out."""
    samples: list[dict[str, Any]] = []
    for i, question in enumerate(exam.questions):
        if any(question.key not in found.left_out for each in measured.values() for found in each):
            said = {name: [_said(found, question.key, i) for found in each] for name, each in measured.items()}
            samples.append({**question.about(), "systems": said})
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
        "metrics": {name: found.at(name, i) for name in found.metrics},
    }


def publish(folder: Path, results: dict[str, Any]) -> None:
    """Both reports, from the results alone."""
    write_atomic(folder / "report.md", render_markdown(results))
    write_atomic(folder / "report.html", render_html(results))


def keep(folder: Path | None, results: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """results.json, samples.jsonl and both reports, where there is a folder for them."""
    if folder is None:
        return
    write_json_lines(folder / "samples.jsonl", samples)
    write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    publish(folder, results)


def read_results(path: Path) -> dict[str, Any]:
    """A comparison's results.json. Raises BadInput where it is missing, empty, or something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["version"] not in READABLE or not results["systems"] or "differences" not in results:
            raise ValueError("not of this version")
    except OSError as error:
        raise BadInput(f"{path}: can't read it: {error.strerror}; `dream compare` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is no comparison's results.json ({error}); run `dream compare` again") from error
    return results
