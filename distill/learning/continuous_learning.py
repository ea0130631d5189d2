"""Learning from a stream, a few examples at a time: watched, and one step back where it did harm; and an encoder of
triplets of pictures that learns so.

To that each phrase has a direction of its own in its space, which only the phrase's letters decide: new ones need no
new weights. What a triplet of pictures shows is, of each role, the phrase that its state points to.

Shape legend: B triplets, 3 roles, D numbers of an embedding, C phrases.
"""

import copy
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.learning.ewc import Anchor, diagonal_fisher
from distill.learning.replay import BETA, Priorities
from distill.mining.triplets import Triplet
from distill.vision.vision_encoder import TripletEncoder

Label = tuple[str, str, str]
"""What, action, result."""
Shown = tuple[Tensor, Label]
"""Pixels (3, 3, S, S) of the three roles' pictures, and what they show."""
HELD_OUT = 8
"""Of so many examples one is not learned from, but watched."""
FISHED = 32
"""After so many more examples the Fisher information is taken anew, of as many."""


class Learner(Protocol):
    """What an online loop teaches."""

    def learn(self, examples: Sequence[Any]) -> dict[str, float]:
        """Learn from examples. Of what it returns the loop reads `watched_before` and `watched`, a loss of what is held
        out, `held_out`, how many examples ever were, and `phrases`, if it tells how many it chooses from: where these
        change, the loss is another. Nothing where nothing was to be learned."""
        ...

    def step_back(self) -> None:
        """To before the last `learn`."""
        ...

    def grow(self) -> None:
        """The last `learn` stays: the graph, if there is one, grows by it."""
        ...


class OnlineLearningLoop:
    """Teaches a learner what comes, `together` examples at a time.

    bound: what is held out may be worse by so much than it was at best; else the learner steps back, and it is said.
    best: what it was before, where a loop goes on.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        together: int = 1,
        bound: float = math.inf,
        best: float = math.inf,
        listen: Listener = silent,
    ) -> None:
        self.learner, self.together, self.bound, self.listen = learner, together, bound, listen
        self.waiting: list[Any] = []
        self._best = best
        self._of: tuple[float, float] | None = None

    def step(self, *example: Any) -> dict[str, float]:
        """One more example, as the learner takes it (several values are a tuple): what learning it brought, and
        `stepped_back`, 1 where that was undone. Nothing while more are waited for."""
        self.waiting.append(example[0] if len(example) == 1 else example)
        return self.flush() if len(self.waiting) >= self.together else {}

    def flush(self) -> dict[str, float]:
        """Learn what is waiting, however few that are. It goes on waiting where the learner raises."""
        if not self.waiting:
            return {}
        found = self.learner.learn(self.waiting)
        examples, self.waiting = self.waiting, []
        if not found:
            return {}
        of = found["held_out"], found.get("phrases", 0.0)
        if self._of not in (None, of):  # of others, of more, or among more phrases the loss is another
            self._best = math.inf
        self._of = of
        self._best = min(self._best, found["watched_before"])
        worse = found["watched"] > self._best + self.bound
        if worse:
            text = f"held-out loss {found['watched']:.3f}, {self._best:.3f} at best: stepped back"
            self.listen(Event("online", "warning", f"{text}; {len(examples)} examples are left out"))
            self.learner.step_back()
        else:
            self.learner.grow()
        return {**found, "stepped_back": float(worse)}


class Grows(Protocol):
    """A graph that triplets are added to."""

    def add(self, triplets: Iterable[Triplet]) -> object: ...


_numbers = itertools.count()


def told(labels: Iterable[Label]) -> Iterator[Triplet]:
    """What somebody said that pictures show. Each is a trace of its own: one follows from no other."""
    return (Triplet(*label, "causal", 0, f"told {next(_numbers)}", 0, "online") for label in labels)


class IncrementalLearner:
    """Learns batches of (what, action, result, label), with as many old ones drawn by priority (replay.py) from a
    memory of at most `memory`; with `ewc` weights that these hang on are held. graph: `grow` adds the last labels to
    it. steps: of a batch.
    """

    def __init__(
        self,
        encoder: TripletEncoder,
        graph: Grows | None = None,
        *,
        lr: float = 1e-3,
        steps: int = 4,
        memory: int = 512,
        ewc: float = 1.0,
        seed: int = 0,
    ) -> None:
        # A batch's own statistics would make what a picture shows hang on those beside it.
        self.encoder, self.graph, self.steps, self.most, self.ewc = encoder.eval(), graph, steps, memory, ewc
        self.optimizer = torch.optim.AdamW(encoder.parameters(), lr, weight_decay=0.01)
        self.memory: list[Shown] = []
        self.watch: list[Shown] = []
        self.phrases: dict[str, Tensor] = {}
        self.seen = 0
        self._tree = Priorities(np.zeros(memory))
        self._random = np.random.default_rng(seed)
        self._before: Any = None
        self._labels: list[Label] = []
        self._anchor: Anchor | None = None
        self._renewed = 0

    def learn(self, examples: Sequence[tuple[Any, Any, Any, Label]]) -> dict[str, float]:
        """Learn from examples, but for each eighth, which is watched. Pictures as the encoder takes them, one a role;
        label: (what, action, result).

        Returns `reconstruction`, nats of a role's phrase; `ewc`, the penalty; `accuracy`, the share of these labels
        that was right before they were learned; `watched_before`, `watched`, `held_out` and `phrases`. Raises BadInput
        for a label that is none.
        """
        shown = [self._read(*example) for example in examples]
        new: list[Shown] = []
        for one in shown:
            self.seen += 1
            if self.seen % HELD_OUT == 0:
                self.watch = [*self.watch, one][-self.most // HELD_OUT :]
            else:
                new.append(one)
        for _, label in shown:
            dim, device = self.encoder.vision.dim, self.encoder.role.device
            self.phrases |= {phrase: direction(phrase, dim).to(device) for phrase in label}
        right = float(
            np.mean([tuple(told) == label for told, (_, label) in zip(self._told(shown), shown, strict=True)])
        )
        found = {"accuracy": right, "held_out": float(self.seen // HELD_OUT), "phrases": float(len(self.phrases))}
        found["watched_before"] = self.watched()
        weights = [copy.deepcopy(own.state_dict()) for own in (self.encoder, self.optimizer)]
        self._before = (*weights, [*self.memory], self._tree.values.copy())
        self._labels = [label for _, label in shown]
        found |= self._fit(new) if new else {"reconstruction": 0.0, "ewc": 0.0}
        for one in new:
            self._remember(one)
        return {**found, "watched": self.watched()}

    def step_back(self) -> None:
        """Weights and memory as they were before the last `learn`. What is watched stays, and the phrases do."""
        if self._before is not None:
            encoder, optimizer, memory, shares = self._before
            self.encoder.load_state_dict(encoder)
            self.optimizer.load_state_dict(optimizer)
            self.memory, self._tree = [*memory], Priorities(shares.copy())

    def grow(self) -> None:
        """Add the labels of the last `learn` to the graph, where there is one."""
        if self.graph is not None:
            self.graph.add(told(self._labels))

    def predict(self, what: Any, action: Any, result: Any) -> list[Label]:
        """What triplets of pictures show, (B, 3, H, W) each or lists of pictures. Raises BadInput before it learned."""
        if not self.phrases:
            raise BadInput("nothing was learned yet; show it examples with their labels first")
        pixels = torch.stack([self.encoder.vision.pixels(images) for images in (what, action, result)], 1)
        return self._told([(own, ("", "", "")) for own in pixels])

    def watched(self) -> float:
        """Nats of a role's phrase of what is watched; 0 of nothing."""
        with torch.no_grad():
            return float(self._losses(self.watch).mean()) if self.watch else 0.0

    def _read(self, what: Any, action: Any, result: Any, label: Any) -> Shown:
        if len(label) != 3 or not all(isinstance(phrase, str) and phrase for phrase in label):
            raise BadInput(f"label: {label!r} is no (what, action, result)")
        given = [one if isinstance(one, Tensor) and one.dim() == 4 else [one] for one in (what, action, result)]
        if any(len(one) != 1 for one in given):
            raise BadInput("pictures: show one triplet after the other, each with its label")
        return torch.cat([self.encoder.vision.pixels(one) for one in given]), (label[0], label[1], label[2])

    def _logits(self, shown: Sequence[Shown]) -> Tensor:
        """(B, 3, C) of each role's phrase."""
        roles = self.encoder.roles(*torch.stack([own for own, _ in shown]).unbind(1))
        return self.encoder.logits(roles, torch.stack([*self.phrases.values()]))

    def _losses(self, shown: Sequence[Shown]) -> Tensor:
        """(B,) mean nats of the three phrases."""
        logits, names = self._logits(shown), [*self.phrases]
        said = torch.tensor([[names.index(phrase) for phrase in label] for _, label in shown], device=logits.device)
        return F.cross_entropy(logits.flatten(0, 1), said.flatten(), reduction="none").view(-1, 3).mean(1)

    @torch.no_grad()
    def _told(self, shown: Sequence[Shown]) -> list[Label]:
        logits, names = self._logits(shown), [*self.phrases]
        return [(names[a], names[b], names[c]) for a, b, c in logits.argmax(-1).tolist()]

    def _fit(self, new: Sequence[Shown]) -> dict[str, float]:
        if self.ewc and self.seen >= self._renewed + FISHED:
            self._renewed = self.seen
            self._anchor = Anchor(self.encoder, diagonal_fisher(self.encoder, self._drawn()), self.ewc)
        loss, penalty = torch.zeros(()), 0.0
        for step in range(self.steps):
            places = np.zeros(0, np.int64)
            if self.memory:
                places = self._tree.find(self._random.random(len(new)) * self._tree.total)
            losses = self._losses([*new, *(self.memory[int(i)] for i in places)])
            beta = BETA + (1 - BETA) * step / max(self.steps - 1, 1)
            weights = self._tree.weights(places, beta) if len(places) else np.zeros(0)  # their mean is made 1
            weights = torch.from_numpy(weights / weights.mean() if len(places) else weights).to(losses)
            loss = losses[: len(new)].mean()
            self.optimizer.zero_grad()
            (loss + (weights * losses[len(new) :]).sum() / max(len(places), 1)).backward()
            penalty = self._anchor.pull() if self._anchor is not None else 0.0
            torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
            self.optimizer.step()
            self._tree.learn_losses(places, losses[len(new) :].detach().double().cpu().numpy())
        return {"reconstruction": float(loss.detach()), "ewc": penalty}

    def _drawn(self) -> Iterator[tuple[Tensor, int]]:
        """Of some remembered triplets −log p of phrases that the encoder itself draws."""
        chosen = self._random.permutation(len(self.memory))[:FISHED]
        names = [*self.phrases]
        for i in chosen:
            pixels, label = self.memory[int(i)]
            with torch.no_grad():
                roles = self.encoder.roles(*pixels[None].unbind(1))
                chances = self.encoder.logits(roles, torch.stack([*self.phrases.values()]))[0].double().softmax(-1)
            drawn = [names[self._random.choice(len(names), p=own / own.sum())] for own in chances.cpu().numpy()]
            yield self._losses([(pixels, (drawn[0], drawn[1], drawn[2]))])[0] * len(label), len(label)

    def _remember(self, one: Shown) -> None:
        """Where room lacks, in the place of one that chance names."""
        place = len(self.memory)
        if place < self.most:
            self.memory.append(one)
        else:
            place = int(self._random.integers(self.most))
            self.memory[place] = one
        worst = self._tree.values.max() or 1.0
        self._tree.put(np.array([place]), np.array([worst]))


def direction(phrase: str, dim: int) -> Tensor:
    """(D,) of length 1, drawn from the phrase's own SHA-256."""
    seed = int.from_bytes(hashlib.sha256(phrase.encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).standard_normal(dim)
    return torch.from_numpy(drawn / np.linalg.norm(drawn)).float()
