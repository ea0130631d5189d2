"""Decoding and scoring with the native backbone, in batches, on whatever device it lies.

Greedy, or sampled by inverse transform: each row draws its own uniform numbers beforehand, so what it says
depends on its prompt and its seed, never on its neighbours or on the size of the batch (but for float rounding).

Shape legend: B rows, T positions, P longest prompt, L cache columns, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.backbone.model import Backbone, pad_left
from distill.backbone.session import Session
from distill.errors import BadInput

LOGITS_AT_ONCE = 1 << 24
"""Elements of a (positions, V) block of logits held at a time while scoring (64 MiB of float32)."""


class Grammar(Protocol):
    """What may be written next, by a state that each row is in; all rows begin in `start`."""

    @property
    def start(self) -> int: ...

    def mask(self, logits: Tensor, states: Tensor) -> Tensor:
        """logits (B, V) with −∞ for what may not follow in the rows' states (B,) int64."""
        ...

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The states (B,) after tokens (B,)."""
        ...


def generate(
    model: Backbone | Session,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    batch_rows: int = 32,
    grammar: Grammar | None = None,
) -> list[list[int]]:
    """Answers to all prompts, in their order. An answer ends with the stop id that ended it, if one did.

    It ends at the latest after `max_tokens`, or where prompt and answer together fill the model's context.
    model: a backbone, which reads the prompts first thing; or a session, which goes on with them in its rows.
    temperature 0 is greedy; otherwise the order is temperature, top_k (0: all), top_p, as in transformers.
    seed: one number a row, or one for all: row i then draws from `seed + i`.
    grammar: nothing is written that it doesn't allow; top_k and top_p are of what it does.
    Raises BadInput for an empty prompt, or one that leaves no room in the context.
    """
    seeds = [seed + i for i in range(len(prompt_ids))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompt_ids):
        raise BadInput(f"seed: {len(seeds)} seeds for {len(prompt_ids)} prompts; give one for each")
    sampler = Sampler(temperature, top_k, top_p)
    answers: list[list[int]] = [[] for _ in prompt_ids]
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))
    if isinstance(model, Session):
        order, batch_rows = list(range(len(prompt_ids))), max(1, len(prompt_ids))
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        prompts, drawn = [prompt_ids[row] for row in rows], [seeds[row] for row in rows]
        for step in _decode(prompts, drawn, model, sampler, max_tokens, stop_ids, grammar):
            for row, token in step:
                answers[rows[row]].append(token)
    return answers


def stream(
    model: Backbone | Session,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    grammar: Grammar | None = None,
) -> Iterator[int]:
    """One answer, token by token: the same tokens that `generate` gives. A session must have one row."""
    sampler = Sampler(temperature, top_k, top_p)
    for step in _decode([prompt_ids], [seed], model, sampler, max_tokens, stop_ids, grammar):
        yield step[0][1]


class Sampler:
    """Chooses the next token of each row."""

    def __init__(self, temperature: float, top_k: int, top_p: float) -> None:
        if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise BadInput(
                f"sampling: temperature {temperature}, top_k {top_k}, top_p {top_p}; "
                "they must be a number of at least 0, at least 0, and in (0, 1]"
            )
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def uniforms(self, seeds: Sequence[int], steps: int) -> Tensor | None:
        """(B, steps) float64 in [0, 1), a row a seed; None where nothing is drawn."""
        if self.temperature == 0:
            return None
        draws = [np.random.default_rng(seed % 2**64).random(steps) for seed in seeds]
        return torch.from_numpy(np.stack(draws))

    def choose(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Token ids (B,) for logits (B, V), by inverse transform at uniform (B, 1)."""
        if uniform is None:
            return logits.argmax(-1)
        values, ids = logits.double() / max(self.temperature, 1e-6), None
        if self.top_k and self.top_k < logits.shape[-1]:
            values, ids = values.topk(self.top_k)
        elif self.top_p < 1:
            values, ids = values.sort(descending=True)
        cumulative = values.softmax(-1).cumsum(-1)
        mass = cumulative[:, -1:]
        if self.top_p < 1:
            # The nucleus: the fewest tokens whose mass reaches top_p.
            last = torch.searchsorted(cumulative, mass * self.top_p).clamp_max(values.shape[-1] - 1)
            mass = cumulative.gather(-1, last)
        # Kept below the mass: rounding must not lift a draw out of the nucleus, or onto a token without mass.
        draw = torch.minimum(uniform * mass, torch.nextafter(mass, torch.zeros_like(mass)))
        place = torch.searchsorted(cumulative, draw, right=True)
        return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def _rooms(prompts: Sequence[Sequence[int]], read: Sequence[int], context: int) -> list[int]:
    """Tokens that each row may still write after what it has read and its prompt."""
    if len(read) != len(prompts):
        raise BadInput(f"prompt: {len(prompts)} prompts for a session of {len(read)} rows; give one for each")
    for before, prompt in zip(read, prompts, strict=True):
        if not prompt:
            raise BadInput("prompt: is empty; the student needs at least one token to start from")
        if before + len(prompt) >= context:
            raise BadInput(
                f"prompt: {before + len(prompt)} tokens leave no room for an answer in a context of {context}; "
                "shorten it"
            )
    return [context - before - len(prompt) for before, prompt in zip(read, prompts, strict=True)]


@torch.inference_mode()
def _decode(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    model: Backbone | Session,
    sampler: Sampler,
    max_tokens: int,
    stop_ids: Sequence[int],
    grammar: Grammar | None,
) -> Iterator[list[tuple[int, int]]]:
    """Per step, (row, token) of the rows still going. Rows that are done leave once they are half of the batch."""
    session = model if isinstance(model, Session) else Session(model, len(prompts))
    room = [min(max_tokens, left) for left in _rooms(prompts, session.lengths, session.model.config.context)]
    steps = max(room, default=0)
    if steps <= 0:
        return
    device, stops = session.model.cos.device, frozenset(stop_ids)
    uniforms = sampler.uniforms(seeds, steps)
    ids, real = (tensor.to(device) for tensor in pad_left(prompts, 0))
    session.reserve(ids.shape[1] + steps - 1)
    _, logits = session.append(ids, None if bool(real.all()) else real, last=True)
    rows = list(range(len(prompts)))
    going = set(rows)
    states = torch.full((len(rows),), grammar.start if grammar else 0, device=device)
    for step in range(steps):
        uniform = None if uniforms is None else uniforms[rows, step : step + 1].to(device)
        chosen = sampler.choose(grammar.mask(logits, states) if grammar else logits, uniform)
        states = grammar.advance(states, chosen) if grammar else states
        tokens = chosen.tolist()
        yield [(row, token) for row, token in zip(rows, tokens, strict=True) if row in going]
        going -= {row for row, token in zip(rows, tokens, strict=True) if token in stops or step + 1 >= room[row]}
        if not going:
            return
        if 2 * len(going) <= len(rows):
            keep = torch.tensor([i for i, row in enumerate(rows) if row in going], device=device)
            rows, chosen, states = [rows[i] for i in keep.tolist()], chosen[keep], states[keep]
            session.keep(keep)
        # Rows that are done no longer advance: their place in the context may be used up.
        done = len(going) < len(rows)
        alive = torch.tensor([[row in going] for row in rows], device=device) if done else None
        _, logits = session.append(chosen.unsqueeze(1), alive)


@torch.inference_mode()
def log_likelihood(
    model: Backbone,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 8192,
) -> list[NDArray[np.float64]]:
    """Natural log-probability of each token of each continuation after its context, (len(continuation),) each.

    Bounds and errors as of `states_before`.
    """
    scores: list[NDArray[np.float64]] = [np.zeros(0)] * len(contexts)
    for batch, hidden in states_before(model, contexts, continuations, batch_tokens):
        targets = torch.tensor([token for i in batch for token in continuations[i]], device=hidden.device)
        ends = np.cumsum([len(continuations[i]) for i in batch])
        for i, part in zip(batch, np.split(_token_scores(model, hidden, targets), ends[:-1]), strict=True):
            scores[i] = part
    return scores


@torch.inference_mode()
def states_before(
    model: Backbone, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], batch_tokens: int = 8192
) -> Iterator[tuple[list[int], Tensor]]:
    """The last hidden states that predict the tokens of each continuation after its context: numbers of some pairs, and
    (tokens of all of them, D), in that order. Pairs without a continuation are in none.

    batch_tokens bounds rows × length of one forward pass. Raises BadInput for an empty context (nothing predicts
    the first token) or a pair that doesn't fit the model's context.
    """
    lengths: dict[int, int] = {}
    for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        size = len(context) + len(continuation)
        if not context:
            raise BadInput("context: is empty; nothing predicts the continuation's first token")
        # The last token is only predicted, never read, so it needs no place.
        if size - 1 > model.config.context:
            raise BadInput(f"continuation: {size} tokens don't fit a context of {model.config.context}; shorten it")
        if continuation:
            lengths[i] = size - 1
    for batch in batches(lengths, batch_tokens):
        yield batch, states_of(model, [contexts[i] for i in batch], [continuations[i] for i in batch])


def states_of(model: Backbone, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Tensor:
    """The same of all pairs in one pass, (tokens of all continuations, D), with gradients where they are wanted."""
    rows = [[*context, *continuation] for context, continuation in zip(contexts, continuations, strict=True)]
    longest = max(map(len, rows))
    # Padded on the right: a causal model never sees it.
    ids = torch.tensor([row[:-1] + [0] * (longest - len(row)) for row in rows], device=model.cos.device)
    hidden = model.hidden(ids)
    spans = [range(len(context) - 1, len(row) - 1) for context, row in zip(contexts, rows, strict=True)]
    return torch.cat([hidden[place, span.start : span.stop] for place, span in enumerate(spans)])


def _token_scores(model: Backbone, hidden: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """log softmax(hidden (N, D) · Wᵀ)[targets (N,)], (N,), without holding (N, V) whole."""
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts: list[Tensor] = []
    for start in range(0, len(targets), size):
        logits = model.lm_head(hidden[start : start + size]).float()
        chosen = logits.gather(-1, targets[start : start + size, None]).squeeze(-1)
        parts.append(chosen.double() - logits.logsumexp(-1).double())
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0)


def batches(lengths: dict[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Keys, longest first, in groups of rows × longest ≤ batch_tokens (one row at least)."""
    batch: list[int] = []
    for i in sorted(lengths, key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
