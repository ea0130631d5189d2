"""One step: the optimizer, a batch's loss and gradients, and where they are computed."""

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.backbone.device import sent
from distill.backbone.model import Backbone
from distill.training.batches import Batch
from distill.training.losses import chunked_distillation, fused_distillation
from distill.training.muon import Muon

if TYPE_CHECKING:
    from distill.training.features import Features


Results = list[tuple[Batch, dict[str, Tensor]]]
"""Of the parts of a step's batch."""


def make_optimizer(
    model: Backbone, lr: float, betas: tuple[float, float], weight_decay: float, muon: bool = False
) -> torch.optim.AdamW:
    """AdamW, or Muon for the blocks' matrices; norms and embeddings don't decay."""
    matrices = [
        p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "muon": muon},
        {"params": others, "weight_decay": 0.0},
    ]
    return (Muon if muon else torch.optim.AdamW)(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


@contextlib.contextmanager
def quicker(rows: list[Tensor], factor: float) -> Generator[None]:
    """What an optimizer changes within of rows (R, D) of parameters is `factor` times as much: matrices that are tied
    have one learning rate, and some of their rows have more to learn."""
    with torch.no_grad():
        before = [part.clone() for part in rows]
        yield
        for part, old in zip(rows, before, strict=True):
            part.copy_(old.lerp_(part, factor))


def forward_backward(
    model: Backbone,
    batch: Batch,
    precision: str,
    kernel: Any,
    backward: bool = True,
    features: "Features | None" = None,
    match: float = 0.0,
) -> dict[str, Tensor]:
    """Loss of a batch, its gradients left in the model. KL and cross-entropy come as (M,) or (C,), with the loss.

    features: whose hidden states the model's are drawn to, with the weight `match`; their distance comes as `match`.
    """
    device = batch.ids.device
    states: list[Tensor] | None = None if features is None else []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        hidden = model.hidden(batch.ids, batch.positions, batch.spans, states=states)
        apart = features.distance(batch, states) if features and states else None
    hidden = hidden.flatten(0, 1).index_select(0, batch.where)
    weight = model.lm_head.weight
    if batch.chunks is not None:
        loss, kl, ce = chunked_distillation(hidden, weight, batch.targets, batch.chunks)
    else:
        loss, kl, ce = fused_distillation(hidden, weight, batch.targets, kernel)
    if backward:
        (loss if apart is None else loss + match * apart).backward()
    found = {"loss": loss.detach(), "kl": kl.detach(), "ce": ce.detach()}
    return found if apart is None else {**found, "match": apart.detach()}


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; itself where it is there."""
    if batch.ids.device == device:
        return batch
    batch.spans.device = device
    chunks = None if batch.chunks is None else batch.chunks.to(device)
    ids, positions, where, answers, alike = (
        sent(part, device) for part in (batch.ids, batch.positions, batch.where, batch.answers, batch.alike)
    )
    targets = batch.targets.to(device)
    return Batch(ids, positions, batch.spans, where, targets, answers, batch.loss_positions, alike, chunks)


def means(results: Results) -> dict[str, float]:
    """What a step's log tells besides its loss."""
    soft, answers, dreams = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch, result in results:
        real = batch.targets.weight > 0
        told = real & batch.answers & (batch.targets.soft_weight > 0) if batch.chunks is None else slice(None)
        soft.append(result["kl"][told])
        answers.append(result["ce"][real & batch.answers])
        dreams.append(result["ce"][real & ~batch.answers])
    kl = torch.cat(soft)
    kl = kl if len(kl) else torch.cat([result["kl"] for _, result in results])
    found = {"kl": float(kl.mean()), "answer_cross_entropy": float(torch.cat(answers).mean())}
    if matched := [result["match"] for _, result in results if "match" in result]:
        found["match"] = float(torch.stack(matched).mean())
    if len(together := torch.cat(dreams)):
        found["dream_cross_entropy"] = float(together.mean())
    return found
