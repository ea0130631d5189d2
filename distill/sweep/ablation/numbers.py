"""What an ablation's measurements come to: means over seeds, intervals and paired differences, by split and depth."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.exam.metrics.statistics import HierarchicalBootstrap
from distill.sweep.ablation.arms import CONTROLS, READINGS, Measured
from distill.sweep.ablation.examples import Example
from distill.tokens.bpe import StudentTokenizer

PAIRS = [
    *((arm, control) for arm in ("backbone", "engine", "oracle", "retrieval") for control in CONTROLS),
    *(("backbone", reading) for reading in READINGS),
    ("engine", "backbone"),
    ("retrieval", "backbone"),
]
"""Differences that are reported: the first minus the second."""


def numbers_of(
    examples: list[Example], measured: dict[int, dict[str, Measured]], resamples: int, seed: int
) -> dict[str, Any]:
    """Groups of prompts, every metric of every arm in each, and the differences of PAIRS.

    measured: training seed → arm → what it did. Metrics are named "metric/group".
    """
    seeds, groups = list(measured), groups_of(examples)
    arms = list(measured[seeds[0]])
    bootstrap = HierarchicalBootstrap(len(seeds), len(examples), resamples, seed)
    values = {
        arm: {
            f"{metric}/{group}": [measured[seed][arm].metrics[metric].within(inside) for seed in seeds]
            for metric in measured[seeds[0]][arm].metrics
            for group, inside in groups.items()
        }
        for arm in arms
    }
    intervals = {arm: {name: bootstrap.interval(found) for name, found in each.items()} for arm, each in values.items()}
    differences = {
        f"{one}-{two}": {
            name: bootstrap.difference(ratios, values[two][name])
            for name, ratios in values[one].items()
            if name in values[two]
        }
        for one, two in PAIRS
        if one in values and two in values
    }
    return {
        "exact": any(example.truth for example in examples),
        "seeds": seeds,
        "groups": {name: int(inside.sum()) for name, inside in groups.items()},
        "metrics": {arm: _json(each) for arm, each in intervals.items()},
        "differences": {pair: _json(each) for pair, each in differences.items()},
    }


def samples_of(
    examples: list[Example], tokenizer: StudentTokenizer, measured: dict[int, dict[str, Measured]]
) -> list[dict[str, Any]]:
    """Per prompt, seed and arm: dream, answer, and the metrics' numerators and denominators."""
    samples: list[dict[str, Any]] = []
    for i, example in enumerate(examples):
        sample: dict[str, Any] = {"key": example.key, "prompt": example.prompt, "teacher": example.text}
        if truth := example.truth:
            sample |= {"split": truth.split, "depth": truth.depth, "expected": truth.answer}
        sample["dream"] = tokenizer.decode(example.mined)
        sample["seeds"] = {
            str(seed): {
                arm: {
                    "dream": found.dreams[i],
                    "answer": found.answers[i],
                    "metrics": {name: [r.numerator[i], r.denominator[i]] for name, r in found.metrics.items()},
                }
                for arm, found in arms.items()
            }
            for seed, arms in measured.items()
        }
        samples.append(sample)
    return samples


def groups_of(examples: list[Example]) -> dict[str, NDArray[np.bool_]]:
    """Group → which examples are in it, (prompts,) bool: "all", each split, and each depth of a split as "split/3"."""
    groups = {"all": np.ones(len(examples), np.bool_)}
    truths = [example.truth for example in examples]
    splits = Counter(truth.split for truth in truths if truth)
    depths = Counter((truth.split, truth.depth) for truth in truths if truth)
    for split in sorted(splits):
        groups[split] = np.array([truth is not None and truth.split == split for truth in truths])
    for split, depth in sorted(depths):
        inside = [truth is not None and (truth.split, truth.depth) == (split, depth) for truth in truths]
        groups[f"{split}/{depth}"] = np.array(inside)
    return groups


def _json(intervals: dict[str, Any]) -> dict[str, Any]:
    return {name: None if found is None else asdict(found) for name, found in intervals.items()}
