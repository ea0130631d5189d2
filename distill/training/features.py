"""The teacher's hidden states, which an inherited student's are drawn to (hints, arXiv:1412.6550; arXiv:1909.10351).

Shape legend: B rows, T positions, D hidden, N positions that are compared.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.backbone.model import Backbone
from distill.corpus.teachers_source import teachers_source
from distill.errors import BadInput
from distill.events import Listener
from distill.run import Run
from distill.student.initialize import transplant
from distill.tokens.bpe import StudentTokenizer
from distill.training.batches import Batch
from distill.training.start import ABOUT, started_at


class Features:
    """A frozen teacher under the student's vocabulary. layers: of the teacher's, those that the student's come from."""

    def __init__(self, teacher: Backbone, layers: Sequence[int]) -> None:
        self.teacher = teacher.requires_grad_(False).eval()
        self.layers = list(layers)

    @classmethod
    def of(cls, run: Run, tokenizer: StudentTokenizer, device: torch.device, listen: Listener) -> "Features":
        """Of the teacher that the run's student began as. Raises BadInput where it began as something else."""
        start = started_at(run)
        source = teachers_source(run, listen) if start else ""
        if start is None or isinstance(source, str):
            raise BadInput("train.match: only a student that begins as its teacher can be drawn to it; set it to 0")
        layers: list[int] = json.loads((start / ABOUT).read_text(encoding="utf-8"))["layers"]
        return cls(transplant(source, tokenizer, run.settings.student.context).to(device), layers)

    def distance(self, batch: Batch, states: Sequence[Tensor]) -> Tensor:
        """Mean over layers and positions of ‖s − t‖² / ‖t‖² (a scalar), where both have read the same: questions, and
        answers without a dream; 0 if they have nowhere. states: (B, T, D) that leave each of the student's layers."""
        places = batch.alike.flatten().nonzero().squeeze(1)
        total = states[0].new_zeros((), dtype=torch.float32)
        if not len(places):
            return total
        theirs: list[Tensor] = []
        with torch.no_grad():
            self.teacher.hidden(batch.ids, batch.positions, batch.spans, states=theirs)
        for own, layer in zip(states, self.layers, strict=True):
            target = theirs[layer].flatten(0, 1)[places].float()
            apart = (own.flatten(0, 1)[places].float() - target).square().sum(1)
            total = total + (apart / target.square().sum(1)).mean()
        return total / len(self.layers)
