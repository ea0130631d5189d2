"""The `evaluate` stage: how well a student learned, on prompts that it never saw, beside what it can be held to."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.events import Event, Listener, silent
from distill.exam.baselines import check_baselines, train_baseline
from distill.exam.examine import VERSION as EXAMINATION
from distill.exam.examine import dream_tokens_of, examine, teacher_measured
from distill.exam.measured import Measured
from distill.exam.metrics.statistics import Interval, PairedBootstrap, paired
from distill.exam.questions import Exam, load_exam
from distill.exam.targets import Kind, Target
from distill.report.evaluation import render
from distill.run import Run, fingerprint, sha256_file, write_atomic, write_json_lines
from distill.tokens.bpe import StudentTokenizer
from distill.training.checkpoint import best, folder_of, latest, read_loop, verify_checkpoint

VERSION = 3
"""Raised when a metric changes, so that kept results are measured anew."""


@dataclass(frozen=True)
class System:
    """What is measured. only: these phases of an examination alone; () for all."""

    name: str
    target: Target
    only: tuple[str, ...] = ()


def evaluate(
    run: Run, listen: Listener = silent, force: bool = False, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Measure the best checkpoint, its start and the baselines of `evaluate.baselines`; return the main numbers.

    Writes results.json, samples.jsonl and report.md into evaluation/ and records the stage. Another `checkpoint`
    of the run is measured into evaluation/CHECKPOINT and not recorded. A system that was measured already is
    not measured again. Raises MissingStage, BadInput (no held-out answers, unknown baseline), CorruptFile
    (checkpoint) and RunMismatch (tokenizer and checkpoint don't fit).
    """
    started = time.monotonic()
    run.require("train")
    check_baselines(run.settings.evaluate.baselines)
    chosen = checkpoint or best(run)
    settings = asdict(run.settings.evaluate)
    settings |= {"seed": run.settings.seed, "version": VERSION, "examination": EXAMINATION}
    record = run.fresh("evaluate", {**settings, "checkpoint": chosen.name})
    if record is not None and checkpoint is None and not force:
        listen(Event("evaluate", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    verify_checkpoint(chosen)
    folder = run.evaluation / checkpoint.name if checkpoint else run.evaluation
    results, samples = Evaluation(run, chosen, listen, force).results()
    outputs = publish(folder, results, samples)
    summary = summarize(results)
    if checkpoint is None:
        outputs = {f"evaluation/{name}": digest for name, digest in outputs.items()}
        run.record("evaluate", {**settings, "checkpoint": chosen.name}, outputs, summary, time.monotonic() - started)
    listen(Event("evaluate", "done", f"{folder / 'report.md'}", data=summary))
    return summary


class Evaluation:
    """One evaluation of one checkpoint."""

    def __init__(self, run: Run, chosen: Path, listen: Listener, force: bool) -> None:
        self.run, self.chosen, self.listen, self.force = run, chosen, listen, force
        self.settings = run.settings.evaluate
        self.exam = load_exam(run)

    def results(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The content of results.json and of samples.jsonl."""
        systems = self._systems()
        measured = {system.name: self._measure(system) for system in systems}
        left_out = measured["student"].left_out
        if left_out:
            reason = next(iter(left_out.values()))
            self.listen(Event("evaluate", "warning", f"{len(left_out)} held-out answers left out: {reason}"))
        measured["teacher"] = teacher_measured(self.exam, left_out)
        return self._results(systems, measured), samples_of(self.exam, measured)

    def _systems(self) -> list[System]:
        """Student, start and baselines; the baselines are trained here if they aren't yet."""
        kind: Kind = "run" if self.chosen == best(self.run) else "checkpoint"
        systems = [System("student", Target(self.run.name, kind, self.chosen, run=self.run))]
        start = folder_of(self.run, 0)
        if start.is_dir():
            # Before training its dreams are noise: only its likelihoods without one say something.
            systems.append(System("start", Target("start", "checkpoint", start, run=self.run), only=("score-none",)))
        for name in self.settings.baselines:
            child = train_baseline(self.run, name, read_loop(latest(self.run)).step, self.listen)
            systems.append(System(name, Target(name, "run", best(child), run=child)))
        return systems

    def _measure(self, system: System) -> Measured:
        return examine(
            system.target,
            self.exam,
            self.settings,
            self.run.settings.seed,
            self.listen,
            dream_tokens=dream_tokens_of(self.run),
            device=self.run.settings.train.device,
            force=self.force,
            only=system.only,
        )

    def _results(self, systems: list[System], measured: dict[str, Measured]) -> dict[str, Any]:
        """All numbers with their intervals, and each system's difference to the student."""
        bootstrap = PairedBootstrap(len(self.exam.questions), self.settings.bootstrap, self.run.settings.seed)
        student = measured["student"]
        entries: dict[str, Any] = {}
        for name, system in measured.items():
            versus = {
                metric: bootstrap.difference(*paired(ratio, student.metrics[metric]))
                for metric, ratio in system.metrics.items()
                if metric in student.metrics
            }
            entries[name] = {
                "metrics": {metric: _json(bootstrap.interval(ratio)) for metric, ratio in system.metrics.items()},
                "missing": system.missing,
                "versus_student": {} if name == "student" else {metric: _json(v) for metric, v in versus.items()},
                "tokens_per_second": system.tokens_per_second,
            }
        for system in systems:
            assert system.target.path is not None
            step = read_loop(system.target.path).step
            entries[system.name] |= {"checkpoint": system.target.path.name, "step": step}
        return {
            "version": VERSION,
            "run": self.run.name,
            "checkpoint": self.chosen.name,
            "teacher": self.run.settings.source,
            "tokenizer": StudentTokenizer.load(self.chosen / "tokenizer").kind,
            "prompts": len(student.keys) - len(student.left_out),
            "left_out": len(student.left_out),
            "answer_tokens": student.answer_tokens,
            "answer_bytes": sum(q.bytes for q in self.exam.questions if q.key not in student.left_out),
            "seed": self.run.settings.seed,
            "settings": asdict(self.settings),
            "systems": entries,
            "fall": self._falls(bootstrap, measured),
        }

    def _falls(self, bootstrap: PairedBootstrap, measured: dict[str, Measured]) -> dict[str, Any]:
        """By what share the student's bits per byte fell since its start."""
        if "start" not in measured:
            return {}
        start, student = measured["start"].metrics, measured["student"].metrics
        names = [name for name in start if name.startswith("bits_per_byte") and name in student]
        return {name: _json(bootstrap.fall(start[name], student[name])) for name in names}


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def samples_of(exam: Exam, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Per prompt: the teacher's answer, and each system's dream, answer and metrics. Prompts that no system was asked
    are left out."""
    samples: list[dict[str, Any]] = []
    for i, question in enumerate(exam.questions):
        systems: dict[str, Any] = {}
        for name, system in measured.items():
            if question.key in system.left_out:
                continue
            entry: dict[str, Any] = {"metrics": {metric: system.at(metric, i) for metric in system.metrics}}
            if system.answers and system.card.dreams:
                entry["dream"] = system.dreams[i]
            # What the teacher said stands beside all systems.
            if system.answers and system.card.kind != "teacher":
                entry["answer"] = system.answers[i]
            systems[name] = entry
        if systems:
            samples.append({**question.about(), "systems": systems})
    return samples


def publish(folder: Path, results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, str]:
    """Write the three files; file → digest of its content, without what only says how fast it went."""
    write_json_lines(folder / "samples.jsonl", samples)
    write_atomic(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomic(folder / "report.md", render(results, samples))
    timeless = without_speed(results)
    return {
        "results.json": fingerprint(timeless),
        "samples.jsonl": sha256_file(folder / "samples.jsonl"),
        "report.md": fingerprint(timeless),
    }


def without_speed(results: dict[str, Any]) -> dict[str, Any]:
    """Results without tokens per second: two evaluations of one checkpoint are equal in all else."""
    systems = {
        name: {key: value for key, value in system.items() if key != "tokens_per_second"}
        for name, system in results["systems"].items()
    }
    return {**results, "systems": systems}


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers to show in one glance, flat."""
    summary: dict[str, Any] = {"prompts": results["prompts"], "checkpoint": results["checkpoint"]}
    student = results["systems"]["student"]
    summary |= {name: round(entry["value"], 4) for name, entry in student["metrics"].items() if entry}
    fall = results["fall"].get("bits_per_byte")
    if fall:
        summary["bits_per_byte_at_start"] = round(results["systems"]["start"]["metrics"]["bits_per_byte"]["value"], 4)
        summary["bits_per_byte_fall"] = round(fall["value"], 4)
    summary["tokens_per_second"] = round(student["tokens_per_second"] or 0.0, 1)
    return summary
