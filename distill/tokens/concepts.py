"""The concept space: phrases as unit vectors of 512 dimensions.

Two encoders, one interface. `local` needs no download: half of its dimensions are how a phrase is written
(TF-IDF of words and character n-grams, latent semantic analysis), half what its words keep company with in the
corpus (positive pointwise mutual information, factorized). `ollama:MODEL` asks an embedding model, `clip:FOLDER`
CLIP's text side. All save their state as safetensors and JSON, so that phrases never seen before can be embedded later.

Shape legend: n phrases, D = 512, F surface features, W words.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from distill.config import TeacherSettings
from distill.errors import BadInput, CorruptFile, TeacherUnavailable
from distill.events import silent
from distill.run import write_atomic

CONCEPT_DIM = 512
SURFACE_DIM = 256
MAX_FEATURES = 8000
MAX_WORDS = 4000
WINDOW = 4
"""Words on either side that count as company."""
WORDS_AT_ONCE = 1 << 22
EMBED_BATCH = 256
"""Phrases in one request to an embedding model."""

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]


class ConceptEncoder(Protocol):
    """What embeds phrases."""

    @property
    def name(self) -> str:
        """`local`, `ollama:MODEL` or `clip:FOLDER`, as in the settings."""
        ...

    def encode(self, phrases: Sequence[str]) -> Vectors:
        """(n, 512) float32, rows of length 1 (or 0 where nothing of the phrase is known)."""
        ...

    def save(self, folder: Path) -> None:
        """Write encoder.safetensors and encoder.json."""
        ...


def unit_rows(vectors: NDArray[Any]) -> Vectors:
    """Rows scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def pad(vectors: NDArray[Any], width: int) -> Vectors:
    """Zeros appended to each row, up to `width`."""
    padded = np.zeros((len(vectors), width), np.float32)
    padded[:, : vectors.shape[1]] = vectors
    return padded


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+", text.lower())


class LocalEncoder:
    """Surface and company of words, learned from the phrases and texts of one corpus."""

    name = "local"

    def __init__(
        self, features: list[str], idf: Vectors, components: Vectors, words: list[str], word_vectors: Vectors
    ) -> None:
        self.features, self.idf, self.components = features, idf, components
        self.words, self.word_vectors = words, word_vectors
        self._word_id = {word: i for i, word in enumerate(words)}

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _vectorizer(vocabulary={feature: i for i, feature in enumerate(self.features)})
        vectorizer.idf_ = self.idf.astype(np.float64)
        return vectorizer

    @classmethod
    def fit(cls, phrases: Sequence[str], texts: Iterable[str], seed: int) -> "LocalEncoder":
        """Learn from distinct `phrases` and from running `texts` (the phrases' own corpus), gone through twice."""
        if not phrases:
            return cls([], np.zeros(0, np.float32), np.zeros((0, 0), np.float32), [], np.zeros((0, 0), np.float32))
        vectorizer = _vectorizer(max_features=MAX_FEATURES)
        surface = vectorizer.fit_transform(phrases)
        components = _svd(surface, SURFACE_DIM, seed)[1]
        words, word_vectors = _company(phrases, texts, seed)
        return cls(
            list(vectorizer.get_feature_names_out()),
            np.asarray(vectorizer.idf_, np.float32),
            components,
            words,
            word_vectors,
        )

    def encode(self, phrases: Sequence[str]) -> Vectors:
        if not phrases or not self.features:
            return np.zeros((len(phrases), CONCEPT_DIM), np.float32)
        surface = unit_rows(self._vectorizer.transform(phrases) @ self.components.T)
        company = unit_rows(self._mentions(phrases) @ self.word_vectors)
        meaning = pad(company, CONCEPT_DIM - SURFACE_DIM)
        return unit_rows(np.concatenate([pad(surface, SURFACE_DIM), meaning], axis=1))

    def _mentions(self, phrases: Sequence[str]) -> Any:
        """(n, W) how much each known word says in each phrase: rare words say more."""
        rows, columns, values = [], [], []
        weight = {
            feature[2:]: value for feature, value in zip(self.features, self.idf, strict=True) if feature[:2] == "w:"
        }
        for row, phrase in enumerate(phrases):
            for word in words_of(phrase):
                if word in self._word_id:
                    rows.append(row)
                    columns.append(self._word_id[word])
                    values.append(float(weight.get(word, 1.0)))
        return sp.csr_matrix((values, (rows, columns)), shape=(len(phrases), len(self.words)), dtype=np.float32)

    def save(self, folder: Path) -> None:
        arrays = {"idf": self.idf, "components": self.components, "word_vectors": self.word_vectors}
        save_state(folder, arrays, {"name": self.name, "features": self.features, "words": self.words})

    @classmethod
    def from_state(cls, arrays: dict[str, NDArray[Any]], state: dict[str, Any]) -> "LocalEncoder":
        features, words = state["features"], state["words"]
        idf, components, vectors = arrays["idf"], arrays["components"], arrays["word_vectors"]
        if idf.shape != (len(features),) or components.shape[1] != len(features) or len(vectors) != len(words):
            raise ValueError("its arrays and lists differ in length")
        return cls(features, idf, components, words, vectors)


def surface_features(phrase: str) -> list[str]:
    """Words, marked `w:`, and character 3- and 4-grams within words' borders, marked `c:`."""
    words = words_of(phrase)
    bordered = [f" {word} " for word in words]
    grams = [f"c:{word[i : i + n]}" for word in bordered for n in (3, 4) for i in range(len(word) - n + 1)]
    return [f"w:{word}" for word in words] + grams


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # a second to import, and seldom needed

    analyzer: Any = surface_features
    return TfidfVectorizer(analyzer=analyzer, sublinear_tf=True, **options)


def _svd(matrix: Any, dims: int, seed: int) -> tuple[Vectors, Vectors]:
    """Truncated SVD: (rows, k) scores and (k, columns) components, k ≤ dims as the matrix allows."""
    k = min(dims, min(matrix.shape) - 1)
    if k < 1:  # a single row or column: it spans its own space
        dense = np.asarray(matrix.todense(), np.float32)
        basis = unit_rows(dense[:1]) if dense.shape[0] == 1 else np.ones((1, dense.shape[1]), np.float32)
        return (dense @ basis.T).astype(np.float32), basis
    from sklearn.decomposition import TruncatedSVD

    svd: Any = TruncatedSVD(k, n_iter=4, random_state=seed)
    with np.errstate(invalid="ignore"):  # it divides by the variance, which equal phrases have none of
        scores = svd.fit_transform(matrix)
    return scores.astype(np.float32), svd.components_.astype(np.float32)


def _company(phrases: Sequence[str], texts: Iterable[str], seed: int) -> tuple[list[str], Vectors]:
    """Words of the phrases and their vectors: PPMI of co-occurrence within WINDOW words, factorized.

    PPMI with context distribution smoothing 0.75 and symmetric weighting of singular values: O. Levy,
    Y. Goldberg, I. Dagan, "Improving Distributional Similarity with Lessons Learned from Word Embeddings" (2015).
    """
    counts = Counter(chain.from_iterable(map(words_of, chain(phrases, texts))))
    needed = Counter(word for phrase in phrases for word in words_of(phrase))
    rank = sorted(counts, key=lambda word: (-(word in needed), -counts[word], word))
    words = rank[: max(MAX_WORDS, len(needed))]
    index = {word: i for i, word in enumerate(words)}
    pairs = sp.csr_matrix((len(words), len(words)), dtype=np.float64)
    for stream in _streams(chain(phrases, texts), index):
        for offset in range(1, WINDOW + 1):
            left, right = stream[:-offset], stream[offset:]
            known = (left >= 0) & (right >= 0)
            ones = np.full(int(known.sum()), 1.0 / offset)
            pairs += sp.coo_matrix((ones, (left[known], right[known])), shape=pairs.shape).tocsr()
    pairs = pairs + pairs.T
    vectors, _ = _svd(_ppmi(pairs), CONCEPT_DIM - SURFACE_DIM, seed)
    strengths = np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)
    rows = [index[word] for word in sorted(needed)]
    return sorted(needed), unit_rows((vectors / np.sqrt(strengths))[rows])


def _streams(texts: Iterable[str], index: Mapping[str, int]) -> Iterator[NDArray[np.int64]]:
    """Ids of the texts' words, −1 for unknown ones, some millions at a time; WINDOW gaps of −1 keep texts apart."""
    ids, gap = array("q"), [-1] * WINDOW
    for text in texts:
        ids.extend([index.get(word, -1) for word in words_of(text)])
        ids.extend(gap)
        if len(ids) > WORDS_AT_ONCE:
            yield np.array(ids, np.int64)
            ids = array("q")
    yield np.array(ids, np.int64)


def _ppmi(pairs: Any) -> Any:
    coo = pairs.tocoo()
    total = max(float(coo.data.sum()), 1e-12)
    row = np.asarray(pairs.sum(axis=1)).ravel()
    context = np.asarray(pairs.sum(axis=0)).ravel() ** 0.75
    context *= total / max(float(context.sum()), 1e-12)
    values = np.log(np.maximum(coo.data * total, 1e-12) / np.maximum(row[coo.row] * context[coo.col], 1e-12))
    positive = values > 0
    return sp.csr_matrix((values[positive], (coo.row[positive], coo.col[positive])), shape=pairs.shape)


class OllamaEncoder:
    """An embedding model's vectors (CLIP's too), by seeded PCA to 512 dimensions where it has more, padded where fewer.

    `embed` is OllamaTeacher.embed; after loading from disk it is opened when first needed.
    """

    teacher: TeacherSettings | None = None
    """Whose hosts are asked, and for how long they are waited for."""

    def __init__(self, model: str, mean: Vectors, components: Vectors, embed: Embed | None = None) -> None:
        self.model, self.mean, self.components, self._embed = model, mean, components, embed

    @property
    def name(self) -> str:
        return self.model

    @classmethod
    def fit(cls, model: str, phrases: Sequence[str], embed: Embed, seed: int) -> "OllamaEncoder":
        vectors = _embedded(phrases, embed, model) if phrases else np.zeros((0, 0), np.float32)
        width = vectors.shape[1]
        if width <= CONCEPT_DIM:
            return cls(model, np.zeros(width, np.float32), np.eye(width, dtype=np.float32), embed)
        mean = vectors.mean(axis=0)
        return cls(model, mean, _svd(sp.csr_matrix(vectors - mean), CONCEPT_DIM, seed)[1], embed)

    def encode(self, phrases: Sequence[str]) -> Vectors:
        if not phrases or not len(self.components):
            return np.zeros((len(phrases), CONCEPT_DIM), np.float32)
        vectors = _embedded(phrases, self._open(), self.model)
        if vectors.shape[1] != len(self.mean):
            raise BadInput(
                f"{self.model}: embeds in {vectors.shape[1]} dimensions, the codebook was made with {len(self.mean)};"
                " use the model it was made with"
            )
        return unit_rows(pad((vectors - self.mean) @ self.components.T, CONCEPT_DIM))

    def _open(self) -> Embed:
        if self._embed is None:
            self._embed = open_embed(self.model, self.teacher)
        return self._embed

    def save(self, folder: Path) -> None:
        save_state(folder, {"mean": self.mean, "components": self.components}, {"name": self.model})

    @classmethod
    def from_state(cls, arrays: dict[str, NDArray[Any]], state: dict[str, Any]) -> "OllamaEncoder":
        mean, components = arrays["mean"], arrays["components"]
        if components.ndim != 2 or components.shape[1:] != mean.shape:
            raise ValueError("its projection and mean differ in width")
        return cls(state["name"], mean, components)


def _embedded(phrases: Sequence[str], embed: Embed, model: str) -> Vectors:
    """Rows of length 1, asked for in batches: no request takes as long as all phrases would."""
    vectors = np.concatenate([embed(phrases[i : i + EMBED_BATCH]) for i in range(0, len(phrases), EMBED_BATCH)])
    if not np.isfinite(vectors).all():
        raise BadInput(f"{model}: returned embeddings that are not finite; choose another --set tokenize.encoder")
    return unit_rows(np.asarray(vectors, np.float32))


def open_embed(model: str, teacher: TeacherSettings | None = None) -> Embed:
    """The embedding call of `ollama:MODEL`, with the teacher's time-out and retries, at the first of its hosts that
    answers: there it stays, as another may have another model of that name."""
    if model.startswith("clip:"):
        from distill.tokens.clip_text import clip_text

        return clip_text(model.removeprefix("clip:"))
    from distill.teacher.ollama import open_teachers

    hosts = open_teachers(model.removeprefix("ollama:"), teacher or TeacherSettings(), silent, 0)

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        while True:
            try:
                vectors = hosts[0].embed(texts)
            except TeacherUnavailable:
                if len(hosts) == 1:
                    raise
                hosts.pop(0).close()
                continue
            while len(hosts) > 1:
                hosts.pop().close()
            return vectors

    return embed


def fit_encoder(
    name: str,
    phrases: Sequence[str],
    texts: Iterable[str],
    seed: int,
    embed: Embed | None = None,
    teacher: TeacherSettings | None = None,
) -> ConceptEncoder:
    """The encoder that the settings name. `embed` stands in for `ollama:MODEL`, else it is asked at the hosts of
    `teacher`. Raises BadInput."""
    if name == "local":
        return LocalEncoder.fit(phrases, texts, seed)
    kind, _, model = name.partition(":")
    if kind in ("ollama", "clip") and model:
        return OllamaEncoder.fit(name, phrases, embed or open_embed(name, teacher), seed)
    raise BadInput(f"tokenize.encoder={name}: no such encoder; choose local, ollama:MODEL or clip:FOLDER")


# State on disk.


def save_state(folder: Path, arrays: dict[str, NDArray[Any]], state: dict[str, Any]) -> None:
    write_atomic(folder / "encoder.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
    write_atomic(folder / "encoder.json", json.dumps({"version": 1, **state}, ensure_ascii=False))


def load_encoder(folder: Path, teacher: TeacherSettings | None = None) -> ConceptEncoder:
    """The encoder saved in a folder; one that is a server's model is asked at the hosts of `teacher`. Raises
    CorruptFile."""
    path = folder / "encoder.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        arrays = load_file(folder / "encoder.safetensors")
        if state["name"] == "local":
            return LocalEncoder.from_state(arrays, state)
        found = OllamaEncoder.from_state(arrays, state)
        found.teacher = teacher
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise CorruptFile(f"{path}: not an encoder's state ({error}); run `dream tokenize --force`") from error
