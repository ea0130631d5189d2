"""The evaluation of a run, a comparison of its student with its start, its baselines and its teacher, on prompts that
it never saw."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import EvaluateSettings
from distill.events import Event, Listener, silent
from distill.exam.baselines import check_baselines, train_baseline
from distill.exam.examine import VERSION as EXAMINATION
from distill.exam.examine import teacher_measured
from distill.exam.measured import Measured
from distill.exam.metrics.statistics import PairedBootstrap
from distill.exam.questions import load_exam
from distill.exam.targets import Kind, Target
from distill.report.measure import VERSION, Measurement, keep, samples_of
from distill.run import Run, fingerprint, sha256_file
from distill.tokens.bpe import StudentTokenizer
from distill.training.checkpoint import (
    as_trained,
    best,
    folder_of,
    read_loop,
    trained_steps,
    verify_checkpoint,
    weights_of,
)

TIMES = ("finished", "machine", "cost", "tokens_per_second", "seconds")
"""Keys of results that say how fast it went, and when and where: two evaluations of one checkpoint are equal in all
else."""


def evaluate(
    run: Run, listen: Listener = silent, force: bool = False, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Measure the best checkpoint, its start and the baselines of `evaluate.baselines`; return the main numbers.

    Writes results.json, samples.jsonl, report.md and report.html into evaluation/ and records the stage. Another
    `checkpoint` of the run is measured into evaluation/CHECKPOINT and not recorded. A system that was measured already
    is not measured again. Raises MissingStage, BadInput (no held-out answers, unknown baseline), CorruptFile
    (checkpoint) and RunMismatch (tokenizer and checkpoint don't fit).
    """
    started, own = time.monotonic(), run.settings.evaluate
    run.require("train")
    check_baselines(own.baselines)
    chosen = checkpoint or best(run)
    settings = asdict(own) | {"seed": run.settings.seed, "version": VERSION, "examination": EXAMINATION}
    settings |= {"checkpoint": chosen.name, "weights": weights_of(chosen)}
    if run.settings.dreaming.sure < 1:
        settings["sure"] = run.settings.dreaming.sure
    record = run.fresh("evaluate", settings)
    if record is not None and checkpoint is None and not force:
        listen(Event("evaluate", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    verify_checkpoint(chosen)
    folder = run.evaluation / checkpoint.name if checkpoint else run.evaluation
    results, samples = evaluate_run(run, chosen, listen, force)
    keep(folder, results, samples)
    summary = summarize(results)
    if checkpoint is None:
        mark = fingerprint(without_times(results))
        outputs = {f"evaluation/{name}": mark for name in ("results.json", "report.md", "report.html")}
        outputs["evaluation/samples.jsonl"] = sha256_file(folder / "samples.jsonl")
        run.record("evaluate", settings, outputs, summary, time.monotonic() - started)
    listen(Event("evaluate", "done", f"{folder / 'report.md'}", data=summary))
    return summary


def evaluate_run(
    run: Run, chosen: Path, listen: Listener = silent, force: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of results.json and of samples.jsonl for one checkpoint; baselines are trained if they aren't yet.

    To what every comparison holds come `run`, `checkpoint`, `tokenizer` …, and for each system its checkpoint and its
    step.
    """
    exam, seed = load_exam(run), run.settings.seed
    measurement = Measurement.of(exam, run.settings, listen=listen, force=force)
    systems = _systems(run, chosen, listen)
    # Before training its dreams are noise: only its likelihoods without one say something.
    measured, failed = measurement.measure(systems, only={"start": ("score-none",)})
    for error in failed.values():
        raise error
    (student,) = measured["student"]
    if student.left_out:
        reason = next(iter(student.left_out.values()))
        listen(Event("evaluate", "warning", f"{len(student.left_out)} held-out answers left out: {reason}"))
    measured["teacher"] = [teacher_measured(exam, student.left_out)]
    results = measurement.results(systems, measured, "student", cost=False)
    results |= {
        "run": run.name,
        "checkpoint": chosen.name,
        "weights": weights_of(chosen),
        "teacher": run.settings.source,
        "tokenizer": StudentTokenizer.load(chosen / "tokenizer").kind,
        "prompts": len(student.keys) - len(student.left_out),
        "left_out": len(student.left_out),
        "answer_tokens": student.answer_tokens,
        "answer_bytes": sum(q.bytes for q in exam.questions if q.key not in student.left_out),
        "seed": seed,
        "settings": asdict(run.settings.evaluate),
        "fall": _falls(measured, run.settings.evaluate, seed),
    }
    for name, (target,) in systems.items():
        assert target.path is not None
        results["systems"][name] |= {"checkpoint": target.path.name, "step": read_loop(target.path).step}
    return results, samples_of(exam, measured)


def _systems(run: Run, chosen: Path, listen: Listener) -> dict[str, list[Target]]:
    """Student, start and baselines."""
    kind: Kind = "run" if chosen == best(run) else "checkpoint"
    systems = {"student": [Target(run.name, kind, chosen, run=run)]}
    start = folder_of(run, 0)
    if start.is_dir():
        systems["start"] = [Target("start", "checkpoint", start, run=run)]
    for name in run.settings.evaluate.baselines:
        child = train_baseline(run, name, trained_steps(run), listen)
        systems[name] = [Target(name, "run", as_trained(child), run=child)]
    return systems


def _falls(measured: Mapping[str, Sequence[Measured]], settings: EvaluateSettings, seed: int) -> dict[str, Any]:
    """By what share the student's bits per byte fell since its start."""
    if "start" not in measured:
        return {}
    start, student = (measured[name][0].metrics["bits_per_byte"] for name in ("start", "student"))
    fall = PairedBootstrap(len(start.denominator), settings.bootstrap, seed).fall(start, student)
    return {"bits_per_byte": fall and asdict(fall)}


def without_times(value: Any) -> Any:
    """Results, or a part of them, without what differs between two evaluations of one checkpoint."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers to show in one glance, flat."""
    student = results["systems"]["student"]
    known = {name: entry["value"] for name, entry in student["metrics"].items() if entry["value"] is not None}
    summary = {"prompts": results["prompts"], "checkpoint": results["checkpoint"]}
    summary |= {name: round(value, 4) for name, value in known.items()}
    if fall := results["fall"].get("bits_per_byte"):
        summary["bits_per_byte_at_start"] = round(results["systems"]["start"]["metrics"]["bits_per_byte"]["value"], 4)
        summary["bits_per_byte_fall"] = round(fall["value"], 4)
    speed = student["tokens_per_second"]
    return summary | ({"tokens_per_second": round(speed, 1)} if speed else {})
