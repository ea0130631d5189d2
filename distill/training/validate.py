"""How a student does on the validation documents."""

import math

import torch

from distill.backbone.model import Backbone
from distill.training.batches import Batches
from distill.training.step import forward_backward, move


@torch.no_grad()
def validate(model: Backbone, batches: Batches, batch_rows: int, precision: str, kernel: object) -> dict[str, float]:
    """Loss and cross-entropy of an epoch of them: nats a token; bits per byte of the answers."""
    totals, device = torch.zeros(4, dtype=torch.float64), model.cos.device
    rows = batches.epoch(0)
    model.eval()
    for start in range(0, len(rows), batch_rows):
        batch = move(batches.assemble(rows[start : start + batch_rows]), device)
        result = forward_backward(model, batch, precision, kernel, backward=False)
        real = batch.targets.weight > 0
        answers = real & batch.answers
        totals += torch.tensor(
            [
                float(result["loss"]) * batch.loss_positions,
                batch.loss_positions,
                float(result["ce"][answers].sum()),
                float(answers.sum()),
            ],
            dtype=torch.float64,
        )
    model.train()
    documents = batches.documents
    tokens_a_byte = len(documents.answer_ids) / max(int(documents.answer_bytes.sum()), 1)
    cross_entropy = float(totals[2] / totals[3].clamp_min(1))
    return {
        "validation_loss": float(totals[0] / totals[1].clamp_min(1)),
        "validation_bits_per_byte": cross_entropy * tokens_a_byte / math.log(2),
    }
