"""What an ablation's measurements come to: means over seeds, intervals and paired differences, by split and depth."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.exam.measured import Measured
from distill.exam.metrics.statistics import HierarchicalBootstrap, Ratio, SeedInterval, paired
from distill.exam.questions import Question
from distill.sweep.ablation.arms import CONTROLS, READINGS, TRUE_READINGS

PAIRS = [
    *((arm, control) for arm in ("backbone", "engine", "oracle", "retrieval") for control in CONTROLS),
    *(("backbone", reading) for reading in READINGS),
    *(("oracle", reading) for reading in ("empty", *TRUE_READINGS)),
    *((reading, none) for reading in TRUE_READINGS for none in ("empty", "nodream")),
    ("engine", "backbone"),
    ("retrieval", "backbone"),
]
"""Differences that are reported: the first minus the second."""

Seeds = Mapping[int, Mapping[str, Measured]]
"""Training seed → arm → what it did."""


def numbers_of(questions: Sequence[Question], measured: Seeds, resamples: int, seed: int) -> dict[str, Any]:
    """Groups of prompts, every metric of every arm in each, and the differences of PAIRS, paired by seed and prompt.

    Metrics are named "metric/group".
    """
    groups, by_seed = groups_of(questions), list(measured.values())
    bootstrap = HierarchicalBootstrap(len(by_seed), len(questions), resamples, seed)
    values = {
        arm: {
            f"{metric}/{group}": [arms[arm].metrics[metric].within(inside) for arms in by_seed]
            for metric in found.metrics
            for group, inside in groups.items()
        }
        for arm, found in by_seed[0].items()
    }
    pairs = {f"{one}-{two}": (values[one], values[two]) for one, two in PAIRS if one in values and two in values}
    return {
        "exact": any(question.truth for question in questions),
        "seeds": list(measured),
        "groups": {name: int(inside.sum()) for name, inside in groups.items()},
        "metrics": {
            arm: {name: _json(bootstrap.interval(ratios)) for name, ratios in each.items()}
            for arm, each in values.items()
        },
        "differences": {
            pair: {name: _json(_difference(bootstrap, one[name], two[name])) for name in one if name in two}
            for pair, (one, two) in pairs.items()
        },
    }


def _difference(bootstrap: HierarchicalBootstrap, one: Sequence[Ratio], two: Sequence[Ratio]) -> SeedInterval | None:
    """Over the prompts for which both are defined."""
    pairs = [paired(first, second) for first, second in zip(one, two, strict=True)]
    return bootstrap.difference([first for first, _ in pairs], [second for _, second in pairs])


def samples_of(questions: Sequence[Question], dreams: Sequence[str], measured: Seeds) -> list[dict[str, Any]]:
    """Per prompt, seed and arm: dream, answer, and the metrics' numerators and denominators. dreams: the true ones."""

    def told(found: Measured, i: int) -> dict[str, Any]:
        metrics = {name: [ratio.numerator[i], ratio.denominator[i]] for name, ratio in found.metrics.items()}
        return {"dream": found.dreams[i], "answer": found.answers[i], "metrics": metrics}

    return [
        {
            **question.about(),
            "dream": dreams[i],
            "seeds": {
                str(seed): {arm: told(found, i) for arm, found in arms.items()} for seed, arms in measured.items()
            },
        }
        for i, question in enumerate(questions)
    ]


def groups_of(questions: Sequence[Question]) -> dict[str, NDArray[np.bool_]]:
    """Group → which questions are in it, (prompts,) bool: "all", each split, and each depth of a split as "split/3"."""
    truths = [question.truth for question in questions]
    names = [("all", *((truth.split, f"{truth.split}/{truth.depth}") if truth else ())) for truth in truths]
    # All, then splits, then depths in their order.
    wanted = sorted({name for each in names for name in each}, key=_place)
    return {name: np.array([name in each for each in names]) for name in wanted}


def _place(group: str) -> tuple[int, str, int]:
    split, _, depth = group.partition("/")
    return (2 if depth else group != "all"), split, int(depth or 0)


def _json(interval: Any) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)
