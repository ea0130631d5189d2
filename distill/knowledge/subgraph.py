"""What a prompt is answered from: the chains around it as tensors, several prompts' side by side.

Shape legend: U texts, B prompts, T words, N concepts, E chains; each concept and chain is of one prompt.
"""

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.knowledge.retrieval import Chain, Retriever
from distill.mining.inflect import stem
from distill.mining.triplets import LENSES

BUCKETS = 8192
MAX_WORDS = 64
"""Of a prompt, those that are read."""


@dataclass(frozen=True)
class Batch:
    """features, starts  numbers of all U texts' features, and where each text's begin
    words     (B, T) numbers of texts, −1 where there is no word
    concepts  (N,) numbers of texts; whose (N,) prompts
    matches   (N, T) what a word weighs (0 to 1) that its concept holds
    chains    (E, 3) numbers of concepts: what, action, result; lenses (E,); counts (E,) log(1 + times said)
    asked     (E,) prompts
    """

    features: Tensor
    starts: Tensor
    words: Tensor
    concepts: Tensor
    whose: Tensor
    matches: Tensor
    chains: Tensor
    lenses: Tensor
    counts: Tensor
    asked: Tensor


def words_in(prompt: str) -> list[str]:
    return re.findall(r"[^\W_]+", prompt.lower())[:MAX_WORDS]


@lru_cache(maxsize=65536)
def features_of(text: str) -> tuple[int, ...]:
    """Of a text its words' stems and their three letters in a row, hashed (arXiv:1607.04606)."""
    stems = [stem(word) for word in words_in(text)] or [text]
    parts = [f"{{{one}}}"[i : i + 3] for one in stems for i in range(len(one))]
    return tuple(zlib.crc32(part.encode()) % BUCKETS for part in (*stems, *parts))


def flat(texts: Iterable[str]) -> tuple[Tensor, Tensor]:
    """Features of texts, one after the other, and where each text's begin: as nn.EmbeddingBag takes them."""
    found = [features_of(text) for text in texts]
    starts = [0]
    for one in found:
        starts.append(starts[-1] + len(one))
    return torch.tensor([number for one in found for number in one]), torch.tensor(starts[:-1])


def batch_of(retriever: Retriever, words: Sequence[str], around: Sequence[Chain]) -> Batch:
    """One prompt and at least one chain."""
    texts: dict[str, int] = {}
    places: dict[frozenset[str], int] = {}
    concepts: list[int] = []
    matches: list[list[float]] = []
    stems = [stem(word) for word in words]
    top = math.log(1 + len(retriever.entries))
    weights = {word: retriever.weight(word) / top for word in stems if word in retriever.by_stem}

    def place(name: str) -> int:
        entry = retriever.entries[name]
        if entry.concept not in places:
            places[entry.concept] = len(concepts)
            concepts.append(texts.setdefault(entry.label, len(texts)))
            matches.append([weights[word] if word in entry.stems else 0.0 for word in stems])
        return places[entry.concept]

    chains = [[place(name) for name in chain[:3]] for chain in around]
    said = [texts.setdefault(word, len(texts)) for word in words]
    return Batch(
        *flat(texts),
        words=torch.tensor([said], dtype=torch.long),
        concepts=torch.tensor(concepts),
        whose=torch.zeros(len(concepts), dtype=torch.long),
        matches=torch.tensor(matches).view(len(concepts), len(words)),
        chains=torch.tensor(chains),
        lenses=torch.tensor([LENSES.index(chain.lens) for chain in around]),
        counts=torch.tensor([math.log1p(retriever.chains[chain]) for chain in around]),
        asked=torch.zeros(len(around), dtype=torch.long),
    )


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Several prompts as one."""
    most = max(1, *(batch.words.shape[1] for batch in batches))  # one at least, that is none
    features = texts = nodes = prompts = 0
    moved: list[Batch] = []
    for batch in batches:
        short = most - batch.words.shape[1]
        moved.append(
            Batch(
                batch.features,
                batch.starts + features,
                F.pad(torch.where(batch.words < 0, -1, batch.words + texts), (0, short), value=-1),
                batch.concepts + texts,
                batch.whose + prompts,
                F.pad(batch.matches, (0, short)),
                batch.chains + nodes,
                batch.lenses,
                batch.counts,
                batch.asked + prompts,
            )
        )
        features, texts = features + len(batch.features), texts + len(batch.starts)
        nodes, prompts = nodes + len(batch.concepts), prompts + len(batch.words)
    return Batch(*(torch.cat([getattr(one, field.name) for one in moved]) for field in fields(Batch)))
