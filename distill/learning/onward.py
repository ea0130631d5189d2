"""What trainings have in common that go on from a trained student: `see`, `polish`, `learn` and `reward`."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.backbone.device import pick_device
from distill.backbone.model import load_backbone
from distill.errors import BadInput
from distill.run import Run, sha256_file
from distill.student.grammar import DreamGrammar, longest_path
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training import checkpoint
from distill.training.batches import Batches
from distill.training.checkpoint import LoopState
from distill.training.losses import tail_kernel
from distill.training.mixture import Mixture
from distill.training.step import make_optimizer
from distill.training.validate import validate
from distill.vision import PROJECTOR


def take_back(run: Run, stage: str) -> int:
    """Delete what a stage left in the run, and what went on from there; returns how many checkpoints that were."""
    shutil.rmtree(run.path / "tensorboard" / stage, ignore_errors=True)
    return checkpoint.drop(run, stage)


class Onward:
    """The run's best student with a new optimizer, its training's batches and those of validation.

    anew: the stage that takes the place of what it left before; it begins with the student before that. begun: the
    checkpoint that it goes on from. Raises MissingStage without one, CorruptFile for an altered one.
    """

    def __init__(self, run: Run, lr: float, precision: str = "float32", anew: str = "") -> None:
        self.run, self.precision, self.anew, train = run, precision, anew, run.settings.train
        self.tokenizer = StudentTokenizer.load(run.tokenizer)
        self.begun = checkpoint.best(run, anew)
        checkpoint.verify_checkpoint(self.begun)
        self._newest = self.begun
        self.model = load_backbone(self.begun).to(pick_device(train.device, "train.device"))
        self.model.recompute = train.recompute
        self.optimizer = make_optimizer(self.model, lr, (train.betas[0], train.betas[1]), train.weight_decay)
        self.grammar, self.charged = (
            DreamGrammar(self.tokenizer, longest_path(run.settings), whole) for whole in (True, False)
        )
        mixture = Mixture.of(train)
        self.given, self.validation = (
            self.batches(Documents.load(run.data / name), how, train.soft_weight)
            for name, how in (("train", mixture), ("validation", mixture.exact))
        )

    def batches(self, documents: Documents, mixture: Mixture, soft: float) -> Batches:
        context, settings = self.model.config.context, self.run.settings
        return Batches(
            documents, self.tokenizer, context, mixture, settings.seed, soft, self.charged, settings.train.strict
        )

    def bits_per_byte(self) -> float:
        """Of the validation answers."""
        rows = self.run.settings.train.batch_rows
        found = validate(self.model, self.validation, rows, self.precision, tail_kernel)
        return round(found["validation_bits_per_byte"], 4)

    def fitting(self, documents: Documents, further: Sequence[Sequence[int]] = ()) -> list[int]:
        """Those whose prompts leave room for a reply; further prompts have the numbers after theirs. Raises BadInput
        where none does."""
        context = self.model.config.context
        lengths = [np.diff(documents.prompt_ends, prepend=0), np.array([len(ids) for ids in further], np.int64)]
        fit = np.flatnonzero(np.concatenate(lengths) < context // 2)
        if not len(fit):
            raise BadInput(f"student.context={context}: no prompt fits into half of it; raise it")
        return fit.tolist()

    def descend(self, rate: float | None = None) -> None:
        """A step along the gradients that there are. rate: the learning rate, from now on."""
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.settings.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, base: LoopState, steps: int, stage: str, told: Mapping[str, Any]) -> Path:
        """A checkpoint so many steps after `base`, the best of the run. told: what it knows of its stage."""
        step = base.step + steps
        state = replace(base, step=step, best_step=step, settings={**base.settings, stage: told})
        self._newest = checkpoint.save_checkpoint(self.run, self.model, self.optimizer, state, {}, {}, self.beside)
        return self._newest

    def beside(self, folder: Path) -> None:
        """Write what a checkpoint holds besides into its folder: the projector, where the student reads pictures."""
        if (sight := self._newest / PROJECTOR).is_file():
            shutil.copyfile(sight, folder / PROJECTOR)

    def keep(
        self, base: LoopState, steps: int, stage: str, told: Mapping[str, Any], before: Sequence[Path] | None = None
    ) -> None:
        """`save` in the place of what the stage left before, or of these checkpoints."""
        before = checkpoint.of_stage(self.run, stage) if before is None else before
        if self.anew:  # the record is of what goes now
            self.run.forget(stage)
        saved = self.save(base, steps, stage, told)
        for path in before:
            if path != saved:
                checkpoint.delete(path)

    def board(self, stage: str, done: int) -> Any:
        """TensorBoard's writer into RUN/tensorboard/STAGE, after so many steps or rounds: of later ones, which a kill
        left there, nothing is shown."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.run.path / "tensorboard" / stage), purge_step=done + 1)

    def record(self, stage: str, how: Mapping[str, Any], summary: Mapping[str, Any], seconds: float) -> None:
        """Write down that the stage is done."""
        weights = checkpoint.best(self.run) / "model.safetensors"
        outputs = {str(weights.relative_to(self.run.path)): sha256_file(weights)}
        self.run.record(stage, how, outputs, summary, seconds)
