"""A mean of the weights along a training: what is judged and shipped, while training goes on from the last ones.

Polynomial-decay averaging (arXiv:1212.1824, section 4): after step t the mean moves to the weights by
(η + 1) / (t + η). The weights in it are (t − 1) / (η + 2) steps old on average, a share of the training so far: so it
needs no end to be known beforehand, every checkpoint has a mean of its own, and the start is forgotten. A mean with a
fixed half-life would hold noise early and, in a short training, the beginning late; a uniform one over the last part
must know where the end is.
"""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn

from distill.training.sharding import part_of


class Average:
    """The mean of a model's weights, and a way to stand it in their place.

    share: mean age of the weights in the mean, as a share of the training so far; 0: there is no mean.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.parameters = dict(model.named_parameters()) if share else {}
        self.beside = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        """What the model doesn't hold: the mean; within `shipped` the weights that training goes on from."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps, 1 being the first."""
        if self.share:
            eta = 1 / self.share - 2
            for name, parameter in self.parameters.items():
                self.beside[name].lerp_(parameter, (eta + 1) / (step + eta))

    @contextlib.contextmanager
    def shipped(self) -> Generator[None]:
        """Within it the model holds the mean."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def restore(self, weights: dict[str, Tensor]) -> None:
        """The model holds a mean, as it was shipped: keep it, and go on from `weights`."""
        self._swap()
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(part_of(weights[name], parameter))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()  # FSDP2 gathers from the memory that a parameter had at first
            parameter.copy_(self.beside[name])
            self.beside[name].copy_(held)
