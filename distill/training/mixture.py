"""What of a document varies from epoch to epoch: which dream it holds, and how well it is read."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distill.config import TrainSettings


@dataclass(frozen=True)
class Mixture:
    """Shares of documents by what is in their think block, of their answers' tokens that are read as others, and of
    what is not read of their questions, by their positions, and of mined dreams that stutter; and what a dream's tokens
    weigh in the loss. See TrainSettings."""

    dreams: bool
    empty: float
    drafts: float
    pause: bool = False
    noise: float = 0.0
    bottleneck: float = 0.0
    prompt_dropout: float = 0.0
    told: bool = False
    gaps: float = 0.0
    stutter: float = 0.0
    dream_weight: float = 1.0

    @classmethod
    def of(cls, settings: TrainSettings) -> "Mixture":
        names = ("noise", "bottleneck", "prompt_dropout", "told", "gaps", "stutter", "dream_weight")
        drafts = 0.0 if settings.pause else settings.drafts_share
        same = {name: getattr(settings, name) for name in names}
        return cls(settings.dreams, settings.empty_dreams, drafts, settings.pause, **same)

    @property
    def exact(self) -> "Mixture":
        """The same of documents that are read as they are."""
        return replace(self, noise=0.0, gaps=0.0, stutter=0.0)


def stuttered(
    dream: Sequence[int], lenses: Collection[int], most: int | None, random: np.random.Generator
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A dream's ids, in which some steps of each lens are said twice, one after the other; and the places of what is
    said for the second time. A lens has `most` steps then (None: twice its own), or fewer.

    Who learns from that can't count steps, for there may be more than an answer has; what comes next, and where a lens
    ends, only what was said tells. And it reads dreams longer than any that it learns to write.
    """
    begins = [i for i, id in enumerate(dream) if id in lenses]
    ids, said = list(dream[: begins[0] if begins else len(dream)]), list[int]()
    for begin, end in zip(begins, [*begins[1:], len(dream)], strict=True):
        steps = [dream[i : i + 3] for i in range(begin + 1, end, 3)]
        room = len(steps) if most is None else min(len(steps), most - len(steps))
        twice = random.permutation(len(steps))[: random.integers(room + 1)] if room > 0 else ()
        ids.append(dream[begin])
        for number, step in enumerate(steps):
            ids += step
            if number in twice:
                said += range(len(ids), len(ids) + len(step))
                ids += step
    return tuple(ids), tuple(said)
