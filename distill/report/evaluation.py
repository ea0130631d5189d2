"""The report of an evaluation: a pure function of results.json and samples.jsonl."""

from collections.abc import Collection, Mapping
from typing import Any

from distill.exam.metrics.catalogue import EXACT, Metric, in_order, metric_of, shown

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
    """The main table, its heading first: a row a metric, a column a system. "–": not defined; "missing": it can't be
    had of this system, `missing_lines` says why."""
    names = [name for name in SYSTEMS if name in results["systems"]]
    rows = [["metric", *(SYSTEMS[name] for name in names)], *metric_rows(results["systems"], names, intervals)]
    speeds = [results["systems"][name]["tokens_per_second"] for name in names]
    if any(speeds):
        rows.append(["tokens a second", *("–" if speed is None else f"{speed:.0f}" for speed in speeds)])
    return rows


def metric_rows(systems: Mapping[str, Any], names: Collection[str], intervals: bool) -> list[list[str]]:
    """A row for each metric that is defined for any of these systems."""
    found = in_order({metric for name in names for metric, entry in systems[name]["metrics"].items() if entry})
    return [
        [label(metric_of(metric)), *(_cell(systems[name], metric, intervals) for name in names)] for metric in found
    ]


def missing_lines(systems: Mapping[str, Any], headings: Mapping[str, str]) -> list[str]:
    """Which metrics are missing of which systems, and why: a line for each reason."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for name, heading in headings.items():
        reasons: dict[str, list[str]] = {}
        missing: dict[str, str] = systems[name].get("missing", {})
        for metric in in_order(set(missing)):
            base = metric.removesuffix("_dreams").removesuffix("_oracle")
            if base == metric or missing.get(base) != missing[metric]:
                reasons.setdefault(missing[metric], []).append(metric_of(metric).label.removesuffix(", no dream"))
        for reason, metrics in reasons.items():
            lacking.setdefault(("; ".join(metrics), reason), []).append(heading)
    return [f"{', '.join(who)}: no {what}: {reason}." for (what, reason), who in lacking.items()]


def difference_rows(results: dict[str, Any]) -> list[list[str]]:
    """Each other system minus the student, with intervals; * where the interval leaves out 0. Heading first."""
    names = [name for name in SYSTEMS if results["systems"].get(name, {}).get("versus_student")]
    rows = [["metric", *(f"{SYSTEMS[name]} − student" for name in names)]]
    versus = [results["systems"][name]["versus_student"] for name in names]
    for metric in in_order({metric for each in versus for metric, entry in each.items() if entry}):
        how = metric_of(metric)
        rows.append([label(how), *(_difference(each.get(metric), how) for each in versus)])
    return rows


def label(metric: Metric) -> str:
    """What a metric is called, and which way is better."""
    return metric.label + {1: " ↑", -1: " ↓", 0: ""}[metric.better]


def _cell(system: Mapping[str, Any], name: str, intervals: bool) -> str:
    entry, metric = system["metrics"].get(name), metric_of(name)
    if entry is None:
        return "missing" if name in system.get("missing", {}) else "–"
    text = shown(entry["value"], metric)
    return f"{text} [{shown(entry['low'], metric)}, {shown(entry['high'], metric)}]" if intervals else text


def _difference(entry: dict[str, float] | None, metric: Metric) -> str:
    if entry is None:
        return "–"
    low, high = entry["low"], entry["high"]
    clear = " *" if low > 0 or high < 0 else ""
    return f"{shown(entry['value'], metric, '+')} [{shown(low, metric, '+')}, {shown(high, metric, '+')}]{clear}"


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
        f"{decoding(settings)}; seed {results['seed']}. {brackets(settings)}",
        "## Measured",
        markdown_table(table_rows(results, intervals=True)),
        _reading(results),
    ]
    headings = {name: SYSTEMS[name] for name in SYSTEMS if name in results["systems"]}
    if missing := missing_lines(results["systems"], headings):
        parts += ["Missing:", "\n".join(f"- {inline(line)}" for line in missing)]
    differences = difference_rows(results)
    if len(differences) > 1:
        parts += [
            "## Differences to the student",
            markdown_table(differences),
            "An asterisk marks an interval that leaves out zero.",
        ]
    parts += ["## Samples", *(_sample(sample) for sample in samples[:SHOWN])]
    return "\n\n".join(parts) + "\n"


def answered(exam: Mapping[str, Any], teacher: str) -> str:
    """Who answered, how much, and how often to its own end."""
    ended = exam.get("teacher_ended")  # not told by results of old
    told = "" if ended is None else f", {100 * ended:.0f} % of the answers ended by themselves"
    return f", answered by {teacher} ({exam['answer_bytes']:,} bytes{told})"


def decoding(settings: Mapping[str, Any]) -> str:
    """How dreams and answers were drawn."""
    dreams = f"own dreams: {settings['dreams']} sampled a prompt; " if settings["dreams"] else ""
    return f"{dreams}answers sampled at temperature {settings['temperature']}, at most {settings['max_tokens']} tokens"


def brackets(settings: Mapping[str, Any]) -> str:
    """What the intervals are."""
    return f"In brackets: 95 % intervals of a paired bootstrap over prompts ({settings['bootstrap']:,} resamples)."


def _reading(results: dict[str, Any]) -> str:
    lines = [
        ORACLE,
        "The teacher's bits per byte are those of its own sampled tokens at temperature 1.",
    ]
    if EXACT in results["systems"]["student"]["metrics"]:
        lines.append("Exact match is of answers decoded greedily, dream first, with the dataset's true answers.")
    return " ".join(lines)


ORACLE = (
    "The oracle reads a dream mined from the very answer that it is scored on: it bounds what a perfect dream would "
    "bring, and is no result of the student."
)


def _sample(sample: dict[str, Any]) -> str:
    student = sample["systems"]["student"]
    lines = [f"**{inline(sample['prompt'])}**", f"*Teacher:* {inline(sample['teacher'])}"]
    if "dream" in student:
        lines.append(f"*Dream:* {inline(student['dream'])}")
    lines.append(f"*Student:* {inline(student['answer'])}")
    return "\n\n".join(lines)


def inline(text: str) -> str:
    """On one line, with what Markdown or HTML would take as markup escaped."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
    return escaped or "(nothing)"


def markdown_table(rows: list[list[str]]) -> str:
    """GitHub's tables; the first row is the heading, numbers to the right."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    assert all(len(row) == len(heading) for row in body), "a row is as wide as the heading"
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rule, *body])
