"""How likely a student finds given answers, and what it dreams and says by itself.

Shape legend: B rows, T positions, D hidden, A answer tokens, S named alternatives, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from distill.evaluation.metrics import SoftTargets, bucket_kl
from distill.student.generate import batches, generate
from distill.student.model import Backbone

if TYPE_CHECKING:
    from distill.tokens.bpe import StudentTokenizer

BATCH_TOKENS = 4096
"""Rows × positions of one forward pass."""

LOGITS_AT_ONCE = 1 << 22
"""Elements of a (positions, V) block of logits: bucket_kl makes several float64 copies of it."""


@dataclass(frozen=True)
class AnswerScore:
    """One answer after one context.

    logprobs (A,) float64, nats; kl (A,) float64, nats, NaN where there is no soft target; agrees (A,) float64,
    1 where the student's likeliest token is the teacher's, NaN where there is no soft target.
    """

    logprobs: NDArray[np.float64]
    kl: NDArray[np.float64]
    agrees: NDArray[np.float64]


@torch.inference_mode()
def score_answers(
    model: Backbone,
    contexts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    targets: Sequence[SoftTargets | None],
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, AnswerScore]]:
    """(index, score) of each answer after its context, rows of like length together, so that little is padded."""
    rows = [[*context, *answer] for context, answer in zip(contexts, answers, strict=True)]
    for batch in batches({i: len(row) for i, row in enumerate(rows)}, batch_tokens):
        longest = max(len(rows[i]) for i in batch) - 1
        # Padded on the right: what comes before never reads it.
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        for place, i in enumerate(batch):
            ids[place, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
        hidden = model.hidden(ids.to(model.cos.device))
        for place, i in enumerate(batch):
            span = hidden[place, len(contexts[i]) - 1 : len(rows[i]) - 1]
            yield i, _score(model, span, answers[i], targets[i])


def _score(model: Backbone, hidden: torch.Tensor, answer: Sequence[int], targets: SoftTargets | None) -> AnswerScore:
    """Of hidden (A, D), the states that predict the answer's tokens."""
    length = len(answer)
    result = AnswerScore(np.empty(length), np.full(length, np.nan), np.full(length, np.nan))
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, length, size):
        part = slice(start, start + size)
        logits = model.lm_head(hidden[part]).float()
        labels = torch.tensor(answer[part], device=logits.device)[:, None]
        if targets is None or not targets.soft[part].any():
            total = logits.logsumexp(-1).double()
        else:
            ids = torch.from_numpy(targets.ids[part]).to(logits.device)
            kl, total = bucket_kl(logits, ids, torch.from_numpy(targets.logprobs[part]).to(logits.device))
            result.kl[part] = np.where(targets.soft[part], kl.cpu().numpy(), np.nan)
            same = logits.argmax(-1).cpu().numpy() == targets.top[part]
            result.agrees[part] = np.where(targets.soft[part], same, np.nan)
        result.logprobs[part] = (logits.gather(-1, labels).squeeze(-1).double() - total).cpu().numpy()
    return result


# Contexts: what stands before an answer.


def dream_context(tokenizer: "StudentTokenizer", header: Sequence[int], dream: Sequence[int]) -> list[int]:
    """A prompt's header and a dream, closed: the answer comes next. No dream: as `think: false` renders it."""
    newline = tokenizer.newline_id
    inside = [*dream, newline] if dream else []
    return [*header, tokenizer.think_id, newline, *inside, tokenizer.end_think_id, newline]


@dataclass(frozen=True)
class OwnDream:
    """Tokens between `<think>⏎` and `⏎</think>`; `closed` by the student itself, or by us at the limit."""

    ids: list[int]
    closed: bool


def sample_dreams(
    model: Backbone,
    tokenizer: "StudentTokenizer",
    headers: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[OwnDream]:
    """One dream a header, sampled after the opening `<think>`; what doesn't close is closed."""
    stops = [tokenizer.end_think_id, tokenizer.eos_id]
    drawn = generate(
        model,
        [[*header, tokenizer.think_id, tokenizer.newline_id] for header in headers],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=list(seeds),
        stop_ids=stops,
    )
    dreams: list[OwnDream] = []
    for ids in drawn:
        closed = bool(ids) and ids[-1] == tokenizer.end_think_id
        ids = ids[:-1] if ids and ids[-1] in stops else ids
        ids = ids[:-1] if ids and ids[-1] == tokenizer.newline_id else ids
        dreams.append(OwnDream(ids, closed))
    return dreams


def write_answers(
    model: Backbone,
    contexts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    eos_id: int,
) -> list[list[int]]:
    """One answer a context, without EOS."""
    drawn = generate(
        model, contexts, max_tokens=max_tokens, temperature=temperature, seed=list(seeds), stop_ids=[eos_id]
    )
    return [ids[:-1] if ids and ids[-1] == eos_id else ids for ids in drawn]
