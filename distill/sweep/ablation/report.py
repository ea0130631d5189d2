"""The report of an ablation: a pure function of its results.json. A headline, tables, and how they were made."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from distill.exam.metrics.catalogue import METRICS, Metric, shown
from distill.report.tables import markdown_table
from distill.sweep.ablation.arms import ARMS, CONTROLS

Results = Mapping[str, Any]
Entry = Mapping[str, Any] | None
Rows = list[list[str]]

SHOWN = {
    "exact_match": METRICS["exact_match"],
    "bits_per_byte": Metric("bits per byte", -1),
    "chrf": METRICS["chrf"],
    "dream_accuracy": Metric("codes right", 1, 1, True),
    "dream_exact": Metric("whole dreams right", 1, 1, True),
    "dream_tokens": Metric("tokens of the dream", 0, 1),
    "steering_chrf": METRICS["steering_chrf"],
    "steering_concepts": METRICS["steering_concepts"],
}
"""Metric → how it is shown: of answers, of dreams, and how far answers follow the dream of another one."""
COMPARED = ("exact_match", "bits_per_byte", "chrf")
FEW_SEEDS = 3
"""Up to so many, each seed's own value is shown as well."""

READING = """\
Empty, shuffled and another prompt's dream (of the same split and depth, where there are splits) are read by the student
that dreams, in the place of its own, or of the true one. True dreams are an oracle, made from the true answer: what
better dreams could bring, and no result of the student. Codes right: of the true dream's image tokens, those that stand
at the same lens, step and role in the own dream. Whole dreams right: nothing missing, nothing wrong, nothing more."""

MADE = """\
The pause arm reads and was trained with as many pause tokens in the place of the true dream, so it is told its length.
Pauses carry no loss. Without dreams more of the packed tokens are answers than with them. Each student is the
checkpoint with the lowest validation loss."""


def render(results: Results) -> str:
    """report.md."""
    arms = list(results["arms"])
    parts = [f"# What dreaming is worth: {results['run']}", headline(results), _about(results), "## Arms", READING]
    parts += [markdown_table(table_rows(results, metric, arms)) for metric in _measured(results, SHOWN)]
    if pairs := list(results["differences"]):
        parts += ["## Differences", "Paired by seed and prompt. An asterisk marks an interval that leaves out zero."]
        parts += [markdown_table(difference_rows(results, metric, pairs)) for metric in _measured(results, COMPARED)]
    return "\n\n".join([*parts, *_depths(results), "## How it was made", *_provenance(results)]) + "\n"


# Tables.
def main_metric(results: Results) -> str:
    """What the headline is about."""
    return "exact_match" if results["exact"] else "bits_per_byte"


def _measured(results: Results, metrics: Iterable[str]) -> list[str]:
    return [name for name in metrics if any(f"{name}/all" in found for found in results["metrics"].values())]


def _columns(results: Results, name: str) -> tuple[list[str], list[str]]:
    """Groups that get a column (the splits, and all prompts together), and the heading."""
    counts = results["groups"]
    splits = [group for group in counts if "/" not in group and group != "all"]
    groups = [*splits, "all"] if len(splits) != 1 else splits
    return groups, [name, *(f"{'all held-out' if group == 'all' else group} ({counts[group]})" for group in groups)]


def cell(entry: Entry, metric: Metric, sign: str = "", each: bool = True) -> str:
    """A value with its interval and, with `each` and where there are few, every seed's value."""
    if entry is None:
        return "–"
    low, high = entry["low"], entry["high"]
    if not sign:  # the interval over seeds knows no bounds
        low, high = metric.within(low, high)
    text = f"{shown(entry['value'], metric, sign)} [{shown(low, metric, sign)}, {shown(high, metric, sign)}]"
    if each and 1 < len(entry["seeds"]) <= FEW_SEEDS:
        text += f" ({', '.join(shown(value, metric, sign) for value in entry['seeds'])})"
    return text


def table_rows(results: Results, metric: str, arms: Iterable[str], each: bool = True) -> Rows:
    """Arms that have the metric × splits, the heading first. each: with every seed's value, where there are few."""
    how = SHOWN[metric]
    groups, heading = _columns(results, how.label + {1: " ↑", -1: " ↓", 0: ""}[how.better])
    having = {arm: found for arm in arms if f"{metric}/all" in (found := results["metrics"][arm])}
    return [
        heading,
        *(
            [results["arms"][arm]["label"], *(cell(found.get(f"{metric}/{g}"), how, each=each) for g in groups)]
            for arm, found in having.items()
        ),
    ]


def difference_rows(results: Results, metric: str, pairs: Iterable[str], each: bool = True) -> Rows:
    """Pairs × splits; * where the interval leaves out 0. The heading first."""
    how = SHOWN[metric]
    groups, heading = _columns(results, f"difference, {how.label}")
    rows = [heading]
    for pair in pairs:
        found = [results["differences"][pair].get(f"{metric}/{group}") for group in groups]
        labels = " − ".join(results["arms"][arm]["label"] for arm in pair.split("-"))
        rows.append([labels, *(cell(e, how, "+", each) + (" *" if e and _clear(e) else "") for e in found)])
    return rows


def _clear(entry: Mapping[str, Any]) -> bool:
    return entry["low"] > 0 or entry["high"] < 0


def _depths(results: Results) -> list[str]:
    """Depths of the splits × arms."""
    metric = main_metric(results)
    rows = [["split, depth (prompts)", *(about["label"] for about in results["arms"].values())]]
    for group in (name for name in results["groups"] if "/" in name):
        found = [results["metrics"][arm].get(f"{metric}/{group}") for arm in results["arms"]]
        values = (shown(entry and entry["value"], SHOWN[metric]) for entry in found)
        rows.append([f"{group.replace('/', ', ')} ({results['groups'][group]})", *values])
    return ["## By depth", markdown_table(rows)] if len(rows) > 1 else []


# Words.
def headline(results: Results) -> str:
    """Each dreamer over all held-out prompts: what it reaches, and whether that is more than its controls reach."""
    metric = main_metric(results)
    how, told = SHOWN[metric], list[str]()
    for arm in (name for name in results["arms"] if ARMS[name].own):
        pairs = {name: results["differences"].get(f"{arm}-{name}", {}).get(f"{metric}/all") for name in CONTROLS}
        found = {control: entry for control, entry in pairs.items() if entry}
        if not found:
            continue
        gains = [entry["value"] * how.better if _clear(entry) else 0 for entry in found.values()]
        verdict = "lose to a control" if min(gains) < 0 else "do not clearly win"
        if min(gains) > 0:
            verdict = f"win against {'both controls' if len(found) > 1 else 'their control'}"
        against = (f"{results['arms'][name]['label']} {cell(e, how, '+', each=False)}" for name, e in found.items())
        reached = shown(results["metrics"][arm][f"{metric}/all"]["value"], how)
        told.append(f"- {results['arms'][arm]['label']} {verdict}: {reached} {how.label} ({'; '.join(against)}).")
    return "\n".join(told) or "No arm dreams and has a control beside it."


def _about(results: Results) -> str:
    seeds, prompts = len(results["seeds"]), results["prompts"]
    over = f"a hierarchical bootstrap over {seeds} training seeds and {prompts} prompts (docs/statistics.md)"
    if seeds == 1:
        over = f"a bootstrap over {prompts} prompts. There is one training seed: no interval knows what another changes"
    each = "; in parentheses: each seed" if 1 < seeds <= FEW_SEEDS else ""
    return (
        f"{prompts} held-out prompts of {results['source']}; each arm's training took {results['steps']:,} steps of as "
        f"many packed tokens of the same data. Dreams and answers are decoded greedily, answers with at most "
        f"{results['max_tokens']} tokens. Values are means over seeds{each}; in brackets: 95 % intervals of {over}. "
        "Where all of n prompts came out the same, up to about 3/n of all others may still come out otherwise (rule of "
        "three, 95 %)."
    )


def _provenance(results: Results) -> list[str]:
    words = ["dream", "ablate", results["run"], "--seeds", str(len(results["seeds"])), "--steps", str(results["steps"])]
    if results["chosen"]:
        words += ["--arms", ",".join(results["arms"])]
    columns = ("tokens", "parameters", "seconds", "engine_parameters", "engine_seconds")
    rows = [["seed, training", "computed in", "steps (best)", *(name.replace("_", " ") for name in columns)]]
    for entry in results["trainings"]:
        row = [f"{entry['seed']}, {entry['training']}", entry["computed"]]
        row += [f"{entry['steps']:,} ({entry['best_step']:,})"]
        rows.append([*row, *(f"{n:,.0f}" if (n := entry.get(name)) else "–" for name in columns)])
    changed = " ".join(f"{name}={_setting(value)}" for name, value in results["settings"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"```sh\n{shlex.join(words)}\n```",
        f"Settings that are not the defaults: `{changed or '(none)'}`.",
        markdown_table(rows),
        f"A true dream has {results['dreams_tokens']:.1f} tokens on average. {MADE} {results['left_out']} held-out "
        "prompts were left out (too long for the context).",
        f"{versions}; finished {results['finished']}.",
    ]


def _setting(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
