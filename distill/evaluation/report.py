"""The report of an evaluation: a pure function of results.json and samples.jsonl."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. `better`: 1 more, −1 less, 0 neither; `percent`: a share, shown times 100."""

    label: str
    better: int
    digits: int = 3
    percent: bool = False


METRICS: dict[str, Metric] = {
    "bits_per_byte": Metric("bits per byte, no dream", -1),
    "bits_per_byte_dreams": Metric("bits per byte, {K} own dreams", -1),
    "bits_per_byte_oracle": Metric("bits per byte, mined dream (oracle)", -1),
    "kl": Metric("KL to the teacher (nats), no dream", -1),
    "kl_dreams": Metric("KL, own dreams", -1),
    "kl_oracle": Metric("KL, mined dream (oracle)", -1),
    "agreement": Metric("top-1 agreement, no dream", 1, 1, True),
    "agreement_dreams": Metric("top-1 agreement, own dreams", 1, 1, True),
    "agreement_oracle": Metric("top-1 agreement, mined dream (oracle)", 1, 1, True),
    "chrf": Metric("chrF2 of own answers", 1, 1),
    "repetition": Metric("repeated 4-grams", -1, 1, True),
    "distinct_2": Metric("distinct-2", 1, 1, True),
    "length_ratio": Metric("length to the teacher's", 0, 2),
    "dream_recall": Metric("dream recall", 1, 1, True),
    "dream_recall_chance": Metric("dream recall by chance", 0, 1, True),
    "dream_form": Metric("well-formed dreams", 1, 1, True),
}

EXACT = "exact_match"


def metrics_of(results: dict[str, Any]) -> dict[str, Metric]:
    """METRICS and, where the dataset has true answers, exact match over all prompts and in each split."""
    exact: dict[str, Metric] = {}
    for name in results["systems"]["student"]["metrics"]:
        if name.startswith(EXACT):
            split = name.removeprefix(EXACT).lstrip("_")
            exact[name] = Metric(f"exact match, {split}" if split else "exact match", 1, 1, True)
    return {**exact, **METRICS}


SYSTEMS = {
    "start": "its start",
    "student": "student",
    "hard": "hard labels only",
    "nodream": "no dreams",
    "teacher": "teacher",
}
"""Name → heading, in the order of the columns."""

SHOWN = 3
"""Samples in the report."""


def table_rows(results: dict[str, Any], intervals: bool = False) -> list[list[str]]:
    """The main table, its heading first: a row a metric, a column a system. "–": not defined."""
    names = [name for name in SYSTEMS if name in results["systems"]]
    rows = [["metric", *(SYSTEMS[name] for name in names)]]
    for metric, shown in metrics_of(results).items():
        entries = [results["systems"][name]["metrics"].get(metric) for name in names]
        if any(entries):
            rows.append([_label(shown, results), *(_cell(entry, shown, intervals) for entry in entries)])
    speeds = [results["systems"][name]["tokens_per_second"] for name in names]
    if any(speeds):
        rows.append(["tokens a second", *("–" if speed is None else f"{speed:.0f}" for speed in speeds)])
    return rows


def difference_rows(results: dict[str, Any]) -> list[list[str]]:
    """Each other system minus the student, with intervals; * where the interval leaves out 0. Heading first."""
    names = [name for name in SYSTEMS if results["systems"].get(name, {}).get("versus_student")]
    rows = [["metric", *(f"{SYSTEMS[name]} − student" for name in names)]]
    for metric, shown in metrics_of(results).items():
        entries = [results["systems"][name]["versus_student"].get(metric) for name in names]
        if any(entries):
            rows.append([_label(shown, results), *(_difference(entry, shown) for entry in entries)])
    return rows


def _label(metric: Metric, results: dict[str, Any]) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[metric.better]
    return metric.label.format(K=results["settings"]["dreams"]) + arrow


def _number(value: float, metric: Metric, sign: str = "") -> str:
    return f"{100 * value:{sign}.{metric.digits}f} %" if metric.percent else f"{value:{sign}.{metric.digits}f}"


def _cell(entry: dict[str, float] | None, metric: Metric, intervals: bool) -> str:
    if entry is None:
        return "–"
    text = _number(entry["value"], metric)
    return f"{text} [{_number(entry['low'], metric)}, {_number(entry['high'], metric)}]" if intervals else text


def _difference(entry: dict[str, float] | None, metric: Metric) -> str:
    if entry is None:
        return "–"
    low, high = entry["low"], entry["high"]
    clear = " *" if low > 0 or high < 0 else ""
    return f"{_number(entry['value'], metric, '+')} [{_number(low, metric, '+')}, {_number(high, metric, '+')}]{clear}"


def headline(results: dict[str, Any]) -> str:
    """One sentence: what the training brought."""
    fall = results["fall"].get("bits_per_byte")
    student = results["systems"]["student"]["metrics"]["bits_per_byte"]["value"]
    if not fall:
        return f"The student needs {student:.3f} bits per byte of the teacher's held-out answers."
    start = results["systems"]["start"]["metrics"]["bits_per_byte"]["value"]
    return (
        f"Bits per byte of the teacher's held-out answers fell by {_share(fall)}, "
        f"from {start:.3f} at the start to {student:.3f}."
    )


def _share(entry: dict[str, float]) -> str:
    return f"{100 * entry['value']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def render(results: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """report.md."""
    settings = results["settings"]
    parts = [
        f"# Evaluation of {results['run']}, {results['checkpoint']}",
        headline(results),
        f"{results['prompts']} held-out prompts ({results['answer_tokens']:,} answer tokens, "
        f"{results['answer_bytes']:,} bytes) asked of `{results['teacher']}`; {results['tokenizer']} tokenizer; "
        f"answers sampled at temperature {settings['temperature']}, at most {settings['max_tokens']} tokens; "
        f"seed {results['seed']}. In brackets: 95 % intervals of a paired bootstrap over prompts "
        f"({settings['bootstrap']:,} resamples).",
        "## Measured",
        markdown_table(table_rows(results, intervals=True)),
        _reading(results),
    ]
    differences = difference_rows(results)
    if len(differences) > 1:
        parts += [
            "## Differences to the student",
            markdown_table(differences),
            "An asterisk marks an interval that leaves out zero.",
        ]
    parts += ["## Samples", *(_sample(sample) for sample in samples[:SHOWN])]
    return "\n\n".join(parts) + "\n"


def _reading(results: dict[str, Any]) -> str:
    lines = [
        "The oracle reads a dream mined from the very answer that it is scored on: it bounds what a perfect dream "
        "would bring, and is no result of the student.",
        "The teacher's bits per byte are those of its own sampled tokens at temperature 1.",
    ]
    if not any(system["metrics"].get("kl") for name, system in results["systems"].items() if name != "teacher"):
        lines.append("There is no KL and no agreement: the traces hold no soft targets in the student's vocabulary.")
    if EXACT in results["systems"]["student"]["metrics"]:
        lines.append("Exact match is of answers decoded greedily, dream first, with the dataset's true answers.")
    return " ".join(lines)


def _sample(sample: dict[str, Any]) -> str:
    student = sample["systems"]["student"]
    lines = [f"**{_inline(sample['prompt'])}**", f"*Teacher:* {_inline(sample['teacher'])}"]
    if "dream" in student:
        lines.append(f"*Dream:* {_inline(student['dream'])}")
    lines.append(f"*Student:* {_inline(student['answer'])}")
    return "\n\n".join(lines)


def _inline(text: str) -> str:
    """On one line, with what Markdown or HTML would take as markup escaped."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
    return escaped or "(nothing)"


def markdown_table(rows: list[list[str]]) -> str:
    """GitHub's tables; the first row is the heading, numbers to the right."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    assert all(len(row) == len(heading) for row in body), "a row is as wide as the heading"
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rule, *body])
