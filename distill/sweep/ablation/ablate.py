"""What dreaming is worth: the same student trained without dreams, with pauses in their place, and with them.

All see the same data for as many packed tokens, with several training seeds. Each training is a run of its own under
ablation/seed-S/; each arm's measurement is kept beside it, so that an interrupted ablation goes on where it was.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.backbone.model import load_backbone
from distill.config import Settings
from distill.errors import BadInput, RunMismatch
from distill.events import Event, Listener, silent
from distill.exam.baselines import renamed, train_child
from distill.exam.provenance import changed_settings, versions
from distill.run import Run, fingerprint, sha256_file, write_atomic, write_json_lines
from distill.student.grammar import dream_size, longest_path
from distill.sweep.ablation.arms import ARMS, Measured, Student
from distill.sweep.ablation.examples import Example, load_examples
from distill.sweep.ablation.numbers import numbers_of, samples_of
from distill.sweep.ablation.report import render
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import Codebook, load_codes
from distill.tokens.packing import pack
from distill.training.checkpoint import best, latest, list_checkpoints, read_loop, verify_checkpoint
from distill.training.step import pick_device

VERSION = 2
"""Raised when an arm or a metric changes, so that kept measurements are made anew."""


def _train_as(settings: Settings, dreams: bool = True, pause: bool = False, retrieve: str = "") -> None:
    settings.train.dreams, settings.train.pause, settings.train.retrieve = dreams, pause, retrieve


TRAININGS: dict[str, Callable[[Settings], None]] = {
    "nodream": partial(_train_as, dreams=False),
    "pause": partial(_train_as, pause=True),
    "dreams": _train_as,
    "retrieval": lambda settings: _train_as(settings, retrieve=settings.train.retrieve or "neighbourhood"),
}
"""Name → what it changes in the student's settings."""


def ablate(
    run: Run,
    listen: Listener = silent,
    *,
    seeds: int = 3,
    steps: int | None = None,
    arms: Sequence[str] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Train and measure arms with `seeds` training seeds; returns the results.

    arms: by default all that are not optional; "all" stands for the optional ones too.
    steps: of each training; by default as many as the run's student had, or train.steps. force: measure again.
    Writes results.json, samples.jsonl and report.md into ablation/. Raises MissingStage, and BadInput for an unknown
    arm, no seed, a run without dreams, or fewer than two held-out prompts.
    """
    for stage in ("capture", "mine", "tokenize"):
        run.require(stage)
    if unknown := [arm for arm in arms if arm not in (*ARMS, "all")]:
        raise BadInput(f"arms: {unknown[0]!r} is none of {', '.join(ARMS)} and all")
    if seeds < 1:
        raise BadInput(f"seeds: {seeds} is too few; 1 is the least, 3 or more say how much chance matters")
    trained = list_checkpoints(run)
    steps = steps or (read_loop(latest(run)).step if trained else 0) or run.settings.train.steps
    wanted = [name for name, arm in ARMS.items() if name in arms or "all" in arms or not (arms or arm.optional)]
    ablation = Ablation(run, listen, wanted, steps, force)
    measured = {run.settings.seed + i: ablation.measure(run.settings.seed + i) for i in range(seeds)}
    results = ablation.results(measured)
    samples = samples_of(ablation.examples, ablation.tokenizer, measured)
    write_json_lines(ablation.folder / "samples.jsonl", samples)
    write_atomic(ablation.folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomic(ablation.folder / "report.md", render(results))
    listen(Event("ablate", "done", f"{ablation.folder / 'report.md'}"))
    return results


class Ablation:
    """One ablation of one run."""

    def __init__(self, run: Run, listen: Listener, arms: list[str], steps: int, force: bool) -> None:
        self.run, self.listen, self.arms, self.steps, self.force = run, listen, arms, steps, force
        self.folder = run.path / "ablation"
        self.tokenizer = StudentTokenizer.load(run.tokenizer)
        self.codebook = Codebook.load(run.tokenizer)
        self.dream_tokens = dream_size(longest_path(run.settings))
        self.examples, self.left_out = self._examples("dreams", run.settings.evaluate.prompts)
        self._check()
        if "engine" in arms and run.settings.dreaming.dream_steps < 1:
            listen(Event("ablate", "warning", "no engine dreams: dreaming.dream_steps=0 trains no engine"))
            arms.remove("engine")
        pack(run)  # once, for all children
        self.trainings: list[dict[str, Any]] = []

    def _settings(self, training: str, seed: int) -> Settings:
        settings = copy.deepcopy(self.run.settings)
        settings.seed = seed
        TRAININGS[training](settings)
        return settings

    def _examples(self, training: str, limit: int = 0, seed: int | None = None) -> tuple[list[Example], int]:
        """Held-out prompts as a training's student is given them, and how many were left out."""
        settings = self._settings(training, self.run.settings.seed if seed is None else seed)
        settings.evaluate.prompts = limit
        codes, context = load_codes(self.run.tokenizer, self.codebook), settings.student.context
        run = Run(self.run.path, settings)
        return load_examples(run, self.tokenizer, codes, context, self.dream_tokens + 4)

    def _retrieved(self, seed: int) -> list[Example]:
        """The same prompts with what is retrieved for each."""
        found = {example.key: example for example in self._examples("retrieval", seed=seed)[0]}
        if missing := sum(example.key not in found for example in self.examples):
            text = f"{missing} prompts with what is retrieved for them don't fit the student's context"
            raise BadInput(f"{self.run.traces}: {text}; raise student.context, or lower train.retrieve_limit")
        return [found[example.key] for example in self.examples]

    def _check(self) -> None:
        if len(self.examples) < 2:
            raise BadInput(f"{self.run.traces}: has 1 usable held-out prompt; an ablation needs 2 (evaluate.prompts)")
        if not any(example.mined for example in self.examples):
            raise BadInput(
                f"{self.run.triplets}: no held-out prompt has a dream, so there is nothing to ablate; mine another run"
            )

    # Measuring.
    def measure(self, seed: int) -> dict[str, Measured]:
        """Arm → what it did with this training seed."""
        found: dict[str, Measured] = {}
        for training in TRAININGS:
            arms = [arm for arm in self.arms if ARMS[arm].training == training]
            if arms:
                child = self._child(seed, training, engine="engine" in arms)
                found |= self._measure_child(child, seed, training, arms)
        return {arm: found[arm] for arm in self.arms}

    def _child(self, seed: int, training: str, engine: bool) -> Run:
        """A training, finished, and its engine where one is wanted."""
        folder, stage = self.folder / f"seed-{seed}" / training, f"seed {seed}, {training}"
        child = train_child(self.run, folder, self._settings(training, seed), self.steps, stage, self.listen)
        record = child.require("train")
        entry = {"seed": seed, "training": training, "seconds": record.seconds, "computed": record.summary["numerics"]}
        entry |= {key: record.summary[key] for key in ("steps", "best_step", "tokens", "parameters")}
        if engine:
            from distill.training.engine.phases import train_engine

            listen = renamed(self.listen, f"{stage}, engine")
            try:
                train_engine(child, listen)
            except RunMismatch:
                listen(Event("engine", "note", "the settings of dreaming changed: training the engine anew"))
                train_engine(child, listen, force=True)
            made = child.require("engine")
            if reason := made.summary.get("skipped"):
                raise BadInput(f"{child.path}: there is no dream engine ({reason}); leave the engine out of --arms")
            entry |= {"engine_seconds": made.seconds, "engine_parameters": made.summary.get("parameters")}
        self.trainings.append(entry)
        return child

    def _measure_child(self, child: Run, seed: int, training: str, arms: list[str]) -> dict[str, Measured]:
        checkpoint = best(child)
        verify_checkpoint(checkpoint)
        examples = self._retrieved(seed) if training == "retrieval" else self.examples
        stage, done, total = f"seed {seed}, {training}, arms", 0, 2 * len(examples) * len(arms)
        self.listen(Event(stage, "start", ", ".join(arms)))

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self.listen(Event(stage, "progress", done=done, total=total, unit="answers"))

        student: Student | None = None
        found: dict[str, Measured] = {}
        for arm in arms:
            kept, mark = (
                self.folder / f"seed-{seed}" / "arms" / f"{arm}.json",
                self._mark(child, checkpoint, arm, examples),
            )
            measured = None if self.force else Measured.kept(kept, mark)
            if measured is None:
                student = student or self._student(child, checkpoint, examples, progress, "engine" in arms)
                measured = student.measure(arm)
                measured.keep(kept, mark)
            else:
                progress(2 * len(examples))
            found[arm] = measured
        return found

    def _mark(self, child: Run, checkpoint: Path, arm: str, examples: list[Example]) -> str:
        """Of all that an arm's numbers depend on."""
        return fingerprint(
            {
                "version": VERSION,
                "arm": arm,
                "weights": sha256_file(checkpoint / "model.safetensors"),
                "engine": child.require("engine").outputs if arm == "engine" else None,
                "keep_above": self.run.settings.dreaming.keep_above if arm == "engine" else None,
                "how": [self.run.settings.seed, self.dream_tokens, self.run.settings.evaluate.max_tokens],
                "examples": [[e.key, e.header, e.answer, e.mined, e.truth and asdict(e.truth)] for e in examples],
            }
        )

    def _student(
        self, child: Run, checkpoint: Path, examples: list[Example], progress: Callable[[int], None], engine: bool
    ) -> Student:
        model = load_backbone(checkpoint).to(pick_device(self.run.settings.train.device)).eval()
        dreamer = None
        if engine:
            from distill.dream.engine import DreamEngine

            dreamer = DreamEngine.load(child.engine, self.codebook, model.config.hidden).to(model.cos.device)
        return Student(
            model,
            self.tokenizer,
            examples,
            dreamer,
            seed=self.run.settings.seed,
            dream_tokens=self.dream_tokens,
            max_tokens=self.run.settings.evaluate.max_tokens,
            keep_above=self.run.settings.dreaming.keep_above,
            listen=progress,
        )

    def results(self, measured: dict[int, dict[str, Measured]]) -> dict[str, Any]:
        """The content of results.json: what was measured, and how."""
        run, settings = self.run, self.run.settings
        numbers = numbers_of(self.examples, measured, settings.evaluate.bootstrap, settings.seed)
        return {
            "version": VERSION,
            "run": run.name,
            "source": f"dataset {settings.capture.dataset}" if settings.capture.dataset else settings.teacher.model,
            "prompts": len(self.examples),
            "left_out": self.left_out,
            "dreams_tokens": float(np.mean([len(e.mined) for e in self.examples])),
            "steps": self.steps,
            "arms": {arm: {"label": ARMS[arm].label, "training": ARMS[arm].training} for arm in self.arms},
            "chosen": self.arms != [name for name, arm in ARMS.items() if not arm.optional],
            **numbers,
            "trainings": self.trainings,
            "settings": changed_settings(settings),
            "max_tokens": settings.evaluate.max_tokens,
            "bootstrap": settings.evaluate.bootstrap,
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
