"""The next token's distribution for many rows: exact log-probabilities, its likeliest tokens, and one drawn of them.

A large vocabulary is looked through once: the maxima of its chunks say which chunks can hold the K likeliest, and only
those are sorted.

Shape legend: B rows, D hidden, V vocabulary, K likeliest tokens, S tokens to draw from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.backbone.prepared import Prepared

BLOCK = 1024
"""Vocabulary rows of one product on a CPU: its result stays in the cache, and BLAS copies little (measured for
D = 576, V = 49,152 and 128 rows: 72 GFLOP/s a core against 60 in one product)."""
CHUNK = 64
"""Tokens of which the maximum is taken first."""
SPARE = 44
"""Tokens beside the K likeliest whose logits are computed anew where products were rounded."""


@dataclass(frozen=True)
class Likeliest:
    """logprobs (B, V) float32, natural, at T = 1; top_ids (B, K) int64, likeliest first; top_logprobs (B, K) theirs."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@torch.inference_mode()
def likeliest(weights: Prepared, states: Tensor, count: int, out: Tensor | None = None) -> Likeliest:
    """Distributions after states (B, D) float32, with the `count` likeliest tokens (at most V).

    In float32 all is exact but for its rounding. In bfloat16 the products round logits to 8 bits: those of the
    `count` + SPARE likeliest are computed anew in float32 before they are normalized; what is left is the rounding of
    the unlikely ones, whose errors cancel in their sum.
    out: (≥ B, V) float32 to write logprobs in, so that their memory needn't be asked for at each step.
    """
    rows, size = len(states), len(weights.unembed)
    logits = torch.empty((rows, size), device=states.device) if out is None else out[:rows]
    count = min(count, size)
    if weights.dtype == torch.float32:
        _multiply(states, weights.unembed, logits)
        logprobs = torch.log_softmax(logits, -1, out=logits)
        return Likeliest(logprobs, *top(logprobs, count))
    logits.copy_(torch.mm(states.to(weights.dtype), weights.unembed.t()))
    near, _ = top(logits, min(count + SPARE, size))
    logits.scatter_(1, near, torch.bmm(weights.unembed[near].float(), states.unsqueeze(-1)).squeeze(-1))
    logprobs = torch.log_softmax(logits, -1, out=logits)
    values, order = logprobs.gather(1, near).topk(count)
    return Likeliest(logprobs, near.gather(1, order), values)


def _multiply(states: Tensor, unembed: Tensor, out: Tensor) -> None:
    """states (B, D) · unembedᵀ (D, V)."""
    step = BLOCK if states.device.type == "cpu" else len(unembed)
    for start in range(0, len(unembed), step):
        part = unembed[start : start + step]
        torch.mm(states, part.t(), out=out[:, start : start + len(part)])


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ids and values, (B, count) each, of the largest of values (B, V), largest first."""
    chunks = values.shape[1] // CHUNK
    if chunks < 2 * count:
        found, ids = values.topk(count)
        return ids, found
    # What is among the `count` largest lies in a chunk whose maximum is: at most `count` chunks hold them all.
    whole = chunks * CHUNK
    best = values[:, :whole].unflatten(1, (chunks, CHUNK)).amax(-1).topk(count, sorted=False).indices
    ids = (best.unsqueeze(-1) * CHUNK + torch.arange(CHUNK, device=values.device)).flatten(1)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    ids = torch.cat((ids, rest), dim=1)
    found, order = values.gather(1, ids).topk(count)
    return ids.gather(1, order), found


def draw(logprobs: Tensor, top_k: Tensor, top_p: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Which place of logprobs (B, S), largest first, is drawn, (B,): top-k, then top-p, then temperature.

    top_k (B,) is 1 to S, uniform (B,) in [0, 1), as are the others a row's own. The nucleus is the fewest tokens whose
    mass among the top k reaches top_p. temperature 0 takes the first.
    """
    places = torch.arange(logprobs.shape[1], device=logprobs.device)
    kept = logprobs.double().masked_fill(places >= top_k[:, None], -torch.inf)
    before = kept.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    kept.masked_fill_(before >= top_p[:, None], -torch.inf)
    kept[:, 0] = logprobs[:, 0]
    cumulative = (kept / temperature.clamp_min(1e-6)[:, None]).softmax(-1).cumsum(-1)
    # Below the mass: rounding must not lift a draw onto a token without any.
    mass = cumulative[:, -1:]
    target = torch.minimum(uniform[:, None] * mass, torch.nextafter(mass, torch.zeros_like(mass)))
    place = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return torch.where(temperature > 0, place, 0)
