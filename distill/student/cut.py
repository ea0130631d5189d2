"""A smaller model out of a larger one, by what some texts of its own need: fewer layers, fewer heads and neurons.

Layers go that hurt the texts' likelihood least (greedily, a few at a time; compare ShortGPT, arXiv:2403.03853).
Neurons of a feed-forward go by the optimal brain surgeon's rule on whole neurons, layer by layer (ZipLM,
arXiv:2302.04089): with activations X (positions, F) and the projection W (F, D) that reads them, a neuron j costs

    ‖W_j‖² / [(XᵀX)⁻¹]_jj

to leave out if all that stay make up for it as least squares can, which is then done to W. A head of an attention, E
rows of the projection behind it, goes likewise: it costs tr(W_jᵀ [(XᵀX)⁻¹]_jj⁻¹ W_j). Each layer is given what the
layers before it, cut already, make of the texts, and W then moves to mend half of what these have left wrong, too: all
of it fits the texts and nothing else (compare GPTAQ, arXiv:2504.02692, which does so for rounded weights).

Shape legend: B rows, T positions, D hidden, F feed-forward, E a head, M positions that are predicted.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.backbone.architecture import BackboneConfig
from distill.backbone.attention import Documents
from distill.backbone.model import Backbone, Block
from distill.errors import BadInput

DAMPING = 1e-3
"""Added to the diagonal of XᵀX, as a share of its mean: neurons that are never used together have no inverse."""
MENDED = 0.5
"""Share of the errors of earlier layers that a feed-forward's last projection makes up for."""
MENDING_DAMPING = 3e-2
"""As DAMPING, where that is fitted: it generalizes less than what neurons say of each other."""
SHARE = 0.1
"""Of the neurons that are left, so many go before all are judged anew."""


@dataclass(frozen=True)
class Sample:
    """Packed rows of the texts. ids, positions (B, T); documents: where texts lie; where (M,): flat positions before
    the tokens labels (M,), whose likelihood counts."""

    ids: Tensor
    positions: Tensor
    documents: Documents
    where: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Quality:
    """Of a model on samples: nats a token, and the share of tokens that are its likeliest."""

    nats: float
    top1: float


@torch.inference_mode()
def quality(model: Backbone, samples: Sequence[Sample]) -> Quality:
    """Of the whole model."""
    return _judged(model, _blocks(model), samples)


@torch.inference_mode()
def final_states(model: Backbone, samples: Sequence[Sample]) -> list[Tensor]:
    """(M, D) of each sample: what the output matrix reads where a token is predicted."""
    states = [_through(model, _blocks(model), sample, _embedded(model, sample)) for sample in samples]
    return [model.model.norm(x.flatten(0, 1)[sample.where]) for x, sample in zip(states, samples, strict=True)]


@torch.inference_mode()
def drop_layers(
    model: Backbone,
    samples: Sequence[Sample],
    keep: int,
    seconds: float,
    told: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[list[int], dict[int, float]]:
    """The `keep` layers that stay, and nats a token at each number of layers on the way. The model is left as it is.

    seconds: what it may take, roughly: the less, the fewer samples are looked at, and the more layers go at a time.
    told: (layers gone, of how many).
    """
    layers = model.config.layers
    if not 1 <= keep <= layers:
        raise BadInput(f"student.layers={keep}: the teacher has {layers}; keep 1 to {layers} of them")
    started, alive, path = time.monotonic(), list(range(layers)), dict[int, float]()
    if keep < layers:
        _judged(model, _blocks(model), samples[:1])
        a_round = (time.monotonic() - started) * layers / 2  # each layer tried, half of all computed on average
        samples = samples[: max(1, int(seconds / (3 * max(a_round, 1e-9))))]
    while len(alive) > keep:
        begun = time.monotonic()
        losses = _without_each(model, alive, samples)
        took, left = time.monotonic() - begun, started + seconds - time.monotonic()
        # Later rounds have fewer layers to try, and fewer below them: a round costs half of this one, on average.
        rounds = max(1, int(2 * left / max(took, 1e-9))) + 1
        gone = -(-(len(alive) - keep) // rounds)
        for _, layer in sorted(zip(losses, alive, strict=True))[:gone]:
            alive.remove(layer)
        path[len(alive)] = _judged(model, [_blocks(model)[layer] for layer in alive], samples).nats
        told(layers - len(alive), layers - keep)
    return alive, path


def _without_each(model: Backbone, alive: Sequence[int], samples: Sequence[Sample]) -> list[float]:
    """Nats a token without each of the layers; what lies below it is computed once."""
    blocks = [_blocks(model)[layer] for layer in alive]
    states = [_embedded(model, sample) for sample in samples]
    losses: list[float] = []
    for place, block in enumerate(blocks):
        above = [_through(model, blocks[place + 1 :], sample, x) for sample, x in zip(samples, states, strict=True)]
        losses.append(_judge(model, above, samples).nats)
        states = [_through(model, [block], sample, x) for sample, x in zip(samples, states, strict=True)]
    return losses


def keep_layers(model: Backbone, layers: Sequence[int]) -> Backbone:
    """The model of these layers alone, which share its memory."""
    smaller = Backbone(replace(model.config, layers=len(layers)))
    smaller.model.layers = torch.nn.ModuleList([model.model.layers[layer] for layer in layers])
    smaller.model.embed_tokens, smaller.model.norm = model.model.embed_tokens, model.model.norm
    smaller.lm_head = model.lm_head
    return smaller.eval()


@torch.no_grad()
def narrow(
    model: Backbone,
    samples: Sequence[Sample],
    ffn: int,
    heads: int,
    seconds: float = math.inf,
    told: Callable[[int, int], None] = lambda _done, _total: None,
) -> Backbone:
    """The model with `ffn` neurons in each feed-forward and `heads` queries in each attention, of every group that
    shares a key as many. The one given is used up.

    seconds: what it may take, roughly: where a layer takes longer than its part, fewer samples are looked at from then
    on, a fifth of them at least. told: (layers done, of how many).
    """
    config, ends = model.config, time.monotonic() + seconds
    if not 1 <= ffn <= config.ffn:
        raise BadInput(f"student.ffn={ffn}: the teacher's feed-forwards have {config.ffn} neurons; keep 1 to that many")
    if not 1 <= heads <= config.heads or heads % config.kv_heads:
        some = " or ".join(map(str, range(config.kv_heads, config.heads + 1, config.kv_heads)))
        raise BadInput(f"student.heads={heads}: of the teacher's {config.heads} keep {some}: of every group as many")
    states, least = [_embedded(model, sample) for sample in samples], -(-len(samples) // 5)
    wanted = [state.clone() for state in states]  # the uncut model's
    for number, block in enumerate(_blocks(model)):
        begun, attention, feed = time.monotonic(), block.self_attn, block.mlp
        mixed = [_mixed(model, block, sample, x) for sample, x in zip(samples, states, strict=False)]
        for aim, sample in zip(wanted, samples, strict=False):
            aim += attention.o_proj(_mixed(model, block, sample, aim))
        if heads < config.heads:
            kept = _refit(attention.o_proj, mixed, states, wanted, partial(head_surgeon, config=config, keep=heads))
            _keep_rows(attention.q_proj, kept)
        for state, x in zip(states, mixed, strict=True):
            state += attention.o_proj(x)
        active = [_activations(block, state) for state in states]
        for aim in wanted:
            aim += feed.down_proj(_activations(block, aim))
        kept = _refit(feed.down_proj, active, states, wanted, partial(surgeon, keep=ffn))
        _keep_rows(feed.gate_proj, kept)
        _keep_rows(feed.up_proj, kept)
        for state, x in zip(states, active, strict=True):
            state += feed.down_proj(x)
        told(number + 1, config.layers)
        now, still = time.monotonic(), config.layers - number - 1
        if still and (now - begun) * still > ends - now:
            fitting = int(len(states) * max(ends - now, 0.0) / ((now - begun) * still))
            del states[max(fitting, least) :], wanted[max(fitting, least) :]
    smaller = Backbone(narrowed(config, ffn, heads))
    smaller.load_state_dict(model.state_dict())
    return smaller.eval()


def narrowed(config: BackboneConfig, ffn: int, heads: int) -> BackboneConfig:
    """The same with so many neurons and heads, which keep their size."""
    size = None if heads * config.head_dim == config.hidden else config.head_dim
    return replace(config, ffn=ffn, heads=heads, head_size=size)


def _refit(
    projection: nn.Linear,
    read: list[Tensor],
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Which inputs of a projection stay; what it has read, (B, T, F) of each sample, becomes these alone, and its
    weights what makes the states, to which it is added, as they are wanted, as far as that is done here."""
    whole = projection.weight.t()
    gram = torch.zeros(len(whole), len(whole))
    for x in read:
        _add_products(gram, x.flatten(0, 1))
    gram = gram.triu() + gram.triu(1).t()
    kept, rows = choose(gram, whole)
    missing = torch.zeros(rows.shape)
    for i, (state, aim) in enumerate(zip(states, wanted, strict=True)):
        read[i] = read[i][..., kept]
        missing.addmm_(read[i].flatten(0, 1).t(), (aim - state).flatten(0, 1))
    errors = missing - gram[kept] @ whole  # what the whole projection would leave wrong, as the kept inputs see it
    rows = rows + MENDED * _fitted(gram[kept][:, kept], errors)
    projection.weight = nn.Parameter(rows.t().contiguous())
    return kept


def _keep_rows(projection: nn.Linear, kept: Tensor) -> None:
    projection.weight = nn.Parameter(projection.weight[kept])
    bias = cast("nn.Parameter | None", projection.bias)
    if bias is not None:
        projection.bias = nn.Parameter(bias[kept])


def surgeon(gram: Tensor, weight: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which rows of weight (F, D) stay, (keep,), and what becomes of them, (keep, D).

    gram (F, F): XᵀX of the activations X that the weight is multiplied with. Raises nothing: damping keeps it regular.
    """
    count = len(gram)
    if keep == count:
        return torch.arange(count), weight
    rows, inverse, left = weight.double(), _inverse(gram), torch.arange(count)
    while len(left) > keep:
        cost = rows.square().sum(1) / inverse.diagonal()
        going = cost.argsort()[: min(len(left) - keep, max(1, int(SHARE * len(left))))]
        rows, inverse, left = _without(rows, inverse, left, going)
    return left, rows.to(weight.dtype)


def head_surgeon(gram: Tensor, weight: Tensor, config: BackboneConfig, keep: int) -> tuple[Tensor, Tensor]:
    """The same of whole heads, `keep` of them: rows go by `config.head_dim`, of each group of queries as many."""
    size, group = config.head_dim, config.heads // config.kv_heads
    rows, inverse, left = weight.double(), _inverse(gram), torch.arange(len(gram))
    while len(left) > keep * size:
        first = left[::size] // size // group  # the group of each head that is left
        costs = [
            float((rows[own] * torch.linalg.solve(inverse[own, own], rows[own])).sum())
            if int((first == of).sum()) > keep // config.kv_heads
            else math.inf
            for of, own in ((of, slice(place * size, (place + 1) * size)) for place, of in enumerate(first))
        ]
        place = costs.index(min(costs))
        rows, inverse, left = _without(rows, inverse, left, torch.arange(place * size, (place + 1) * size))
    return left, rows.to(weight.dtype)


def _inverse(gram: Tensor) -> Tensor:
    """(XᵀX)⁻¹ in float64, damped, of a gram of mean diagonal 1."""
    scale = float(gram.diagonal().mean()) or 1.0
    regular = gram.double() / scale
    regular.diagonal().add_(DAMPING)
    return torch.linalg.inv(regular)


def _without(rows: Tensor, inverse: Tensor, left: Tensor, going: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All without the rows `going`. Block elimination: what these did is spread over all, and they vanish from the
    inverse."""
    staying = torch.ones(len(left), dtype=torch.bool).index_fill_(0, going, value=False)
    spread = torch.linalg.solve(inverse[going][:, going], torch.cat((rows[going], inverse[going]), dim=1))
    change = inverse[:, going] @ spread
    rows = (rows - change[:, : rows.shape[1]])[staying]
    inverse = (inverse - change[:, rows.shape[1] :])[staying][:, staying]
    return rows, inverse, left[staying]


def _add_products(gram: Tensor, x: Tensor, size: int = 512) -> None:
    """Add XᵀX (F, F) of x (N, F), its upper triangle at least: the rest is the same."""
    for begin in range(0, len(gram), size):
        gram[begin : begin + size, begin:].addmm_(x[:, begin : begin + size].t(), x[:, begin:])


def _fitted(gram: Tensor, moments: Tensor) -> Tensor:
    """(F, D) of least squares, XᵀX (F, F) and XᵀY (F, D) being given; damped."""
    damping = MENDING_DAMPING * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram))
    return torch.linalg.solve((gram + damping).double(), moments.double()).to(moments.dtype)


# The forward pass in pieces.


def _blocks(model: Backbone) -> list[Block]:
    return cast("list[Block]", list(model.model.layers))


def _embedded(model: Backbone, sample: Sample) -> Tensor:
    return model.model.embed_tokens(sample.ids)


def _rotations(model: Backbone, sample: Sample) -> tuple[Tensor, Tensor]:
    return model.cos[sample.positions].unsqueeze(1), model.sin[sample.positions].unsqueeze(1)


def _through(model: Backbone, blocks: Sequence[Block], sample: Sample, x: Tensor) -> Tensor:
    rotations: Any = _rotations(model, sample)
    for block in blocks:
        x = block(x, *rotations, sample.documents)
    return x


def _mixed(model: Backbone, block: Block, sample: Sample, x: Tensor) -> Tensor:
    """(B, T, heads · E) of states (B, T, D): what the last projection of the attention reads."""
    return block.self_attn.mixed(block.input_layernorm(x), *_rotations(model, sample), sample.documents)


def _activations(block: Block, x: Tensor) -> Tensor:
    """(…, F) of states (…, D): what the last projection of the feed-forward reads."""
    normed = block.post_attention_layernorm(x)
    return F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)


def _judged(model: Backbone, blocks: Sequence[Block], samples: Sequence[Sample]) -> Quality:
    return _judge(model, [_through(model, blocks, sample, _embedded(model, sample)) for sample in samples], samples)


def _judge(model: Backbone, states: Sequence[Tensor], samples: Sequence[Sample]) -> Quality:
    """states (B, T, D) of each sample, before the last norm."""
    nats = right = total = 0.0
    for x, sample in zip(states, samples, strict=True):
        logits = model.lm_head(model.model.norm(x.flatten(0, 1)[sample.where]))
        nats += float(F.cross_entropy(logits, sample.labels, reduction="sum"))
        right += float((logits.argmax(-1) == sample.labels).sum())
        total += len(sample.labels)
    return Quality(nats / max(total, 1), right / max(total, 1))
