"""The report of an ablation: a pure function of its results.json. A headline, tables, and how they were made."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill.exam.metrics.catalogue import METRICS, Metric, shown
from distill.report.tables import markdown_table
from distill.sweep.ablation.arms import ARMS, CONTROLS, READINGS, TRUE_READINGS

Results = Mapping[str, Any]
Entry = Mapping[str, Any] | None
Rows = list[list[str]]

OF_ANSWERS = {
    "exact_match": METRICS["exact_match"],
    "bits_per_byte": Metric("bits per byte", -1),
    "chrf": METRICS["chrf"],
}
OF_DREAMS = {
    "dream_accuracy": Metric("codes right", 1, 1, True),
    "dream_exact": Metric("whole dreams right", 1, 1, True),
    "dream_tokens": Metric("tokens of the dream", 0, 1),
}
OF_STEERING = {name: METRICS[name] for name in ("steering_chrf", "steering_concepts")}
SHOWN = OF_ANSWERS | OF_DREAMS | OF_STEERING
FEW_SEEDS = 3
"""Up to so many, each seed's own value is shown as well."""


def render(results: Results) -> str:
    """report.md."""
    arms = results["arms"]
    trained = [arm for arm in arms if arm not in (*READINGS, *TRUE_READINGS)]
    read = [arm for arm in ("backbone", *READINGS) if arm in arms] if {*READINGS} & {*arms} else []
    beside = ("oracle", *TRUE_READINGS, "empty", "nodream") if {*TRUE_READINGS} & {*arms} else ()
    truths = [arm for arm in beside if arm in arms]
    dreamers = [arm for arm in arms if "dream_accuracy/all" in results["metrics"][arm]]
    parts = [
        f"# What dreaming is worth: {results['run']}",
        headline(results),
        _about(results),
        *_section("Arms", _tables(results, trained)),
        *_section("Differences", _differences(results, trained)),
        *_section(
            "Does the answer read its dream?",
            [
                "The backbone's own dream, as it is, left out, with its image tokens in another order, and another "
                "prompt's (of the same split and depth, where there are splits). All are read by the same student.",
                *_tables(results, read),
                *_differences(results, read),
            ]
            if read
            else [],
        ),
        *_section(
            "Would the answer read a true dream?",
            [
                "The true dream of the answer itself, of another of the teacher's answers to the prompt, of another "
                "prompt, with its image tokens in another order, and none, all read by the same student; beside it the "
                "one that was trained without dreams. Last, how much nearer answers come to the one whose dream they "
                "were given than to the other.",
                *_tables(results, truths),
                *_differences(results, truths),
                *(markdown_table(table_rows(results, name, ["sibling"])) for name in OF_STEERING if _steered(results)),
            ]
            if truths
            else [],
        ),
        *_section(
            "The dreams themselves",
            [
                "Codes right: of the true dream's image tokens, those that stand at the same lens, step and role in "
                "the own dream. Whole dreams right: nothing missing, nothing wrong, nothing more.",
                *(markdown_table(table_rows(results, metric, dreamers, each=False)) for metric in OF_DREAMS),
            ]
            if dreamers
            else [],
        ),
        *_section("By depth", _depths(results)),
        "## How it was made",
        *_provenance(results),
    ]
    return "\n\n".join(parts) + "\n"


def _section(heading: str, parts: list[str]) -> list[str]:
    return [f"## {heading}", *parts] if parts else []


# Tables.
def main_metric(results: Results) -> str:
    """What the headline is about."""
    return "exact_match" if results["exact"] else "bits_per_byte"


def splits(results: Results) -> list[str]:
    """Groups that get a column: the splits, and all prompts together."""
    names = [name for name in results["groups"] if "/" not in name and name != "all"]
    return [*names, "all"] if len(names) != 1 else names


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


def _heading(results: Results, name: str, groups: Iterable[str]) -> list[str]:
    counts = results["groups"]
    return [name, *(f"{'all held-out' if group == 'all' else group} ({counts[group]})" for group in groups)]


def table_rows(results: Results, metric: str, arms: Iterable[str], each: bool = True) -> Rows:
    """Arms × splits, the heading first. each: with every seed's value, where there are few."""
    how, groups = SHOWN[metric], splits(results)
    rows = [_heading(results, how.label + {1: " ↑", -1: " ↓", 0: ""}[how.better], groups)]
    for arm in arms:
        found = (results["metrics"][arm].get(f"{metric}/{group}") for group in groups)
        rows.append([results["arms"][arm]["label"], *(cell(entry, how, each=each) for entry in found)])
    return rows


def difference_rows(results: Results, metric: str, pairs: Iterable[str], each: bool = True) -> Rows:
    """Pairs × splits; * where the interval leaves out 0. The heading first."""
    how, groups = SHOWN[metric], splits(results)
    rows = [_heading(results, f"difference, {how.label}", groups)]
    for pair in pairs:
        found = [results["differences"][pair].get(f"{metric}/{group}") for group in groups]
        labels = " − ".join(results["arms"][arm]["label"] for arm in pair.split("-"))
        rows.append([labels, *(cell(e, how, "+", each) + (" *" if e and _clear(e) else "") for e in found)])
    return rows


def _clear(entry: Mapping[str, Any]) -> bool:
    return entry["low"] > 0 or entry["high"] < 0


def _steered(results: Results) -> bool:
    return "steering_chrf/all" in results["metrics"].get("sibling", {})


def _measured(results: Results, arms: Sequence[str]) -> list[str]:
    """Metrics of answers that the arms have, the main one first."""
    return [name for name in OF_ANSWERS if any(f"{name}/all" in results["metrics"][arm] for arm in arms)]


def _tables(results: Results, arms: Sequence[str]) -> list[str]:
    main = main_metric(results)
    return [markdown_table(table_rows(results, metric, arms, metric == main)) for metric in _measured(results, arms)]


def _differences(results: Results, arms: Sequence[str]) -> list[str]:
    """Of all pairs among the arms."""
    pairs = [pair for pair in results["differences"] if {*pair.split("-")} <= {*arms}]
    if not pairs:
        return []
    main, metrics = main_metric(results), _measured(results, [pairs[0].split("-")[0]])
    tables = [markdown_table(difference_rows(results, metric, pairs, metric == main)) for metric in metrics]
    return [*tables, "Paired by seed and prompt. An asterisk marks an interval that leaves out zero."]


def _depths(results: Results) -> list[str]:
    """Depths of the splits × arms."""
    groups, metric = [name for name in results["groups"] if "/" in name], main_metric(results)
    if not groups:
        return []
    rows = [["split, depth (prompts)", *(about["label"] for about in results["arms"].values())]]
    for group in groups:
        found = [results["metrics"][arm].get(f"{metric}/{group}") for arm in results["arms"]]
        values = (shown(entry and entry["value"], SHOWN[metric]) for entry in found)
        rows.append([f"{group.replace('/', ', ')} ({results['groups'][group]})", *values])
    return [f"{SHOWN[metric].label}, means over seeds.", markdown_table(rows)]


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
        told.append(f"{results['arms'][arm]['label']} {verdict}: {reached} {how.label} ({'; '.join(against)}).")
    return "\n".join(f"- {line}" for line in told) or "No arm dreams and has a control beside it."


def _about(results: Results) -> str:
    seeds = len(results["seeds"])
    level = f"95 % intervals of a bootstrap over {results['prompts']} prompts"
    if seeds > 1:
        level = (
            f"95 % intervals of a hierarchical bootstrap over {seeds} training seeds and {results['prompts']} prompts "
            "(seeds by Student's t, prompts drawn again; docs/statistics.md)"
        )
    each = "; in parentheses: each seed" if 1 < seeds <= FEW_SEEDS else ""
    one = " There is one training seed: no interval here knows what another would have changed." if seeds == 1 else ""
    return (
        f"{results['prompts']} held-out prompts of {results['source']}; each arm's training took {results['steps']:,} "
        f"steps of as many packed tokens of the same data. Dreams and answers are decoded greedily, answers with at "
        f"most {results['max_tokens']} tokens. Values are means over seeds; in brackets: {level}{each}.{one} True "
        "dreams are an oracle, made from the true answer: what better dreams could bring, and no result of the "
        "student. Where all of n prompts came out the same, resampling finds no width: up to about 3/n of all others "
        "may still come out otherwise (rule of three, 95 %)."
    )


def command(results: Results) -> str:
    """What to type for these results."""
    words = ["dream", "ablate", results["run"], "--seeds", str(len(results["seeds"])), "--steps", str(results["steps"])]
    if results["chosen"]:
        words += ["--arms", ",".join(results["arms"])]
    return shlex.join(words)


def _provenance(results: Results) -> list[str]:
    rows = [["seed, training", "computed in", "steps (best)", "packed tokens", "parameters", "seconds"]]
    rows[0] += ["engine parameters", "engine s"]
    for entry in results["trainings"]:
        numbers = [entry.get(key) for key in ("tokens", "parameters", "seconds", "engine_parameters", "engine_seconds")]
        row = [f"{entry['seed']}, {entry['training']}", entry["computed"]]
        row += [f"{entry['steps']:,} ({entry['best_step']:,})", *(f"{n:,.0f}" if n else "–" for n in numbers)]
        rows.append(row)
    changed = " ".join(f"{name}={_setting(value)}" for name, value in results["settings"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"```sh\n{command(results)}\n```",
        f"Settings that are not the defaults: `{changed or '(none)'}`.",
        markdown_table(rows),
        f"A true dream has {results['dreams_tokens']:.1f} tokens on average; the pause arm reads and was trained with "
        "as many pause tokens in its place, so it is told the true dream's length. Pauses carry no loss. Without "
        "dreams more of the packed tokens are answers than with them. Each student is the checkpoint with the lowest "
        f"validation loss. {results['left_out']} held-out prompts were left out (too long for the context).",
        f"{versions}; finished {results['finished']}.",
    ]


def _setting(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
