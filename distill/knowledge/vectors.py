"""An index of vectors: which are nearest to a query, by cosine. Exact search is the reference, faiss the quick one.

Shape legend: n vectors, Q queries, D dimensions, k wanted.
"""

from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.errors import BadInput, MissingDependency

Vectors = NDArray[np.float32]
Kind = Literal["auto", "exact", "faiss"]
LARGE = 50_000
"""Vectors from which on `auto` takes faiss where it is installed: fewer are searched exactly in some milliseconds."""
PER_LIST, MOST_LISTS = 250, 2048
SAMPLE = 40
"""Vectors a list that k-means is trained on."""
PROBES = 32
"""Lists that a search looks into."""
BLOCK = 65536


class VectorIndex(Protocol):
    """n unit vectors, numbered as they were given."""

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """Queries (Q, D) → cosines and numbers, (Q, min(k, n)) each, the nearest first; of equals any."""
        ...


def unit(vectors: Vectors) -> Vectors:
    """Rows of length 1, the same array where they have it; rows of zeros stay."""
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    if np.allclose(length, 1.0, atol=1e-6):
        return np.ascontiguousarray(vectors, np.float32)
    return np.ascontiguousarray(vectors / np.maximum(length, 1e-12)[:, None], np.float32)


class ExactIndex:
    """Compares with every vector, block by block."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = unit(vectors)

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        queries, k = unit(queries), min(k, len(self.vectors))
        scores, ids = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(self.vectors), BLOCK):
            found = queries @ self.vectors[start : start + BLOCK].T
            best = np.argpartition(-found, min(k, found.shape[1]) - 1, axis=1)[:, :k]
            scores = np.concatenate([scores, np.take_along_axis(found, best, 1)], axis=1)
            ids = np.concatenate([ids, best + start], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        return scores, ids


class FaissIndex:
    """Lists of near vectors (IVF, arXiv:1702.08734): a search looks into the `probes` lists nearest to the query.

    Raises MissingDependency without faiss.
    """

    def __init__(self, vectors: Vectors, probes: int = PROBES, seed: int = 0) -> None:
        if find_spec("faiss") is None:
            raise MissingDependency(
                'faiss is not installed; `pip install "dreaming-student[faiss]"`, or search exactly'
            )
        import faiss  # pyright: ignore[reportMissingImports]  (an extra)

        faiss_: Any = faiss  # it has no types
        vectors = unit(vectors)
        self.lists = max(1, min(MOST_LISTS, len(vectors) // PER_LIST))
        self.probes = probes
        self._index: Any = faiss_.index_factory(vectors.shape[1], f"IVF{self.lists},Flat", faiss_.METRIC_INNER_PRODUCT)
        self._index.cp.max_points_per_centroid, self._index.cp.seed = SAMPLE, seed + 1
        chosen = np.random.default_rng(seed).permutation(len(vectors))[: SAMPLE * self.lists]
        self._index.train(vectors[np.sort(chosen)])
        self._index.add(vectors)

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """Numbers are −1 where the lists held fewer than k."""
        self._index.nprobe = min(self.probes, self.lists)
        return self._index.search(unit(queries), min(k, self._index.ntotal))


def index_of(vectors: Vectors, kind: Kind = "auto") -> VectorIndex:
    """The index of n vectors (n, D). `auto`: exact below LARGE of them and where faiss is not installed.

    Raises BadInput for another kind, MissingDependency where faiss is asked for by name and isn't there.
    """
    if kind not in ("auto", "exact", "faiss"):
        raise BadInput(f"index={kind!r}: choose auto, exact or faiss")
    quick = kind == "faiss" or (kind == "auto" and len(vectors) >= LARGE and find_spec("faiss") is not None)
    return FaissIndex(vectors) if quick else ExactIndex(vectors)
