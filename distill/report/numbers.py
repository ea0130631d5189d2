"""What a comparison's measurements come to: values, paired differences and tests, wins, disagreements, the frontier.

A system is one target, or several trainings of one recipe that differ by their seed. Everything is on the same prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.exam.measured import Measured
from distill.exam.metrics.catalogue import Metric, in_order, metric_of
from distill.exam.metrics.significance import holm, permutation_test
from distill.exam.metrics.statistics import HierarchicalBootstrap, Ratio, shared
from distill.exam.questions import Question

USED = "bits_per_byte_used"
LEADING = ("exact_match", USED, "bits_per_byte", "chrf")
"""The first of these that all systems have leads: its tests are corrected by themselves, and disagreements and the
frontier are told in it. A rule, so that nobody chooses it by what came out."""

TIE = 1e-9
"""A prompt whose values differ by no more is a tie: they are equal but for rounding."""

SHOWN = 24
"""Disagreements that are kept."""

Systems = Mapping[str, Sequence[Measured]]


def compare_numbers(
    systems: Systems,
    baseline: str,
    *,
    resamples: int = 2_000,
    permutations: int = 10_000,
    seed: int = 0,
    questions: Sequence[Question] = (),
    costs: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """The parts of a comparison's results.json that are computed from measurements alone.

    systems: name → what each of its trainings did, all on the same questions. questions: those, for the prompts' texts.
    costs: name → its cost ("tokens_per_second": {"median": …}); without any, tokens a second are those of its own
    answers, of the first training.

    "metrics": system → metric → value, low, high, prompts, seeds. "differences": each system minus the baseline, "own"
    and "other" their values on the prompts that both have, with p-values by `permutation_test` where each has one
    training, else by `HierarchicalBootstrap.contrast` of as many draws; "tests" says how. "same_as": a metric that is
    this very one for both, under which it is tested. "disagreements": prompts where the systems differ most.
    "frontier": size, speed, quality.
    """
    names = in_order({name for each in systems.values() for measured in each for name in measured.metrics})
    size = len(systems[baseline][0].keys)
    bootstrap = HierarchicalBootstrap(max(map(len, systems.values())), size, resamples, seed)
    found = {
        system: {name: ratios for name in names if (ratios := _ratios(each, name)) is not None}
        for system, each in systems.items()
    }
    several = any(len(each) > 1 for each in systems.values())
    # p-values need draws further out in the tails than intervals do.
    far = HierarchicalBootstrap(1, size, permutations, seed) if several else None
    differences = [
        _difference(
            system, baseline, name, found[system][name], found[baseline][name], bootstrap, far, permutations, seed
        )
        for system in systems
        for name in names
        if system != baseline and name in found[system] and name in found[baseline] and not name.endswith("_chance")
    ]
    leading = next((name for name in LEADING if all(name in each for each in found.values())), None)
    for difference in differences:
        difference["same_as"] = same = _same(
            found[difference["system"]], found[baseline], difference["metric"], leading
        )
        if same is not None:
            difference["p"] = None  # one test, told once
    # What was to be found out is one question; all else that was looked at besides is another.
    kinds = _kinds(systems, baseline)
    main, rest = ([d for d in differences if (d["metric"] == leading) is first] for first in (True, False))
    for family in (main, rest):
        for difference, p in zip(family, holm([d["p"] for d in family]), strict=True):
            difference["p_corrected"] = p
    return {
        "metrics": {
            system: {
                name: _entry(found[system].get(name), bootstrap, metric_of(name))
                for name in names
                if all(name in measured.metrics for measured in each)
            }
            for system, each in systems.items()
        },
        "differences": differences,
        "tests": {
            "leading": leading,
            "count_leading": sum(difference["p"] is not None for difference in main),
            "count": sum(difference["p"] is not None for difference in rest),
            "correction": "Holm",
            "method": " ".join(METHODS[kind] for kind in kinds),
            "kinds": kinds,
            "permutations": permutations,
            "bootstrap": resamples,
        },
        "disagreements": disagreements(systems, found, leading, questions) if leading else [],
        "frontier": frontier(systems, found, leading, costs, bootstrap) if leading else None,
    }


METHODS = {
    "permutation": "Of two systems with one training each, p is two-sided and of a paired permutation test: the share "
    "of random swaps of their results, prompt by prompt, whose difference is at least as large.",
    "bootstrap": "Of systems with several trainings, p is two-sided and of a bootstrap over prompts and seeds, which "
    "are not paired: 1 − the level of the widest interval that leaves out zero.",
}


def _kinds(systems: Systems, baseline: str) -> list[str]:
    """Which tests were made, of `METHODS`."""
    several = {len(each) > 1 or len(systems[baseline]) > 1 for name, each in systems.items() if name != baseline}
    return [kind for kind, drawn in zip(METHODS, (False, True), strict=True) if drawn in several]


def _same(
    one: Mapping[str, Sequence[Ratio]], other: Mapping[str, Sequence[Ratio]], name: str, leading: str | None
) -> str | None:
    """What `name` repeats number by number for both systems: what leads, or bits per byte as each answers (which is
    the one without a dream, or that after own dreams). None for what is a metric of its own."""

    def equal(these: Sequence[Ratio], those: Sequence[Ratio]) -> bool:
        return all(
            np.array_equal(a.numerator, b.numerator) and np.array_equal(a.denominator, b.denominator)
            for a, b in zip(these, those, strict=True)
        )

    for first in (leading, USED):
        if first is None or first == name or name == leading or first not in one or first not in other:
            continue
        if equal(one[name], one[first]) and equal(other[name], other[first]):
            return first
    return None


def _ratios(each: Sequence[Measured], name: str) -> list[Ratio] | None:
    """The metric of every training; None where one of them lacks it or it is defined for no prompt."""
    ratios = [measured.metrics[name] for measured in each if name in measured.metrics]
    return ratios if len(ratios) == len(each) and all(ratio.defined for ratio in ratios) else None


def _entry(ratios: list[Ratio] | None, bootstrap: HierarchicalBootstrap, metric: Metric) -> dict[str, Any]:
    """One system's metric; null where a training defines it for no prompt."""
    interval = None if ratios is None else bootstrap.interval(ratios)
    if ratios is None or interval is None:
        return {"value": None, "low": None, "high": None, "seeds": [], "prompts": 0}
    # With few seeds an interval can reach beyond what the metric can be.
    low, high = metric.within(interval.low, interval.high)
    entry = {"value": interval.value, "low": low, "high": high}
    return {**entry, "seeds": list(interval.seeds), "prompts": _count(ratios)}


def _count(ratios: Sequence[Ratio]) -> int:
    """Prompts that a metric is defined for, in any training."""
    return int(np.any([ratio.denominator != 0 for ratio in ratios], axis=0).sum())


def _difference(
    system: str,
    against: str,
    name: str,
    ratios: list[Ratio],
    others: list[Ratio],
    bootstrap: HierarchicalBootstrap,
    far: HierarchicalBootstrap | None,
    permutations: int,
    seed: int,
) -> dict[str, Any]:
    """system − against in one metric, on the prompts for which all trainings of both define it."""
    better = metric_of(name).better
    both = shared([*ratios, *others])
    one, two = both[: len(ratios)], both[len(ratios) :]
    found = bootstrap.contrast(one, two)
    p: float | None = None
    # A dream mined from the very answer is a landmark: no system is better for it.
    if found is not None and better and not name.endswith("_oracle"):
        if len(one) == len(two) == 1:
            p = permutation_test(one[0], two[0], permutations, seed)
        elif far is not None and (drawn := far.contrast(one, two)) is not None:
            p = drawn[1]
    interval = None if found is None else found[0]
    counts: dict[str, int | None] = dict.fromkeys(("wins", "ties", "losses"))
    # A calibration error has parts that only add up over many prompts: there is none of a single prompt.
    if better and one[0].numerator.ndim == 1:
        counts = _wins(by_prompt(one) - by_prompt(two), better)
    return {
        "system": system,
        "against": against,
        "metric": name,
        "value": None if interval is None else interval.value,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "p": p,
        "p_corrected": None,
        "own": None if found is None else float(np.mean([ratio.value for ratio in one])),
        "other": None if found is None else float(np.mean([ratio.value for ratio in two])),
        "prompts": _count(both),
        **counts,
    }


def by_prompt(ratios: Sequence[Ratio]) -> NDArray[np.float64]:
    """A metric's value at each prompt, the mean over trainings, (prompts,); NaN where one of them doesn't define it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        values = [np.where(r.denominator != 0, r.numerator / r.denominator, np.nan) for r in ratios]
    return np.mean(values, axis=0)


def _wins(differences: NDArray[np.float64], better: int) -> dict[str, int | None]:
    """Prompts where the first is better, as good, or worse. better: 1 where more is, −1 where less is."""
    gains = better * differences[np.isfinite(differences)]
    wins, losses = int((gains > TIE).sum()), int((gains < -TIE).sum())
    return {"wins": wins, "ties": len(gains) - wins - losses, "losses": losses}


def disagreements(
    systems: Systems, found: Mapping[str, Mapping[str, Sequence[Ratio]]], metric: str, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """The prompts where the systems' values in `metric` lie furthest apart, the furthest first; equal ones in the order
    of their keys. Dreams and answers are those of each system's first training, null where it wasn't to speak."""
    values = {system: by_prompt(each[metric]) for system, each in found.items()}
    table = np.stack(list(values.values()))
    spread = table.max(axis=0) - table.min(axis=0)
    order = [int(i) for i in np.argsort(-spread, kind="stable") if spread[i] > TIE]
    keys = next(iter(systems.values()))[0].keys
    asked = {question.key: question for question in questions}
    return [
        {
            "key": keys[i],
            "prompt": asked[keys[i]].prompt if keys[i] in asked else "",
            "teacher": asked[keys[i]].text if keys[i] in asked else "",
            "metric": metric,
            "spread": float(spread[i]),
            "values": {system: float(each[i]) for system, each in values.items()},
            "systems": {
                system: {
                    "dream": each[0].dreams[i] if each[0].dreams else None,
                    "answer": each[0].answers[i] if each[0].answers else None,
                }
                for system, each in systems.items()
            },
        }
        for i in order[:SHOWN]
    ]


def frontier(
    systems: Systems,
    found: Mapping[str, Mapping[str, Sequence[Ratio]]],
    metric: str,
    costs: Mapping[str, Mapping[str, Any] | None] | None,
    bootstrap: HierarchicalBootstrap,
) -> dict[str, Any]:
    """Size, speed and quality of each system, and whether another is at least as good in all three and better in one.

    Quality is that on the prompts that all systems have. "speed_of": "alone" where costs tell the speed of one prompt
    at a time, else "in batches", as the exam was answered. A system of which one of the three is not known is compared
    with nobody, and is not on the frontier.
    """
    better = metric_of(metric).better
    timed = any((costs or {}).values())
    every = iter(shared([ratio for each in found.values() for ratio in each[metric]]))
    points: list[dict[str, Any]] = []
    for system, each in systems.items():
        quality = bootstrap.interval([next(every) for _ in each])
        cost = (costs or {}).get(system)
        speed = cost["tokens_per_second"]["median"] if cost and cost["tokens_per_second"] else None
        point = {
            "system": system,
            "bytes": each[0].card.bytes,
            "tokens_per_second": speed if timed else each[0].tokens_per_second,
            "quality": quality.value if quality else None,
            "low": quality.low if quality else None,
            "high": quality.high if quality else None,
        }
        points.append(point)
    goods = {
        p["system"]: (-p["bytes"], p["tokens_per_second"], better * p["quality"])
        for p in points
        if None not in (p["bytes"], p["tokens_per_second"], p["quality"])
    }
    for point in points:
        own = goods.get(point["system"])
        beaten = own is not None and any(
            other != own and all(o >= s for o, s in zip(other, own, strict=True)) for other in goods.values()
        )
        point["on_frontier"] = own is not None and not beaten
    return {
        "quality": metric,
        "better": better,
        "speed_of": "alone" if timed else "in batches",
        "points": points,
    }
