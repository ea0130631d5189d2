"""What dreaming is worth: the same student trained without dreams, with pauses in their place, and with them.

The trainings are a sweep's cells (configs/sweeps/ablation.yaml): the same data for as many packed tokens, with several
seeds, each a run of its own under ablation/seed-S/. Each arm is examined as any target is, on the run's held-out
prompts, and what it said is kept beside it: an interrupted ablation goes on where it was.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.exam.baselines import SHARED_STAGES, renamed
from distill.exam.examine import examine
from distill.exam.measured import NO_SIBLINGS, Measured
from distill.exam.metrics.steering import steering
from distill.exam.provenance import changed_settings, versions
from distill.exam.questions import Exam, Question, load_exam
from distill.exam.targets import How, Target
from distill.run import Run, write_atomic, write_json_lines
from distill.shipped import shipped
from distill.student.grammar import dream_size, longest_path
from distill.sweep.ablation.arms import ARMS, Reader, arm_metrics, default_arms
from distill.sweep.ablation.numbers import numbers_of, samples_of
from distill.sweep.ablation.report import render
from distill.sweep.cells import Job, train_cell
from distill.sweep.plan import Cell, plan_of, read_content
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, prompt_ids
from distill.tokens.image_tokens import Codebook, dream_of, load_codes
from distill.tokens.packing import Aligner, pack
from distill.training.checkpoint import best, latest, list_checkpoints, read_loop

VERSION = 3
"""Raised when an arm or a metric changes, so that kept measurements are made anew."""

TOLD = ("steps", "best_step", "tokens", "parameters", "seconds", "engine_seconds", "engine_parameters")
"""What the results say of a training."""


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

    arms: by default all that are not optional, those of several answers where prompts have them; "all" stands for the
    optional ones too.
    steps: of each training; by default as many as the run's student had, or train.steps. force: measure again.
    Writes results.json, samples.jsonl and report.md into ablation/. Raises MissingStage, and BadInput for an unknown
    arm, no seed, a run without dreams, or fewer than two held-out prompts.
    """
    for stage in SHARED_STAGES:
        run.require(stage)
    if unknown := [arm for arm in arms if arm not in (*ARMS, "all")]:
        raise BadInput(f"arms: {unknown[0]!r} is none of {', '.join(ARMS)} and all")
    if seeds < 1:
        raise BadInput(f"seeds: {seeds} is too few; 1 is the least, 3 or more say how much chance matters")
    trained = list_checkpoints(run)
    steps = steps or (read_loop(latest(run)).step if trained else 0) or run.settings.train.steps
    default = default_arms(run.settings.capture.samples > 1)
    wanted = [name for name in ARMS if name in arms or "all" in arms or (not arms and name in default)]
    return Ablation(run, listen, wanted, steps, force).perform(seeds)


def cells_of(run: Run, trainings: Sequence[str], seeds: int, steps: int) -> list[Cell]:
    """The trainings of an ablation, all of a seed before those of the next."""
    file = shipped("configs") / "sweeps" / "ablation.yaml"
    content = read_content(file)
    variants = {name: changes for name, changes in content["variants"].items() if name in trainings}
    if run.settings.train.retrieve and "retrieval" in variants:
        variants["retrieval"]["train.retrieve"] = run.settings.train.retrieve
    asked = {"variants": variants, "baseline": None, "seeds": seeds, "settings": {"train.steps": steps}}
    return sorted(plan_of(file, content | asked, run).cells, key=lambda cell: cell.seed)


class Ablation:
    """One ablation of one run."""

    def __init__(self, run: Run, listen: Listener, arms: list[str], steps: int, force: bool) -> None:
        self.run, self.listen, self.arms, self.steps, self.force = run, listen, arms, steps, force
        self.folder = run.path / "ablation"
        self.tokenizer = StudentTokenizer.load(run.tokenizer)
        self.codebook = Codebook.load(run.tokenizer)
        self.codes = load_codes(run.tokenizer, self.codebook)
        self.dream_tokens = dream_size(longest_path(run.settings))
        self.exam, self.left_out = self._exam()
        self.mined = [self._mined(question) for question in self.exam.questions]
        if not any(self.mined):
            raise BadInput(f"{run.triplets}: no held-out prompt has a dream: nothing to ablate; mine another run")
        lacking = {"engine": "dreaming.dream_steps=0 trains no engine"} if run.settings.dreaming.dream_steps < 1 else {}
        lacking |= {} if self.exam.has_siblings else {"sibling": NO_SIBLINGS}
        for arm in lacking.keys() & {*arms}:
            listen(Event("ablate", "warning", f"{ARMS[arm].label} left out: {lacking[arm]}"))
            arms.remove(arm)
        self.trainings: list[dict[str, Any]] = []

    def _mined(self, question: Question) -> list[int]:
        return dream_ids(self.tokenizer, dream_of(question.triplets, self.codes))

    def _exam(self) -> tuple[Exam, int]:
        """The held-out prompts that fit the student's context with any dream, and how many don't: told now, and not
        when the first training is done."""
        # Without its run an exam has no codebook: nothing is asked of the answers' concepts here.
        exam = replace(load_exam(self.run), run=None)
        fitting = [question for question in exam.questions if self._size(question) <= self.run.settings.student.context]
        if len(fitting) < 2:
            told = f"{len(fitting)} of {len(exam.questions)} held-out prompts fit the student's context"
            raise BadInput(f"{self.run.traces}: {told}; an ablation needs 2 (evaluate.prompts, student.context)")
        return replace(exam, questions=fitting), len(exam.questions) - len(fitting)

    def _size(self, question: Question) -> int:
        """Tokens of prompt, the longest dream with its tags, and answer."""
        header = prompt_ids(self.tokenizer, question.prompt, system=question.system)
        answer = Aligner(self.tokenizer, None).align(question.text, question.tokens, question.done_reason).ids
        return len(header) + max(self.dream_tokens, len(self._mined(question)) + 1) + 4 + len(answer)

    def perform(self, seeds: int) -> dict[str, Any]:
        """Train, examine and write down."""
        pack(self.run)  # once, for all children
        measured: dict[int, dict[str, Measured]] = {}
        for cell in cells_of(self.run, [ARMS[arm].training for arm in self.arms], seeds, self.steps):
            arms = [arm for arm in self.arms if ARMS[arm].training == cell.system]
            child = self._train(cell, engine="engine" in arms)
            measured.setdefault(cell.seed, {}).update(self._examine(child, cell, arms))
        measured = {seed: {arm: found[arm] for arm in self.arms} for seed, found in measured.items()}
        results = self._results(measured)
        dreams = [self.tokenizer.decode(dream) for dream in self.mined]
        write_json_lines(self.folder / "samples.jsonl", samples_of(self.exam.questions, dreams, measured))
        write_atomic(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        write_atomic(self.folder / "report.md", render(results))
        self.listen(Event("ablate", "done", f"{self.folder / 'report.md'}"))
        return results

    def _train(self, cell: Cell, engine: bool) -> Run:
        """A training, finished, and its engine where one is wanted."""
        folder = self.folder / f"seed-{cell.seed}" / cell.system
        found = train_cell(Job(cell, self.run, folder, engine, f"seed {cell.seed}, {cell.system}"), self.listen)
        if reason := found.get("engine_skipped"):
            raise BadInput(f"{folder}: there is no dream engine ({reason}); leave the engine out of --arms")
        told = {key: found[key] for key in TOLD if key in found}
        self.trainings.append({"seed": cell.seed, "training": cell.system, "computed": found["numerics"], **told})
        return Run(folder, cell.settings)

    def _examine(self, child: Run, cell: Cell, arms: Sequence[str]) -> dict[str, Measured]:
        """Arm → what the student did after its dreams, decoded greedily."""
        reader: Reader | None = None

        def opened(target: Target, how: How) -> Reader:
            nonlocal reader
            reader = reader or Reader(target, how, self.exam.questions, self.codes, child)
            reader.arm = target.spec
            return reader

        measured: dict[str, Measured] = {}
        for arm in arms:
            engine = [child.require("engine").outputs, child.settings.dreaming.keep_above] if arm == "engine" else None
            found = examine(
                Target(arm, "checkpoint", best(child), run=child),
                replace(self.exam, folder=self.folder / f"seed-{cell.seed}" / "arms" / arm),
                replace(self.run.settings.evaluate, dreams=1, temperature=0.0),
                self.run.settings.seed,
                renamed(self.listen, f"seed {cell.seed}, {arm}"),
                dream_tokens=self.dream_tokens,
                device=self.run.settings.train.device,
                force=self.force,
                only=("score-own-1", "answers"),
                opened=opened,
                also=[VERSION, arm, engine],
            )
            if found.left_out:  # only where more is read than the prompt
                text = f"{len(found.left_out)} prompts with what is retrieved for them don't fit the student's context"
                raise BadInput(f"{self.run.traces}: {text}; raise student.context, or lower train.retrieve_limit")
            measured[arm] = replace(
                found, metrics=arm_metrics(arm, self.exam.questions, found, self.tokenizer, self.mined)
            )
        if {"oracle", "sibling"} <= measured.keys():
            said = [measured[arm].answers for arm in ("oracle", "sibling")]
            measured["sibling"].metrics.update(steering(said[0], said[1], self.exam.questions, self.codebook))
        return measured

    def _results(self, measured: dict[int, dict[str, Measured]]) -> dict[str, Any]:
        """The content of results.json: what was measured, and how."""
        run, settings = self.run, self.run.settings
        return {
            "version": VERSION,
            "run": run.name,
            "source": f"dataset {settings.capture.dataset}" if settings.capture.dataset else settings.teacher.model,
            "prompts": len(self.exam.questions),
            "left_out": self.left_out,
            "dreams_tokens": float(np.mean([len(dream) for dream in self.mined])),
            "steps": self.steps,
            "arms": {arm: {"label": ARMS[arm].label, "training": ARMS[arm].training} for arm in self.arms},
            "chosen": self.arms != default_arms(settings.capture.samples > 1),
            **numbers_of(self.exam.questions, measured, settings.evaluate.bootstrap, settings.seed),
            "trainings": self.trainings,
            "settings": changed_settings(settings),
            "max_tokens": settings.evaluate.max_tokens,
            "bootstrap": settings.evaluate.bootstrap,
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
