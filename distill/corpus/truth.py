"""True answers: a dataset that makes its own questions knows them, and says which split each question is of."""

import json
from dataclasses import dataclass
from itertools import zip_longest

from distill.corpus.datasets.stage import dataset_file
from distill.corpus.traces import Trace
from distill.errors import CorruptFile
from distill.run import Run


@dataclass(frozen=True)
class Truth:
    """Of one question. split: "train", or which way of holding out it belongs to; depth: steps to its answer."""

    split: str
    answer: str
    depth: int


def read_truths(run: Run) -> dict[str, Truth]:
    """Trace key → its truth; empty for a run without true answers. Raises CorruptFile naming the broken line."""
    path = dataset_file(run)
    if not path.exists():
        return {}
    truths: dict[str, Truth] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            value = json.loads(line)
            key, truth = value["key"], Truth(value["split"], value["answer"], value["depth"])
            kinds = [(key, str), (truth.split, str), (truth.answer, str), (truth.depth, int)]
            if not all(type(found) is kind for found, kind in kinds):
                raise ValueError("key, split and answer are text, depth is a whole number")
        except (ValueError, KeyError, TypeError) as error:
            remedy = f"run `dream capture {run.path} --force`"
            raise CorruptFile(f"{path}:{number}: not a question with its true answer ({error}); {remedy}") from error
        truths[key] = truth
    return truths


def same_answer(answer: str, truth: str) -> bool:
    """Exact match: equal but for white space."""
    return answer.split() == truth.split()


def spread(traces: list[Trace], truths: dict[str, Truth]) -> list[Trace]:
    """The traces in turns from each split, so that however many are taken, splits are represented evenly."""
    splits: dict[str, list[Trace]] = {}
    for trace in traces:
        splits.setdefault(truths[trace.key].split if trace.key in truths else "", []).append(trace)
    turns = zip_longest(*(splits[name] for name in sorted(splits)))
    return [trace for turn in turns for trace in turn if trace is not None]
