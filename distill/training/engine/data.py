"""What the dream engine learns from: prompts, their mined dreams as codes and as phrases, and the answers.

Ids are those of the backbone's own training documents, memory-mapped. A phrase is encoded once for all phases.

Shape legend: n documents, B prompts of a batch, L lenses (4), T steps, 3 roles (what, action, result), D = 512,
U distinct phrases.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.corpus.traces import TraceStore
from distill.mining.triplets import LENSES, Triplet, by_trace, read_triplets
from distill.run import Run, write_atomic
from distill.tokens.concepts import CONCEPT_DIM
from distill.tokens.image_tokens import Codebook, coded_steps, load_codes
from distill.tokens.packing import Documents, split_traces

ABSENT = -1
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class DreamBatch:
    """B prompts. Absent steps have codes −1 and phrases 0.

    documents (B,): their numbers. prompts, answers: ids. codes (B, L, T, 3) int64. phrases (B, L, T, 3, D)
    float32: the mined phrases' own embeddings, which the codes are the nearest centroids of.
    """

    documents: NDArray[np.int64]
    prompts: list[list[int]]
    answers: list[list[int]]
    codes: Tensor
    phrases: Tensor

    def __len__(self) -> int:
        return len(self.documents)

    def to(self, device: torch.device) -> "DreamBatch":
        return DreamBatch(self.documents, self.prompts, self.answers, self.codes.to(device), self.phrases.to(device))


@dataclass(frozen=True)
class DreamData:
    """One split. codes, phrases (n, L, T, 3) int32: codes, and rows of vectors; usable: documents with a dream whose
    prompt leaves room for one; left_out: those with a longer prompt. vectors (U, D) float16."""

    documents: Documents
    codes: NDArray[np.int32]
    phrases: NDArray[np.int32]
    vectors: NDArray[np.float16]
    usable: NDArray[np.int64]
    left_out: int

    def __len__(self) -> int:
        """Documents that can be learned from."""
        return len(self.usable)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Prompt tokens of the usable documents."""
        return np.diff(self.documents.prompt_ends, prepend=0)[self.usable]

    def batch(self, places: NDArray[np.int64]) -> DreamBatch:
        """The usable documents at some places."""
        chosen = self.usable[places]
        rows = self.phrases[chosen]
        vectors = self.vectors[np.maximum(rows, 0)].astype(np.float32) * (rows >= 0)[..., None]
        return DreamBatch(
            documents=chosen,
            prompts=[self.documents.prompt(int(i)).tolist() for i in chosen],
            answers=[self.documents.answer(int(i)).tolist() for i in chosen],
            codes=torch.from_numpy(self.codes[chosen].astype(np.int64)),
            phrases=torch.from_numpy(vectors),
        )


def dream_tokens(steps: int) -> int:
    """Tokens of the longest think block: its tags and line breaks, and each lens with its steps."""
    return 5 + len(LENSES) * (1 + 3 * steps)


def has_dream(documents: Documents) -> NDArray[np.bool_]:
    """(n,) whether a step was mined: more than the four lenses."""
    return np.diff(documents.dream_ends, prepend=0) > len(LENSES)


def leaves_room(documents: Documents, steps: int, context: int) -> NDArray[np.bool_]:
    """(n,) whether the prompt, the longest dream and a token of the answer fit the context."""
    return np.diff(documents.prompt_ends, prepend=0) + dream_tokens(steps) < context


def load_data(run: Run, codebook: Codebook, steps: int, context: int) -> dict[Split, DreamData]:
    """Training and validation prompts; held-out ones are in neither.

    steps: T; longer chains are cut. context: what prompt, dream and at least one token of the answer must fit.
    """
    codes = load_codes(run.tokenizer, codebook)
    mined = read_triplets(run.triplets)
    known = sorted({phrase for triplet in mined for phrase in triplet.phrases})
    vectors = phrase_vectors(run, codebook, known)
    rows = {phrase: row for row, phrase in enumerate(known)}
    triplets = by_trace(mined)
    with TraceStore(run.traces, readonly=True) as store:
        keys = [[trace.key for trace in traces] for traces in split_traces(store)]
    found: dict[Split, DreamData] = {}
    for split, wanted in zip(("train", "validation"), keys, strict=True):
        documents = Documents.load(run.data / split)
        assert len(documents) == len(wanted)
        targets = [dream_targets(triplets.get(key, []), codes, rows, steps) for key in wanted]
        arrays = np.stack([code for code, _ in targets]), np.stack([row for _, row in targets])
        dreaming, fits = has_dream(documents), leaves_room(documents, steps, context)
        usable = np.flatnonzero(dreaming & fits)
        found[split] = DreamData(documents, *arrays, vectors, usable, int((dreaming & ~fits).sum()))
    return found


def dream_targets(
    triplets: list[Triplet], codes: dict[str, int], rows: dict[str, int], steps: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """A trace's mined dream: the codes and the phrases' rows of each step, (L, T, 3) each, −1 where absent."""
    code_at = np.full((len(LENSES), steps, 3), ABSENT, np.int32)
    row_at = code_at.copy()
    for lens, chain in enumerate(coded_steps(triplets, codes).values()):
        for t, (step, triplet) in enumerate(chain[:steps]):
            code_at[lens, t] = step
            row_at[lens, t] = [rows[phrase] for phrase in triplet.phrases]
    return code_at, row_at


def phrase_vectors(run: Run, codebook: Codebook, phrases: list[str]) -> NDArray[np.float16]:
    """(U, D) unit vectors of phrases. Kept beside the documents, so that an encoder elsewhere is asked once."""
    path = run.data / "phrases.npy"
    shape = (len(phrases), CONCEPT_DIM)
    try:
        kept: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        if kept.shape == shape and kept.dtype == np.float16:
            return kept
    except (OSError, ValueError):
        pass  # not there yet, or cut short: encode them
    vectors = codebook.encoder.encode(phrases).astype(np.float16)
    file = io.BytesIO()
    np.save(file, vectors, allow_pickle=False)
    write_atomic(path, file.getvalue())
    return vectors


class Order:
    """Which prompts each step reads: shuffled epochs.

    Short and long prompts share a batch: sorted by length, a batch would hold dreams of one length, and the engine
    learns those in twice the steps. A pure function of (seed, phase, step), so that a resumed training reads what it
    would have read.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.batches = -(-count // size)
        self._epoch = lru_cache(maxsize=1)(self._shuffled)

    def at(self, phase: int, step: int) -> NDArray[np.int64]:
        """Places of the prompts of a step, counted from 0."""
        epoch, number = divmod(step, self.batches)
        return self._epoch(phase, epoch)[number * self.size : (number + 1) * self.size]

    def _shuffled(self, phase: int, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, phase, epoch]).permutation(self.count)


def first_triplets(batch: DreamBatch) -> tuple[Tensor, Tensor]:
    """Codes (B, 3) and phrases (B, 3, D) of each dream's first step: of the first lens that has one."""
    lens = (batch.codes[:, :, 0, 0] >= 0).int().argmax(1)
    row = torch.arange(len(batch), device=lens.device)
    return batch.codes[row, lens, 0], batch.phrases[row, lens, 0]


def outcomes(batch: DreamBatch) -> tuple[Tensor, Tensor]:
    """Codes (B, 3) and phrases (B, 3, D) of what each dream comes to: the last step of the causal chain, or, where
    that is empty, of the last lens that has one."""
    lengths = (batch.codes[..., 0] >= 0).sum(-1)  # (B, L)
    causal = LENSES.index("causal")
    last = len(LENSES) - 1 - (lengths > 0).int().flip(1).argmax(1)
    row = torch.arange(len(batch), device=lengths.device)
    lens = torch.where(lengths[:, causal] > 0, causal, last)
    step = lengths[row, lens] - 1
    return batch.codes[row, lens, step], batch.phrases[row, lens, step]
