"""How likely a model finds given answers.

Shape legend: B rows, T positions, D hidden, N answer tokens of a whole batch, n of a block of them, S named
alternatives, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.backbone.generate import batches
from distill.backbone.model import Backbone
from distill.exam.examinees.protocol import AnswerScore
from distill.exam.metrics.likelihood import SoftTargets, bucket_divergence, named_places

BATCH_TOKENS = 4096
"""Rows × positions of one forward pass."""

LOGITS_AT_ONCE = 1 << 20
"""Elements of a block of logits: what fits a processor's cache is quicker to go over several times."""

POSITIONS_AT_ONCE = 64
"""Of a block, at least, however large the vocabulary: fewer make poor matrix products."""

BEST = 5
"""The teacher's likeliest token is looked for among so many."""


def score_answers(
    model: Backbone,
    contexts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    targets: Sequence[SoftTargets | None],
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, AnswerScore]]:
    """`score_rows` of a backbone: only what predicts an answer's token is projected."""
    return score_rows(
        model.hidden,
        lambda states: model.lm_head(states).float(),
        (model.config.vocab_size, model.cos.device),
        contexts,
        answers,
        targets,
        batch_tokens,
    )


@torch.inference_mode()
def score_rows(
    read: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    size: tuple[int, torch.device],
    contexts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    targets: Sequence[SoftTargets | None],
    batch_tokens: int,
) -> Iterator[tuple[int, AnswerScore]]:
    """(index, score) of each answer after its context, rows of like length together, so that little is padded.

    read: ids (B, T) → states (B, T, D). project: states (n, D) → float32 logits (n, V), which are overwritten. size:
    V, and where the model lies.
    """
    vocabulary, device = size
    rows = [[*context, *answer] for context, answer in zip(contexts, answers, strict=True)]
    for batch in batches({i: len(row) for i, row in enumerate(rows)}, batch_tokens):
        longest = max(len(rows[i]) for i in batch) - 1
        # Padded on the right: what comes before never reads it.
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        for place, i in enumerate(batch):
            ids[place, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
        states = read(ids.to(device))
        flat = torch.cat([states[place, len(contexts[i]) - 1 : len(rows[i]) - 1] for place, i in enumerate(batch)])
        lengths = [len(answers[i]) for i in batch]
        result = AnswerScore.unknown(sum(lengths))
        labels = torch.tensor([token for i in batch for token in answers[i]], dtype=torch.long)
        named = _joined([targets[i] for i in batch], lengths)
        step = max(POSITIONS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            _score_block(project(flat[part]), labels[part], named, part, result)
        columns = [np.split(column, np.cumsum(lengths)[:-1]) for column in vars(result).values()]
        yield from zip(batch, (AnswerScore(*arrays) for arrays in zip(*columns, strict=True)), strict=True)


def _joined(targets: Sequence[SoftTargets | None], lengths: Sequence[int]) -> SoftTargets | None:
    """Those of all N tokens of a batch; None where no answer has any."""
    width = max((found.ids.shape[1] for found in targets if found is not None), default=0)
    if not width:
        return None
    total = sum(lengths)
    joined = SoftTargets(
        np.full((total, width), -1, np.int64),
        np.full((total, width), -np.inf),
        np.full(total, -1, np.int64),
        np.zeros(total, np.bool_),
    )
    for end, length, found in zip(np.cumsum(lengths).tolist(), lengths, targets, strict=True):
        if found is not None:
            part, columns = slice(end - length, end), slice(found.ids.shape[1])
            joined.ids[part, columns], joined.logprobs[part, columns] = found.ids, found.logprobs
            joined.top[part], joined.soft[part] = found.top, found.soft
    return joined


def _score_block(logits: Tensor, labels: Tensor, named: SoftTargets | None, part: slice, result: AnswerScore) -> None:
    """Fill in `part` of the result. logits (n, V) are overwritten; float64 are only those of named tokens."""
    device = logits.device
    labels = labels.to(device)
    own = logits.gather(-1, labels[:, None]).squeeze(-1).double()
    best = logits.topk(min(BEST, logits.shape[-1])).indices
    if named is None or not named.soft[part].any():
        total = _log_sum_exp(logits)
    else:
        ids, soft = torch.from_numpy(named.ids[part]).to(device), named.soft[part]
        places = named_places(ids)
        values = logits.gather(-1, places)
        tail = _log_sum_exp(logits.scatter_(-1, places, -torch.inf))
        kl, total = bucket_divergence(values, tail, ids, torch.from_numpy(named.logprobs[part]).to(device))
        hits = best == torch.from_numpy(named.top[part]).to(device)[:, None]
        for column, found in ((result.kl, kl), (result.agrees, hits[:, 0]), (result.agrees_5, hits.any(-1))):
            column[part] = np.where(soft, found.cpu().numpy(), np.nan)
    result.logprobs[part] = (own - total).cpu().numpy()


def _log_sum_exp(logits: Tensor) -> Tensor:
    """log Σ exp of each row (n,) float64, without a copy: logits (n, V) are overwritten."""
    # A row may be all −∞ where every token was named.
    highest = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    return highest.squeeze(-1).double() + logits.sub_(highest).exp_().sum(-1).double().log()
