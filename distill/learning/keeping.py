"""What keeps old answers while a student learns new ones: replay, elastic weights, and its own past.

Each step of new rows comes with as many rows of old documents, drawn by priority (replay.py), whose loss counts

    replay · (−log q(what was said)) + past · KL(p ‖ q)

with p the student's own distribution before it learned anything new: its 20 likeliest words and a tail (learning
without forgetting, arXiv:1606.09282). Elastic weights (ewc.py) pull whatever the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.backbone.model import Backbone
from distill.errors import BadInput
from distill.learning.ewc import Anchor, diagonal_fisher, drawn_loss
from distill.learning.onward import Onward
from distill.learning.replay import BETA, Memory, places_of
from distill.teacher.protocol import MAX_TOP_LOGPROBS
from distill.training.batches import Batch
from distill.training.losses import CHUNK, Targets, alternatives, tail_kernel
from distill.training.mixture import Mixture
from distill.training.step import forward_backward, move

MEMORY, FISHER = "memory.safetensors", "fisher.safetensors"
"""Beside the weights of a checkpoint."""
FISHED = 256
"""Old documents of which the Fisher information is taken."""


@dataclass(frozen=True)
class Keeping:
    """replay: what old answers count, beside new ones. past: what the student's own distribution before counts on
    them. ewc: λ of the elastic weights. memory: documents that are remembered at most."""

    replay: float = 1.0
    past: float = 0.0
    ewc: float = 0.0
    memory: int = 4096

    def __post_init__(self) -> None:
        if min(self.replay, self.past, self.ewc) < 0 or self.memory < 1:
            raise BadInput("replay, past and ewc must be 0 or more, memory 1 or more")


class Keeper:
    """was: the student before it learned anything new. memory: what it learned until then."""

    def __init__(self, learner: Onward, keeping: Keeping, was: Backbone, memory: Memory, fisher: Path | None) -> None:
        """fisher: where the Fisher information is that it was begun with; None to begin."""
        train = learner.run.settings.train
        self.learner, self.keeping, self.was, self.memory = learner, keeping, was.eval(), memory
        self.batches = learner.batches(memory.documents, Mixture.of(train), train.soft_weight)
        memory.tree.put(unfit := np.setdiff1d(np.arange(len(memory)), self.batches.usable), np.zeros(len(unfit)))
        self.empty = train.empty_dreams
        self.anchor: Anchor | None = None
        if keeping.ewc:
            self.anchor = Anchor(was, self._fisher(fisher), keeping.ewc)
            self.anchor.parameters = dict(learner.model.named_parameters())

    def _fisher(self, path: Path | None) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        device = self.was.cos.device
        if path is not None:
            return load_file(path, str(device))
        found = diagonal_fisher(self.was, self._losses())
        return {name: value.to(device) for name, value in found.items()}

    def _losses(self) -> Iterator[tuple[Tensor, int]]:
        """Of a row of old documents each."""
        seed = self.learner.run.settings.seed
        random, generator = np.random.default_rng([seed, FISHED]), torch.Generator().manual_seed(seed)
        even = Memory(self.memory.documents, self.memory.learned, np.sign(self.memory.tree.values))
        exact = self.learner.batches(self.memory.documents, self.batches.mixture.exact, 0.0)
        seen = 0
        while seen < FISHED:
            (row,) = even.draw(exact, 1, random, self.empty)
            for piece in row[:-1] or row:  # the last fills the row up
                seen += 1
                yield drawn_loss(self.was, move(exact.assemble([[piece]]), self.was.cos.device), generator)

    def backward(self, rows: int, progress: float, random: np.random.Generator) -> dict[str, float]:
        """Add the gradients of what is kept; the losses, nats. progress: 0 to 1, of the learning."""
        keeping, found, learner = self.keeping, dict[str, float](), self.learner
        if (counts := keeping.replay + keeping.past) > 0:
            chosen = self.memory.draw(self.batches, rows, random, self.empty)
            batch = move(self.batches.assemble(chosen), learner.model.cos.device)
            places = places_of(batch, chosen)
            if keeping.past:
                batch.targets, batch.chunks = of_past(self.was, batch, keeping.past / counts), None
            weights = self.memory.tree.weights(places, BETA + (1 - BETA) * progress)
            weights *= counts / weights[: batch.loss_positions].mean()
            count(batch.targets, torch.from_numpy(weights).to(batch.where.device, torch.float32))
            result = forward_backward(learner.model, batch, learner.precision, tail_kernel)
            heard = (batch.answers & (batch.targets.weight > 0)).cpu().numpy()
            which, inverse = np.unique(places[heard], return_inverse=True)
            sums = np.bincount(inverse, result["ce"].float().cpu().numpy()[heard])
            self.memory.tree.learn_losses(which, sums / np.bincount(inverse))
            there = batch.targets.weight > 0  # what fills the last chunk up is no loss
            found["replay"] = float(result["ce"][there].mean())
            if keeping.past:
                found["past"] = float(result["kl"][there].mean())
        if self.anchor is not None:
            found["ewc"] = self.anchor.pull()
        return found

    def save(self, folder: Path) -> None:
        """Into a checkpoint that is being written."""
        from safetensors.torch import save_file

        self.memory.save(folder / MEMORY)
        if self.anchor is not None:
            save_file({name: value.contiguous() for name, value in self.anchor.fisher.items()}, folder / FISHER)


def count(targets: Targets, factors: Tensor) -> None:
    """Let position i count factors[i] times."""
    targets.weight = targets.weight * factors
    if targets.strict is not None:
        targets.strict = targets.strict * factors


@torch.no_grad()
def of_past(was: Backbone, batch: Batch, soft: float) -> Targets:
    """A batch's targets with what a student itself said before as the soft ones: of weight `soft`, the rest hard.
    Within dreams, where no tail of words is, its 20 likeliest count as all."""
    hidden = was.hidden(batch.ids, batch.positions, batch.spans).flatten(0, 1).index_select(0, batch.where)
    labels = batch.targets.labels[:, None]
    slots: list[Tensor] = []
    logprobs: list[Tensor] = []
    for start in range(0, len(hidden), CHUNK):
        own = labels[start : start + CHUNK]
        told = was.lm_head(hidden[start : start + CHUNK]).float().log_softmax(-1)
        ids, both = alternatives(told, own, MAX_TOP_LOGPROBS)
        slots.append(torch.cat([own, ids], 1))
        logprobs.append(both)
    found = torch.cat(logprobs)
    found = torch.where(batch.answers[:, None], found, found.log_softmax(-1))
    weight = torch.where(batch.targets.weight > 0, soft, 0.0)
    return replace(batch.targets, slots=torch.cat(slots), logprobs=found, soft_weight=weight)
