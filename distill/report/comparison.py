"""The report of a comparison as Markdown: a pure function of its results.json."""

import re
from typing import Any

from distill.exam.metrics.catalogue import metric_of, shown
from distill.report.evaluation import markdown_table
from distill.report.findings import (
    Finding,
    Results,
    asked,
    cautions,
    equal_tokens,
    findings,
    judged,
    lanes,
    minus,
    missing_reasons,
    unequal_prompts,
)
from distill.report.tables import (
    Rows,
    contamination_rows,
    cost_rows,
    difference_rows,
    judge_rows,
    label,
    metric_rows,
    training_rows,
)

SHOWN = 5
"""Prompts side by side: results.json and the page have more."""
LINES = 3
"""Metrics of each kind that are told of a pair in words: the table has them all."""

READING = (
    "Brackets hold 95 % intervals. Differences are paired by prompt: what makes a prompt hard for all systems cancels.",
    "▲ and ▼ mark what is clearly better or worse than the baseline: its p-value, corrected for the tests that were "
    "made, is below 0.05 and its interval leaves out zero. The tests of the metric that leads are corrected by "
    "themselves, those of all others together.",
    "No clear difference doesn't mean equal: the interval says how large a difference could still be there.",
    "A system wins a prompt where its value is the better one there; how much better is not counted.",
    "“Missing” is what a system can't give, for the reason that stands there; it counts neither for nor against it. "
    "“–” is not defined.",
    "Metrics with a mined dream (oracle) read a dream made from the very answer that is scored, and “by chance” is "
    "what would be reached without looking at the prompt: landmarks, no results of a system.",
)
"""How to read it; the page says the same."""

SPEEDS = {
    "alone": " Speed is that of one prompt at a time.",
    "in batches": " Speed is that of answering the prompts of this comparison, many at once where a system can.",
}
"""Of a frontier's "speed_of"."""

JUDGING = (
    "{model} was shown both answers to each prompt in both orders. A win is a verdict for the same answer in both; a "
    "tie is where it calls them equal, where the orders disagree, or where both said the same. In the win rate a tie "
    "counts half. What can't be read as a verdict counts for nobody. A judge that chooses the first or the longer "
    "answer much more often than half of the time judges that, and not what is said."
)


def render_markdown(results: Results) -> str:
    """report.md."""
    parts = [
        f"# Comparison: {_inline(results['title'])}",
        "\n".join(_headline(*headline) for headline in headlines(results)),
        *_section("Before you believe it", [_list(cautions(results))] if cautions(results) else []),
        *_section("Asked", [_prose(asked(results))]),
        *_section("Measured", [_table(metric_rows(results)), *_unequal(results), *_missing(results)]),
        *_section("Differences", [_table(difference_rows(results)), _prose(results["tests"]["method"])]),
        *_section("Judge", _judge(results)),
        *_section("Prompts where they differ most", _prompts(results)),
        *_section("Size, speed and quality", [_table(cost_rows(results)), *_frontier(results)]),
        *_section("Trained on", _training(results)),
        *_section("Seen before?", [_table(contamination_rows(results)), *_seen(results)]),
        *_section("How to read it", [_list(READING), _prose(provenance(results))]),
    ]
    return "\n\n".join(parts) + "\n"


def headlines(results: Results) -> list[tuple[str, list[str]]]:
    """What came out: a sentence for each pair and each judged pair, and lines that give its numbers."""
    lines = [(finding.text, _details(finding)) for finding in findings(results)]
    if not lines:
        lines.append(("There is nothing to compare with: one system was measured.", []))
    judge = results["judge"]
    return lines + [(judged(pair, judge["model"]), []) for pair in (judge or {}).get("pairs", [])]


def _details(finding: Finding) -> list[str]:
    details: list[str] = []
    for word, lines in (("Better", finding.better), ("Worse", finding.worse)):
        details += [f"{word} in {line}." for line in lines[:LINES]]
        if len(lines) > LINES:
            details.append(f"{word} in {len(lines) - LINES} more, see below.")
    if finding.open and (finding.better or finding.worse):
        details.append(f"No clear difference in {'; '.join(finding.open)}.")
    return details


def provenance(results: Results) -> str:
    """What it was measured with, and when."""
    machine = results["machine"]
    where = [
        machine.get("processor"),
        f"{machine['threads']} threads" if machine.get("threads") else "",
        machine.get("device"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"Measured on {', '.join(filter(None, where)) or 'an unnamed machine'}"
        f"{f', with {versions}' if versions else ''}; finished {results['finished']}; "
        f"exam {results['exam']['digest'][:12]}."
    )


def _headline(text: str, details: list[str]) -> str:
    return "\n".join([f"- **{_prose(text)}**", *(f"  - {_prose(detail)}" for detail in details)])


def _section(title: str, parts: list[str]) -> list[str]:
    return [f"## {title}", *parts] if parts else []


def _unequal(results: Results) -> list[str]:
    return [_prose(unequal_prompts(results))] if unequal_prompts(results) else []


def _missing(results: Results) -> list[str]:
    return (
        [_list(f"{name} lacks {'; '.join(labels)}: {reason}" for name, reason, labels in missing_reasons(results))]
        if missing_reasons(results)
        else []
    )


def _judge(results: Results) -> list[str]:
    if not results["judge"]:
        return []
    text = JUDGING.format(model=results["judge"]["model"])
    return [_prose(text), _table(judge_rows(results))]


def _prompts(results: Results) -> list[str]:
    found = results["disagreements"][:SHOWN]
    return [part for disagreement in found for part in _prompt(disagreement, results)]


def _prompt(disagreement: dict[str, Any], results: Results) -> list[str]:
    metric = metric_of(disagreement["metric"])
    parts = [f"### {_inline(disagreement['prompt'])}"]
    if disagreement["teacher"]:
        parts.append(f"*Teacher:* {_inline(disagreement['teacher'])}")
    lines: list[str] = []
    for name in results["systems"]:
        said = disagreement["systems"].get(name)
        value = minus(shown(disagreement["values"].get(name), metric))
        if said is None and value == "–":
            continue
        answer = _inline((said or {}).get("answer") or "")
        line = f"**{_inline(name)}** ({label(disagreement['metric'])} {value}): {answer}"
        if dream := (said or {}).get("dream"):
            line += f"  \n  *Dream:* {_dream(dream)}"
        lines.append(line)
    return [*parts, "\n".join(f"- {line}" for line in lines)]


def _dream(dream: str) -> str:
    """By lens: "*spatial* a ball · is on · the shelf → …"."""
    told: list[str] = []
    for lane in lanes(dream):
        steps = " → ".join(" · ".join(_inline(token) for token in step) for step in lane.steps)
        loose = f"“{_inline(lane.loose)}”" if lane.loose else ""
        told.append(" ".join(filter(None, (f"*{lane.lens}*" if lane.lens else "", steps, loose))))
    return "; ".join(told)


def _frontier(results: Results) -> list[str]:
    points = results["frontier"]["points"] if results["frontier"] else []
    best = [point["system"] for point in points if point["on_frontier"]]
    if not best:
        return []
    quality = metric_of(results["frontier"]["quality"]).label
    return [
        _prose(
            f"On the frontier of size, speed and {quality}: {', '.join(best)}. No other system is at least as good in "
            "all of them and better in one."
            f"{SPEEDS.get(results['frontier'].get('speed_of'), '')}"
        )
    ]


def _training(results: Results) -> list[str]:
    rows, equal = training_rows(results)
    parts = [_prose(equal_tokens(results))] if equal_tokens(results) else []
    if len(rows) > 1:
        parts.append(_table(rows))
    if equal:
        parts.append(_prose(f"Equal in all of which it is known: {'; '.join(equal)}."))
    return parts


def _seen(results: Results) -> list[str]:
    lines = [
        f"{name}, {example['kind']} ({100 * example['similarity']:.0f} % alike): “{example['prompt']}” is held out, "
        f"“{example['found']}” was trained on"
        for name, system in results["systems"].items()
        for example in (system["contamination"] or {}).get("examples", [])[:2]
    ]
    return ["\n".join(f"- {_inline(line)}" for line in lines)] if lines else []


def _list(lines: Any) -> str:
    return "\n".join(f"- {_prose(line)}" for line in lines)


def _table(rows: Rows) -> str:
    return markdown_table([[_prose(cell) for cell in row] for row in rows])


def _prose(text: str) -> str:
    """Our own sentence, which may hold a name that a user chose: nothing in it becomes markup."""
    return re.sub(r"[\\`*]|<(?! )|\](?=\()|^#", lambda found: f"\\{found[0]}", " ".join(text.split()))


def _inline(text: str) -> str:
    """Anything, on one line, with what Markdown or HTML would take as markup escaped and no control characters."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#&~" else c for c in " ".join(plain.split())) or "(nothing)"
