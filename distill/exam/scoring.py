"""How likely a student finds given answers, and what it dreams and says by itself.

Shape legend: B rows, T positions, D hidden, A answer tokens, N answer tokens of a whole batch, S named alternatives,
V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.backbone.generate import batches, generate
from distill.backbone.model import Backbone
from distill.exam.examinees.protocol import AnswerScore, Spoken
from distill.exam.metrics.likelihood import SoftTargets, bucket_divergence, named_places
from distill.exam.metrics.speech import Letters, form_of
from distill.tokens.chat import think_block

if TYPE_CHECKING:
    from distill.student.grammar import DreamGrammar
    from distill.tokens.bpe import StudentTokenizer

Item = TypeVar("Item")

BATCH_TOKENS = 4096
"""Rows × positions of one forward pass."""

LOGITS_AT_ONCE = 1 << 20
"""Elements of a block of logits: what fits a processor's cache is quicker to go over several times."""

POSITIONS_AT_ONCE = 64
"""Of a block, at least, however large the vocabulary: fewer make poor matrix products."""

BEST = 5
"""The teacher's likeliest token is looked for among so many."""


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
        spans = [hidden[place, len(contexts[i]) - 1 : len(rows[i]) - 1] for place, i in enumerate(batch)]
        # Only what predicts an answer's token is projected, that of a whole batch at once.
        flat = torch.cat(spans)

        def logits(part: slice, states: Tensor = flat) -> Tensor:
            return model.lm_head(states[part]).float()

        scores = score_logits(logits, model.config.vocab_size, [answers[i] for i in batch], [targets[i] for i in batch])
        yield from zip(batch, scores, strict=True)


def score_logits(
    logits: Callable[[slice], Tensor],
    vocabulary: int,
    answers: Sequence[Sequence[int]],
    targets: Sequence[SoftTargets | None],
) -> list[AnswerScore]:
    """Scores of answers whose tokens are predicted by `logits`: for a slice of the N tokens of all answers, one after
    the other, it makes fresh float32 (n, V), which are overwritten here. They are never held whole.
    """
    lengths = [len(answer) for answer in answers]
    result = AnswerScore.unknown(sum(lengths))
    labels = torch.tensor([token for answer in answers for token in answer], dtype=torch.long)
    named = _Named.of(targets, lengths)
    size = max(POSITIONS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        _score_block(logits(part), labels[part], named, part, result)
    ends = np.cumsum(lengths)[:-1]
    columns = [np.split(column, ends) for column in vars(result).values()]
    return [AnswerScore(*arrays) for arrays in zip(*columns, strict=True)]


@dataclass(frozen=True)
class _Named:
    """The soft targets of N tokens; fields as in SoftTargets."""

    ids: Tensor
    logprobs: Tensor
    top: Tensor
    soft: NDArray[np.bool_]

    @classmethod
    def of(cls, targets: Sequence[SoftTargets | None], lengths: Sequence[int]) -> "_Named | None":
        """None where no answer has any."""
        width = max((found.ids.shape[1] for found in targets if found is not None), default=0)
        if not width:
            return None
        ids, logprobs = np.full((sum(lengths), width), -1, np.int64), np.full((sum(lengths), width), -np.inf)
        top, soft = np.full(sum(lengths), -1, np.int64), np.zeros(sum(lengths), np.bool_)
        for end, length, found in zip(np.cumsum(lengths).tolist(), lengths, targets, strict=True):
            if found is not None:
                part, columns = slice(end - length, end), slice(found.ids.shape[1])
                ids[part, columns], logprobs[part, columns] = found.ids, found.logprobs
                top[part], soft[part] = found.top, found.soft
        return cls(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(top), soft)


def _score_block(logits: Tensor, labels: Tensor, named: _Named | None, part: slice, result: AnswerScore) -> None:
    """Fill in `part` of the result. logits (n, V) are overwritten; float64 are only those of named tokens."""
    device = logits.device
    labels = labels.to(device)
    own = logits.gather(-1, labels[:, None]).squeeze(-1).double()
    best = logits.topk(min(BEST, logits.shape[-1]))
    highest, likeliest = best.values[:, 0].double(), best.indices[:, 0]
    if named is None or not named.soft[part].any():
        total = _log_sum_exp(logits)
    else:
        ids, soft = named.ids[part].to(device), named.soft[part]
        places = named_places(ids)
        values = logits.gather(-1, places)
        tail = _log_sum_exp(logits.scatter_(-1, places, -torch.inf))
        kl, total = bucket_divergence(values, tail, ids, named.logprobs[part].to(device))
        hits = best.indices == named.top[part].to(device)[:, None]
        for column, found in ((result.kl, kl), (result.agrees, hits[:, 0]), (result.agrees_5, hits.any(-1))):
            column[part] = np.where(soft, found.cpu().numpy(), np.nan)
    result.logprobs[part] = (own - total).cpu().numpy()
    result.confidence[part] = (highest - total).exp().cpu().numpy()
    result.correct[part] = (likeliest == labels).cpu().numpy()


def _log_sum_exp(logits: Tensor) -> Tensor:
    """log Σ exp of each row (n,) float64, without a copy: logits (n, V) are overwritten."""
    # A row may be all −∞ where every token was named.
    highest = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    return highest.squeeze(-1).double() + logits.sub_(highest).exp_().sum(-1).double().log()


# Contexts: what stands before an answer.


def dream_context(tokenizer: "StudentTokenizer", header: Sequence[int], dream: Sequence[int]) -> list[int]:
    """A prompt's header and a dream, closed: the answer comes next. No dream: as `think: false` renders it."""
    return [*header, *think_block(tokenizer, dream)]


@dataclass(frozen=True)
class OwnDream:
    """Tokens between `<think>⏎` and `⏎</think>`; `closed` by the student itself, or by us at the limit. written: all
    that it wrote after `<think>⏎`, with what ended it."""

    ids: list[int]
    closed: bool
    written: list[int] = field(default_factory=list[int])


def spoken_of(
    dream: OwnDream,
    answer: list[int],
    thought: str,
    said: str,
    letters: Letters,
    *,
    ended: bool,
    steps: int,
    seconds: float,
) -> Spoken:
    """What was said, of a dream and of an answer's ids without its end token. thought, said: both as text. ended: the
    answer by itself. steps: triplets that a lens may have."""
    form = form_of(
        letters(dream.written),
        letters(answer),
        dream_text=thought,
        answer_text=said,
        closed=dream.closed,
        ended=ended,
        steps=steps,
    )
    return Spoken(thought, said, dream.closed, len(dream.ids) + len(answer), seconds, form)


def sample_dreams(
    model: Backbone,
    tokenizer: "StudentTokenizer",
    grammar: "DreamGrammar",
    headers: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[OwnDream]:
    """One dream a header, sampled after the opening `<think>`; what doesn't close within `max_tokens` is closed."""
    end = tokenizer.end_think_id
    drawn = generate(
        model,
        [[*header, tokenizer.think_id, tokenizer.newline_id] for header in headers],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=list(seeds),
        stop_ids=[end],
        grammar=grammar.inside,
    )
    dreams: list[OwnDream] = []
    for written in drawn:
        closed = bool(written) and written[-1] == end
        ids = written[:-1] if closed else written
        ids = ids[:-1] if ids and ids[-1] == tokenizer.newline_id else ids
        dreams.append(OwnDream(ids, closed, written))
    return dreams


def write_answers(
    model: Backbone,
    grammar: "DreamGrammar",
    contexts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    eos_id: int,
) -> list[list[int]]:
    """One answer a context, with EOS where it ended by itself."""
    return generate(
        model,
        contexts,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=list(seeds),
        stop_ids=[eos_id],
        grammar=grammar.answering,
    )


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """In groups of at most `size`, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
