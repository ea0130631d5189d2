"""How a student does on the validation documents."""

import math

import torch

from distill.backbone.model import Backbone
from distill.training.batches import Batches
from distill.training.distributed import ALONE, World
from distill.training.sharding import settle
from distill.training.step import forward_backward, move


@torch.no_grad()
def validate(
    model: Backbone, batches: Batches, batch_rows: int, precision: str, kernel: object, world: World = ALONE
) -> dict[str, float]:
    """Loss of an epoch of them, nats a token; bits per byte and, by token, perplexity of the answers. world: of the
    processes, which all call this, and of which each reads its share."""
    totals, device = torch.zeros(4, dtype=torch.float64), model.cos.device
    rows = batches.epoch(0)
    model.eval()
    for turn in range(0, len(rows), batch_rows * world.size):
        start = turn + batch_rows * world.rank
        part = rows[start : start + batch_rows]
        # Where there is no more to read, what is sharded must be gathered with the others still.
        batch = move(batches.assemble(part or rows[:1]), device)
        result = forward_backward(model, batch, precision, kernel, backward=False)
        real = batch.targets.weight > 0
        answers = real & batch.answers
        if not part:
            break
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
    settle(model)
    if world.size > 1:
        totals = world.sum(totals.to(device)).cpu()
    documents = batches.documents
    tokens_a_byte = len(documents.answer_ids) / max(int(documents.answer_bytes.sum()), 1)
    cross_entropy = float(totals[2] / totals[3].clamp_min(1))
    return {
        "validation_loss": float(totals[0] / totals[1].clamp_min(1)),
        "validation_bits_per_byte": cross_entropy * tokens_a_byte / math.log(2),
        "validation_perplexity": math.exp(min(cross_entropy, 700)),
    }
