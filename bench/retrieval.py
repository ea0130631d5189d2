"""What retrieval finds, and how fast vectors are searched. Writes docs/results/retrieval-*.json.

python -m bench.retrieval facts RUN…    right facts among the first four, by each way; runs of datasets
python -m bench.retrieval matches RUN…  exact match in the hearsay world; runs trained with train.retrieve, by seed
python -m bench.retrieval index         faiss against exact search of a million vectors of 512
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.figures import write_table
from distill.corpus.datasets.causal_world import THINGS, State
from distill.corpus.datasets.hearsay_world import ends
from distill.corpus.truth import same_answer
from distill.errors import BadInput
from distill.exam.examinees.opening import open_examinee
from distill.exam.metrics.statistics import HierarchicalBootstrap, Interval, Ratio
from distill.exam.questions import Exam, Question, load_exam
from distill.exam.targets import How, find_target
from distill.knowledge.graph_rag import GraphRAGEnhanced
from distill.knowledge.retrieval import ATTENTION, RETRIEVALS, WAYS, Retriever
from distill.knowledge.vectors import BLOCK, PROBES, ExactIndex, FaissIndex, Vectors, unit
from distill.run import Run, write_atomic
from distill.tokens.packing import recall_of

GUESS = "the best guess without them"
SEEDS, FIRST, RESAMPLES, ASKED = 3, 4, 2000, 300
SPLITS = {
    "familiar": "new questions of the training's kind",
    "combination": "unseen combinations",
    "depth": "five actions",
    "unseen": "things that training never names",
}
UNTOLD = ("kind of", "made of")
"""Actions of the facts that no question tells."""
VECTORS, DIM, QUERIES, TOP = 1_000_000, 512, 100, 10
LATENT, NOISE, CENTRES = 32, 0.3, 10_000


def shares(retriever: Retriever, exam: Exam, how: str, seed: int) -> dict[str, list[float]]:
    """Of each question the share of the first four facts that its true derivation has, and whether all that it needs
    and doesn't tell are among them."""
    found: dict[str, list[float]] = {"right": [], "untold": []}
    for question in exam.questions:
        first = retriever.retrieve(question.prompt, how, FIRST, seed)
        true = {triplet.phrases for triplet in question.triplets}
        found["right"].append(sum(labels in true for labels in first) / FIRST)
        found["untold"].append(float({labels for labels in true if labels[1] in UNTOLD} <= {*first}))
    return found


def facts(paths: list[str]) -> list[dict[str, Any]]:
    """A row for each run's split and column of `shares`."""
    rows: list[dict[str, Any]] = []
    for run in (Run.open(Path(path)) for path in paths):
        settings = replace(run.settings, train=replace(run.settings.train, retrieve=WAYS[0]))
        recall, exam = recall_of(Run(run.path, settings), {}, []), load_exam(run, 0)
        known = {prompt: own for prompt, own in recall.triplets.items() if " " in prompt}  # facts have none
        measured: dict[str, list[dict[str, list[float]]]] = {how: [] for how in RETRIEVALS}
        for seed in range(SEEDS):
            attention = GraphRAGEnhanced(seed=seed)
            attention.fit(recall.retriever, known, seed=seed)
            recall.retriever.attention = attention
            for how in RETRIEVALS:
                measured[how].append(shares(recall.retriever, exam, how, seed))
        for split in sorted({_split(question) for question in exam.questions}):
            inside = np.array([_split(question) == split for question in exam.questions])
            for column, label in (("right", "of the first four facts right"), ("untold", "all untold facts there")):
                name = f"{run.settings.capture.dataset}, {SPLITS[split]}: {label}"
                rows.append({"name": name, **_row(measured, column, inside)})
    return rows


def matches(paths: list[str]) -> list[dict[str, Any]]:
    """A row for each way that runs were trained and are asked with, and one for the best guess of whoever doesn't know
    what a thing is made of: no student that isn't told can expect more. All of the same questions."""
    runs = sorted((Run.open(Path(path)) for path in paths), key=lambda run: run.settings.seed)
    exam = load_exam(runs[0], ASKED)
    right: dict[str, list[Ratio]] = {}
    for run in runs:
        right.setdefault(run.settings.train.retrieve, []).append(Ratio.of(_matched(run, exam)))
    seeds = {len(own) for own in right.values()}
    if len(seeds) > 1:
        raise BadInput(f"matches: {seeds} runs of the ways; give as many of each, by the same seeds")
    guess = Ratio.of([_guess(question) for question in exam.questions])
    found = {**right, GUESS: [guess] * seeds.pop()}
    rows: list[dict[str, Any]] = []
    for how, own in found.items():
        row: dict[str, Any] = {"name": how}
        for split in ("unseen", "familiar"):
            inside = np.array([_split(question) == split for question in exam.questions])
            if not inside.any():
                continue
            bootstrap = HierarchicalBootstrap(len(own), len(inside), RESAMPLES, 0)
            asked = [ratio.within(inside) for ratio in own]
            row[split] = _cell(bootstrap.interval(asked))
            if how != ATTENTION:
                best = [ratio.within(inside) for ratio in found[ATTENTION]]
                contrast = bootstrap.contrast(best, asked, by_seed=True)
                row[f"{split}_less"] = _cell(contrast[0] if contrast else None)
        rows.append(row)
    return rows


def _matched(run: Run, exam: Exam) -> list[float]:
    """1 for each question that the run answers rightly, else 0; what was asked before is kept in the run."""
    kept = run.path / "matches.json"
    key = [exam.digest, run.require("train").outputs]
    if kept.is_file() and (found := json.loads(kept.read_bytes()))["key"] == key:
        return found["right"]
    examinee = open_examinee(find_target(str(run.path)), How(device="cpu"))
    said = examinee.answer(exam.questions, think=True, temperature=0.0, max_tokens=32, draw=0)
    right = [float(_right(one, spoken.answer)) for one, spoken in zip(exam.questions, said, strict=True)]
    write_atomic(kept, json.dumps({"key": key, "right": right}))
    return right


def _right(question: Question, answer: str) -> bool:
    assert question.truth is not None, "of a dataset"
    return same_answer(answer, question.truth.answer)


def _guess(question: Question) -> float:
    first = {triplet.lens: triplet for triplet in reversed(question.triplets)}
    start = State(first["spatial"].what, first["temporal"].what, first["causal"].what)
    actions = [triplet.action for triplet in question.triplets if triplet.lens == "spatial"]
    return max(ends(start, actions).values()) / len(THINGS)


def _split(question: Question) -> str:
    assert question.truth is not None, "of a dataset"
    return question.truth.split


def _row(
    measured: Mapping[str, list[dict[str, list[float]]]], column: str, inside: NDArray[np.bool_]
) -> dict[str, list[float]]:
    """Each way's share, and attention's less that of the best other, with 95 % intervals."""
    ratios = {how: [Ratio.of(one[column]).within(inside) for one in own] for how, own in measured.items()}
    bootstrap = HierarchicalBootstrap(SEEDS, len(inside), RESAMPLES, 0)
    best = max(WAYS, key=lambda how: float(np.mean([ratio.value for ratio in ratios[how]])))
    contrast = bootstrap.contrast(ratios[ATTENTION], ratios[best], by_seed=True)
    assert contrast is not None, "there are questions"
    return {how: _cell(bootstrap.interval(own)) for how, own in ratios.items()} | {"difference": _cell(contrast[0])}


def _cell(interval: Interval | None) -> list[float]:
    assert interval is not None, "there are questions"
    return [round(value, 4) for value in (interval.value, interval.low, interval.high)]


def made(kind: str, count: int, seed: int) -> Vectors:
    """Vectors (count, 512): `clustered`, around centres that lie in 32 dimensions, as embeddings of text about do; or
    `noise`, the worst there is: no vector is near to any."""
    fixed = np.random.default_rng(0)
    spread = fixed.standard_normal((LATENT, DIM), np.float32) / LATENT**0.5
    centres = fixed.standard_normal((CENTRES, LATENT), np.float32)
    vectors = np.empty((count, DIM), np.float32)
    for start in range(0, count, BLOCK):  # some hundred megabytes at a time
        draw, part = np.random.default_rng([seed, start]), vectors[start : start + BLOCK]
        part[:] = draw.standard_normal(part.shape, np.float32)
        if kind == "clustered":
            latent = centres[draw.integers(0, CENTRES, len(part))]
            latent += 0.5 * draw.standard_normal(latent.shape, np.float32)
            part[:] = NOISE * part + latent @ spread
    return unit(vectors)


def index() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind, count in (("noise", VECTORS // 10), ("clustered", VECTORS)):
        vectors, queries = made(kind, count, 1), made(kind, QUERIES, 2)
        exact = ExactIndex(vectors)
        slow, truth = _searched(exact.search, queries)
        before = _gigabytes()
        started = time.process_time()
        quick = FaissIndex(vectors)
        built = time.process_time() - started
        held = _gigabytes() - before
        fast, found = _searched(quick.search, queries)
        hits = [len({*one} & {*other}) / TOP for one, other in zip(found.tolist(), truth.tolist(), strict=True)]
        rows.append(
            {
                "name": f"{count:,}, {kind}; {PROBES} of {quick.lists:,} lists",
                "recall": round(float(np.mean(hits)), 4),
                "exact": 1000 * float(np.median(slow)),
                "faiss": 1000 * float(np.median(fast)),
                "faster": float(np.median(slow) / np.median(fast)),
                "built": built,
                "held": held,
            }
        )
    return rows[::-1]


def _searched(
    search: Callable[[Vectors, int], tuple[Vectors, NDArray[np.int64]]], queries: Vectors
) -> tuple[list[float], NDArray[np.int64]]:
    """Seconds of the processor for each query by itself, as a prompt asks it, and what they found."""
    seconds: list[float] = []
    found: list[NDArray[np.int64]] = []
    for query in queries:
        started = time.process_time()
        found.append(search(query[None], TOP)[1])
        seconds.append(time.process_time() - started)
    return seconds, np.concatenate(found)


def _gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _share(label: str, signed: bool = False) -> dict[str, Any]:
    return {"label": label, "digits": 1, "percent": True, "signed": signed}


COLUMNS: dict[str, dict[str, Any]] = {
    "matches": {
        "name": {"label": "facts found by"},
        "unseen": _share("exact match, things never trained on"),
        "unseen_less": _share("attention's less that", signed=True),
        "familiar": _share("exact match, things trained on"),
        "familiar_less": _share("attention's less that", signed=True),
    },
    "facts": {
        "name": {"label": "questions"},
        **{how: _share(how) for how in RETRIEVALS},
        "difference": _share("attention − the best other", signed=True),
    },
    "index": {
        "name": {"label": "vectors of 512"},
        "recall": {"label": "recall of the first ten", "digits": 3},
        "exact": {"label": "exact, ms a query", "digits": 1},
        "faiss": {"label": "faiss, ms a query", "digits": 2},
        "faster": {"label": "times faster", "digits": 0},
        "built": {"label": "built in, s", "digits": 0},
        "held": {"label": "memory beside the vectors, GB", "digits": 1},
    },
}


def main(words: list[str]) -> None:
    what, *rest = words
    rows = index() if what == "index" else facts(rest) if what == "facts" else matches(rest)
    seeds = SEEDS if what == "facts" else len({Run.open(Path(path)).settings.seed for path in rest})
    intervals = f"{seeds} seeds, 95 % intervals over seeds and questions"
    about = "one query at a time, in seconds of one core" if what == "index" else intervals
    command = f"python -m bench.retrieval {what}{' RUN…' if rest else ''}"
    write_table(f"retrieval-{what}", command, f"one shared core; {about}", COLUMNS[what], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
