"""The tables of a comparison as rows of text, their headings first; Markdown and HTML are made from the same rows."""

from typing import Any

from distill.exam.metrics.catalogue import metric_of
from distill.exam.provenance import default_settings
from distill.report.findings import (
    SIGNS,
    WORDS,
    Results,
    contaminated,
    difference_text,
    interval_text,
    p_text,
    share,
    verdict,
)

Rows = list[list[str]]
ARROWS = {1: " ↑", -1: " ↓", 0: ""}
FIELDS = {
    "teacher": "teacher",
    "data": "data (digest)",
    "answers": "the teacher's answers",
    "answer_tokens": "tokens of answers",
    "tokens": "packed tokens",
    "steps": "steps",
    "epochs": "epochs",
    "parameters": "parameters",
    "numerics": "numerics",
    "seconds": "seconds of training",
}
"""Of `trained_on`, and how they are called."""
DIGEST = 12
"""Characters of a digest that are shown."""


def label(name: str) -> str:
    """A metric's label and an arrow that says which way is better."""
    metric = metric_of(name)
    return metric.label + ARROWS[metric.better]


def metric_cells(results: Results, metric: str) -> list[tuple[str, str, str]]:
    """A row of the metric table: (value, interval, sign of a clear difference to the baseline) for each system."""
    clear = {
        d["system"]: SIGNS.get(verdict(d), "")
        for d in results["differences"]
        if d["metric"] == metric and d["against"] == results["baseline"]
    }
    cells: list[tuple[str, str, str]] = []
    for name, system in results["systems"].items():
        if metric in system["missing"]:
            cells.append(("missing", "", ""))
        else:
            cells.append((*interval_text(system["metrics"].get(metric), metric), clear.get(name, "")))
    return cells


def metric_rows(results: Results) -> Rows:
    """A row a metric, a column a system."""
    heading = ["metric", *(name_of(results, name) for name in results["systems"])]
    rows = [
        [label(metric), *(" ".join(filter(None, cell)) for cell in metric_cells(results, metric))]
        for metric in results["metrics"]
    ]
    return [heading, *rows]


def name_of(results: Results, system: str) -> str:
    return f"{system} (baseline)" if system == results["baseline"] else system


def difference_rows(results: Results) -> Rows:
    """A row for each metric of each pair that was compared."""
    rows = [["metric", "system − against", "difference", "p", "corrected p", "win / tie / loss", "verdict"]]
    for d in results["differences"]:
        found = verdict(d)
        counted = metric_of(d["metric"]).better and d["prompts"] and d["wins"] is not None
        rows.append(
            [
                label(d["metric"]),
                f"{d['system']} − {d['against']}",
                difference_text(d),
                p_text(d["p"]),
                p_text(d["p_corrected"]),
                f"{d['wins']} / {d['ties']} / {d['losses']}" if counted else "–",
                f"the same as {metric_of(same).label}"
                if (same := d.get("same_as"))
                else f"{SIGNS.get(found, '')} {WORDS[found]}".strip(),
            ]
        )
    return rows


def judge_rows(results: Results) -> Rows:
    """A row for each pair that was judged."""
    heading = ["system − against", "win / tie / loss", "win rate", "p", "corrected p", "same in both orders"]
    rows = [[*heading, "no verdict", "chose the first", "chose the longer"]]
    for pair in results["judge"]["pairs"]:
        rows.append(
            [
                f"{pair['system']} − {pair['against']}",
                f"{pair['wins']} / {pair['ties']} / {pair['losses']}",
                share(pair, "win_rate", "low", "high"),
                p_text(pair["p"]),
                p_text(pair["p_corrected"]),
                share(pair, "agreement", "agreement_low", "agreement_high"),
                str(pair["nonsense"]),
                *(_percent(pair.get(name)) for name in ("position_A", "longer_won")),
            ]
        )
    return rows


def cost_rows(results: Results) -> Rows:
    """A row for each measure of size and speed, a column a system."""
    systems = results["systems"].values()
    found = results["frontier"] or {}
    in_batches = found.get("speed_of") == "in batches"
    batched = {point["system"]: point["tokens_per_second"] for point in found.get("points", []) if in_batches}
    rows = [
        ["cost", *results["systems"]],
        ["parameters", *(_count(system["card"]["parameters"]) for system in systems)],
        ["size on disk", *(size(system["card"]["bytes"]) for system in systems)],
        ["weights", *(system["card"]["quantization"] or "–" for system in systems)],
        ["context, tokens", *(_count(system["card"]["context"]) for system in systems)],
        [
            "tokens a second, one prompt at a time",
            *(_spread(system["cost"], "tokens_per_second", 1.0, "") for system in systems),
        ],
        ["tokens a second, in batches", *(_three(batched.get(name)) for name in results["systems"])],
        ["time to first token", *(_spread(system["cost"], "first_token_seconds", 1000.0, " ms") for system in systems)],
        ["peak memory", *(size((system["cost"] or {}).get("peak_bytes")) for system in systems)],
    ]
    return [row for row in rows if any(cell != "–" for cell in row[1:])]


def training_rows(results: Results) -> tuple[Rows, list[str]]:
    """What differs between the systems' trainings as a table, and what is equal as "name value"."""
    known = {name: system["trained_on"] for name, system in results["systems"].items() if system["trained_on"]}
    fields = {name: {key: _value(key, each.get(key)) for key in FIELDS} for name, each in known.items()}
    # What one of them changed has its default in the others, of whose settings any are known.
    changed = {name: each["settings"] for name, each in known.items() if each.get("settings")}
    named = dict.fromkeys(key for each in changed.values() for key in each)
    defaults = default_settings()
    for name, each in changed.items():
        fields[name] |= {key: _setting(each.get(key, defaults.get(key))) for key in named}
    keys = list(dict.fromkeys(key for each in fields.values() for key in each))
    rows, equal = [["trained on", *results["systems"]]], list[str]()
    for key in keys:
        values = [each.get(key, "–") for each in fields.values()]
        if len(set(values)) > 1:
            cells = (fields[name].get(key, "–") if name in fields else "not known" for name in results["systems"])
            rows.append([FIELDS.get(key, key), *cells])
        elif values[0] != "–":
            equal.append(f"{FIELDS.get(key, key)} {values[0]}")
    return rows, equal


def contamination_rows(results: Results) -> Rows:
    """A row a system."""
    rows = [["system", "held-out prompts in its training", "prompts checked"]]
    for name, system in results["systems"].items():
        found = system["contamination"]
        if not found or not found["checked"]:
            rows.append([name, f"not checked: {(found or {}).get('reason') or 'nothing is known of its data'}", "–"])
        else:
            told = "; ".join(filter(None, (contaminated(found) or "none", found["reason"])))
            rows.append([name, told, str(found["prompts"])])
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def size(count: int | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _count(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"


def _spread(cost: dict[str, Any] | None, name: str, times: float, unit: str) -> str:
    entry = (cost or {}).get(name)
    if not entry or entry["median"] is None:
        return "–"
    median, low, high = (None if entry[key] is None else times * entry[key] for key in ("median", "low", "high"))
    interval = "" if low is None or high is None else f" [{_three(low)}, {_three(high)}]"
    return f"{_three(median)}{unit}{interval}"


def _three(value: float | None) -> str:
    """Three digits, never as a power of ten."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _value(key: str, value: Any) -> str:
    if value is None or value == "":
        return "–"
    if key == "data":
        return str(value)[:DIGEST]
    if isinstance(value, float):
        return f"{value:,.0f}" if key == "seconds" else f"{value:.2f}"
    return _count(value) if key == "parameters" else f"{value:,}" if isinstance(value, int) else str(value)


def _setting(value: Any) -> str:
    """As it is written in a settings file."""
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)
