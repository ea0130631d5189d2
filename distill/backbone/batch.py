"""Many who write with one model, a token each at a time: they join and leave as they come and end.

What one of them writes depends on its prompt and its seed, never on its neighbours (but for float rounding): each row
draws its own uniform numbers beforehand.

Shape legend: B rows, K alternatives, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.backbone.generate import Grammar
from distill.backbone.likeliest import Likeliest, draw, likeliest, top
from distill.backbone.prepared import Prepared
from distill.backbone.rows import Rows

NARROW = 256
"""Up to this top_k a row draws from its likeliest tokens; else (0 too) its whole distribution is sorted."""


class How(Protocol):
    """How a row draws: top_k (0: all), then top_p, then temperature (0: the likeliest). top_logprobs: alternatives that
    are told of each position."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def top_logprobs(self) -> int: ...


class Form(Protocol):
    """What one row alone is held to."""

    def allowed(self, state: int | None) -> NDArray[np.bool_] | None:
        """(V,): what may be written next where the grammar is in `state`, whatever that allows; None: what it does."""
        ...

    def advance(self, token: int) -> None:
        """What was written where something was `allowed`."""
        ...


@dataclass(eq=False)
class Row:
    """Who writes: at most `room` tokens after a prompt of at least one, `count` so far.

    state: of the batch's grammar; None: it may write anything.
    """

    prompt: list[int]
    room: int
    how: How
    state: int | None = None
    count: int = 0
    form: Form | None = None

    def __post_init__(self) -> None:
        self.next = self.prompt[-1]
        warm = self.how.temperature > 0
        self.uniforms = np.random.default_rng(self.how.seed % 2**64).random(self.room) if warm else None
        self.narrow = not warm or 0 < self.how.top_k <= NARROW

    @property
    def columns(self) -> int:
        return len(self.prompt) + self.room


@dataclass(frozen=True)
class Step:
    """What B rows wrote: tokens (B,), logprobs (B,) float32, and the K likeliest, top_ids (B, K), top_logprobs (B, K).
    Log-probabilities are natural and at T = 1, whatever was drawn from. K is the most that any row wants told."""

    tokens: list[int]
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


R = TypeVar("R", bound=Row)


class Batch(Generic[R]):
    """slots: rows at once at most; fewer where their past would take more than `memory` bytes."""

    def __init__(self, weights: Prepared, slots: int, memory: int, grammar: Grammar | None = None) -> None:
        self.weights, self.slots, self.memory, self.grammar = weights, slots, memory, grammar
        self.rows: list[R] = []
        self._past = Rows(weights)
        self._logits = torch.empty(0)

    def fitting(self, waiting: deque[R]) -> list[R]:
        """Of those that wait, in their order, as many as there are slots and memory for; one, if the batch is empty."""
        new: list[R] = []
        columns = max((row.columns for row in self.rows), default=0)
        while waiting and (count := len(self.rows) + len(new)) < self.slots:
            columns = max(columns, waiting[0].columns)
            if count and (count + 1) * Rows.bytes_of(self.weights, columns) > self.memory:
                break
            new.append(waiting.popleft())
        return new

    def join(self, new: Sequence[R], columns: int = 0) -> None:
        """Read the prompts of new rows. columns: of the past that room is made for at once; else it grows."""
        self.rows += new
        self._past.reserve(len(self.rows) if columns else self._room(), columns)
        self._past.join([row.prompt[:-1] for row in new])  # the last token is read by the first step
        if len(self._logits) < len(self.rows):
            shape = (len(self.rows), self.weights.config.vocab_size)
            self._logits = torch.empty(shape, device=self.weights.embed.device)

    def _room(self) -> int:
        """Rows to make room for, where they come one by one: twice as many each time, as far as memory goes."""
        rows, columns = len(self.rows), max(row.columns for row in self.rows)
        return min(1 << (rows - 1).bit_length(), max(rows, self.memory // Rows.bytes_of(self.weights, columns)))

    def leave(self, i: int) -> None:
        """Forget row i; the last one takes its place."""
        self._past.leave(i)
        self.rows[i] = self.rows[-1]
        self.rows.pop()

    @torch.inference_mode()
    def step(self) -> Step:
        """Every row writes a token."""
        rows, device = self.rows, self.weights.embed.device
        states = self._past.advance(torch.tensor([row.next for row in rows], device=device))
        width = max(row.how.top_logprobs for row in rows)
        count = max(width, 1, *(row.how.top_k for row in rows if row.narrow))
        found = likeliest(self.weights, states, count, self._logits)
        chosen = self._obey(found, count)
        tokens = chosen.tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.next = token
            row.count += 1
        logprobs = found.logprobs.gather(1, chosen[:, None])[:, 0]
        return Step(
            tokens,
            logprobs.cpu().numpy(),
            found.top_ids[:, :width].cpu().numpy(),
            found.top_logprobs[:, :width].cpu().numpy(),
        )

    def _obey(self, found: Likeliest, count: int) -> Tensor:
        """The next token of each row, (B,), held to the grammar and to its form where it is to be."""
        grammar, device = self.grammar, found.logprobs.device
        obeying = [(i, row.state) for i, row in enumerate(self.rows) if grammar is not None and row.state is not None]
        forms = [(i, form, form.allowed(row.state)) for i, row in enumerate(self.rows) if (form := row.form)]
        forms = [(i, form, torch.from_numpy(allowed)) for i, form, allowed in forms if allowed is not None]
        if not obeying and not forms:
            return self._choose(found)
        at, states = torch.tensor(obeying, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
        if grammar is not None and len(obeying) == len(self.rows):
            allowed = grammar.mask(found.logprobs, states)
        else:
            allowed = found.logprobs.clone()
            if grammar is not None and obeying:
                allowed[at] = grammar.mask(found.logprobs[at], states)
        for i, _, words in forms:
            allowed[i] = found.logprobs[i].masked_fill(~words.to(device), -torch.inf)
        chosen = self._choose(Likeliest(allowed, *top(allowed, min(count, allowed.shape[1]))))
        for i, form, _ in forms:
            form.advance(int(chosen[i]))
        if grammar is not None and obeying:
            for (i, _), state in zip(obeying, grammar.advance(states, chosen[at]).tolist(), strict=True):
                self.rows[i].state = state
        return chosen

    def _choose(self, found: Likeliest) -> Tensor:
        chosen = found.top_ids[:, 0].clone()
        for narrow in (True, False):
            rows = [i for i, row in enumerate(self.rows) if row.uniforms is not None and row.narrow is narrow]
            if rows:
                at = torch.tensor(rows, device=chosen.device)
                values, ids = found.top_logprobs[at], found.top_ids[at]
                if not narrow:
                    values, ids = found.logprobs[at].sort(descending=True)
                place = draw(values, *self._how(rows, values.shape[1], chosen.device))
                chosen[at] = ids.gather(1, place[:, None])[:, 0]
        return chosen

    def _how(self, rows: list[int], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """top_k, top_p, temperature and a uniform number of each of these rows."""
        those = [self.rows[i] for i in rows]
        top_k = torch.tensor([min(row.how.top_k or size, size) for row in those], device=device)
        floats = [
            (row.how.top_p, row.how.temperature, row.uniforms[row.count]) for row in those if row.uniforms is not None
        ]
        top_p, temperature, uniform = torch.tensor(floats, dtype=torch.float64, device=device).unbind(1)
        return top_k, top_p, temperature, uniform
