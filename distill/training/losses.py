"""What the student is trained to minimize, fused with the projection to the vocabulary.

The logits of all positions are never held at once: they are made, turned into loss and gradient, and dropped
chunk by chunk.

Shape legend: M positions that carry loss, D hidden, V vocabulary, S target slots (slot 0 is the token that the
teacher sampled; then its top alternatives, as far as they are in the student's vocabulary).

The soft loss of one position, with teacher p and student q over the slots and one tail class τ for all other words:

    KL = Σ_S p_i (log p_i − log q_i) + p_τ (log p_τ − log q_τ),   p_τ = 1 − Σ_S p_i,   q_τ = Σ_{words j∉S} q_j
    loss = a·KL + (1 − a)·(−log q_0)

The tail holds words alone: what a student has besides (image tokens, control tokens) its teacher can't say, so that
its probability, for which p = 0, is a loss. By the log-sum inequality KL is a lower bound of the divergence over the
whole vocabulary, and equal to it when student and teacher agree within the tail. With softmax logits z its gradient is

    ∂/∂z_j = q_j − a p_j − (1 − a)[j = slot 0]          on the slots
    ∂/∂z_j = (q_j / q_τ) (q_τ − a p_τ)                  of other words
    ∂/∂z_j = q_j                                        of what is no word

and log q_τ comes from a log-sum-exp over the tail itself, so nothing cancels when the tail is tiny.

What a position's grammar forbids costs g·(−log Σ_allowed q_j) more (the semantic loss, arXiv:1711.11157): natively a
mask keeps to the grammar, but where none runs, as in Ollama, the weights alone must.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.backbone.device import sent

CHUNK = 512
"""Positions projected at once: 512 × 8,192 float32 logits are 16 MiB."""
LOGITS = 2**26
"""Logits that a GPU makes at once, 256 MiB of float32: fewer don't keep it busy."""


def chunks(positions: int, words: int, device: torch.device) -> Iterator[slice]:
    """Parts of so many positions that are projected at once to logits of `words`: of CHUNK; on a GPU of more, and what
    is left of CHUNK, so that there are two shapes to compile for, however many positions a batch has."""
    large = max(LOGITS // words // CHUNK, 1) * CHUNK if device.type == "cuda" else CHUNK
    start = 0
    while start < positions:
        end = start + (large if positions - start >= large else CHUNK)
        yield slice(start, end)
        start = end


@dataclass
class Targets:
    """Targets of M positions.

    labels (M,) int64; slots (M, S) int64, slot 0 the label, unused slots repeat it; logprobs (M, S) float32 of
    the teacher, −inf in unused slots; soft_weight (M,) float32: a, 0 for hard-only positions; weight (M,)
    float32: what each position counts. words: so many ids, the first ones, are the teacher's words; 0: all.
    forbidden (K, V) float32: −∞ for what must not be written, 0 elsewhere; which (M,) int64: each position's row of it;
    strict (M,) float32: weight · g, what forbidden probability costs there.
    """

    labels: Tensor
    slots: Tensor
    logprobs: Tensor
    soft_weight: Tensor
    weight: Tensor
    words: int = 0
    forbidden: Tensor | None = None
    which: Tensor | None = None
    strict: Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        moved = {name: sent(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def scale(self, by: float) -> None:
        """Let all positions count so much more."""
        self.weight *= by
        if self.strict is not None:
            self.strict *= by


def chunk_terms(
    h: Tensor, w: Tensor, targets: "Targets", part: slice, kernel: "Kernel"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL (C,), cross-entropy (C,), the gradient by the logits (C, V), of `weight` · loss, for C positions, and what
    they pay for forbidden tokens in all.

    The slots are taken out of the logits and put back into the gradient here; `kernel` sees the tail alone.
    """
    slots = targets.slots[part]
    z = h @ w.t()
    strict = strictness(z, targets, part)
    places = (torch.arange(0, z.numel(), z.shape[1], device=z.device)[:, None] + slots).flatten()
    z_slots = z.view(-1)[places].view_as(slots).float()
    z.view(-1).index_fill_(0, places, float("-inf"))  # far quicker than scatter_ along a dimension
    logprobs, soft, weight = (values[part] for values in (targets.logprobs, targets.soft_weight, targets.weight))
    kl, ce, dz, d_slots = kernel(z, z_slots, logprobs, soft, weight, targets.words or z.shape[1])
    dz.view(-1).index_copy_(0, places, d_slots.flatten())
    if strict is not None:
        dz += strict[1]
    return kl, ce, dz, z.new_zeros(()) if strict is None else strict[0]


def alternatives(logprobs: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ids (M, K) of the likeliest of logprobs (M, V), K = min(count, V), and the logprobs (M, 1 + K) of the labels
    (M, 1) and of these: −inf where one is the label, which would count twice."""
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    return ids, torch.cat([logprobs.gather(1, labels), values.masked_fill(ids == labels, float("-inf"))], 1)


def strictness(z: Tensor, targets: "Targets", part: slice) -> tuple[Tensor, Tensor] | None:
    """Σ strict · (−log q(allowed)) and its gradient (C, V): q_j, less q_j / q(allowed) on what is allowed."""
    if targets.forbidden is None or targets.which is None or targets.strict is None:
        return None
    z = z.float()
    allowed = z + targets.forbidden[targets.which[part]]
    lse, lse_allowed = z.logsumexp(1, keepdim=True), allowed.logsumexp(1, keepdim=True)
    scale = targets.strict[part, None]
    gradient = ((z - lse).exp_() - (allowed - lse_allowed).exp_()).mul_(scale)
    return (scale * (lse - lse_allowed)).sum(), gradient


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def tail_kernel(
    z: Tensor, z_slots: Tensor, logprobs: Tensor, soft_weight: Tensor, weight: Tensor, words: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL (C,), cross-entropy (C,), gradient off the slots (C, V) and on them (C, S).

    z (C, V): logits, −inf on the slots. z_slots (C, S): the logits there. words: how many ids are the teacher's.
    """
    unused = torch.isneginf(logprobs)
    z_slots = z_slots.masked_fill(unused, float("-inf"))
    parts = (z[:, :words].float(), z[:, words:].float())
    log_rest = parts[0].logsumexp(1, keepdim=True)
    lse = torch.logaddexp(log_rest, z_slots.logsumexp(1, keepdim=True))
    if words < z.shape[1]:
        lse = torch.logaddexp(lse, parts[1].logsumexp(1, keepdim=True))
    log_q = z_slots - lse
    log_q_tail = (log_rest - lse).squeeze(1)

    p = logprobs.exp()
    p_tail = (1 - p.sum(1)).clamp_min(0)
    p = p / (p.sum(1) + p_tail).unsqueeze(1)  # float16 values may sum to a little over 1
    kl = torch.where(unused, 0.0, p * (p.clamp_min(1e-30).log() - log_q.masked_fill(unused, 0.0))).sum(1)
    kl = kl + torch.where(p_tail > 0, p_tail * (p_tail.clamp_min(1e-30).log() - log_q_tail), 0.0)
    ce = -log_q[:, 0]

    a = soft_weight
    scale = (weight * (log_q_tail.exp() - a * p_tail)).unsqueeze(1)
    gradients = ((parts[0] - log_rest).exp() * scale, (parts[1] - lse).exp() * weight.unsqueeze(1))
    dz = torch.cat(gradients, dim=1).to(z.dtype)
    d_slots = log_q.exp() - a.unsqueeze(1) * p
    first = torch.arange(d_slots.shape[1], device=z.device) == 0
    d_slots = (d_slots - (1 - a).unsqueeze(1) * first) * weight.unsqueeze(1)
    d_slots = torch.where(unused, d_slots[:, :1], d_slots)  # unused slots stand where slot 0 does
    return kl, ce, dz, d_slots.to(z.dtype)


class FusedDistillation(torch.autograd.Function):
    """Sum over positions of weight · (a·KL + (1 − a)·CE), with both gradients made on the way forward where it
    `learns`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, projection: Tensor, targets: Targets, kernel: Kernel, learns: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = (torch.empty_like(hidden), torch.zeros_like(projection, dtype=torch.float32)) if learns else ()
        w = projection.detach().to(hidden.dtype)
        kls: list[Tensor] = []
        ces: list[Tensor] = []
        paid = hidden.new_zeros((), dtype=torch.float32)
        for part in chunks(len(hidden), len(projection), hidden.device):
            h = hidden[part].detach()
            kl, ce, dz, strict = chunk_terms(h, w, targets, part, kernel)
            if gradients:
                gradients[0][part] = dz @ w
                gradients[1].add_(dz.t() @ h)
            kls.append(kl)
            ces.append(ce)
            paid += strict
        kl, ce = torch.cat(kls), torch.cat(ces)
        ctx.save_for_backward(*gradients)
        a = targets.soft_weight
        loss = (targets.weight * (torch.where(a > 0, a * kl, 0.0) + (1 - a) * ce)).sum() + paid
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_projection = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_projection * grads[0], None, None, None


def fused_distillation(
    hidden: Tensor, projection: Tensor, targets: Targets, kernel: Kernel = tail_kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar), KL (M,) and cross-entropy (M,) of hidden (M, D) under projection (V, D).

    `kernel` is `tail_kernel`, perhaps compiled. Where it is compiled, M should be a multiple of CHUNK.
    """
    learns = torch.is_grad_enabled()  # within forward it never is
    return FusedDistillation.apply(hidden, projection, targets, kernel, learns)  # pyright: ignore[reportReturnType]


@dataclass
class ChunkTargets:
    """Soft targets where student and teacher cut text differently.

    chunk (M,) int64: the byte-aligned chunk that a position belongs to, −1 for none; logprobs (C,) float32: the
    teacher's of each chunk; soft: a.
    """

    chunk: Tensor
    logprobs: Tensor
    soft: float

    def to(self, device: torch.device) -> "ChunkTargets":
        return ChunkTargets(sent(self.chunk, device), sent(self.logprobs, device), self.soft)


class LabelLogprobs(torch.autograd.Function):
    """log q of the labels (M,), and what the positions pay for forbidden tokens in all; the logits are made a second
    time on the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, projection: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        w = projection.to(hidden.dtype)
        parts: list[Tensor] = []
        paid = hidden.new_zeros((), dtype=torch.float32)
        for part in chunks(len(hidden), len(projection), hidden.device):
            z = (hidden[part] @ w.t()).float()
            own = z.gather(1, targets.labels[part, None])
            parts.append((own - z.logsumexp(1, keepdim=True)).squeeze(1))
            if (strict := strictness(z, targets, part)) is not None:
                paid += strict[0]
        ctx.save_for_backward(hidden, projection)
        ctx.targets = targets
        return torch.cat(parts), paid

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, projection = ctx.saved_tensors
        targets: Targets = ctx.targets
        w = projection.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_projection = torch.zeros_like(projection, dtype=torch.float32)
        for part in chunks(len(hidden), len(projection), hidden.device):
            h, grad = hidden[part], grads[0][part, None].float()
            z = (h @ w.t()).float()
            dz = z.softmax(1).mul_(-grad).scatter_add_(1, targets.labels[part, None], grad)
            if (strict := strictness(z, targets, part)) is not None:
                dz += grads[1] * strict[1]
            dz = dz.to(h.dtype)
            grad_hidden[part] = dz @ w
            grad_projection += dz.t() @ h
        return grad_hidden, grad_projection, None


def chunk_divergence(log_q: Tensor, targets: ChunkTargets) -> tuple[Tensor, Tensor]:
    """Binary KL (C,) between the teacher's and the student's likelihood of each chunk, and positions' membership.

    With p, q the two likelihoods of a chunk: p log(p/q) + (1 − p) log((1 − p)/(1 − q)) (arXiv:2503.20083, with
    the divergence KL). log_q (M,): of each position's label.
    """
    member = targets.chunk >= 0
    log_q_chunk = torch.zeros_like(targets.logprobs).index_add(0, targets.chunk[member], log_q[member])
    log_p = targets.logprobs.clamp(max=-1e-6)
    log_q_chunk = log_q_chunk.clamp(max=-1e-6)
    p = log_p.exp()
    divergence = p * (log_p - log_q_chunk) + (1 - p) * (torch.log1p(-p) - torch.log(-torch.expm1(log_q_chunk)))
    return divergence, member


def chunked_distillation(
    hidden: Tensor, projection: Tensor, targets: Targets, chunks: ChunkTargets
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_distillation`, with chunk targets: loss, KL (C,) a chunk, cross-entropy (M,).

    A position in a chunk counts (1 − a) of its cross-entropy, and a chunk a times its divergence times the
    positions in it, so that long chunks don't lose weight.
    """
    log_q: Tensor
    log_q, paid = LabelLogprobs.apply(hidden, projection, targets)  # pyright: ignore[reportGeneralTypeIssues]
    divergence, member = chunk_divergence(log_q, chunks)
    weight = torch.zeros_like(chunks.logprobs).index_add(0, chunks.chunk[member], targets.weight[member])
    share = torch.where(member, 1 - chunks.soft, 1.0)
    loss = chunks.soft * (weight * divergence).sum() - (targets.weight * share * log_q).sum() + paid
    return loss, divergence.detach(), -log_q.detach()
