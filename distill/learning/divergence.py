"""The generalized Jensen-Shannon divergence, from forward to reverse KL, as a kernel of the fused loss.

Over the classes c that tell teacher p from student q (the slots, all other words, what is no word: losses.py), with
m = β p + (1 − β) q (arXiv:2306.13649, section 3.2, here divided by β (1 − β), so that every β counts alike where both
are near to each other):

    D_β = KL(p ‖ m) / (1 − β) + KL(q ‖ m) / β,    ∂D_β/∂q_c = log(q_c / m_c) / β + constant

β → 0 is KL(p ‖ q), which wants all that the teacher would say; β = 1 is KL(q ‖ p), which wants nothing else.
"""

import torch
from torch import Tensor

from distill.training.losses import Kernel, tail_kernel

LEAST = 1e-8
"""Probability that a class counts for at least within m: at β = 1 what the teacher never says would cost infinitely."""


def divergence(beta: float) -> Kernel:
    """The kernel of D_β, 0 ≤ β ≤ 1; that of forward KL where β is 0. Shapes as of `tail_kernel`."""
    if beta == 0:
        return tail_kernel

    def kernel(
        z: Tensor, z_slots: Tensor, logprobs: Tensor, soft_weight: Tensor, weight: Tensor, words: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        unused = torch.isneginf(logprobs)
        parts = (z[:, :words].float(), z[:, words:].float())
        rests = [part.logsumexp(1, keepdim=True) for part in parts if part.shape[1]]
        logits = torch.cat([z_slots.masked_fill(unused, float("-inf")), *rests], 1)  # (C, S + 1 or 2): the classes
        log_q = logits.log_softmax(1)
        q, p = log_q.exp(), logprobs.exp()
        tail = (1 - p.sum(1, keepdim=True)).clamp_min(0)
        p = torch.cat([p, tail, *(torch.zeros_like(tail) for _ in rests[1:])], 1)
        p = p / p.sum(1, keepdim=True)
        log_m = (beta * p + (1 - beta) * q).clamp_min(LEAST).log()
        slope = torch.where(q > 0, log_q - log_m, 0.0) / beta
        found = (q * slope).sum(1)
        a, first = soft_weight.unsqueeze(1), torch.arange(logits.shape[1], device=z.device) == 0
        d_classes = q * (a * (slope - found.unsqueeze(1)) + 1 - a) - (1 - a) * first
        d_classes = d_classes * weight.unsqueeze(1)
        if beta < 1:
            found = found + (p * (p.clamp_min(LEAST).log() - log_m)).sum(1) / (1 - beta)
        count = z_slots.shape[1]
        rest = [
            (part - lse).exp() * d_classes[:, count + i, None]
            for i, (part, lse) in enumerate(zip(parts, rests, strict=False))
        ]
        d_slots = torch.where(unused, d_classes[:, :1], d_classes[:, :count])  # unused slots stand where slot 0 does
        return found, -log_q[:, 0], torch.cat(rest, 1).to(z.dtype), d_slots.to(z.dtype)

    return kernel
