"""The report of `dream evaluate TARGET…`: a pure function of its results.json and samples.jsonl."""

from collections.abc import Mapping
from typing import Any

from distill.report.evaluation import (
    ORACLE,
    SHOWN,
    answered,
    brackets,
    decoding,
    inline,
    markdown_table,
    metric_rows,
    missing_lines,
)


def table_rows(results: Mapping[str, Any], intervals: bool = True) -> list[list[str]]:
    """Heading first: a row a metric, then a row for each thing that is known of the targets themselves; a column a
    target. "–": not defined; "missing": it can't be had of this target, `missing_lines` says why."""
    systems: dict[str, Any] = results["systems"]
    rows = [["metric", *systems], *metric_rows(systems, list(systems), intervals)]
    for name, cells in {
        "tokens a second": [_spread(system["cost"], "tokens_per_second", 1.0, "") for system in systems.values()],
        "time to first token": [
            _spread(system["cost"], "first_token_seconds", 1000.0, " ms") for system in systems.values()
        ],
        "peak memory": [_bytes((system["cost"] or {}).get("peak_bytes")) for system in systems.values()],
        "parameters": [_count(system["card"]["parameters"]) for system in systems.values()],
        "size": [_bytes(system["card"]["bytes"]) for system in systems.values()],
        "stored as": [system["card"]["quantization"] or "–" for system in systems.values()],
        "prompts left out": [str(system["left_out"] or "–") for system in systems.values()],
        "prompts in its training data": [_contaminated(system["contamination"]) for system in systems.values()],
    }.items():
        if any(cell != "–" for cell in cells):
            rows.append([name, *cells])
    return rows


def _spread(cost: Mapping[str, Any] | None, name: str, times: float, unit: str) -> str:
    found = (cost or {}).get(name)
    if not found:
        return "–"
    median, low, high = (found[key] * times for key in ("median", "low", "high"))
    return f"{_rounded(median)}{unit} [{_rounded(low)}, {_rounded(high)}]"


def _timed(cost: Mapping[str, Any]) -> bool:
    """Whether anything was answered whose time could be taken."""
    return cost["tokens_per_second"] is not None


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _bytes(size: float | None) -> str:
    if not size:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _count(number: int | None) -> str:
    if not number:
        return "–"
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _contaminated(found: Mapping[str, Any]) -> str:
    if not found["checked"]:
        return "unknown"
    parts = [f"{found[kind]} {kind}" for kind in ("exact", "near", "contained") if found[kind]]
    return ", ".join(parts) or "none"


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know besides the table: what is missing and why, how speed was measured, who failed."""
    systems: dict[str, Any] = results["systems"]
    lines = missing_lines(systems, {name: name for name in systems})
    for name, system in systems.items():
        if system["card"].get("note"):
            lines.append(f"{name}: {system['card']['note']}.")
        if reason := system["contamination"].get("reason"):
            lines.append(f"{name}: its training data against these prompts: {reason}.")
        if system["cost"] and not _timed(system["cost"]):
            said_why = str(system["cost"]["note"]).startswith("not measured")
            lines.append(
                f"{name}: speed and memory {system['cost']['note']}."
                if said_why
                else f"{name}: speed not measured: it answered nothing."
            )
    return [*lines, *(f"{name} failed: {reason}" for name, reason in results["failed"].items())]


def render(results: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """report.md."""
    exam, settings, systems = results["exam"], results["settings"], results["systems"]
    asked = answered(exam, f"`{exam['teacher']}`") if exam["teacher"] else ""
    parts = [
        f"# {', '.join(systems)}",
        f"Asked: {exam['name']}{asked}; {decoding(settings)}; seed {results['seed']}. {brackets(settings)}",
        markdown_table(table_rows(results)),
    ]
    if any("bits_per_byte_oracle" in system["metrics"] for system in systems.values()):
        parts.append(ORACLE)
    costs = [system["cost"] for system in systems.values() if system["cost"]]
    notes = dict.fromkeys(cost["note"] for cost in costs if _timed(cost))
    parts += [f"Speed and memory: {note}." for note in notes]
    if lines := remarks(results):
        parts += ["## Missing, and what to know", "\n".join(f"- {inline(line)}" for line in lines)]
    parts += ["## Samples", *(_sample(sample) for sample in samples[:SHOWN])]
    return "\n\n".join(parts) + "\n"


def _sample(sample: dict[str, Any]) -> str:
    lines = [f"**{inline(sample['prompt'])}**"]
    if sample["teacher"]:
        lines.append(f"*Teacher:* {inline(sample['teacher'])}")
    for name, said in sample["systems"].items():
        if said.get("dream"):
            lines.append(f"*{inline(name)} dreams:* {inline(said['dream'])}")
        lines.append(f"*{inline(name)}:* {inline(said.get('answer', said.get('left_out', '')))}")
    return "\n\n".join(lines)
