"""Whether an answer can stand without a dream: where the student is sure of it.

What it would say without one is begun. The answer stands if it comes to its end with a probability, the product of its
tokens' at temperature 1 among all tokens, of `dreaming.sure` or more; else it is taken back, at the first token that
rules it out, and dreamed of.
"""

import math
from collections.abc import Sequence

from distill.backbone.generate import log_likelihood
from distill.backbone.model import Backbone

LONGEST = 64
"""Tokens of an answer that may stand. A longer one is begun in vain, and is hardly ever that sure."""


class Trial:
    """An answer that is begun, of `longest` tokens at most. still: it may yet stand."""

    def __init__(self, sure: float, longest: int = LONGEST) -> None:
        self._left, self._tokens, self._longest, self.still = -math.log(sure), 0, longest, True

    def add(self, logprob: float) -> bool:
        """Another token of it came, with this natural log-probability; whether it may still stand."""
        self._left += logprob
        self._tokens += 1
        self.still = self._left >= 0 and self._tokens <= self._longest
        return self.still


def are_sure(
    model: Backbone, contexts: Sequence[list[int]], answers: Sequence[list[int]], end: int, sure: float
) -> list[bool]:
    """Whether each of the answers stands, which were written without a dream after their contexts. end: its last id."""
    trials = [Trial(sure) for _ in answers]
    for trial, logprobs in zip(trials, log_likelihood(model, contexts, answers), strict=True):
        for logprob in logprobs.tolist():
            trial.add(logprob)
    pairs = zip(trials, answers, strict=True)
    return [trial.still and bool(answer) and answer[-1] == end for trial, answer in pairs]
