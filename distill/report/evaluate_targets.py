"""Any number of targets on one exam, side by side: what `dream evaluate TARGET…` shows."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import EvaluateSettings
from distill.errors import DistillError
from distill.events import Event, Listener, silent
from distill.exam.contamination import of_target
from distill.exam.cost import kept_cost
from distill.exam.examine import ExaminationsFailed, examine_all, names_of
from distill.exam.measured import Measured
from distill.exam.metrics.statistics import PairedBootstrap
from distill.exam.questions import Exam
from distill.exam.targets import Target
from distill.report.targets import render
from distill.run import write_atomic, write_json_lines

VERSION = 1


def evaluate_targets(
    targets: Sequence[Target],
    exam: Exam,
    settings: EvaluateSettings,
    listen: Listener = silent,
    *,
    seed: int = 0,
    dream_tokens: int = 66,
    device: str = "auto",
    cost: bool = True,
    force: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Examine every target; returns the content of results.json, which is written to `out` with samples.jsonl and
    report.md where a folder is given.

    A target that fails is in `failed` with its reason and in nothing else. Raises what failed where all did.
    """
    failed: dict[str, str] = {}
    try:
        measured = examine_all(
            targets, exam, settings, seed, listen, dream_tokens=dream_tokens, device=device, force=force
        )
    except ExaminationsFailed as error:
        if not error.measured:
            raise
        measured, failed = error.measured, error.failed
    systems: dict[str, Any] = {}
    bootstrap = PairedBootstrap(len(exam.questions), settings.bootstrap, seed)
    for name, target in zip(names_of(targets), targets, strict=True):
        if name in measured:
            systems[name] = _system(target, measured[name], exam, bootstrap)
            if cost:
                listen(Event("evaluate", "note", f"{name}: speed and memory, in a process of its own"))
                systems[name]["cost"] = kept_cost(
                    target, exam, settings, seed=seed, dream_tokens=dream_tokens, device=device, force=force
                )
    results = {
        "version": VERSION,
        "exam": {
            "name": exam.name,
            "teacher": exam.teacher,
            "prompts": len(exam.questions),
            "answer_bytes": sum(question.bytes for question in exam.questions),
            "teacher_ended": exam.teacher_ended,
            "digest": exam.digest,
        },
        "seed": seed,
        "settings": {**asdict(settings), "dream_tokens": dream_tokens},
        "systems": systems,
        "failed": failed,
    }
    if out is not None:
        samples = samples_of(exam, measured)
        write_json_lines(out / "samples.jsonl", samples)
        write_atomic(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_atomic(out / "report.md", render(results, samples))
    listen(Event("evaluate", "done", str(out / "report.md") if out else ""))
    return results


def _system(target: Target, measured: Measured, exam: Exam, bootstrap: PairedBootstrap) -> dict[str, Any]:
    intervals = {metric: bootstrap.interval(ratio) for metric, ratio in measured.metrics.items()}
    try:
        contamination = of_target(target, exam).to_json()
    except DistillError as error:  # a broken training set doesn't make the numbers wrong
        contamination = {"checked": False, "reason": str(error)}
    return {
        "target": target.spec,
        "kind": target.kind,
        "card": asdict(measured.card),
        "left_out": len(measured.left_out),
        "metrics": {metric: None if found is None else asdict(found) for metric, found in intervals.items()},
        "missing": measured.missing,
        "tokens_per_second": measured.tokens_per_second,
        "cost": None,
        "contamination": contamination,
    }


def samples_of(exam: Exam, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Per prompt: the teacher's answer, and each target's dream, answer and metrics, or why it was left out."""
    samples: list[dict[str, Any]] = []
    for i, question in enumerate(exam.questions):
        systems: dict[str, Any] = {}
        for name, each in measured.items():
            if question.key in each.left_out:
                systems[name] = {"left_out": each.left_out[question.key]}
                continue
            systems[name] = {
                "answer": each.answers[i],
                **({"dream": each.dreams[i]} if each.card.dreams else {}),
                "metrics": {metric: each.at(metric, i) for metric in each.metrics},
            }
        samples.append({**question.about(), "systems": systems})
    return samples
