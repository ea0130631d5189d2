"""Every metric's name, and how it is shown. What they measure is in docs/metrics.md."""

import math
from dataclasses import dataclass
from typing import Literal

Group = Literal["exact", "likelihood", "targets", "calibration", "text", "speech", "concepts", "dreams"]
"""What a metric needs and speaks of: true answers · likelihoods of the teacher's answers · its soft targets ·
whether a target's confidence is justified · its own answers as text · how its replies are spelled · its own answers in
concept space · its own dreams."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    better: 1 more, −1 less, 0 neither. digits: after the point. percent: a share, shown times 100. least and most: no
    value can lie beyond, so no interval is shown there.
    """

    label: str
    better: int
    digits: int = 3
    percent: bool = False
    group: Group = "text"
    least: float = 0.0
    most: float = math.inf

    def within(self, low: float, high: float) -> tuple[float, float]:
        """An interval of a value, cut where none can lie."""
        most = min(self.most, 1.0) if self.percent else self.most
        return min(max(low, self.least), most), min(max(high, self.least), most)


EXACT = "exact_match"

METRICS: dict[str, Metric] = {
    EXACT: Metric("exact match", 1, 1, True, "exact"),
    "bits_per_byte_used": Metric("bits per byte, as it answers", -1, group="likelihood"),
    "bits_per_byte": Metric("bits per byte, no dream", -1, group="likelihood"),
    "bits_per_byte_dreams": Metric("bits per byte, own dreams", -1, group="likelihood"),
    "bits_per_byte_oracle": Metric("bits per byte, mined dream (oracle)", -1, group="likelihood"),
    "bits_per_byte_sibling": Metric("bits per byte, another answer's mined dream", -1, group="likelihood"),
    "kl": Metric("KL to the teacher (nats), no dream", -1, group="targets"),
    "kl_dreams": Metric("KL, own dreams", -1, group="targets"),
    "kl_oracle": Metric("KL, mined dream (oracle)", -1, group="targets"),
    "agreement": Metric("top-1 agreement, no dream", 1, 1, True, "targets"),
    "agreement_dreams": Metric("top-1 agreement, own dreams", 1, 1, True, "targets"),
    "agreement_oracle": Metric("top-1 agreement, mined dream (oracle)", 1, 1, True, "targets"),
    "agreement_5": Metric("top-5 agreement, no dream", 1, 1, True, "targets"),
    "agreement_5_dreams": Metric("top-5 agreement, own dreams", 1, 1, True, "targets"),
    "agreement_5_oracle": Metric("top-5 agreement, mined dream (oracle)", 1, 1, True, "targets"),
    "chrf": Metric("chrF2 of own answers", 1, 1, most=100.0),
    "rouge_l": Metric("ROUGE-L of own answers", 1, 1, True),
    "repetition": Metric("repeated 4-grams", -1, 1, True),
    "distinct_1": Metric("distinct-1", 1, 1, True),
    "distinct_2": Metric("distinct-2", 1, 1, True),
    "length_ratio": Metric("length to the teacher's", 0, 2),
    "malformed_dreams": Metric("malformed dreams", -1, 1, True, "speech"),
    "unclean_answers": Metric("answers with an image or control token", -1, 1, True, "speech"),
    "broken_bytes": Metric("replies with bytes that are no UTF-8", -1, 1, True, "speech"),
    "ended": Metric("answers that end by themselves", 1, 1, True, "speech"),
    "concept_similarity": Metric("concept similarity of own answers", 1, group="concepts", least=-1.0, most=1.0),
    "concept_similarity_chance": Metric("concept similarity by chance", 0, group="concepts", least=-1.0, most=1.0),
    "dream_recall": Metric("dream recall", 1, 1, True, "dreams"),
    "dream_recall_chance": Metric("dream recall by chance", 0, 1, True, "dreams"),
    "dream_precision": Metric("dream precision", 1, 1, True, "dreams"),
    "tokens_dreamed": Metric("tokens of the dream", 0, 1, group="dreams"),
    "steering_chrf": Metric("answer follows its dream, chrF2", 1, 1, group="dreams", least=-100.0, most=100.0),
    "steering_concepts": Metric("answer follows its dream, concepts", 1, group="dreams", least=-2.0, most=2.0),
}
"""In the order in which they are shown. Of a dataset with splits there is `exact_match_SPLIT`, too: `metric_of`."""

OTHERS = {
    "codes_right": Metric("codes of the true dream in place", 1, 1, True, "dreams"),
    "dreams_right": Metric("whole dreams right", 1, 1, True, "dreams"),
    "calibration_error": Metric("calibration error, no dream", -1, 1, True, "calibration"),
    "calibration_error_dreams": Metric("calibration error, own dreams", -1, 1, True, "calibration"),
    "dream_form": Metric("well-formed dreams", 1, 1, True, "dreams"),
    "triplet_agreement": Metric("triplet agreement of own answers", 1, 1, True, "concepts"),
    "triplet_agreement_chance": Metric("triplet agreement by chance", 0, 1, True, "concepts"),
}
"""Of an ablation's arms, and of results of old, measured no more: shown last."""


def metric_of(name: str) -> Metric:
    """How `name` is shown. Raises KeyError for what is no metric."""
    if name.startswith(f"{EXACT}_"):
        exact = METRICS[EXACT]
        split = name.removeprefix(f"{EXACT}_")
        return Metric(f"{exact.label}, {split}", exact.better, exact.digits, exact.percent, exact.group)
    return METRICS.get(name) or OTHERS[name]


def in_order(names: set[str]) -> list[str]:
    """Names as they are shown: exact match first, by split after it, then METRICS' order. Raises KeyError."""
    order = [*METRICS, *OTHERS]
    return sorted(names, key=lambda name: (order.index(name), "") if name in order else _split_place(name))


def _split_place(name: str) -> tuple[float, str]:
    metric_of(name)
    return 0.5, name


def shown(value: float | None, metric: Metric, sign: str = "") -> str:
    """A value as text, with its unit; "–" where it isn't defined. sign: "+" for differences."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:{sign}.{metric.digits}f} %" if metric.percent else f"{value:{sign}.{metric.digits}f}"
