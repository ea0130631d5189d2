"""Likelihoods and soft targets, as plain functions. Formulas and sources are in docs/metrics.md.

Shape legend: A answer tokens (EOS left out), S named alternatives a position, V student vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.teacher.protocol import TokenTargets
from distill.tokens.aligner import Aligned

LOG_2 = math.log(2)


def bits(logprobs: NDArray[np.floating[Any]]) -> float:
    """−Σ log₂ p of natural log-probabilities."""
    return float(-np.sum(logprobs, dtype=np.float64) / LOG_2)


def log_mean_exp(values: Sequence[float]) -> float:
    """log(1/K Σ exp v_k), without overflow."""
    highest = max(values)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values) / len(values))


# Soft targets.


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's distributions in the student's ids, one row for each answer token.

    ids (A, S) int64, −1 where absent; logprobs (A, S) float64, −inf where absent; top (A,) int64 the student's
    id of the teacher's likeliest token, −1 where the student has none; soft (A,) bool: False has no target.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    top: NDArray[np.int64]
    soft: NDArray[np.bool_]


def soft_targets(
    aligned: Aligned, tokens: TokenTargets, teacher_map: NDArray[np.int32], length: int
) -> SoftTargets | None:
    """Targets of the first `length` tokens of an answer that was aligned one to one; None where none is soft.

    Alternatives that the student can't name were left out by the alignment: they fall into the tail.
    """
    logprobs = aligned.slot_logprobs[:length].astype(np.float64)
    soft = np.isfinite(logprobs[:, 0])
    if not soft.any():
        return None
    logprobs[~soft] = -np.inf
    ids = np.concatenate([aligned.ids[:length, None], aligned.slot_ids[:length]], axis=1)
    likeliest = tokens.top_ids[:length, 0]
    top = np.where(likeliest >= 0, teacher_map[likeliest], -1)
    return SoftTargets(np.where(np.isfinite(logprobs), ids, -1), logprobs, top.astype(np.int64), soft)


def named_places(ids: Tensor) -> Tensor:
    """ids (A, S) with something that can be gathered where they are absent: the first of the row, or 0."""
    return torch.where(ids < 0, ids[:, :1].clamp_min(0), ids)


def bucket_divergence(named: Tensor, log_tail: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student), nats, over named tokens and one bucket for all others, and log Σ exp logits; (A,) float64.

    named (A, S): the student's logits at `named_places`; log_tail (A,): log Σ exp of all its others; ids (A, S) all
    different, −1 absent; logprobs (A, S) the teacher's, −inf absent.
    Σ_S p (log p − log q) + p_τ (log p_τ − log q_τ), p_τ = 1 − Σ_S p, q_τ = 1 − Σ_S q: a lower bound of the
    full KL (log-sum inequality). q_τ is summed over the other tokens, so that nothing cancels. Where rounding
    of stored values makes Σ_S p exceed 1, they are scaled to 1. An absent slot repeats the first one of its row, which
    counts once, whether it is absent itself or not.
    """
    repeated_place = ids < 0
    repeated_place[:, 0] = False
    named, log_tail = named.double(), log_tail.double()
    total = torch.logaddexp(log_tail, named.masked_fill(repeated_place, -torch.inf).logsumexp(-1))
    log_q, log_q_tail = named - total[:, None], log_tail - total
    log_p = logprobs.double()
    log_p = log_p - log_p.exp().sum(-1).clamp_min(1).log()[:, None]
    p_tail = 1 - log_p.exp().sum(-1)
    has_tail = p_tail > 1e-12
    kl = torch.where(torch.isfinite(log_p), log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    kl = kl + torch.where(has_tail, p_tail * (p_tail.clamp_min(1e-12).log() - log_q_tail), 0.0)
    return kl, total
