"""The student's own dreams on training prompts.

A mined dream tells what the answer says; a student's own may be wrong. Late in training some documents hold such
drafts, so that the answer learns how far to trust its dream.
"""

import math

import torch
from torch import Tensor

from distill.backbone.generate import generate
from distill.backbone.model import Backbone
from distill.student.grammar import DreamGrammar, dream_size
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training.distributed import World

MOST = 2048
"""Documents that get a draft; more would take longer than they teach."""
TEMPERATURE = 0.8

Drafts = dict[str, Tensor]
"""documents (n,), ends (n,), ids: flat, all int64. Empty before there are any."""


def dream_on(model: Backbone, documents: Documents, tokenizer: StudentTokenizer, steps: int, seed: int) -> Drafts:
    """Dreams of at most `steps` triplets a lens, for documents spread evenly over those that have a mined one."""
    dreaming = [i for i in range(len(documents)) if len(documents.dream(i))]
    dreaming = [i for i in dreaming if len(documents.prompt(i)) < model.config.context // 2]
    chosen = dreaming[:: max(1, math.ceil(len(dreaming) / MOST))]
    head = [tokenizer.think_id, tokenizer.newline_id]
    model.eval()
    written = generate(
        model,
        [[*map(int, documents.prompt(i)), *head] for i in chosen],
        max_tokens=dream_size(steps),
        temperature=TEMPERATURE,
        seed=[seed + i for i in chosen],
        stop_ids=[tokenizer.newline_id, tokenizer.end_think_id],
        batch_rows=64,
        grammar=DreamGrammar(tokenizer, steps).inside,
    )
    model.train()
    # Neither empty, nor cut off by the context.
    kept = [(i, ids[:-1]) for i, ids in zip(chosen, written, strict=True) if ids[-1] == tokenizer.newline_id]
    return {
        "documents": torch.tensor([i for i, _ in kept], dtype=torch.int64),
        "ends": torch.tensor([len(ids) for _, ids in kept], dtype=torch.int64).cumsum(0),
        "ids": torch.tensor([id for _, ids in kept for id in ids], dtype=torch.int64),
    }


def share(drafts: Drafts, world: World, device: torch.device) -> Drafts:
    """The first process's drafts, in every process."""
    shared: Drafts = {}
    for name in ("documents", "ends", "ids"):
        own = drafts.get(name, torch.zeros(0, dtype=torch.int64))
        size = int(world.share(torch.tensor(len(own), device=device)))
        shared[name] = world.share((own if world.first else torch.zeros(size, dtype=torch.int64)).to(device)).cpu()
    return shared


def by_document(drafts: Drafts) -> dict[int, list[int]]:
    """Document → the ids of its draft."""
    if not drafts:
        return {}
    ends = drafts["ends"].tolist()
    parts = (drafts["ids"][start:end].tolist() for start, end in zip([0, *ends], ends, strict=False))
    return dict(zip(drafts["documents"].tolist(), parts, strict=True))
