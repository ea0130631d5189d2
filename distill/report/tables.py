"""The tables of a report as rows of text, their headings first: for Markdown, HTML and terminals alike.

All are functions of results.json; those for a run's card and summary also take that of an older evaluation.
"""

from decimal import Decimal
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
    pair_text,
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
    "onward": "gone on by",
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


def metric_rows(results: Results, intervals: bool = True) -> Rows:
    """A row a metric, a column a system."""
    rows = [["metric", *names_of(results).values()]]
    for metric in metrics_of(results):
        cells = metric_cells(results, metric).values()
        told = (cell if intervals else (cell[0], cell[2]) for cell in cells)
        rows.append([label(metric), *(" ".join(filter(None, cell)) for cell in told)])
    return rows


def evaluation_rows(results: Results, intervals: bool = False) -> Rows:
    """A run's evaluation for its card and for the terminal, with tokens a second of its many answers at once. results:
    may be that of an older evaluation."""
    speeds = [results["systems"][name].get("tokens_per_second") for name in names_of(results)]
    return [*metric_rows(results, intervals), *([["tokens a second", *map(_three, speeds)]] if any(speeds) else [])]


def difference_rows(results: Results) -> Rows:
    """A row for each metric of each pair that was compared."""
    rows = [["metric", "system − against", "difference", "p", "corrected p", "win / tie / loss", "verdict"]]
    for d in results["differences"]:
        found, same = verdict(d), d.get("same_as")
        counted = metric_of(d["metric"]).better and d["prompts"] and d["wins"] is not None
        rows.append(
            [
                label(d["metric"]),
                pair_text(d),
                difference_text(d),
                p_text(d["p"]),
                p_text(d["p_corrected"]),
                _counts(d) if counted else "–",
                f"the same as {metric_of(same).label}" if same else f"{SIGNS.get(found, '')} {WORDS[found]}".strip(),
            ]
        )
    return rows


def judge_rows(results: Results) -> Rows:
    """A row for each pair that was judged."""
    heading = ["system − against", "win / tie / loss", "win rate", "p", "corrected p", "same in both orders"]
    rows = [[*heading, "no verdict"]]
    for pair in (results["judge"] or {"pairs": []})["pairs"]:
        rows.append(
            [
                pair_text(pair),
                _counts(pair),
                share(pair, "win_rate", "low", "high"),
                p_text(pair["p"]),
                p_text(pair["p_corrected"]),
                share(pair, "agreement"),
                str(pair["nonsense"]),
            ]
        )
    return rows


def _counts(entry: dict[str, Any]) -> str:
    return f"{entry['wins']} / {entry['ties']} / {entry['losses']}"


def cost_rows(results: Results) -> Rows:
    """A row for each measure of size and speed, a column a system."""
    systems: dict[str, Any] = results["systems"]
    cards = [system["card"] for system in systems.values()]
    costs = [system["cost"] or {} for system in systems.values()]
    rows = [
        ["parameters", *(count(card["parameters"]) for card in cards)],
        ["size on disk", *(size(card["bytes"]) for card in cards)],
        ["weights", *(card["quantization"] or "–" for card in cards)],
        ["context, tokens", *(count(card["context"]) for card in cards)],
        ["tokens a second, one prompt at a time", *(_spread(cost.get("tokens_per_second")) for cost in costs)],
        ["tokens a second, in batches", *(_three(system.get("tokens_per_second")) for system in systems.values())],
        ["seconds to first token", *(_spread(cost.get("first_token_seconds")) for cost in costs)],
        ["peak memory", *(size(cost.get("peak_bytes")) for cost in costs)],
    ]
    return [["cost", *systems], *(row for row in rows if any(cell != "–" for cell in row[1:]))]


def training_rows(results: Results) -> Rows:
    """What is known of the systems' trainings: first what differs, a row each, then what is equal."""
    known = {name: system["trained_on"] for name, system in results["systems"].items() if system["trained_on"]}
    # What one of them changed has its default in the others, of whose settings any are known.
    named = dict.fromkeys(key for each in known.values() for key in each.get("settings", {}))
    defaults, differing, equal = default_settings(), Rows(), Rows()

    def cell(name: str, key: str) -> str:
        if name not in known:
            return "not known"
        if key in FIELDS:
            return _value(key, known[name].get(key))
        settings = known[name].get("settings")
        return str(settings.get(key, defaults.get(key))) if settings else "–"

    for key in [*FIELDS, *named]:
        values = {cell(name, key) for name in known}
        if values != {"–"}:
            row = [FIELDS.get(key, key), *(cell(name, key) for name in results["systems"])]
            (differing if len(values) > 1 else equal).append(row)
    return [["trained on", *results["systems"]], *differing, *equal]


def contamination_rows(results: Results) -> Rows:
    """A row a system."""
    kinds = (("exact", "exact"), ("near", "near copies"), ("contained", "contained in another text"))
    rows = [["system", "held-out prompts in its training", "prompts checked"]]
    for name, system in results["systems"].items():
        found = system["contamination"] or {"checked": False, "reason": "nothing is known of its data"}
        if not found["checked"]:
            rows.append([name, f"not checked: {found['reason']}", "–"])
            continue
        told = ", ".join(f"{found[kind]} {word}" for kind, word in kinds if found.get(kind)) or "none"
        told += f"; {found['reason']}" if found["reason"] else ""
        rows.append([name, told, str(found["prompts"])])
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
    return [
        ["asked", exam["name"]],
        ["answered by", f"{exam['teacher']} ({answers})" if exam["has_answers"] else "nobody"],
        ["answers", f"{drawn}, at most {decoding['max_tokens']} tokens; seed {decoding['seed']}"],
        ["dreams", f"at most {decoding.get('dream_tokens', 'as many as trained')} tokens"],
        *([["own dreams before likelihoods", f"{decoding['dreams']} sampled a prompt"]] if decoding["dreams"] else []),
        ["95 % intervals", f"bootstrap, {tests['bootstrap']:,} resamples"],
        ["p-values", f"{tests['permutations']:,} draws; corrected ({corrected})"],
        ["measured on", ", ".join(str(each) for each in where if each)],
        ["with", ", ".join(f"{name} {version}" for name, version in results["versions"].items())],
        ["finished", f"{results['finished']}; exam {exam['digest'][:DIGEST]}"],
    ]


def markdown_table(rows: Rows) -> str:
    """GitHub's tables; the first row is the heading, numbers to the right."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    assert all(len(row) == len(heading) for row in body), "a row is as wide as the heading"
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rule, *body])


# Cells.


def size(count: int | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "–"
    power = 0
    while power < 4 and float(f"{count / 1000**power:.3g}") >= 1000:
        power += 1
    return f"{_three(count / 1000**power)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def count(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"


def _spread(entry: dict[str, float] | None) -> str:
    return f"{_three(entry['median'])} [{_three(entry['low'])}, {_three(entry['high'])}]" if entry else "–"


def _three(value: float | None) -> str:
    """Three digits, never as a power of ten."""
    if value is None:
        return "–"
    return f"{Decimal(f'{value:.3g}'):f}" if abs(value) < 100 else f"{value:,.0f}"


def _value(key: str, value: Any) -> str:
    if value is None or value == "":
        return "–"
    if key == "data":
        return str(value)[:DIGEST]
    if isinstance(value, float):
        return f"{value:,.0f}" if key == "seconds" else f"{value:.2f}"
    return count(value) if key == "parameters" else f"{value:,}" if isinstance(value, int) else str(value)
