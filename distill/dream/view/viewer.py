"""Dreams that can be looked at: kept as they are dreamed, summed up, and written as JSON, a heatmap or a page.

Shape legend: S paths, T steps, 3 roles (what, action, result), D 512.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distill.dream.record import Branch, DreamRecord
from distill.dream.view.records import arbitrated, read_json, to_bytes
from distill.errors import BadInput
from distill.run import write_atomic

Format = Literal["json", "png", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)

Vectors = NDArray[Any]
"""(S, T, 3, D) embeddings of one dreaming."""


class DreamViewer:
    """Remembers the last `limit` dreamings, and the embeddings of the last `vectors_limit` of them.

    A dreaming is some 10 kB, each word whose attention was noted 2 kB more, its embeddings 120 kB: what a long session
    holds is bounded by the two.
    """

    def __init__(self, limit: int = 1000, vectors_limit: int = 16) -> None:
        self.vectors_limit = vectors_limit
        self.total = 0
        self._records: deque[DreamRecord] = deque(maxlen=limit)
        self._vectors: deque[Vectors | None] = deque(maxlen=limit)
        self._means: deque[float | None] = deque(maxlen=limit)

    @property
    def records(self) -> list[DreamRecord]:
        """What is remembered, oldest first."""
        return list(self._records)

    @property
    def vectors(self) -> list[Vectors | None]:
        """Of each record its (S, T, 3, D) embeddings, where they were given and are not forgotten yet."""
        return list(self._vectors)

    def record(self, record: DreamRecord, vectors: Vectors | None = None) -> None:
        """Remember a dreaming that is over. vectors: (S, T, 3, D), where the dreamer has any."""
        self.total += 1
        held = None if vectors is None else np.asarray(vectors, np.float32)
        self._records.append(record)
        self._vectors.append(held)
        self._means.append(None if held is None else float(held.mean()))
        if len(self._vectors) > self.vectors_limit:
            self._vectors[-1 - self.vectors_limit] = None

    def get_dream_summary(self) -> dict[str, Any]:
        """What was dreamed, in numbers; of all remembered records but for `total_dreams`, which counts every one.

        avg_mean: mean over all values of the embeddings; nan where no dreamer gave any. Shares are 0 to 1.
        lens_shares: of all steps. gate_load: mean weight of each expert. mean_score: of the paths that an arbiter saw.
        """
        branches = [branch for record in self._records for branch in record.branches if branch.steps]
        steps = [step for branch in branches for step in branch.steps]
        lenses = Counter({branch.lens: 0 for branch in branches})
        for branch in branches:
            lenses[branch.lens] += len(branch.steps)
        tokens = Counter(slot.label for step in steps for slot in step.slots)
        return {
            "total_dreams": self.total,
            "avg_mean": _mean(mean for mean in self._means if mean is not None),
            "remembered": len(self._records),
            "dreamers": dict(Counter(record.dreamer for record in self._records)),
            "paths": len(branches),
            "steps": len(steps),
            "kept_share": _mean(float(branch.kept) for branch in branches),
            "mean_score": _mean(branch.score for branch in branches if arbitrated(branch)),
            "mean_probability": _mean(slot.probability for step in steps for slot in step.slots),
            "mean_seconds": _mean(record.seconds for record in self._records),
            "lens_shares": {lens: count / max(1, len(steps)) for lens, count in lenses.items()},
            "gate_load": _gate_load(branches),
            "distinct_tokens": len(tokens),
            "top_tokens": tokens.most_common(10),
        }

    def export(self, path: str | Path, format: Format | None = None) -> Path:
        """Write all remembered dreams; the format is that of the suffix unless it is named.

        json: comes back with `load`. png: a heatmap of the last dreams. html: one page that needs nothing else.
        Raises BadInput for another format, DistillError where the file can't be written.
        """
        path = Path(path)
        kind = check_format(path, format)
        if kind == "json":
            write_atomic(path, to_bytes(self._records))
        elif kind == "html":
            from distill.dream.view.page import page

            write_atomic(path, page(self.records))
        else:
            from distill.dream.view.heatmap import heatmap

            write_atomic(path, heatmap(self.records, self.vectors))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "DreamViewer":
        """The dreams of a JSON file that `export` wrote. Raises BadInput where there is none, CorruptFile."""
        records = read_json(Path(path))
        viewer = cls(limit=max(1000, len(records)))
        for record in records:
            viewer.record(record)
        return viewer


def check_format(path: Path, format: str | None = None) -> str:
    """The format that a file is written in: the one named, else that of its suffix. Raises BadInput."""
    kind = format or path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise BadInput(f"{path}: no format {kind!r} to export dreams in; choose one of {', '.join(FORMATS)}")
    return kind


def _gate_load(branches: Iterable[Branch]) -> dict[str, float]:
    weights: dict[str, list[float]] = {}
    for branch in branches:
        for expert, weight in branch.gates.items():
            weights.setdefault(expert, []).append(weight)
    return {expert: _mean(held) for expert, held in weights.items()}


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return math.fsum(held) / len(held) if held else math.nan
