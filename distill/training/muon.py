"""Muon (arXiv:2502.16982): matrices move by an orthogonalized momentum, everything else by AdamW.

torch.optim.Muon orthogonalizes in bfloat16, which many CPUs only emulate: there it would take longer than the rest of
a step. Here it is done in the precision that the training chose.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.training.sharding import full, part_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton–Schulz iteration, steep at 0: five rounds bring singular values to between 0.7 and 1.2."""
ROUNDS = 5
MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of an update's entries, as AdamW's are: learning rate and weight decay serve both."""


def orthogonalize(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """U Vᵀ, roughly, of a matrix U S Vᵀ (R, C)."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / x.norm().clamp_min(1e-7)).to(precision)  # no singular value above 1
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.AdamW):
    """AdamW, in which the groups marked `muon` are Muon's.

    Their update, with momentum M ← 0.95 M + 0.05 G and Nesterov's look ahead, is
    W ← W − lr (0.2 √max(R, C) · orthogonalize(0.05 G + 0.95 M) + λ W).
    """

    precision = torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            if group.get("muon"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group["lr"], group["weight_decay"])
                        parameter.grad = None  # AdamW passes over what has none
        return super().step(closure)

    def _move(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalize(full(gradient.lerp(momentum, MOMENTUM)), self.precision)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(part_of(update.to(parameter.dtype), parameter), alpha=-lr * RMS * max(parameter.shape) ** 0.5)
