"""Pictures as image tokens: the same codebook that phrases are quantized to.

With CLIP as the codebook's encoder both share one space. Otherwise a linear map is learnt from labelled pictures: from
a picture's embedding to the sum of the centroids of what is in it, by ridge regression, its strength by leave-one-out.

A picture's tokens are taken one after the other, each the centroid that explains most of what the ones before left
over: matching pursuit (S. Mallat, Z. Zhang, 1993), residual quantization with one codebook for all levels.

Shape legend: n pictures, d a picture's embedding, D = 512, C codes, K tokens of a picture.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from threadpoolctl import threadpool_limits

from distill.config import ImageTokenizerConfig
from distill.errors import BadInput, CorruptFile
from distill.mining.triplets import clean_phrase
from distill.run import write_atomic
from distill.tokens.bpe import image_text
from distill.tokens.concepts import CONCEPT_DIM, OllamaEncoder, Vectors, pad, unit_rows
from distill.tokens.image_tokens import Codebook
from distill.tokens.shown import PLACES
from distill.vision import SEEING
from distill.vision.backbones import licence

STRENGTHS = np.logspace(-3, 3, 13)
"""Of the ridge, to choose from; embeddings have length 1."""
TOKENS = 3
"""Of a picture, if nobody asks for more or fewer."""


class PictureCodebook:
    """Embeddings of pictures to codes of a codebook.

    vision: what made the embeddings. weights (d, D) and bias (D,): the map from embeddings of length 1 into the
    codebook's space. there (d + 1,): weights and bias of whether something is there at all, above half if so.
    """

    def __init__(
        self, codebook: Codebook, vision: ImageTokenizerConfig, weights: Vectors, bias: Vectors, there: Vectors
    ) -> None:
        self.codebook, self.vision, self.weights, self.bias, self.there = codebook, vision, weights, bias, there

    @classmethod
    def learn(
        cls, codebook: Codebook, vision: ImageTokenizerConfig, embeddings: Vectors, labels: Sequence[Sequence[str]]
    ) -> "PictureCodebook":
        """Learn the map from (n, d) embeddings of pictures and the phrases that each shows. Deterministic.

        Raises BadInput where there are too few, or the codebook is empty.
        """
        from sklearn.linear_model import RidgeCV  # a second to import, and only where a map is learnt

        if len(embeddings) != len(labels) or len(embeddings) < 2:
            raise BadInput(f"{len(embeddings)} pictures, {len(labels)} labelled: two or more of each are needed")
        phrases = sorted({phrase for own in labels for phrase in own})
        code = dict(zip(phrases, codebook.encode(phrases).tolist(), strict=True))
        wanted = np.zeros((len(labels), len(codebook)), np.float32)
        for row, own in enumerate(labels):
            wanted[row, [code[phrase] for phrase in own]] = 1
        ridge: Any = RidgeCV(STRENGTHS)
        rows, there = unit_rows(embeddings), wanted.any(1)
        if not there.any():
            raise BadInput("no picture shows anything: label some")
        with threadpool_limits(1):
            gate: Any = RidgeCV(STRENGTHS).fit(rows, there.astype(np.float32))
            ridge.fit(rows[there], wanted[there] @ codebook.centroids)
        gate = np.append(gate.coef_, gate.intercept_).astype(np.float32)
        weights, bias = ridge.coef_.T.astype(np.float32), ridge.intercept_.astype(np.float32)
        return cls(codebook, vision, weights, bias, gate)

    @classmethod
    def shared(cls, codebook: Codebook) -> "PictureCodebook":
        """No map is learnt: the codebook's phrases were embedded by the CLIP that embeds the pictures, too. Raises
        BadInput where they weren't."""
        encoder = codebook.encoder
        if not isinstance(encoder, OllamaEncoder) or not encoder.name.startswith("clip:"):
            raise BadInput(f"the codebook's encoder is {encoder.name}: pictures share the space of clip:FOLDER alone")
        weights = pad(encoder.components.T, CONCEPT_DIM)
        vision = ImageTokenizerConfig("clip", encoder.name.removeprefix("clip:"), embedding_dim=0)
        there = np.append(np.zeros(len(weights)), 1).astype(np.float32)  # at every place something
        return cls(codebook, vision, weights, -encoder.mean @ weights, there)

    def vectors(self, embeddings: Vectors) -> Vectors:
        """(n, d) → (n, D) in the codebook's space: about the sum of what is in each picture. Raises BadInput."""
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.weights):
            width = len(self.weights)
            raise BadInput(
                f"embeddings of shape {embeddings.shape}: {self.vision.backbone} has {width} numbers of a picture"
            )
        return (unit_rows(embeddings) @ self.weights + self.bias).astype(np.float32)

    def tokens(self, embeddings: Vectors, count: int = TOKENS) -> NDArray[np.int64]:
        """(n, d) → (n, K) codes, no code twice, what explains most first. K: `count`, or all codes where fewer."""
        return self._pursued(self.vectors(embeddings), count)[0]

    def _pursued(self, vectors: Vectors, count: int) -> tuple[NDArray[np.int64], Vectors]:
        """Codes, and what of the vectors they leave unexplained."""
        if not len(self.codebook):
            raise BadInput("the codebook is empty: no triplets were mined")
        left, rows = vectors.copy(), np.arange(len(vectors))
        codes = np.zeros((len(vectors), min(count, len(self.codebook))), np.int64)
        for level in range(codes.shape[1]):
            strength = left @ self.codebook.centroids.T
            np.put_along_axis(strength, codes[:, :level], -np.inf, axis=1)
            codes[:, level] = strength.argmax(1)
            found = self.codebook.centroids[codes[:, level]]
            left -= np.maximum(strength[rows, codes[:, level]], 0)[:, None] * found
        return codes, left

    def seen(self, embeddings: Vectors) -> str:
        """(places, d) of one picture's parts as prompts have it: each image token, and the place where it was seen."""
        found = zip(PLACES, self.tokens(embeddings, 1).tolist(), self._sure(embeddings), strict=True)
        return " ".join(f"{self.shown(codes)} {place}" for place, codes, much in found if much > 0.5)

    def surest(self, embeddings: Vectors) -> str:
        """The image token of the one place of a picture where it is surest that something is."""
        place = int(self._sure(embeddings).argmax())
        return self.shown(self.tokens(embeddings[place : place + 1], 1)[0].tolist())

    def _sure(self, embeddings: Vectors) -> Vectors:
        return unit_rows(embeddings) @ self.there[:-1] + self.there[-1]

    def shown(self, codes: Sequence[int]) -> str:
        """Codes by their labels: `⟨vase⟩⟨stand⟩⟨table⟩`."""
        return "".join(image_text(self.codebook.labels[code]) for code in codes)

    def report(self, embeddings: Vectors, count: int = TOKENS) -> dict[str, float]:
        """How well so many tokens say what pictures hold.

        error: share of the vectors' square lengths that they leave unexplained; used: share of all codes that occur;
        perplexity: how many codes, used evenly, would be as hard to foresee as the first of each picture.
        """
        vectors = self.vectors(embeddings)
        codes, left = self._pursued(vectors, count)
        share = np.bincount(codes[:, 0], minlength=len(self.codebook)) / max(len(codes), 1)
        entropy = -float(np.sum(share[share > 0] * np.log(share[share > 0])))
        return {
            "pictures": float(len(codes)),
            "error": round(float(np.square(left).sum() / max(np.square(vectors).sum(), 1e-12)), 5),
            "used": round(len(np.unique(codes)) / len(self.codebook), 5),
            "perplexity": round(float(np.exp(entropy)), 2),
        }

    def recall(self, embeddings: Vectors, labels: Sequence[Sequence[str]], count: int = TOKENS) -> dict[str, float]:
        """Share of what pictures show, by their labels, that is among their tokens; and by chance, with codes drawn
        from all evenly. Labels whose codes are the same count once."""
        codes = self.tokens(embeddings, count)
        hits = total = 0
        for own, said in zip(labels, codes, strict=True):
            wanted = set(self.codebook.encode([clean_phrase(phrase) for phrase in own]).tolist())
            hits, total = hits + len(wanted & set(said.tolist())), total + len(wanted)
        return {"recall": round(hits / max(total, 1), 5), "chance": round(codes.shape[1] / len(self.codebook), 5)}

    def save(self, folder: Path) -> None:
        """Write pictures.safetensors and pictures.json; the codebook itself is beside them already."""
        about = {"version": 1, "vision": asdict(self.vision), "licence": licence(self.vision)}
        arrays = {"weights": self.weights, "bias": self.bias, "there": self.there}
        write_atomic(folder / SEEING[1], save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
        write_atomic(folder / SEEING[0], json.dumps(about, indent=1) + "\n")

    @classmethod
    def of(cls, folder: Path, codebook: Codebook | None) -> "PictureCodebook | None":
        """The map in a student's folder; None where it was not trained to see. Raises CorruptFile."""
        return cls.load(folder, codebook) if codebook is not None and (folder / SEEING[0]).is_file() else None

    @classmethod
    def load(cls, folder: Path, codebook: Codebook) -> "PictureCodebook":
        """Read what `save` wrote. Raises CorruptFile."""
        path = folder / SEEING[0]
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            vision = ImageTokenizerConfig(**about["vision"])
            arrays = load_file(folder / SEEING[1])
            weights, bias, there = arrays["weights"], arrays["bias"], arrays["there"]
            if weights.shape != (len(there) - 1, CONCEPT_DIM) or bias.shape != (CONCEPT_DIM,):
                raise ValueError(f"its map of shape {weights.shape} goes elsewhere")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptFile(f"{path}: not a map of pictures ({error}); run `dream tokenize --force`") from error
        return cls(codebook, vision, weights, bias, there)
