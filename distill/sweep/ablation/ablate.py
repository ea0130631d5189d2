"""What dreaming is worth: the same student trained without dreams, with pauses in their place, and with them.

The trainings are a sweep's cells (configs/sweeps/ablation.yaml): the same data for as many packed tokens, with several
seeds, each a run of its own under ablation/seed-S/. Each arm is examined as any target is, on the run's held-out
prompts, and what it said is kept beside it: an interrupted ablation goes on where it was. Arms are compared as all
systems are, by the pairs that say something, paired by seed and by prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.exam.baselines import SHARED_STAGES, renamed
from distill.exam.examine import examine
from distill.exam.measured import NO_SIBLINGS, Measured
from distill.exam.metrics.steering import steering
from distill.exam.questions import Exam, Question, load_exam
from distill.exam.targets import How, Target
from distill.report.measure import Measurement, keep, samples_of
from distill.run import Run
from distill.shipped import shipped
from distill.student.grammar import dream_size, longest_path
from distill.sweep.ablation.arms import ARMS, PAIRS, Reader, arm_metrics, default_arms
from distill.sweep.cells import Job, train_cell
from distill.sweep.plan import Cell, plan_of, read_content
from distill.tokens.aligner import Aligner
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, prompt_ids
from distill.tokens.image_tokens import Codebook, dream_of, load_codes
from distill.tokens.packing import pack
from distill.training.checkpoint import as_trained, list_checkpoints, trained_steps

VERSION = 3
"""Raised when an arm or a metric changes, so that kept measurements are made anew."""


def ablate(
    run: Run,
    listen: Listener = silent,
    *,
    seeds: int = 3,
    steps: int | None = None,
    arms: Sequence[str] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Train and measure arms with `seeds` training seeds; returns the results, a comparison's.

    arms: by default all that are not optional, those of several answers where prompts have them, and what goes without
    dreams where `dreaming.sure` lets it; "all" stands for the optional ones too.
    steps: of each training; by default as many as the run's student had, or train.steps. force: measure again.
    Writes results.json, samples.jsonl, report.md and report.html into ablation/. Raises MissingStage, and BadInput for
    an unknown arm, no seed, a run without dreams, or fewer than two held-out prompts.
    """
    for stage in SHARED_STAGES:
        run.require(stage)
    if unknown := [arm for arm in arms if arm not in (*ARMS, "all")]:
        raise BadInput(f"arms: {unknown[0]!r} is none of {', '.join(ARMS)} and all")
    if seeds < 1:
        raise BadInput(f"seeds: {seeds} is too few; 1 is the least, 3 or more say how much chance matters")
    trained = list_checkpoints(run)
    steps = steps or (trained_steps(run) if trained else 0) or run.settings.train.steps
    default = default_arms(run.settings.capture.samples > 1, run.settings.dreaming.sure < 1)
    wanted = [name for name in ARMS if name in arms or "all" in arms or (not arms and name in default)]
    return Ablation(run, listen, wanted, steps, force).perform(seeds)


DECODING: dict[str, Any] = {"dreams": 1, "temperature": 0.0}
"""What an arm's exam is, whatever `evaluate` says: one dream, everything greedily."""


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
        self.codebook = Codebook.load(run.tokenizer, run.settings.teacher)
        self.codes = load_codes(run.tokenizer, self.codebook)
        self.dream_tokens = dream_size(longest_path(run.settings))
        self.exam = self._exam()
        self.mined = [self._mined(question) for question in self.exam.questions]
        if not any(self.mined):
            raise BadInput(f"{run.triplets}: no held-out prompt has a dream: nothing to ablate; mine another run")
        lacking = {"engine": "dreaming.dream_steps=0 trains no engine"} if run.settings.dreaming.dream_steps < 1 else {}
        lacking |= {} if self.exam.has_siblings else {"sibling": NO_SIBLINGS}
        lacking = {arm: why for arm, why in lacking.items() if arm in arms}
        if lacking and len(lacking) == len(arms):
            raise BadInput(f"arms: none of them can be measured: {'; '.join(lacking.values())}")
        for arm, why in lacking.items():
            listen(Event("ablate", "warning", f"{ARMS[arm].label} left out: {why}"))
            arms.remove(arm)

    def _mined(self, question: Question) -> list[int]:
        return dream_ids(self.tokenizer, dream_of(question.triplets, self.codes))

    def _exam(self) -> Exam:
        """The held-out prompts that fit the student's context with any dream: too few are told now, and not when the
        first training is done."""
        # Without its run an exam has no codebook: nothing is asked of the answers' concepts here.
        exam = replace(load_exam(self.run), run=None)
        fitting = [question for question in exam.questions if self._size(question) <= self.run.settings.student.context]
        if len(fitting) < 2:
            told = f"{len(fitting)} of {len(exam.questions)} held-out prompts fit the student's context"
            raise BadInput(f"{self.run.traces}: {told}; an ablation needs 2 (evaluate.prompts, student.context)")
        return replace(exam, questions=fitting, name=f"{len(fitting)} held-out prompts of {self.run.name}")

    def _size(self, question: Question) -> int:
        """Tokens of prompt, the longest dream with its tags, and answer."""
        header = prompt_ids(self.tokenizer, question.prompt, system=question.system)
        answer = Aligner(self.tokenizer, None).align(question.text, question.tokens, question.done_reason).ids
        return len(header) + max(self.dream_tokens, len(self._mined(question)) + 1) + 4 + len(answer)

    def perform(self, seeds: int) -> dict[str, Any]:
        """Train, examine, compare and write down."""
        pack(self.run)  # once, for all children
        trained: dict[str, list[Run]] = {arm: [] for arm in self.arms}
        measured: dict[str, list[Measured]] = {arm: [] for arm in self.arms}
        for cell in cells_of(self.run, [ARMS[arm].training for arm in self.arms], seeds, self.steps):
            arms = [arm for arm in self.arms if ARMS[arm].training == cell.system]
            child = self._train(cell, engine="engine" in arms)
            for arm, found in self._examine(child, cell, arms).items():
                trained[arm].append(child)
                measured[arm].append(found)
        systems = {
            arm: [Target(f"seed-{run.settings.seed}/{arm}", "checkpoint", as_trained(run), run=run) for run in runs]
            for arm, runs in trained.items()
        }
        asked = replace(self.run.settings, evaluate=replace(self.run.settings.evaluate, **DECODING))
        measurement = Measurement.of(self.exam, asked, listen=self.listen)
        measurement = replace(measurement, dream_tokens=self.dream_tokens)
        pairs = [(one, two) for one, two in PAIRS if one in systems and two in systems]
        results = measurement.results(systems, measured, self.arms[0], cost=False, pairs=pairs, by_seed=True)
        results["title"] = f"what dreaming is worth to {self.run.name}"
        keep(self.folder, results, samples_of(self.exam, measured))
        self.listen(Event("ablate", "done", f"{self.folder / 'report.html'}"))
        return results

    def _train(self, cell: Cell, engine: bool) -> Run:
        """A training, finished, and its engine where one is wanted."""
        folder = self.folder / f"seed-{cell.seed}" / cell.system
        found = train_cell(Job(cell, self.run, folder, engine, f"seed {cell.seed}, {cell.system}"), self.listen)
        if reason := found.get("engine_skipped"):
            raise BadInput(f"{folder}: there is no dream engine ({reason}); leave the engine out of --arms")
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
            engine = self.run.settings.dreaming.sure if arm == "sure" else engine
            found = examine(
                Target(arm, "checkpoint", as_trained(child), run=child),
                replace(self.exam, folder=self.folder / f"seed-{cell.seed}" / "arms" / arm),
                replace(self.run.settings.evaluate, **DECODING),
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
                found,
                metrics=arm_metrics(arm, self.exam.questions, found, self.tokenizer, self.mined),
                missing={},
                card=replace(found.card, name=arm, note=ARMS[arm].label),
            )
        if {"oracle", "sibling"} <= measured.keys():
            said = [measured[arm].answers for arm in ("oracle", "sibling")]
            measured["sibling"].metrics.update(steering(said[0], said[1], self.exam.questions, self.codebook))
        return measured
