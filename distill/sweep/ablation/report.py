"""The report of an ablation: a pure function of its results.json, its plain sentences included."""

import shlex
from dataclasses import dataclass
from typing import Any

from distill.report.evaluation import markdown_table

Results = dict[str, Any]
Entry = dict[str, Any] | None


@dataclass(frozen=True)
class Shown:
    """How a metric is shown. scale: what it is multiplied by; better: 1 more, −1 less, 0 neither.

    unit: of a difference.
    """

    label: str
    digits: int
    scale: float
    better: int
    unit: str

    def number(self, value: float, sign: str = "") -> str:
        rounded = round(self.scale * value, self.digits) + 0.0  # what rounds to nothing has no sign
        return f"{rounded:{sign}.{self.digits}f}"

    @property
    def heading(self) -> str:
        return f"{self.label} { ({1: '↑', -1: '↓'}.get(self.better, '')) }".rstrip()


METRICS = {
    "exact_match": Shown("exact match, %", 1, 100, 1, "points"),
    "bits_per_byte": Shown("bits per byte", 3, 1, -1, "bits per byte"),
    "chrf": Shown("chrF2", 1, 1, 1, "chrF2"),
    "dream_accuracy": Shown("codes right, %", 1, 100, 1, "points"),
    "dream_exact": Shown("whole dreams right, %", 1, 100, 1, "points"),
    "dream_tokens": Shown("tokens of the dream", 1, 1, 0, "tokens"),
}
FEW_SEEDS = 3
"""Up to so many, each seed's own value is shown as well."""

DREAMERS = ("backbone", "engine", "retrieval")
CONTROLS = ("nodream", "pause")
READINGS = ("empty", "shuffled", "other")


def render(results: Results) -> str:
    """report.md."""
    parts = [
        f"# What dreaming is worth: {results['run']}",
        "\n".join(f"- {sentence}" for sentence in sentences(results)),
        _about(results),
        *_section("Arms", _tables(results, [arm for arm in results["arms"] if arm not in READINGS])),
        *_section("Differences", _difference_tables(results, [p for p in results["differences"] if _of_arms(p)])),
        *_section("Does the answer read its dream?", _reading_tables(results)),
        *_dreams(results),
        *_depths(results),
        _no_width(results),
        "## How it was made",
        *_provenance(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(heading: str, parts: list[str]) -> list[str]:
    return [f"## {heading}", *parts] if parts else []


# Numbers.


def main_metric(results: Results) -> str:
    """What the sentences are about."""
    return "exact_match" if results["exact"] else "bits_per_byte"


def splits(results: Results) -> list[str]:
    """Groups that get a column: the splits, and all prompts together."""
    names = [name for name in results["groups"] if "/" not in name and name != "all"]
    return [*names, "all"] if len(names) != 1 else names


def _get(entries: dict[str, Entry], metric: str, group: str) -> Entry:
    return entries.get(f"{metric}/{group}")


def cell(entry: Entry, shown: Shown, sign: str = "", each: bool = True) -> str:
    """A value with its interval and, with `each` and where there are few, every seed's value."""
    if entry is None:
        return "–"
    ends = (entry["low"], entry["high"])
    if shown.label.endswith("%") and not sign:
        ends = (max(ends[0], 0.0), min(ends[1], 1.0))  # a share; the interval over seeds knows no bounds
    low, high = (shown.number(end, sign) for end in ends)
    text = f"{shown.number(entry['value'], sign)} [{low}, {high}]"
    if each and 1 < len(entry["seeds"]) <= FEW_SEEDS:
        text += f" ({', '.join(shown.number(value, sign) for value in entry['seeds'])})"
    return text


def _clear(entry: dict[str, Any]) -> bool:
    return entry["low"] > 0 or entry["high"] < 0


def _heading(results: Results, group: str) -> str:
    return f"{'all held-out' if group == 'all' else group} ({results['groups'][group]})"


def table_rows(results: Results, metric: str, arms: list[str], each: bool = True) -> list[list[str]]:
    """Arms × splits, the heading first. each: with every seed's value, where there are few."""
    shown, groups = METRICS[metric], splits(results)
    rows = [[shown.heading, *(_heading(results, group) for group in groups)]]
    for arm in arms:
        found = [_get(results["metrics"][arm], metric, group) for group in groups]
        rows.append([results["arms"][arm]["label"], *(cell(entry, shown, each=each) for entry in found)])
    return rows


def difference_rows(results: Results, metric: str, pairs: list[str], each: bool = True) -> list[list[str]]:
    """Pairs × splits; * where the interval leaves out 0. The heading first."""
    shown, groups = METRICS[metric], splits(results)
    rows = [[f"difference, {shown.unit}", *(_heading(results, group) for group in groups)]]
    for pair in pairs:
        found = [_get(results["differences"][pair], metric, group) for group in groups]
        labels = " − ".join(results["arms"][arm]["label"] for arm in pair.split("-"))
        rows.append([labels, *(cell(e, shown, "+", each) + (" *" if e and _clear(e) else "") for e in found)])
    return rows


def _measured(results: Results, arms: list[str]) -> list[str]:
    """Metrics of answers that the arms have, the main one first."""
    names = ("exact_match", "bits_per_byte", "chrf")
    return [name for name in names if any(f"{name}/all" in results["metrics"][arm] for arm in arms)]


def _tables(results: Results, arms: list[str]) -> list[str]:
    main = main_metric(results)
    return [markdown_table(table_rows(results, metric, arms, metric == main)) for metric in _measured(results, arms)]


def _of_arms(pair: str) -> bool:
    return pair.split("-")[1] not in READINGS


def _difference_tables(results: Results, pairs: list[str]) -> list[str]:
    if not pairs:
        return []
    main, metrics = main_metric(results), _measured(results, [pairs[0].split("-")[0]])
    tables = [markdown_table(difference_rows(results, metric, pairs, metric == main)) for metric in metrics]
    return [*tables, "Paired by seed and prompt. An asterisk marks an interval that leaves out zero."]


def _reading_tables(results: Results) -> list[str]:
    pairs = [pair for pair in results["differences"] if not _of_arms(pair)]
    if not any(arm in results["arms"] for arm in READINGS):
        return []
    text = (
        "The backbone's own dream, as it is, left out, with its image tokens in another order, and another prompt's "
        "(of the same split and depth, where there are splits). All are read by the same student."
    )
    arms = [arm for arm in ("backbone", *READINGS) if arm in results["arms"]]
    return [text, *_tables(results, arms), *_difference_tables(results, pairs)]


def _dreams(results: Results) -> list[str]:
    arms = [arm for arm in results["arms"] if "dream_accuracy/all" in results["metrics"][arm]]
    if not arms:
        return []
    text = (
        "Codes right: of the true dream's image tokens, those that stand at the same lens, step and role in the own "
        "dream. Whole dreams right: nothing missing, nothing wrong, nothing more."
    )
    names = ("dream_accuracy", "dream_exact", "dream_tokens")
    tables = [markdown_table(table_rows(results, metric, arms, each=False)) for metric in names]
    return ["## The dreams themselves", text, *tables]


def _depths(results: Results) -> list[str]:
    """Depths of the splits × arms."""
    groups, metric = [name for name in results["groups"] if "/" in name], main_metric(results)
    if not groups:
        return []
    rows = [["split, depth (prompts)", *(about["label"] for about in results["arms"].values())]]
    for group in groups:
        split, depth = group.split("/")
        entries = [_get(results["metrics"][arm], metric, group) for arm in results["arms"]]
        cells = ["–" if entry is None else METRICS[metric].number(entry["value"]) for entry in entries]
        rows.append([f"{split}, {depth} ({results['groups'][group]})", *cells])
    return ["## By depth", f"{METRICS[metric].label}, means over seeds.", markdown_table(rows)]


def _no_width(results: Results) -> str:
    """A caution, where every prompt of a group came out the same."""
    entries = [e for each in results["metrics"].values() for name, e in each.items() if name.startswith("exact") and e]
    if not any(e["value"] in (0.0, 1.0) for e in entries):
        return ""
    return (
        "Where all prompts came out the same, resampling them finds no width. With n prompts up to about 3/n of all "
        "others may still come out otherwise (rule of three, 95 %)."
    )


# Words.


def sentences(results: Results) -> list[str]:
    """What the numbers say, in plain words, whatever they say."""
    groups = splits(results)
    groups = groups[:-1] if len(groups) > 1 else groups  # the splits say it all
    found = [_worth(results, arm, group) for group in groups for arm in DREAMERS if arm in results["arms"]]
    found += [_reads(results), _limit(results)]
    if len(results["seeds"]) == 1:
        found.append("There is one training seed: no interval here knows what another would have changed.")
    return [sentence for sentence in found if sentence]


def _against(entry: dict[str, Any], shown: Shown, label: str) -> str:
    """An arm's difference to another, in words."""
    if not _clear(entry):
        value, low, high = (shown.number(entry[key], "+") for key in ("value", "low", "high"))
        return f"no clear difference to {label} ({value} [{low}, {high}])"
    low, high = (shown.number(bound) for bound in sorted(abs(entry[key]) for key in ("low", "high")))
    word = "more" if entry["value"] > 0 else "fewer"
    return f"{shown.number(abs(entry['value']))} {shown.unit} [{low}, {high}] {word} than {label}"


def _worth(results: Results, arm: str, group: str) -> str | None:
    """How a dreamer stands to the controls in a split, and what follows."""
    metric, label = main_metric(results), results["arms"][arm]["label"]
    shown, entry = METRICS[metric], _get(results["metrics"][arm], metric, group)
    pairs = {control: results["differences"].get(f"{arm}-{control}") for control in CONTROLS}
    found = {control: e for control, p in pairs.items() if p and (e := _get(p, metric, group))}
    if entry is None or not found:
        return None
    told = [_against(e, shown, results["arms"][control]["label"]) for control, e in found.items()]
    better = [_clear(e) and e["value"] * shown.better > 0 for e in found.values()]
    worse = [_clear(e) and e["value"] * shown.better < 0 for e in found.values()]
    verdict = "Dreaming loses to a control" if any(worse) else "Dreaming does not clearly win"
    if all(better):
        verdict = f"Dreaming wins against {'both controls' if len(found) > 1 else 'its control'}"
    return f"{_heading(results, group)}: {label} reach {_value(results, entry)}: {'; '.join(told)}. {verdict}."


def _value(results: Results, entry: dict[str, Any]) -> str:
    shown = METRICS[main_metric(results)]
    return f"{shown.number(entry['value'])}{' % exact match' if results['exact'] else f' {shown.unit}'}"


def _reads(results: Results) -> str | None:
    """Whether answers get worse where the dream is spoiled."""
    metric, shown = main_metric(results), METRICS[main_metric(results)]
    found = {
        name: e for name in READINGS if (e := _get(results["differences"].get(f"backbone-{name}", {}), metric, "all"))
    }
    if not found:
        return None
    told = [
        f"{results['arms'][name]['label']}: {shown.number(-e['value'], '+')} "
        f"[{shown.number(-e['high'], '+')}, {shown.number(-e['low'], '+')}] {shown.unit}"
        for name, e in found.items()
    ]
    # Left out, it says what the dream is good for; spoiled, whether it is read.
    spoiled = [e for name, e in found.items() if name != "empty"] or list(found.values())
    hurt = [_clear(e) and e["value"] * shown.better > 0 for e in spoiled]
    verdict = "The answer reads its dream" if all(hurt) else "The answer reads part of its dream at most"
    if not any(hurt):
        verdict = "Nothing shows that the answer reads its dream"
    return f"{verdict} (against the backbone's own dream, all held-out prompts; {'; '.join(told)})."


def _limit(results: Results) -> str | None:
    """What a perfect dream would bring."""
    if "oracle" not in results["arms"]:
        return None
    metric = main_metric(results)
    entry = _get(results["metrics"]["oracle"], metric, "all")
    if entry is None:
        return None
    return (
        f"Given the true dream to read, the dreaming student reaches {_value(results, entry)} over all held-out "
        "prompts: an oracle, no result of its own, and what better dreams could bring it to."
    )


def _about(results: Results) -> str:
    seeds, many = results["seeds"], len(results["seeds"]) > 1
    level = (
        f"95 % intervals of a hierarchical bootstrap over {len(seeds)} training seeds and {results['prompts']} prompts "
        "(seeds by Student's t, prompts drawn again; docs/evaluation.md)"
        if many
        else f"95 % intervals of a bootstrap over {results['prompts']} prompts (one training seed)"
    )
    each = "; in parentheses: each seed" if 1 < len(seeds) <= FEW_SEEDS else ""
    oracle = " True dreams are an oracle: they are made from the true answer." if "oracle" in results["arms"] else ""
    return (
        f"{results['prompts']} held-out prompts of {results['source']}; each arm's training took {results['steps']:,} "
        f"steps of as many packed tokens of the same data. Dreams and answers are decoded greedily, answers with at "
        f"most {results['max_tokens']} tokens. Values are means over seeds; in brackets: {level}{each}.{oracle}"
    )


def command(results: Results) -> str:
    """What to type for these results."""
    words = ["dream", "ablate", results["run"], "--seeds", str(len(results["seeds"])), "--steps", str(results["steps"])]
    if results["chosen"]:
        words += ["--arms", ",".join(results["arms"])]
    return shlex.join(words)


def _provenance(results: Results) -> list[str]:
    heading = [
        "seed, training",
        "computed in",
        "steps (best)",
        "packed tokens",
        "parameters",
        "seconds",
        "engine parameters",
        "engine s",
    ]
    rows = [heading]
    for entry in results["trainings"]:
        rows.append(
            [
                f"{entry['seed']}, {entry['training']}",
                entry["computed"],
                f"{entry['steps']:,} ({entry['best_step']:,})",
                f"{entry['tokens']:,}",
                f"{entry['parameters']:,}",
                f"{entry['seconds']:,.0f}",
                f"{entry['engine_parameters']:,}" if entry.get("engine_parameters") else "–",
                f"{entry['engine_seconds']:,.0f}" if entry.get("engine_seconds") else "–",
            ]
        )
    changed = " ".join(f"{name}={_setting(value)}" for name, value in results["settings"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"```sh\n{command(results)}\n```",
        f"Settings that are not the defaults: `{changed or '(none)'}`.",
        markdown_table(rows),
        f"A true dream has {results['dreams_tokens']:.1f} tokens on average; the pause arm reads and was trained with "
        "as many pause tokens in its place, so it is told the true dream's length. Pauses carry no loss. Without "
        "dreams more of the packed tokens are answers than with them. Each student is the checkpoint with the lowest "
        f"validation loss. {results['left_out']} held-out prompts were left out (empty, or too long for the context).",
        f"{versions}; finished {results['finished']}.",
    ]


def _setting(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
