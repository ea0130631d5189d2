"""The student's own dreams on training prompts.

A mined dream tells what the answer says; a student's own may be wrong. Late in training some documents hold such
drafts, so that the answer learns how far to trust its dream.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from distill.backbone.generate import generate
from distill.backbone.model import Backbone
from distill.student.grammar import DreamGrammar, dream_size
from distill.tokens.bpe import StudentTokenizer
from distill.training.distributed import World

TOGETHER = 256
"""Documents that a process drafts before it is asked whether to stop."""
TEMPERATURE = 0.8

Drafts = dict[str, Tensor]
"""documents (n,), ends (n,), ids: flat, all int64. Empty before there are any."""


def dream_on(
    model: Backbone,
    prompt: Callable[[int], Iterable[int]],
    tokenizer: StudentTokenizer,
    steps: int,
    seed: int,
    chosen: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, list[int]]:
    """Dreams of at most `steps` triplets a lens, for some documents, by number. One that is empty, or cut off, is left
    out."""
    head = [tokenizer.think_id, tokenizer.newline_id]
    model.eval()
    written = generate(
        model,
        [[*map(int, prompt(i)), *head] for i in chosen],
        max_tokens=dream_size(steps),
        temperature=temperature,
        seed=[seed + i for i in chosen],
        stop_ids=[tokenizer.newline_id, tokenizer.end_think_id],
        batch_rows=64,
        grammar=DreamGrammar(tokenizer, steps).inside,
    )
    model.train()
    # Neither empty, nor cut off by the context.
    return {i: ids[:-1] for i, ids in zip(chosen, written, strict=True) if ids[-1] == tokenizer.newline_id}


def stored(drafts: Mapping[int, Sequence[int]]) -> Drafts:
    """Drafts by document as tensors."""
    return {
        "documents": torch.tensor(list(drafts), dtype=torch.int64),
        "ends": torch.tensor([len(ids) for ids in drafts.values()], dtype=torch.int64).cumsum(0),
        "ids": torch.tensor([id for ids in drafts.values() for id in ids], dtype=torch.int64),
    }


class Stopped(Exception):
    """Somebody asked to stop while drafts were made."""


def share_out(
    chosen: Sequence[int],
    dream: Callable[[Sequence[int]], Mapping[int, Sequence[int]]],
    world: World,
    device: torch.device,
    stopped: Callable[[], bool],
) -> dict[int, list[int]]:
    """`dream` of all chosen documents, of which each process makes its share, in every process. Raises Stopped."""
    found: dict[int, list[int]] = {}
    size = world.size * TOGETHER
    for start in range(0, len(chosen), size):
        if start and stopped():
            raise Stopped
        own = stored(dream(chosen[start : start + size][world.rank :: world.size]))
        for source in range(world.size):
            found |= by_document({name: _shared(part, world, source, device) for name, part in own.items()})
    return found


def _shared(own: Tensor, world: World, source: int, device: torch.device) -> Tensor:
    size = int(world.share(torch.tensor(len(own), device=device), source))
    part = own if world.rank == source else torch.zeros(size, dtype=torch.int64)
    return world.share(part.to(device), source).cpu()


def by_document(drafts: Mapping[str, Tensor]) -> dict[int, list[int]]:
    """Document → the ids of its draft."""
    if not drafts:
        return {}
    ends = drafts["ends"].tolist()
    parts = (drafts["ids"][start:end].tolist() for start, end in zip([0, *ends], ends, strict=False))
    return dict(zip(drafts["documents"].tolist(), parts, strict=True))
