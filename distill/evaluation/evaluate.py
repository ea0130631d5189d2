"""The `evaluate` stage: how well a student learned, on prompts that it never saw, beside what it can be held to."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import RunMismatch
from distill.evaluation.baselines import check_baselines, train_baseline
from distill.evaluation.examples import Example, load_examples
from distill.evaluation.measure import Examiner, Measured, measure_teacher
from distill.evaluation.report import render
from distill.evaluation.statistics import Interval, PairedBootstrap, Ratio
from distill.events import Event, Listener, silent
from distill.run import Run, fingerprint, sha256_file, write_atomic
from distill.student.model import Backbone, load_backbone
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import Codebook, load_codes
from distill.training.checkpoint import best, folder_of, latest, read_loop, verify_checkpoint
from distill.training.step import pick_device

VERSION = 1
"""Raised when a metric changes, so that kept results are measured anew."""


@dataclass(frozen=True)
class System:
    """What is measured. `dreams`: it was trained to dream; `texts`: its own answers are measured as well."""

    name: str
    checkpoint: Path
    dreams: bool
    texts: bool


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
    settings = {**asdict(run.settings.evaluate), "seed": run.settings.seed, "version": VERSION}
    record = run.fresh("evaluate", {**settings, "checkpoint": chosen.name})
    if record is not None and checkpoint is None and not force:
        listen(Event("evaluate", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    verify_checkpoint(chosen)
    folder = run.evaluation / checkpoint.name if checkpoint else run.evaluation
    results, samples = Evaluation(run, chosen, folder, listen, force).results()
    outputs = publish(folder, results, samples)
    summary = summarize(results)
    if checkpoint is None:
        outputs = {f"evaluation/{name}": digest for name, digest in outputs.items()}
        run.record("evaluate", {**settings, "checkpoint": chosen.name}, outputs, summary, time.monotonic() - started)
    listen(Event("evaluate", "done", f"{folder / 'report.md'}", data=summary))
    return summary


class Evaluation:
    """One evaluation of one checkpoint."""

    def __init__(self, run: Run, chosen: Path, folder: Path, listen: Listener, force: bool) -> None:
        self.run, self.chosen, self.folder, self.listen, self.force = run, chosen, folder, listen, force
        self.settings = run.settings.evaluate
        self.tokenizer = StudentTokenizer.load(chosen / "tokenizer")
        codes = load_codes(chosen / "tokenizer", Codebook.load(chosen / "tokenizer"))
        self.student = self._load(chosen)
        # Four lenses, each with up to `mine.steps` triplets, and the line's end and closing tag.
        self.dream_tokens = 4 * (1 + 3 * run.settings.mine.steps) + 2
        context = self.student.config.context
        self.examples, self.left_out = load_examples(run, self.tokenizer, codes, context, self.dream_tokens + 4)
        if self.left_out:
            reason = f"empty, or too long for the context of {context} tokens with their prompt and a dream"
            listen(Event("evaluate", "warning", f"{self.left_out} held-out answers left out: {reason}"))

    def results(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The content of results.json and of samples.jsonl."""
        systems = self._systems()
        self.listen(Event("evaluate", "start", f"{self.run.name}, {self.chosen.name}"))
        done = 0
        examiner = self._examiner(lambda count: None)
        total = sum(examiner.work(system.dreams, system.texts) for system in systems)
        measured: dict[str, Measured] = {}
        for system in systems:

            def progress(count: int, name: str = system.name) -> None:
                nonlocal done
                done += count
                self.listen(
                    Event("evaluate", "progress", done=done, total=total, unit="answers", data={"system": name})
                )

            measured[system.name] = self._kept(system, progress)
        measured["teacher"] = measure_teacher(self.examples)
        return self._results(systems, measured), samples_of(self.examples, measured)

    def _systems(self) -> list[System]:
        """Student, start and baselines; the baselines are trained here if they aren't yet."""
        train = self.run.settings.train
        systems = [System("student", self.chosen, train.dreams and not train.pause, texts=True)]
        start = folder_of(self.run, 0)
        if start.is_dir():
            # Before training its dreams are noise: only its likelihoods without one say something.
            systems.append(System("start", start, dreams=False, texts=False))
        for name in self.settings.baselines:
            child = train_baseline(self.run, name, read_loop(latest(self.run)).step, self.listen)
            systems.append(System(name, best(child), child.settings.train.dreams, texts=True))
        return systems

    def _examiner(self, progress: Callable[[int], None]) -> Examiner:
        return Examiner(
            tokenizer=self.tokenizer,
            examples=self.examples,
            seed=self.run.settings.seed,
            dreams=self.settings.dreams,
            temperature=self.settings.temperature,
            max_tokens=self.settings.max_tokens,
            dream_tokens=self.dream_tokens,
            listen=progress,
        )

    def _kept(self, system: System, progress: Callable[[int], None]) -> Measured:
        """A system's measurement, from its kept file where that still holds."""
        kept = self.folder / "systems" / f"{system.name}.json"
        mark = fingerprint(
            {
                "version": VERSION,
                "weights": sha256_file(system.checkpoint / "model.safetensors"),
                "settings": {**asdict(self.settings), "baselines": None, "bootstrap": None},
                "seed": self.run.settings.seed,
                "how": [system.dreams, system.texts, self.dream_tokens],
                "examples": [
                    [e.key, e.header, e.answer, e.mined, e.targets is not None, *([e.truth] if e.truth else [])]
                    for e in self.examples
                ],
            }
        )
        if not self.force and (found := Measured.kept(kept, mark)) is not None:
            progress(self._examiner(progress).work(system.dreams, system.texts))
            return found
        model = self.student if system.checkpoint == self.chosen else self._load(system.checkpoint)
        measured = self._examiner(progress).measure(model, dreams=system.dreams, texts=system.texts)
        measured.keep(kept, mark)
        return measured

    def _load(self, checkpoint: Path) -> Backbone:
        model = load_backbone(checkpoint)
        if model.config.vocab_size != self.tokenizer.vocab_size:
            raise RunMismatch(
                f"{checkpoint}: has {model.config.vocab_size} embeddings, its tokenizer {self.tokenizer.vocab_size} "
                f"tokens; run `dream train {self.run.path} --force`"
            )
        return model.to(pick_device(self.run.settings.train.device)).eval()

    def _results(self, systems: list[System], measured: dict[str, Measured]) -> dict[str, Any]:
        """All numbers with their intervals, and each system's difference to the student."""
        bootstrap = PairedBootstrap(len(self.examples), self.settings.bootstrap, self.run.settings.seed)
        student = measured["student"].metrics
        entries: dict[str, Any] = {}
        for name, system in measured.items():
            versus = {m: bootstrap.difference(r, student[m]) for m, r in system.metrics.items() if m in student}
            entries[name] = {
                "metrics": {metric: _json(bootstrap.interval(ratio)) for metric, ratio in system.metrics.items()},
                "versus_student": {} if name == "student" else {metric: _json(v) for metric, v in versus.items()},
                "tokens_per_second": system.tokens_per_second,
            }
        for system in systems:
            entries[system.name] |= {"checkpoint": system.checkpoint.name, "step": read_loop(system.checkpoint).step}
        return {
            "version": VERSION,
            "run": self.run.name,
            "checkpoint": self.chosen.name,
            "teacher": self.run.settings.source,
            "tokenizer": self.tokenizer.kind,
            "prompts": len(self.examples),
            "left_out": self.left_out,
            "answer_tokens": sum(len(example.answer) for example in self.examples),
            "answer_bytes": sum(example.bytes for example in self.examples),
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


def samples_of(examples: list[Example], measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Per prompt: the teacher's answer, and each system's dream, answer and metrics."""
    samples: list[dict[str, Any]] = []
    for i, example in enumerate(examples):
        systems: dict[str, Any] = {}
        for name, system in measured.items():
            entry: dict[str, Any] = {"metrics": {metric: _at(ratio, i) for metric, ratio in system.metrics.items()}}
            if system.dreams:
                entry["dream"] = system.dreams[i]
            if system.answers:
                entry["answer"] = system.answers[i]
            systems[name] = entry
        sample = {"key": example.key, "prompt": example.prompt, "teacher": example.text}
        if truth := example.truth:
            sample |= {"split": truth.split, "depth": truth.depth, "expected": truth.answer}
        samples.append({**sample, "systems": systems})
    return samples


def _at(ratio: Ratio, i: int) -> float | None:
    return float(ratio.numerator[i] / ratio.denominator[i]) if ratio.denominator[i] else None


def publish(folder: Path, results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, str]:
    """Write the three files; file → digest of its content, without what only says how fast it went."""
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomic(folder / "samples.jsonl", lines)
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
