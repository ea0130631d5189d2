"""What a comparison says, from its results.json alone: verdicts, and a headline for each pair of systems.

Nothing is called better or worse unless the corrected p-value is below 5 % and the interval leaves out zero on the same
side. All else is "no clear difference", which is not the same as "equal".
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from distill.exam.metrics.catalogue import metric_of, shown
from distill.mining.triplets import LENSES

Results = dict[str, Any]
Verdict = Literal["better", "worse", "open", "untested", "undefined"]
"""Of a system against the baseline. open: no clear difference. untested: there is no corrected p-value, or neither more
nor less is better. undefined: the metric is not defined for both."""

CLEAR = 0.05
"""Largest corrected p-value that counts as clear."""
NOT_OWN = ("_oracle", "_chance")
"""Ends of the names of metrics that are landmarks and no result of the system: they make no headline."""
SIGNS: dict[Verdict, str] = {"better": "▲", "worse": "▼"}
WORDS: dict[Verdict, str] = {
    "better": "clearly better",
    "worse": "clearly worse",
    "open": "no clear difference",
    "untested": "not tested",
    "undefined": "not defined",
}


def verdict(difference: dict[str, Any]) -> Verdict:
    """Of one entry of "differences"."""
    value, low, high, p = (difference[name] for name in ("value", "low", "high", "p_corrected"))
    if value is None:
        return "undefined"
    better = metric_of(difference["metric"]).better
    if p is None or low is None or high is None or not better:
        return "untested"
    if p >= CLEAR or not (0 < low <= high or low <= high < 0):
        return "open"
    return "better" if better * value > 0 else "worse"


@dataclass(frozen=True)
class Finding:
    """One system against another. tested: its own metrics that could be, the clear ones first."""

    system: str
    against: str
    headline: str
    tested: list[dict[str, Any]]


def findings(results: Results) -> list[Finding]:
    """One for each pair of systems that was compared, in the order of the results."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for difference in results["differences"]:
        of_pair = pairs.setdefault((difference["system"], difference["against"]), [])
        if verdict(difference) not in ("untested", "undefined") and not difference["metric"].endswith(NOT_OWN):
            of_pair.append(difference)
    order = list(WORDS)
    return [
        Finding(*pair, _headline(*pair, tested, results), sorted(tested, key=lambda d: order.index(verdict(d))))
        for pair, tested in pairs.items()
    ]


def _headline(system: str, against: str, tested: list[dict[str, Any]], results: Results) -> str:
    """ "hard against soft: clearly worse in bits per byte, +0.137 [+0.070, +0.204], corrected p < 0.001. …"."""
    lead = next((d for d in tested if d["metric"] == results["tests"].get("leading")), None)
    told = ""
    if lead is not None:
        label, p = metric_of(lead["metric"]).label, p_equals(lead["p_corrected"])
        told = f"{WORDS[verdict(lead)]} in {label}, {difference_text(lead)}, corrected p {p}. "
    others = Counter(verdict(d) for d in tested if d is not lead)
    counted = ", ".join(f"{words} in {others[kind]}" for kind, words in WORDS.items() if others[kind])
    begin = "Of {} other metrics" if lead else "of {} metrics"
    rest = f"{begin.format(others.total())}: {counted}." if others else "No other metric could be tested."
    return f"{system} against {against}: {told}{rest}"


def headlines(results: Results) -> list[str]:
    """What came out: how far bits per byte fell since the start of a run's training, and one for each pair of systems
    that was compared."""
    first = [fell(results)] if results.get("fall") else []
    return [*first, *(finding.headline for finding in findings(results))]


def fell(results: Results) -> str:
    """What a run's training brought."""
    student = results["systems"]["student"]["metrics"]["bits_per_byte"]["value"]
    if not (fall := results.get("fall", {}).get("bits_per_byte")):
        return f"The student needs {student:.3f} bits per byte of the teacher's held-out answers."
    start = results["systems"]["start"]["metrics"]["bits_per_byte"]["value"]
    went, end = f"fell by {share(fall, 'value', 'low', 'high')}", "."
    if fall["value"] < 0:
        rise = {name: None if fall[name] is None else -fall[name] for name in ("value", "low", "high")}
        went = f"rose by {share(rise, 'value', 'high', 'low')}"
        end = ": the student is no better than it began; `dream train` with more --minutes goes on from there."
    numbers = f"from {start:.3f} at the start to {student:.3f}"
    return f"Bits per byte of the teacher's held-out answers {went}, {numbers}{end}"


def missing_reasons(results: Results) -> list[str]:
    """Which metrics are missing of which systems, and why: a line for each reason."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for name, system in results["systems"].items():
        reasons: dict[str, list[str]] = {}
        for metric, reason in system.get("missing", {}).items():  # an older evaluation has none
            reasons.setdefault(reason, []).append(metric_of(metric).label)
        for reason, labels in reasons.items():
            lacking.setdefault(("; ".join(labels), reason), []).append(name)
    return [f"{', '.join(who)}: no {what}: {reason}." for (what, reason), who in lacking.items()]


# Numbers as text.


def pair_text(entry: dict[str, Any], baseline: str = "") -> str:
    """Who is compared with whom; `baseline` needs no word."""
    return entry["system"] if entry["against"] == baseline else f"{entry['system']} − {entry['against']}"


def difference_text(difference: dict[str, Any], interval: bool = True) -> str:
    """ "+0.05 [+0.02, +0.08]"; of shares in percentage points."""
    metric = metric_of(difference["metric"])
    value, low, high = (
        minus(shown(difference[name], metric, "+")).removesuffix(" %") for name in ("value", "low", "high")
    )
    if difference["value"] is None:
        return "–"
    unit = " points" if metric.percent else ""
    return f"{value}{unit} [{low}, {high}]" if interval and difference["low"] is not None else f"{value}{unit}"


def interval_text(entry: dict[str, Any] | None, name: str) -> tuple[str, str]:
    """A metric's value and its interval in brackets, "" where there is none."""
    metric = metric_of(name)
    if entry is None or entry["value"] is None:
        return "–", ""
    value, low, high = (minus(shown(entry[key], metric)) for key in ("value", "low", "high"))
    return value, "" if entry["low"] is None else f"[{low.removesuffix(' %')}, {high.removesuffix(' %')}]"


def minus(text: str) -> str:
    """A number with the sign for minus that is as wide as plus, and a zero without any."""
    return text.replace("-", "−") if re.search("[1-9]", text) else text.lstrip("+-")


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float | None) -> str:
    """As it stands in a sentence: "< 0.001" or "= 0.012"."""
    return p_text(p) if p is None or p < 0.001 else f"= {p_text(p)}"


def share(entry: dict[str, Any], value: str, low: str = "", high: str = "") -> str:
    """ "30.0 % [20.0, 50.0]", "–" where it isn't defined."""
    if entry[value] is None:
        return "–"
    interval = "" if entry.get(low) is None else f" [{100 * entry[low]:.1f}, {100 * entry[high]:.1f}]"
    return f"{100 * entry[value]:.1f} %{interval}"


def visible(text: str) -> str:
    """With control characters, which HTML forbids, shown as ␀ … ␟."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else c for c in text)


def dream_lines(dream: str) -> list[str]:
    """A dream as printed, ⟨spatial⟩⟨a ball⟩⟨is on⟩⟨the shelf⟩…, a line for each lens."""
    return [line for part in _LENS.split(dream) if (line := " ".join(part.split()))]


_LENS = re.compile(f"(?=⟨(?:{'|'.join(LENSES)})⟩)")
