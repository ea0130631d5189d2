"""What a comparison's measurements come to: values, paired differences and tests, wins, disagreements.

A system is one target, or trainings of one recipe that differ by their seed. Everything is on the same prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.exam.measured import Measured
from distill.exam.metrics.catalogue import in_order, metric_of
from distill.exam.metrics.significance import holm, permutation_test
from distill.exam.metrics.statistics import HierarchicalBootstrap, Ratio, shared
from distill.exam.questions import Question
from distill.turns import transcript
from distill.vision.pictures import thumbnails

USED = "bits_per_byte_used"
LEADING = ("exact_match", USED, "bits_per_byte", "chrf")
"""The first of these that all systems have that spoke, and that can be compared, leads: its tests are corrected by
themselves, and disagreements are told in it. A rule, so that nobody chooses it by what came out."""

TIE = 1e-9
"""A prompt whose values differ by no more is a tie: they are equal but for rounding."""

SHOWN = 24
"""Disagreements that are kept."""

METHODS = {
    "permutation": "Of two systems with one training each, p is two-sided and of a paired permutation test: the share "
    "of random swaps of their results, prompt by prompt, whose difference is at least as large.",
    "bootstrap": "Of systems with several trainings, p is two-sided and of a bootstrap over prompts and seeds, which "
    "are not paired: 1 − the level of the widest interval that leaves out zero.",
    "paired": "p is two-sided and of a bootstrap over prompts and seeds, paired by both: 1 − the level of the widest "
    "interval that leaves out zero.",
}

Systems = Mapping[str, Sequence[Measured]]


def compare_numbers(
    systems: Systems,
    baseline: str,
    *,
    resamples: int = 2_000,
    permutations: int = 10_000,
    seed: int = 0,
    questions: Sequence[Question] = (),
    pairs: Sequence[tuple[str, str]] = (),
    by_seed: bool = False,
) -> dict[str, Any]:
    """The parts of a comparison's results.json that are computed from measurements alone.

    systems: name → what each of its trainings did, all on the same questions. questions: those, for the prompts' texts.
    pairs: which are compared, (one, against); none: each with the baseline. by_seed:
    their trainings are of the same seeds, one by one.

    "metrics": system → metric → value, low, high, prompts, seeds. "differences": one minus the other, "own" and "other"
    their values on the prompts that both have, with p-values by `permutation_test` where each has one
    training, else by `HierarchicalBootstrap.contrast` of as many draws; "tests" says how. "same_as": a metric that is
    this very one for both, under which it is tested. "disagreements": prompts where the systems differ most.
    """
    pairs = pairs or [(name, baseline) for name in systems if name != baseline]
    numbers = _Numbers(systems, baseline, by_seed, resamples, permutations, seed)
    differences, leading = numbers.differences(pairs), numbers.leading
    # What was to be found out is one question; all else that was looked at besides is another.
    families = [[d for d in differences if (d["metric"] == leading) is first] for first in (True, False)]
    for family in families:
        for difference, p in zip(family, holm([d["p"] for d in family]), strict=True):
            difference["p_corrected"] = p
    counts = [sum(difference["p"] is not None for difference in family) for family in families]
    used = {_kind(systems[one], systems[two], by_seed) for one, two in pairs}
    kinds = [kind for kind in METHODS if kind in used]
    return {
        "metrics": {system: numbers.metrics(system) for system in systems},
        "differences": differences,
        "tests": {
            "leading": leading,
            "count_leading": counts[0],
            "count": counts[1],
            "correction": "Holm",
            "method": " ".join(METHODS[kind] for kind in kinds),
            "kinds": kinds,
            "permutations": permutations,
            "bootstrap": resamples,
        },
        "disagreements": numbers.disagreements(leading, questions) if leading else [],
    }


class _Numbers:
    """found: system → metric → a ratio a training, of the metrics that all its trainings define for some prompt."""

    def __init__(
        self, systems: Systems, baseline: str, by_seed: bool, resamples: int, permutations: int, seed: int
    ) -> None:
        self.systems, self.baseline, self.permutations, self.seed = systems, baseline, permutations, seed
        self.by_seed = by_seed
        self.names = in_order({name for each in systems.values() for measured in each for name in measured.metrics})
        self.found = {system: _defined(each) for system, each in systems.items()}
        self.leading = next((name for name in LEADING if self._leads(name)), None)
        size = len(systems[baseline][0].keys)
        self.bootstrap = HierarchicalBootstrap(max(map(len, systems.values())), size, resamples, seed)
        several = any(len(each) > 1 for each in systems.values())
        # p-values need draws further out in the tails than intervals do.
        self.far = HierarchicalBootstrap(1, size, permutations, seed) if several else None

    def _leads(self, metric: str) -> bool:
        """A student's start has likelihoods alone, and a teacher perhaps none: they needn't have it."""
        spoke = {name for name, each in self.systems.items() if each[0].answers and each[0].card.kind != "teacher"}
        having = {name for name, each in self.found.items() if metric in each}
        return having >= spoke and len(having) >= min(2, len(self.found))

    def metrics(self, system: str) -> dict[str, Any]:
        """Null are those that a training defines for no prompt."""
        told: dict[str, Any] = {}
        for name in self.names:
            if ratios := self.found[system].get(name):
                told[name] = self._entry(name, ratios)
            elif all(name in measured.metrics for measured in self.systems[system]):
                told[name] = {"value": None, "low": None, "high": None, "seeds": [], "prompts": 0}
        return told

    def _entry(self, name: str, ratios: list[Ratio]) -> dict[str, Any]:
        seeds = [ratio.value for ratio in ratios]
        interval = self.bootstrap.interval(ratios)
        # With few seeds an interval can reach beyond what the metric can be.
        low, high = metric_of(name).within(interval.low, interval.high) if interval else (None, None)
        value = interval.value if interval else float(np.mean(seeds))
        return {"value": value, "low": low, "high": high, "seeds": seeds, "prompts": _count(ratios)}

    def differences(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """In all metrics that both of a pair have."""
        return [
            self._difference(system, against, name)
            for system, against in pairs
            for name in self.names
            if name in self.found[system] and name in self.found[against] and not name.endswith("_chance")
        ]

    def _difference(self, system: str, against: str, name: str) -> dict[str, Any]:
        """On the prompts for which all trainings of both define it."""
        ratios, others = self.found[system][name], self.found[against][name]
        better, both = metric_of(name).better, shared([*ratios, *others])
        one, two = both[: len(ratios)], both[len(ratios) :]
        means = [float(np.mean([r.value for r in each])) if both[0].defined else None for each in (one, two)]
        told: dict[str, Any] = {
            "system": system,
            "against": against,
            "metric": name,
            "value": None if means[0] is None or means[1] is None else means[0] - means[1],
            **dict.fromkeys(("low", "high", "p", "p_corrected", "wins", "ties", "losses")),
            "own": means[0],
            "other": means[1],
            "prompts": _count(both),
            "same_as": self._same_as(system, against, name),
        }
        if interval := self.bootstrap.contrast(one, two, self.by_seed):
            told |= {"low": interval[0].low, "high": interval[0].high}
            # A dream mined from the very answer is a landmark: no system is better for it.
            if better and not name.endswith("_oracle") and told["same_as"] is None:
                told["p"] = self._p(one, two)
        if better:
            told |= _wins(by_prompt(one) - by_prompt(two), better)
        return told

    def _p(self, one: list[Ratio], two: list[Ratio]) -> float | None:
        if _kind(one, two, self.by_seed) == "permutation":
            return permutation_test(one[0], two[0], self.permutations, self.seed)
        drawn = self.far.contrast(one, two, self.by_seed) if self.far else None
        return drawn[1] if drawn else None

    def _same_as(self, system: str, against: str, name: str) -> str | None:
        """Bits per byte as a system answers are those without a dream, or after its own: where a metric is that for
        both, it is one test, told once."""
        pairs = [(self.found[each].get(name), self.found[each].get(USED)) for each in (system, against)]
        same = all(a and b and all(map(_equal, a, b)) for a, b in pairs)
        return USED if same and name != USED else None

    def disagreements(self, metric: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The prompts where the values of the systems that have `metric` lie furthest apart, the furthest first; equal
        ones in the order of their keys. Dreams and answers are those of each first training, null where it wasn't to
        speak."""
        values = {system: by_prompt(each[metric]) for system, each in self.found.items() if metric in each}
        table = np.stack(list(values.values()))
        spread = table.max(axis=0) - table.min(axis=0)
        order = [int(i) for i in np.argsort(-spread, kind="stable") if spread[i] > TIE]
        keys = self.systems[self.baseline][0].keys
        asked = {question.key: question for question in questions}
        return [
            {
                "key": keys[i],
                "prompt": transcript(asked[keys[i]].prompt) if keys[i] in asked else "",
                "teacher": asked[keys[i]].text if keys[i] in asked else "",
                "pictures": thumbnails(asked[keys[i]].pictures, 192) if keys[i] in asked else [],
                "metric": metric,
                "spread": float(spread[i]),
                "values": {system: float(each[i]) for system, each in values.items()},
                "systems": {
                    system: {
                        "dream": each[0].dreams[i] if each[0].dreams else None,
                        "answer": each[0].answers[i] if each[0].answers else None,
                    }
                    for system, each in self.systems.items()
                },
            }
            for i in order[:SHOWN]
        ]


def _kind(one: Sequence[Any], two: Sequence[Any], by_seed: bool) -> str:
    """Of a test between so many trainings, a key of METHODS."""
    return "permutation" if len(one) == len(two) == 1 else "paired" if by_seed else "bootstrap"


def _defined(each: Sequence[Measured]) -> dict[str, list[Ratio]]:
    found = {name: [measured.metrics.get(name) for measured in each] for name in each[0].metrics}
    return {
        name: [ratio for ratio in ratios if ratio is not None]
        for name, ratios in found.items()
        if all(ratio is not None and ratio.defined for ratio in ratios)
    }


def _equal(a: Ratio, b: Ratio) -> bool:
    return np.array_equal(a.numerator, b.numerator) and np.array_equal(a.denominator, b.denominator)


def _count(ratios: Sequence[Ratio]) -> int:
    """Prompts that a metric is defined for, in any training."""
    return int(np.any([ratio.denominator != 0 for ratio in ratios], axis=0).sum())


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
