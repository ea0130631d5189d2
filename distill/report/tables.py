"""The tables of a report as rows of text, their headings first: for Markdown, HTML and terminals alike.

All are functions of results.json; those for a run's card and summary also take that of an older evaluation.
"""

from typing import Any

from distill.exam.metrics.catalogue import in_order, metric_of
from distill.exam.provenance import default_settings
from distill.report.findings import (
    SIGNS,
    WORDS,
    Results,
    difference_text,
    interval_text,
    p_text,
    share,
    verdict,
)

Rows = list[list[str]]
ARROWS = {1: " ↑", -1: " ↓", 0: ""}
SYSTEMS = {
    "start": "its start",
    "student": "student",
    "hard": "hard labels only",
    "nodream": "no dreams",
    "teacher": "teacher",
}
"""Systems of a run's own evaluation → heading, in the order of the columns."""
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


def names_of(results: Results) -> dict[str, str]:
    """System → the heading of its column, in their order."""
    systems = results["systems"]
    if "run" in results:
        return {name: heading for name, heading in SYSTEMS.items() if name in systems}
    baseline = results.get("baseline") if len(systems) > 1 else None
    return {name: f"{name} (baseline)" if name == baseline else name for name in systems}


def metrics_of(results: Results) -> list[str]:
    """Metrics that are defined for any system, in the order in which they are shown."""
    entries = [item for system in results["systems"].values() for item in system["metrics"].items()]
    return in_order({name for name, entry in entries if entry and entry["value"] is not None})


def metric_cells(results: Results, metric: str) -> dict[str, tuple[str, str, str]]:
    """System → (value, interval, sign of a clear difference to the baseline). "–": not defined; "missing": it can't be
    had of this system, `missing_reasons` says why."""
    clear = {
        d["system"]: SIGNS.get(verdict(d), "")
        for d in results.get("differences", [])
        if d["metric"] == metric and d["against"] == results["baseline"]
    }
    cells: dict[str, tuple[str, str, str]] = {}
    for name in names_of(results):
        system = results["systems"][name]
        if metric in system.get("missing", {}):
            cells[name] = "missing", "", ""
        else:
            cells[name] = (*interval_text(system["metrics"].get(metric), metric), clear.get(name, ""))
    return cells


def metric_rows(results: Results) -> Rows:
    """A row a metric, a column a system."""
    rows = [["metric", *names_of(results).values()]]
    for metric in metrics_of(results):
        cells = metric_cells(results, metric).values()
        rows.append([label(metric), *(" ".join(filter(None, cell)) for cell in cells)])
    return rows


def evaluation_rows(results: Results, intervals: bool = False) -> Rows:
    """A run's evaluation for its card and for the terminal: a row a metric, and tokens a second of its many answers at
    once. results: may be that of an older evaluation."""
    rows = [["metric", *names_of(results).values()]]
    for metric in metrics_of(results):
        cells = metric_cells(results, metric).values()
        rows.append([label(metric), *(" ".join(filter(None, cell[: 1 + intervals])) for cell in cells)])
    speeds = [results["systems"][name].get("tokens_per_second") for name in names_of(results)]
    return [*rows, ["tokens a second", *(_three(speed) for speed in speeds)]] if any(speeds) else rows


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
    for pair in (results["judge"] or {"pairs": []})["pairs"]:
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
    frontier = results["frontier"] or {}
    best = {point["system"] for point in frontier.get("points", []) if point["on_frontier"]}
    rows = [
        ["cost", *results["systems"]],
        ["parameters", *(count(system["card"]["parameters"]) for system in systems)],
        ["size on disk", *(size(system["card"]["bytes"]) for system in systems)],
        ["weights", *(system["card"]["quantization"] or "–" for system in systems)],
        ["context, tokens", *(count(system["card"]["context"]) for system in systems)],
        [
            "tokens a second, one prompt at a time",
            *(_spread(system["cost"], "tokens_per_second", 1.0, "") for system in systems),
        ],
        ["tokens a second, in batches", *(_three(system.get("tokens_per_second")) for system in systems)],
        ["time to first token", *(_spread(system["cost"], "first_token_seconds", 1000.0, " ms") for system in systems)],
        ["peak memory", *(size((system["cost"] or {}).get("peak_bytes")) for system in systems)],
        ["on the frontier of size, speed and quality", *("yes" if n in best else "–" for n in results["systems"])],
    ]
    return [row for row in rows if any(cell != "–" for cell in row[1:])]


def training_rows(results: Results) -> Rows:
    """What is known of the systems' trainings: first what differs, a row each, then what is equal."""
    known = {name: system["trained_on"] for name, system in results["systems"].items() if system["trained_on"]}
    fields = {name: {key: _value(key, each.get(key)) for key in FIELDS} for name, each in known.items()}
    # What one of them changed has its default in the others, of whose settings any are known.
    changed = {name: each["settings"] for name, each in known.items() if each.get("settings")}
    named = dict.fromkeys(key for each in changed.values() for key in each)
    defaults = default_settings()
    for name, each in changed.items():
        fields[name] |= {key: _setting(each.get(key, defaults.get(key))) for key in named}
    differing, equal = Rows(), Rows()
    for key in dict.fromkeys(key for each in fields.values() for key in each):
        values = {each.get(key, "–") for each in fields.values()}
        if values != {"–"}:
            cells = (fields[name].get(key, "–") if name in fields else "not known" for name in results["systems"])
            (differing if len(values) > 1 else equal).append([FIELDS.get(key, key), *cells])
    return [["trained on", *results["systems"]], *differing, *equal]


def contamination_rows(results: Results) -> Rows:
    """A row a system."""
    kinds = (("exact", "exact"), ("near", "near copies"), ("contained", "contained in another text"))
    rows = [["system", "held-out prompts in its training", "prompts checked"]]
    for name, system in results["systems"].items():
        found = system["contamination"] or {"checked": False, "reason": "nothing is known of its data"}
        if found["checked"]:
            told = ", ".join(f"{found[kind]} {word}" for kind, word in kinds if found[kind]) or "none"
            told += f"; {found['reason']}" if found["reason"] else ""
            rows.append([name, told, str(found["prompts"])])
        else:
            rows.append([name, f"not checked: {found['reason']}", "–"])
    return rows


def asked_rows(results: Results) -> Rows:
    """What was asked and answered, how, and what made the numbers."""
    exam, decoding, tests, machine = (results[name] for name in ("exam", "decoding", "tests", "machine"))
    ended = exam.get("teacher_ended")  # not told by results of old
    answers = f"{exam['answer_bytes']:,} bytes"
    answers += "" if ended is None else f"; {100 * ended:.0f} % of the answers ended by themselves"
    drawn = "greedily" if decoding["temperature"] == 0 else f"sampled at temperature {decoding['temperature']:g}"
    corrected = f"{tests['correction']}, for {tests['count']} tests"
    if leading := tests.get("leading"):
        corrected += f", and by itself for {tests['count_leading']} of what leads: {metric_of(leading).label}"
    where = [machine.get("processor"), f"{machine.get('threads')} threads", machine.get("device")]
    rows = [
        ["asked", exam["name"]],
        [
            "answered by",
            f"{exam['teacher']} ({answers})" if exam["has_answers"] else "nobody",
        ],
        ["answers", f"{drawn}, at most {decoding['max_tokens']} tokens; seed {decoding['seed']}"],
        ["dreams", f"at most {decoding.get('dream_tokens', 'as many as trained')} tokens"],
        ["own dreams before likelihoods", f"{decoding['dreams']} sampled a prompt"],
        ["95 % intervals", f"bootstrap, {tests['bootstrap']:,} resamples"],
        ["p-values", f"{tests['permutations']:,} draws; corrected ({corrected})"],
        ["measured on", ", ".join(filter(None, where))],
        ["with", ", ".join(f"{name} {version}" for name, version in results["versions"].items())],
        ["finished", f"{results['finished']}; exam {exam['digest'][:DIGEST]}"],
    ]
    return rows if decoding["dreams"] else [row for row in rows if not row[0].startswith("own dreams")]


def markdown_table(rows: Rows) -> str:
    """GitHub's tables; the first row is the heading, numbers to the right."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    assert all(len(row) == len(heading) for row in body), "a row is as wide as the heading"
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rule, *body])


# Cells.


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


def count(value: int | None) -> str:
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
    return count(value) if key == "parameters" else f"{value:,}" if isinstance(value, int) else str(value)


def _setting(value: Any) -> str:
    """As it is written in a settings file."""
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)
