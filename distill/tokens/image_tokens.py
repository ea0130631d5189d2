"""Image tokens: the concept space quantized to a codebook whose entries are words of the vocabulary.

An image token's text is its label in brackets, `⟨label⟩`. It stands for phrases that turn on one word: `ice cube` and
`small ice cubes` for the same, whatever they are near to. Only phrases whose words are all too rare for a token of
their own go to the nearest. Clusters of near phrases, as k-means finds them, told a reader next to nothing of the very
answer (docs/mining.md).

Shape legend: n phrases, C codes, D = 512.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from distill.config import TeacherSettings
from distill.errors import BadInput, CorruptFile
from distill.mining.inflect import content, stem
from distill.mining.triplets import LENSES, Triplet, clean_phrase
from distill.run import write_atomic
from distill.tokens.concepts import CONCEPT_DIM, ConceptEncoder, Embed, Vectors, fit_encoder, load_encoder, unit_rows

MAX_IMAGE_TOKENS = 4096
SAMPLE = 100_000
"""Phrases that an encoder is fitted to, at most."""
AT_ONCE = 1 << 15
"""Phrases that are compared with all codes."""

Dream = dict[str, list[tuple[int, int, int]]]
"""Lens → its chain of (what, action, result) codes. Every lens is there, in lens order."""


def dream_of(triplets: Iterable[Triplet], codes: Mapping[str, int]) -> Dream:
    """The dream that the triplets of one trace are. Steps with a phrase that has no code are left out, and those whose
    thing and result are other phrases of one code: they would say that nothing becomes of it.

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
        circle = step[0] == step[2] and triplet.what != triplet.result
        if min(step) >= 0 and not circle and not (chain and chain[-1][0] == step):
            chain.append((step, triplet))
    return chains


@dataclass
class Codebook:
    """The image tokens.

    labels     C unique phrases, lower-case, printable
    centroids  (C, D) float32, rows of length 1
    counts     (C,) int64, how often the corpus' triplets mention each code
    words      the word that each code stands for, "" for none; empty in old codebooks, which know the nearest alone
    report     quantization error over the phrases it was built from, weighted by how often each occurs
    """

    labels: list[str]
    centroids: Vectors
    counts: NDArray[np.int64]
    encoder: ConceptEncoder
    report: dict[str, float] = field(default_factory=dict[str, float])
    words: list[str] = field(default_factory=list[str])

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
        """Codes of phrases, seen before or not: by their words, or else of the nearest centroids."""
        clean = [clean_phrase(phrase) for phrase in phrases]
        codes = np.array([_named(phrase, self._by_name) for phrase in clean], np.int64)
        if len(strange := np.flatnonzero(codes < 0)):
            codes[strange] = self.nearest(self.encoder.encode([clean[i] for i in strange]))
        return codes

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """The code of each word that has one, and of each label; none of an old codebook."""
        if not self.words:
            return {}
        words = {word: code for code, word in enumerate(self.words) if word}
        return words | {label: code for code, label in enumerate(self.labels)}

    def save(self, folder: Path) -> None:
        """Write codebook.safetensors, codebook.json and the encoder's state into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        data = save({"centroids": self.centroids, "counts": self.counts})
        about = {
            "version": 1,
            "dim": CONCEPT_DIM,
            "labels": self.labels,
            "words": self.words,
            "report": self.report,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(folder / "codebook.safetensors", data)
        write_atomic(folder / "codebook.json", json.dumps(about, ensure_ascii=False, indent=1) + "\n")
        self.encoder.save(folder)

    @classmethod
    def load(cls, folder: Path, teacher: TeacherSettings | None = None) -> "Codebook":
        """Read what `save` wrote. teacher: at whose hosts an encoder is asked that is a server's model. Raises
        CorruptFile where files are missing, altered or don't fit each other."""
        path = folder / "codebook.json"
        try:
            about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            data = (folder / "codebook.safetensors").read_bytes()
            labels: list[str] = about["labels"]
            if hashlib.sha256(data).hexdigest() != about["sha256"]:
                raise ValueError("codebook.safetensors is not the one it was written with")
            arrays = load(data)
            check_labels(labels)
            words: list[str] = about.get("words", [])
            if len(words) not in (0, len(labels)):
                raise ValueError(f"{len(words)} words for {len(labels)} labels")
            if arrays["centroids"].shape != (len(labels), CONCEPT_DIM) or arrays["counts"].shape != (len(labels),):
                raise ValueError(f"{len(labels)} labels do not fit centroids of shape {arrays['centroids'].shape}")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptFile(f"{path}: not a whole codebook ({error}); run `dream tokenize --force`") from error
        encoder, report = load_encoder(folder, teacher), about.get("report", {})
        return cls(labels, arrays["centroids"], arrays["counts"], encoder, report, words)


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError unless all labels can be image tokens."""
    if len(set(labels)) != len(labels):
        raise ValueError("labels are not unique")
    for label in labels:
        if not label or label != clean_phrase(label) or label in LENSES:
            raise ValueError(f"{label!r} can't be a label")


def build_codebook(
    triplets: Iterable[Triplet],
    *,
    size: int,
    encoder: str = "local",
    seed: int = 0,
    texts: Iterable[str] = (),
    embed: Embed | None = None,
    teacher: TeacherSettings | None = None,
) -> tuple[Codebook, dict[str, int]]:
    """At most `size` image tokens for the words that the triplets' phrases turn on, the commonest; also each phrase's.

    Phrases that mostly are actions have codes of their own, the first, in proportion to their number: an image
    token is at once what happens and what it happens to only where the very phrase is.
    `texts` (prompts and responses) teach the local encoder which words keep company; an `ollama:MODEL`
    encoder is asked through `embed`, else at the hosts of `teacher`. Of more than SAMPLE phrases the encoder is fitted
    to the commonest. Deterministic by seed.
    Raises BadInput for a size that is no codebook's or an unknown encoder.
    """
    if not 1 <= size <= MAX_IMAGE_TOKENS:
        raise BadInput(f"tokenize.image_tokens={size}: choose 1 to {MAX_IMAGE_TOKENS}")
    counts, acted = Counter[str](), Counter[str]()
    for triplet in triplets:
        counts.update(triplet.phrases)
        acted[triplet.action] += 1
    phrases = sorted(counts)
    with threadpool_limits(1):
        common = sorted(sorted(phrases, key=lambda phrase: (-counts[phrase], phrase))[:SAMPLE])
        concepts = fit_encoder(encoder, common, texts, seed, embed, teacher)
        if not phrases:
            return Codebook([], np.zeros((0, CONCEPT_DIM), np.float32), np.zeros(0, np.int64), concepts), {}
        vectors = _vectors(concepts, phrases)
        weights = np.array([counts[phrase] for phrase in phrases], np.float64)
    acts = np.array([2 * acted[phrase] > counts[phrase] for phrase in phrases])  # which mostly are actions
    groups = [
        group for action, share in _shares(acts, size) for group in _groups(action, share, acts, phrases, weights)
    ]
    centroids = unit_rows(np.stack([weights[group.members] @ vectors[group.members] for group in groups]))
    codes = _codes(groups, phrases, acts, vectors, centroids)
    mentions = np.bincount(codes, weights, len(groups)).astype(np.int64)
    codebook = Codebook(_labels(groups, phrases), centroids, mentions, concepts, words=[group.word for group in groups])
    codebook.report = _quantization(codebook, phrases, weights, vectors, codes)
    return codebook, dict(zip(phrases, codes.tolist(), strict=True))


@dataclass(frozen=True)
class Group:
    """Phrases, by their places, that one code stands for, the commonest first; the word that they turn on, "" where
    another code stands for it; and whether they are actions."""

    word: str
    members: list[int]
    action: bool


def _vectors(concepts: ConceptEncoder, phrases: Sequence[str]) -> Vectors:
    """(n, D); many lie on disk as long as they are used."""
    if len(phrases) <= AT_ONCE:
        return concepts.encode(phrases)
    with tempfile.TemporaryFile() as file:
        vectors = np.memmap(file, np.float32, "w+", shape=(len(phrases), CONCEPT_DIM))
    for start in range(0, len(phrases), AT_ONCE):
        vectors[start : start + AT_ONCE] = concepts.encode(phrases[start : start + AT_ONCE])
    return vectors


def _shares(acts: NDArray[np.bool_], size: int) -> list[tuple[bool, int]]:
    """Of actions and of things, how many codes they may have; of one alone, if all are that."""
    if size < 2 or acts.all() or not acts.any():
        return [(bool(acts.all()), size)]
    share = min(max(round(size * float(acts.mean())), 1), size - 1)
    return [(True, share), (False, size - share)]


def _groups(
    action: bool, size: int, acts: NDArray[np.bool_], phrases: Sequence[str], weights: NDArray[np.float64]
) -> list[Group]:
    """At most `size` of all actions, or of all things: those of a word together, the commonest words; where codes are
    left, the commonest phrases that aren't their word's commonest have one for themselves."""
    common = sorted(np.flatnonzero(acts == action).tolist(), key=lambda i: (-weights[i], phrases[i]))
    by_word: dict[str, list[int]] = {}
    for i in common:
        by_word.setdefault(content(phrases[i])[0 if action else -1], []).append(i)
    words = sorted(by_word, key=lambda word: (-weights[by_word[word]].sum(), word))[:size]
    kept = {i for word in words for i in by_word[word][1:]}
    alone = [i for i in common if i in kept][: size - len(words)]
    kept -= set(alone)
    together = [Group(word, [i for i in by_word[word] if i in kept or i == by_word[word][0]], action) for word in words]
    return together + [Group("", [i], action) for i in alone]


def _named(phrase: str, named: Mapping[str, int]) -> int:
    """The code of a phrase, or of the last of its words that has one; −1: there is none."""
    return next((named[word] for word in (phrase, *reversed(content(phrase))) if word in named), -1)


def _codes(
    groups: Sequence[Group], phrases: Sequence[str], acts: NDArray[np.bool_], vectors: Vectors, centroids: Vectors
) -> NDArray[np.int64]:
    """(n,) codes of phrases: of their group's, of another of their words, or of the nearest of their role."""
    codes = np.full(len(phrases), -1)
    for code, group in enumerate(groups):
        codes[group.members] = code
    words = {group.word: code for code, group in enumerate(groups) if group.word}
    for i in np.flatnonzero(codes < 0).tolist():
        codes[i] = _named(phrases[i], words)
    actions = np.array([group.action for group in groups])
    for start in range(0, len(phrases), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        alike = np.where(actions == acts[some, None], vectors[some] @ centroids.T, -1)
        codes[some] = np.where(codes[some] < 0, alike.argmax(1), codes[some])
    return codes


def _labels(groups: Sequence[Group], phrases: Sequence[str]) -> list[str]:
    """For each group its word, if that is a phrase, else its commonest phrase; unique, and no lens's name."""
    taken: set[str] = set(LENSES)
    labels: list[str] = []
    for group in groups:
        own = [phrases[i] for i in group.members]
        names = [clean_phrase(phrase) for phrase in sorted(own, key=lambda phrase: stem(phrase) != group.word)]
        free = [name for name in names if name and name not in taken]
        label = (
            free[0] if free else next(n for i in range(2, 10**6) if (n := f"{names[0] or 'thing'} {i}") not in taken)
        )
        taken.add(label)
        labels.append(label)
    return labels


def _quantization(
    codebook: Codebook,
    phrases: Sequence[str],
    weights: NDArray[np.float64],
    vectors: Vectors,
    codes: NDArray[np.int64],
) -> dict[str, float]:
    near = np.concatenate(
        [
            (vectors[start : start + AT_ONCE] * codebook.centroids[codes[start : start + AT_ONCE]]).sum(1)
            for start in range(0, len(phrases), AT_ONCE)
        ]
    )
    errors = 1.0 - near.astype(np.float64)
    order = np.argsort(errors, kind="stable")
    reach = np.searchsorted(np.cumsum(weights[order]), 0.9 * weights.sum())
    own = np.array([codebook.labels[code] == phrase for code, phrase in zip(codes, phrases, strict=True)])
    return {
        "phrases": float(len(phrases)),
        "codes": float(len(codebook)),
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
