"""What a student remembers of what it learned: documents, some of which it is shown again while it learns new ones.

Those that it knows worst are shown oftenest (prioritized experience replay, Schaul et al., arXiv:1511.05952): document
i is drawn with P(i) = p_i^α / Σ p^α, where p_i is its last loss, nats an answer token, and what it is then shown counts
(n · P(i))^−β, so that with β = 1 all documents count alike in the mean. A sum tree draws in O(log n).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import CorruptFile
from distill.tokens.packing import ARRAYS, Documents
from distill.training.batches import EMPTY, MINED, PAUSE, Batch, Batches, Piece, Row

ALPHA = 0.6
"""How much losses decide what is drawn; 0: nothing."""
BETA = 0.4
"""How far that is corrected at first; at the end of a learning it is wholly. Both as in the paper."""
LEAST = 0.01
"""Nats a token that every document has at least: what is known well is still drawn."""


class SumTree:
    """n numbers of at least 0 with the sums of halves, of halves of these, and so on: leaf i is node `size` + i."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.count, self.size = len(values), 1 << max(len(values) - 1, 0).bit_length()
        self.nodes = np.zeros(2 * self.size)
        self.put(np.arange(self.count), values)

    @property
    def total(self) -> float:
        return float(self.nodes[1])

    @property
    def values(self) -> NDArray[np.float64]:
        """All numbers, (n,)."""
        return self.nodes[self.size : self.size + self.count]

    def put(self, places: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """New numbers at some places; of one that is named twice, the last."""
        at = places + self.size
        self.nodes[at] = values
        while (at := np.unique(at // 2)).size and at[-1]:
            self.nodes[at] = self.nodes[2 * at] + self.nodes[2 * at + 1]

    def find(self, masses: NDArray[np.float64]) -> NDArray[np.int64]:
        """For each of some masses from 0 to below the total, the first place up to which the numbers sum to more."""
        at, left = np.ones(len(masses), np.int64), masses.copy()
        for _ in range(self.size.bit_length() - 1):
            below = self.nodes[2 * at]
            right = (left >= below) & (self.nodes[2 * at + 1] > 0)  # rounding must not lead to where nothing is
            left = np.where(right, left - below, left)
            at = 2 * at + right
        return at - self.size


class Priorities(SumTree):
    """p^α of n examples."""

    def weights(self, places: NDArray[np.int64], beta: float) -> NDArray[np.float64]:
        """(n · P(i))^−β of examples at some places."""
        return (self.count * self.values[places] / self.total) ** -beta

    def learn_losses(self, places: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Last losses of examples at some places, nats."""
        self.put(places, np.maximum(losses, LEAST) ** ALPHA)


class Memory:
    """Documents that were learned from, at most `most`.

    learned (n,) int64: by which learning each came in, 0 for the training. Each learning keeps an equal share of the
    room at least. shares (n,): p^α of each, 0 of what doesn't fit into a row.
    """

    def __init__(self, documents: Documents, learned: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
        self.documents, self.learned, self.tree = documents, learned, Priorities(shares)

    def __len__(self) -> int:
        return len(self.documents)

    @classmethod
    def of(cls, documents: Documents, most: int, seed: int) -> "Memory":
        """A random choice of a training's documents, all as important."""
        chosen = np.sort(np.random.default_rng([seed, len(documents)]).permutation(len(documents))[:most])
        count = len(chosen)
        return cls(gather([(documents, int(i)) for i in chosen]), np.zeros(count, np.int64), np.ones(count))

    def with_new(self, documents: Documents, most: int, seed: int) -> "Memory":
        """And those of one more learning, drawn at first as the worst known. Where room lacks, chance decides which of
        the learnings with most documents gives one up."""
        number = int(self.learned.max(initial=0)) + 1
        learned = np.concatenate([self.learned, np.full(len(documents), number)])
        worst = self.tree.values.max(initial=0.0) or 1.0
        shares = np.concatenate([self.tree.values, np.full(len(documents), worst)])
        counts = np.bincount(learned)
        while counts.sum() > most:
            counts[counts.argmax()] -= 1
        random = np.random.default_rng([seed, number])
        kept = np.sort(
            np.concatenate([random.permutation(np.flatnonzero(learned == i))[:n] for i, n in enumerate(counts)])
        )
        both = [*((self.documents, i) for i in range(len(self))), *((documents, i) for i in range(len(documents)))]
        return Memory(gather([both[i] for i in kept]), learned[kept], shares[kept])

    def draw(self, batches: Batches, rows: int, random: np.random.Generator, empty: float) -> list[Row]:
        """So many full rows of documents drawn by priority. empty: share of those with a dream that are read without.
        What is longer than a row is read as far as it goes.

        batches: of this memory's documents.
        """
        length, found = batches.length, list[Row]()
        for _ in range(rows):
            row, room = list[Piece](), length
            while room:
                place = int(self.tree.find(random.random(1) * self.tree.total)[0])
                dreams = batches.mixture.dreams and len(self.documents.dream(place)) and random.random() >= empty
                dream = len(self.documents.dream(place)) + 1 if dreams else 0
                size = len(self.documents.prompt(place)) + 4 + dream + len(self.documents.answer(place)) - 1
                variant, size = (PAUSE if batches.mixture.pause else MINED) if dreams else EMPTY, min(size, room)
                row.append(Piece(place, variant, size, again=True, noise=int(random.integers(2**31))))
                room -= size
            found.append(row)
        return found

    # On disk, within a checkpoint: whole or not at all.

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        parts: dict[str, NDArray[Any]] = {name: np.ascontiguousarray(getattr(self.documents, name)) for name in ARRAYS}
        save_file({**parts, "learned": self.learned, "shares": self.tree.values.copy()}, path)

    @classmethod
    def load(cls, path: Path) -> "Memory":
        """Raises CorruptFile."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            parts = load_file(path)
            documents = Documents(**{name: parts[name] for name in ARRAYS})
            return cls(documents, parts["learned"], parts["shares"])
        except (OSError, SafetensorError, KeyError) as error:
            raise CorruptFile(f"{path}: can't be read ({error}); delete {path.parent} to learn again") from error


def places_of(batch: Batch, rows: Sequence[Row]) -> NDArray[np.int64]:
    """The document of each position with loss, (M,)."""
    starts = np.array([row * batch.ids.shape[1] + start for row, start, _ in batch.spans.spans])
    documents = np.array([piece.document for row in rows for piece in row])
    return documents[np.searchsorted(starts, batch.where.cpu().numpy(), side="right") - 1]


def gather(chosen: Sequence[tuple[Documents, int]]) -> Documents:
    """Documents of these, document i of the first and so on, as a set of their own."""
    width = max((each.slot_ids.shape[1] for each, _ in chosen), default=0)
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS}
    chunks = 0
    for each, i in chosen:
        answer = each.span(each.answer_ends, i)
        for kind, ids in (("prompt", each.prompt(i)), ("dream", each.dream(i)), ("answer", each.answer(i))):
            parts[f"{kind}_ids"].append(ids)
            parts[f"{kind}_ends"].append(np.array([len(ids)]))
        more = width - each.slot_ids.shape[1]
        slots, labels = each.slot_ids[answer], np.asarray(each.answer_ids[answer])[:, None]
        parts["slot_ids"].append(np.concatenate([slots, np.repeat(labels.astype(slots.dtype), more, axis=1)], axis=1))
        logprobs = np.pad(each.slot_logprobs[answer], ((0, 0), (0, more)), constant_values=-np.inf)
        parts["slot_logprobs"].append(logprobs)
        numbers = np.asarray(each.chunk_ids[answer])
        first, end = (int(numbers[numbers >= 0].min()), int(numbers.max()) + 1) if (numbers >= 0).any() else (0, 0)
        parts["chunk_ids"].append(np.where(numbers >= 0, numbers - first + chunks, -1).astype(np.int32))
        parts["chunk_logprobs"].append(each.chunk_logprobs[first:end])
        parts["answer_bytes"].append(each.answer_bytes[i : i + 1])
        chunks += end - first
    flat = {name: np.concatenate(part) for name, part in parts.items()}
    return Documents(**{name: part.cumsum() if name.endswith("_ends") else part for name, part in flat.items()})


def with_dreams(documents: Documents, dreams: dict[int, list[int]]) -> Documents:
    """The same documents with these dreams (document → ids) in the place of their own."""
    found = [dreams.get(i, []) for i in range(len(documents))]
    ids = np.array([id for dream in found for id in dream], np.int64)
    return replace(documents, dream_ids=ids, dream_ends=np.cumsum([len(dream) for dream in found], dtype=np.int64))
