"""Image tokens: the concept space quantized to a codebook whose entries are words of the vocabulary.

An image token's text is its label in brackets, `⟨label⟩`; the label is the phrase nearest the centroid.

Shape legend: n phrases, C codes, D = 512.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from distill.config import TeacherSettings
from distill.errors import BadInput, CorruptFile
from distill.mining.triplets import LENSES, Triplet, clean_phrase
from distill.run import write_atomic
from distill.tokens.concepts import CONCEPT_DIM, ConceptEncoder, Embed, Vectors, fit_encoder, load_encoder, unit_rows

MAX_IMAGE_TOKENS = 1024

Dream = dict[str, list[tuple[int, int, int]]]
"""Lens → its chain of (what, action, result) codes. Every lens is there, in lens order."""


def dream_of(triplets: Iterable[Triplet], codes: Mapping[str, int]) -> Dream:
    """The dream that the triplets of one trace are. Steps with a phrase that has no code are left out.

    Neighbours that quantize to the very same three codes are one step.
    """
    return {lens: [step for step, _ in chain] for lens, chain in coded_steps(triplets, codes).items()}


def coded_steps(
    triplets: Iterable[Triplet], codes: Mapping[str, int]
) -> dict[str, list[tuple[tuple[int, int, int], Triplet]]]:
    """The steps of `dream_of`, each with the triplet that it was made from."""
    chains: dict[str, list[tuple[tuple[int, int, int], Triplet]]] = {lens: [] for lens in LENSES}
    for triplet in sorted(triplets, key=lambda t: t.step):
        step = (codes.get(triplet.what, -1), codes.get(triplet.action, -1), codes.get(triplet.result, -1))
        chain = chains[triplet.lens]
        if min(step) >= 0 and not (chain and chain[-1][0] == step):
            chain.append((step, triplet))
    return chains


@dataclass
class Codebook:
    """The image tokens.

    labels     C unique phrases, lower-case, printable
    centroids  (C, D) float32, rows of length 1
    counts     (C,) int64, how often the corpus' triplets mention each code
    report     quantization error over the phrases it was built from, weighted by how often each occurs
    """

    labels: list[str]
    centroids: Vectors
    counts: NDArray[np.int64]
    encoder: ConceptEncoder
    report: dict[str, float] = field(default_factory=dict[str, float])

    def __len__(self) -> int:
        return len(self.labels)

    def nearest(self, vectors: Vectors) -> NDArray[np.int64]:
        """(n, D) → (n,) codes of the centroids with the largest cosine. Raises BadInput for another width."""
        if vectors.ndim != 2 or vectors.shape[1] != CONCEPT_DIM:
            raise BadInput(
                f"vectors of shape {vectors.shape}: the codebook's concept space has {CONCEPT_DIM} dimensions"
            )
        if not self.labels:
            raise BadInput("the codebook is empty: no triplets were mined")
        return np.argmax(vectors @ self.centroids.T, axis=1)

    def encode(self, phrases: Sequence[str]) -> NDArray[np.int64]:
        """Codes of phrases, seen before or not."""
        return self.nearest(self.encoder.encode([clean_phrase(phrase) for phrase in phrases]))

    def save(self, folder: Path) -> None:
        """Write codebook.safetensors, codebook.json and the encoder's state into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        data = save({"centroids": self.centroids, "counts": self.counts})
        about = {
            "version": 1,
            "dim": CONCEPT_DIM,
            "labels": self.labels,
            "report": self.report,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(folder / "codebook.safetensors", data)
        write_atomic(folder / "codebook.json", json.dumps(about, ensure_ascii=False, indent=1) + "\n")
        self.encoder.save(folder)

    @classmethod
    def load(cls, folder: Path) -> "Codebook":
        """Read what `save` wrote. Raises CorruptFile where files are missing, altered or don't fit each other."""
        path = folder / "codebook.json"
        try:
            about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            data = (folder / "codebook.safetensors").read_bytes()
            labels: list[str] = about["labels"]
            if hashlib.sha256(data).hexdigest() != about["sha256"]:
                raise ValueError("codebook.safetensors is not the one it was written with")
            arrays = load(data)
            check_labels(labels)
            if arrays["centroids"].shape != (len(labels), CONCEPT_DIM) or arrays["counts"].shape != (len(labels),):
                raise ValueError(f"{len(labels)} labels do not fit centroids of shape {arrays['centroids'].shape}")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptFile(f"{path}: not a whole codebook ({error}); run `dream tokenize --force`") from error
        return cls(labels, arrays["centroids"], arrays["counts"], load_encoder(folder), about.get("report", {}))


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError unless all labels can be image tokens."""
    if len(set(labels)) != len(labels):
        raise ValueError("labels are not unique")
    for label in labels:
        if not label or label != clean_phrase(label) or label in LENSES:
            raise ValueError(f"{label!r} can't be a label")


def phrase_counts(triplets: Iterable[Triplet]) -> Counter[str]:
    return Counter(phrase for triplet in triplets for phrase in triplet.phrases)


def build_codebook(
    triplets: Sequence[Triplet],
    *,
    size: int,
    encoder: str = "local",
    seed: int = 0,
    texts: Iterable[str] = (),
    embed: Embed | None = None,
    teacher: TeacherSettings | None = None,
) -> tuple[Codebook, dict[str, int]]:
    """Cluster the triplets' phrases into at most `size` image tokens; also each phrase's code.

    Phrases that mostly are actions have codes of their own, the first, in proportion to their number: an image
    token is at once what happens and what it happens to only where the very phrase is.
    `texts` (prompts and responses) teach the local encoder which words keep company; an `ollama:MODEL`
    encoder is asked through `embed`, else at the hosts of `teacher`. Deterministic by seed: clustering runs on
    one thread. Raises BadInput for a size that is no codebook's or an unknown encoder.
    """
    if not 1 <= size <= MAX_IMAGE_TOKENS:
        raise BadInput(f"tokenize.image_tokens={size}: choose 1 to {MAX_IMAGE_TOKENS}")
    counts = phrase_counts(triplets)
    phrases = sorted(counts)
    with threadpool_limits(1):
        concepts = fit_encoder(encoder, phrases, texts, seed, embed, teacher)
        if not phrases:
            return Codebook([], np.zeros((0, CONCEPT_DIM), np.float32), np.zeros(0, np.int64), concepts), {}
        vectors = concepts.encode(phrases)
        weights = np.array([counts[phrase] for phrase in phrases], np.float64)
        roles = _roles(triplets, phrases, size)
        parts = [_cluster(vectors[own], weights[own], share, seed) for own, share in roles]
        centroids = np.concatenate(parts)
        similarity = vectors @ centroids.T
    codes, first = np.zeros(len(phrases), np.int64), 0
    for (own, _), part in zip(roles, parts, strict=True):
        codes[own] = first + np.argmax(similarity[own, first : first + len(part)], axis=1)
        first += len(part)
    labels = _labels(phrases, similarity, codes)
    mentions = np.bincount(codes, weights, len(labels)).astype(np.int64)
    codebook = Codebook(labels, centroids, mentions, concepts)
    codebook.report = _quantization(phrases, weights, similarity, codes, labels)
    return codebook, dict(zip(phrases, codes.tolist(), strict=True))


def _roles(triplets: Sequence[Triplet], phrases: Sequence[str], size: int) -> list[tuple[NDArray[np.int64], int]]:
    """The places of actions and of things among the phrases, each with its share of the codes; one, if all are one."""
    actions = Counter(triplet.action for triplet in triplets)
    things = Counter(phrase for triplet in triplets for phrase in (triplet.what, triplet.result))
    acts = np.array([actions[phrase] > things[phrase] for phrase in phrases])
    if size < 2 or acts.all() or not acts.any():
        return [(np.arange(len(phrases)), size)]
    share = min(max(round(size * float(acts.mean())), 1), size - 1)
    return [(np.flatnonzero(acts), share), (np.flatnonzero(~acts), size - share)]


def _cluster(vectors: Vectors, weights: NDArray[np.float64], size: int, seed: int) -> Vectors:
    """(≤ size, D) unit centroids by k-means on the sphere, none without a phrase that is nearest to it."""
    from sklearn.cluster import KMeans  # a second to import, and only where a codebook is made

    distinct = len(np.unique(vectors, axis=0))
    if size >= distinct:
        centroids = np.unique(vectors, axis=0)
    else:
        kmeans: Any = KMeans(size, max_iter=60, random_state=seed)  # k-means++, started once
        centroids = unit_rows(kmeans.fit(vectors, sample_weight=weights).cluster_centers_)
    while True:  # centroids moved onto the sphere: a few may have lost their last phrase
        used = np.unique(np.argmax(vectors @ centroids.T, axis=1))
        if len(used) == len(centroids):
            return centroids
        centroids = centroids[used]


def _labels(phrases: Sequence[str], similarity: Vectors, codes: NDArray[np.int64]) -> list[str]:
    """For each code the phrase nearest its centroid, of those that are its own; unique, and no lens's name."""
    taken: set[str] = set(LENSES)
    labels: list[str] = []
    for code in range(similarity.shape[1]):
        own = np.flatnonzero(codes == code)
        order = own[np.argsort(-similarity[own, code], kind="stable")]
        own_phrases: list[str] = [phrases[int(i)] for i in order]
        names = [clean_phrase(phrase) for phrase in own_phrases]
        free = [name for name in names if name and name not in taken]
        label = (
            free[0] if free else next(n for i in range(2, 10**6) if (n := f"{names[0] or 'thing'} {i}") not in taken)
        )
        taken.add(label)
        labels.append(label)
    return labels


def _quantization(
    phrases: Sequence[str],
    weights: NDArray[np.float64],
    similarity: Vectors,
    codes: NDArray[np.int64],
    labels: Sequence[str],
) -> dict[str, float]:
    errors = 1.0 - similarity[np.arange(len(phrases)), codes].astype(np.float64)
    order = np.argsort(errors, kind="stable")
    reach = np.searchsorted(np.cumsum(weights[order]), 0.9 * weights.sum())
    own = np.array([labels[code] == phrase for phrase, code in zip(phrases, codes, strict=True)])
    return {
        "phrases": float(len(phrases)),
        "codes": float(len(labels)),
        "mean_error": round(max(0.0, float(np.average(errors, weights=weights))), 5),
        "p90_error": round(float(errors[order[min(reach, len(order) - 1)]]), 5),
        "own_label_share": round(float(np.average(own, weights=weights)), 5),
    }


# The phrase → code map, so that later stages need not embed again.


def save_codes(folder: Path, codes: Mapping[str, int]) -> None:
    """Write phrases.json."""
    write_atomic(folder / "phrases.json", json.dumps(dict(sorted(codes.items())), ensure_ascii=False, indent=0) + "\n")


def load_codes(folder: Path, codebook: Codebook) -> dict[str, int]:
    """Read phrases.json. Raises CorruptFile where it is broken or names codes that the codebook lacks."""
    path = folder / "phrases.json"
    try:
        codes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for phrase, code in codes.items():
            if type(code) is not int or not 0 <= code < len(codebook):
                raise ValueError(f"{phrase!r} has code {code!r}, the codebook has {len(codebook)}")
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{path}: does not fit the codebook ({error}); run `dream tokenize --force`") from error
    return codes
