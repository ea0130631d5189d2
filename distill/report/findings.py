"""What a comparison says in words, computed from its results.json: who is better in what, and what to be careful about.

Nothing is called better or worse unless the corrected p-value is below 5 % and the interval leaves out zero on the same
side. All else is "no clear difference", which is not the same as "equal".
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from distill.exam.metrics.catalogue import metric_of, shown
from distill.mining.triplets import LENSES
from distill.report.evaluation import answered

Results = dict[str, Any]
Verdict = Literal["better", "worse", "open", "untested", "undefined"]
"""Of a system against the baseline. open: no clear difference. untested: there is no corrected p-value, or neither more
nor less is better. undefined: the metric is not defined for both."""

CLEAR = 0.05
"""Largest corrected p-value that counts as clear."""
NOT_OWN = ("_oracle", "_chance")
"""Ends of the names of metrics that are landmarks and no result of the system: they make no headline."""
SIGNS: dict[Verdict, str] = {"better": "▲", "worse": "▼"}
WORDS: dict[Verdict, str] = {
    "better": "clearly better",
    "worse": "clearly worse",
    "open": "no clear difference",
    "untested": "not tested",
    "undefined": "not defined",
}


@dataclass(frozen=True)
class Finding:
    """One system against another. text: a sentence; better, worse: a line each; open: metrics' labels."""

    system: str
    against: str
    text: str
    better: list[str] = field(default_factory=list[str])
    worse: list[str] = field(default_factory=list[str])
    open: list[str] = field(default_factory=list[str])


def verdict(difference: dict[str, Any]) -> Verdict:
    """Of one entry of "differences"."""
    value, low, high, p = (difference[name] for name in ("value", "low", "high", "p_corrected"))
    if value is None:
        return "undefined"
    better = metric_of(difference["metric"]).better
    if p is None or low is None or high is None or not better:
        return "untested"
    if p >= CLEAR or not (0 < low <= high or low <= high < 0):
        return "open"
    return "better" if better * value > 0 else "worse"


def findings(results: Results) -> list[Finding]:
    """One for each pair of systems that was compared, in the order of the results."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for difference in results["differences"]:
        pairs.setdefault((difference["system"], difference["against"]), []).append(difference)
    return [_finding(*pair, differences, results) for pair, differences in pairs.items()]


def _finding(system: str, against: str, differences: list[dict[str, Any]], results: Results) -> Finding:
    own = [d for d in differences if not d["metric"].endswith(NOT_OWN)]
    leading = results["tests"].get("leading")
    lead = next((d for d in own if d["metric"] == leading and verdict(d) not in ("untested", "undefined")), None)
    found = _sorted(own)
    others = _sorted([d for d in own if d is not lead])
    if lead is None:
        text = _others(others, f"Compared with {against}, {system} is", f"between {system} and {against}", "")
    else:
        text = f"{_lead(lead, results)} {_others(others, f'{system} is', 'between them', 'other ')}"
    if hints := sum(d["low"] > 0 or d["high"] < 0 for d in others["open"]):
        tests = results["tests"]["count"]
        text += f" In {hints} the interval leaves out zero, which is not enough with {tests} tests."
    return Finding(
        system,
        against,
        text,
        *([_line(d, results) for d in found[name]] for name in ("better", "worse")),
        open=[metric_of(d["metric"]).label for d in found["open"]],
    )


def _corrected(tests: dict[str, Any]) -> str:
    """For how many tests; the leading metric's are corrected by themselves."""
    of = {name: f"{tests[name]} test{'s' * (tests[name] != 1)}" for name in ("count", "count_leading") if name in tests}
    if tests.get("leading") is None:
        return f"for {of['count']}"
    label = metric_of(tests["leading"]).label
    return f"for {of['count_leading']} of what leads ({label}) and {of['count']} of all other metrics"


def _sorted(differences: list[dict[str, Any]]) -> dict[Verdict, list[dict[str, Any]]]:
    found: dict[Verdict, list[dict[str, Any]]] = {name: [] for name in ("better", "worse", "open")}
    for difference in differences:
        if (name := verdict(difference)) in found:
            found[name].append(difference)
    return found


def _lead(difference: dict[str, Any], results: Results) -> str:
    """The sentence on the leading metric: "In bits per byte, hard is clearly worse than soft: 1.34 against 1.25 …"."""
    system, against, which = difference["system"], difference["against"], verdict(difference)
    words = {
        "better": f"{system} is clearly better than {against}",
        "worse": f"{system} is clearly worse than {against}",
        "open": f"there is no clear difference between {system} and {against}",
    }
    label, _, numbers = _line(difference, results).partition(": ")
    return f"In {label}, {words[which]}: {numbers}."


def _others(found: dict[Verdict, list[dict[str, Any]]], begin: str, between: str, other: str) -> str:
    """How many of several metrics say what. other: "other " where one was told of already."""
    tested = sum(map(len, found.values()))
    if not tested:
        return "No other metric could be tested." if other else f"There is no metric {between} that could be tested."
    if len(found["open"]) == tested:
        return f"There is no clear difference {between}, in any of {_metrics(tested, other)}."
    told: tuple[Verdict, ...] = ("better", "worse")
    parts = [f"clearly {name} in {len(found[name])}" for name in told if found[name]]
    text = f"{begin} {_and(parts)} of {_metrics(tested, other)}"
    text += f"; no clear difference in {len(found['open'])}." if found["open"] else "."
    return text[0].upper() + text[1:] if not other else text


def _metrics(count: int, other: str = "") -> str:
    return f"{count} {other}metric{'s' * (count != 1)}"


def _and(parts: list[str]) -> str:
    return " and ".join(([", ".join(parts[:-1])] if parts[:-1] else []) + parts[-1:])


def _line(difference: dict[str, Any], results: Results) -> str:
    metric = metric_of(difference["metric"])
    # On the prompts that both have; of older results, on those that each has.
    values = [
        minus(shown(difference[key], metric))
        if key in difference
        else _value(results, difference[name], difference["metric"])
        for key, name in (("own", "system"), ("other", "against"))
    ]
    line = f"{metric.label}: {values[0]} against {values[1]}, {difference_text(difference)}"
    return f"{line}, corrected p {p_equals(difference['p_corrected'])}{on_prompts(difference)}"


def _value(results: Results, system: str, name: str) -> str:
    entry = results["systems"][system]["metrics"].get(name)
    return minus(shown(entry["value"] if entry else None, metric_of(name)))


def unequal_prompts(results: Results) -> str:
    """That systems' values are not of the same prompts, where one left out more than another; else ""."""
    left_out = {name: system["left_out"] for name, system in results["systems"].items()}
    if len(set(left_out.values())) < 2:
        return ""
    told = ", ".join(f"{name} {count}" for name, count in left_out.items() if count)
    return (
        f"Each value is of the prompts that the system could take, and these are not the same for all: left out were, "
        f"of {results['exam']['prompts']}, {told}. Don't set the values side by side; differences are of the prompts "
        "that both took."
    )


def on_prompts(difference: dict[str, Any]) -> str:
    """ "; better on 5 and worse on 35 of 41 prompts"; nothing where neither can be said."""
    if not metric_of(difference["metric"]).better or not difference["prompts"] or difference["wins"] is None:
        return ""
    wins, losses = difference["wins"], difference["losses"]
    return f"; better on {wins} and worse on {losses} of {difference['prompts']} prompts"


def difference_text(difference: dict[str, Any], interval: bool = True) -> str:
    """ "+0.05 [+0.02, +0.08]"; of shares in percentage points."""
    metric = metric_of(difference["metric"])
    value, low, high = (
        minus(shown(difference[name], metric, "+")).removesuffix(" %") for name in ("value", "low", "high")
    )
    if difference["value"] is None:
        return "–"
    unit = " points" if metric.percent else ""
    return f"{value}{unit} [{low}, {high}]" if interval else f"{value}{unit}"


def interval_text(entry: dict[str, Any] | None, name: str) -> tuple[str, str]:
    """A metric's value and its interval in brackets, "" where there is none."""
    metric = metric_of(name)
    if entry is None or entry["value"] is None:
        return "–", ""
    value, low, high = (minus(shown(entry[key], metric)) for key in ("value", "low", "high"))
    return value, "" if entry["low"] is None else f"[{low.removesuffix(' %')}, {high.removesuffix(' %')}]"


def minus(text: str) -> str:
    """A number with the sign for minus that is as wide as plus, and a zero without any."""
    return text.replace("-", "−") if re.search("[1-9]", text) else text.lstrip("+-")


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float | None) -> str:
    """As it stands in a sentence: "< 0.001" or "= 0.012"."""
    return p_text(p) if p is None or p < 0.001 else f"= {p_text(p)}"


def asked(results: Results) -> str:
    """What was asked, and how answers were decoded."""
    exam, decoding, tests = results["exam"], results["decoding"], results["tests"]
    teacher = answered(exam, exam["teacher"]) if exam["has_answers"] else ""
    none = "" if exam["has_answers"] else " Nobody has answered them, so only what a system says by itself is measured."
    greedy = decoding["temperature"] == 0
    sampled = "were decoded greedily" if greedy else f"were sampled at temperature {decoding['temperature']:g}"
    dreams = decoding["dreams"]
    limit = f" after a dream of at most {decoding['dream_tokens']}" if decoding.get("dream_tokens") else ""
    averaged = f" Likelihoods after own dreams are averaged over {dreams} sampled dreams a prompt." if dreams else ""
    return (
        f"{exam['name']}{teacher}.{none} All systems got the same prompts. Answers {sampled} with at most "
        f"{decoding['max_tokens']} tokens{limit}, seed {decoding['seed']}.{averaged} In brackets stand 95 % intervals "
        f"({tests['bootstrap']:,} resamples); p-values come from {tests['permutations']:,} {_draws(tests)} and are "
        f"corrected {_corrected(tests)} ({tests['correction']})."
    )


def _draws(tests: dict[str, Any]) -> str:
    """What p-values were counted in; older results don't say."""
    kinds = tests.get("kinds") or []
    return (
        {"permutation": "permutations", "bootstrap": "draws of a bootstrap"}["".join(kinds)]
        if len(kinds) == 1
        else "draws"
    )


def cautions(results: Results) -> list[str]:
    """What a reader must know before believing the numbers: the results' warnings, and what follows from the rest."""
    systems: dict[str, Any] = results["systems"]
    lines: list[str] = list(dict.fromkeys(results["warnings"]))
    checks = {name: system["contamination"] or {"checked": False} for name, system in systems.items()}
    if unchecked := [name for name, check in checks.items() if not check["checked"]]:
        lines.append(f"Whether {_and(unchecked)} had seen the prompts before could not be checked.")
    if judge := results["judge"]:
        lines += _of_judge(judge, systems)
    return lines


def _of_judge(judge: dict[str, Any], systems: dict[str, Any]) -> list[str]:
    lines = [
        f"The judge, {judge['model']}, is one of those that it judges: {name}."
        for name, system in systems.items()
        if judge["model"] in system["targets"]
    ]
    nonsense = [f"{pair['nonsense']} ({pair['system']})" for pair in judge["pairs"] if pair["nonsense"]]
    if nonsense:
        lines.append(f"The judge gave no usable verdict on some prompts, which count for nobody: {_and(nonsense)}.")
    return lines


def contaminated(found: dict[str, Any]) -> str:
    """ "1 exact, 2 near copies"; "" for none."""
    kinds = (("exact", "exact"), ("near", "near copies"), ("contained", "contained in another text"))
    return ", ".join(f"{found[key]} {word}" for key, word in kinds if found[key])


def token_counts(results: Results) -> dict[str, int]:
    """Tokens that each system was trained on, of those where it is known."""
    return {
        name: system["trained_on"]["tokens"]
        for name, system in results["systems"].items()
        if system["trained_on"] and system["trained_on"].get("tokens") is not None
    }


def equal_tokens(results: Results) -> str:
    """Whether the comparison is one at equal tokens, as a sentence or two."""
    counts, unknown = token_counts(results), [n for n, s in results["systems"].items() if not s["trained_on"]]
    parts: list[str] = []
    if len(counts) > 1 and len(set(counts.values())) == 1:
        who = "All" if len(counts) == len(results["systems"]) else _and(list(counts))
        parts.append(f"{who} were trained on equally many packed tokens: {next(iter(counts.values())):,}.")
    elif len(counts) > 1:
        most = max(counts.values())
        told = ", ".join(f"{name} {tokens:,} ({100 * tokens / most:.0f} %)" for name, tokens in counts.items())
        parts.append(f"This is no comparison at equal tokens: {told}.")
    if unknown:
        parts.append(f"What {_and(unknown)} {'was' if len(unknown) == 1 else 'were'} trained on is not known.")
    if uncounted := [name for name in results["systems"] if name not in counts and name not in unknown]:
        who = "was" if len(uncounted) == 1 else "were"
        parts.append(f"For how many tokens {_and(uncounted)} {who} trained is not known.")
    return " ".join(parts)


def missing_reasons(results: Results) -> list[tuple[str, str, list[str]]]:
    """(system, reason, labels of the metrics that it is why of), in the order of the tables."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, system in results["systems"].items():
        for metric in results["metrics"]:
            if metric in system["missing"]:
                lines.setdefault((name, system["missing"][metric]), []).append(metric_of(metric).label)
    return [(name, reason, labels) for (name, reason), labels in lines.items()]


def judged(pair: dict[str, Any], model: str) -> str:
    """What a judge says of one pair, and whether it is of one mind."""
    p, low, high = pair["p_corrected"], pair["low"], pair["high"]
    clear = p is not None and p < CLEAR and low is not None and (low > 0.5 or high < 0.5)
    one, other = pair["system"], pair["against"]
    if clear:
        liked = (one, other) if pair["win_rate"] > 0.5 else (other, one)
        text = f"{model} prefers {liked[0]}'s answers to {liked[1]}'s"
    else:
        text = f"{model} shows no clear preference between {one} and {other}"
    rate = "" if pair["win_rate"] is None else f": win rate of {one} {share(pair, 'win_rate', 'low', 'high')}"
    agreement = (
        ""
        if pair["agreement"] is None
        else f" In both orders it said the same on {share(pair, 'agreement', 'agreement_low', 'agreement_high')}."
    )
    return f"{text}{rate}, corrected p {p_equals(p)}.{agreement}"


def share(entry: dict[str, Any], value: str, low: str, high: str) -> str:
    """ "30.0 % [20.0, 50.0]", "–" where it isn't defined."""
    if entry[value] is None:
        return "–"
    interval = "" if entry[low] is None else f" [{100 * entry[low]:.1f}, {100 * entry[high]:.1f}]"
    return f"{100 * entry[value]:.1f} %{interval}"


@dataclass(frozen=True)
class Lane:
    """A part of a dream. lens: "" before the first. steps: up to three labels each; loose: text outside of tokens."""

    lens: str
    steps: list[list[str]]
    loose: str


def lanes(dream: str) -> list[Lane]:
    """A dream as printed, ⟨spatial⟩⟨a ball⟩⟨is on⟩⟨the shelf⟩…, by lens, whatever else stands in it."""
    found: list[tuple[str, list[str], list[str]]] = [("", [], [])]
    for token, text in re.findall(r"⟨([^⟨⟩]*)⟩|([^⟨⟩]+|[⟨⟩])", dream):
        if token in LENSES:
            found.append((token, [], []))
        elif text.strip():
            found[-1][2].append(" ".join(text.split()))
        elif not text:
            found[-1][1].append(token)
    return [
        Lane(lens, [labels[i : i + 3] for i in range(0, len(labels), 3)], " ".join(loose))
        for lens, labels, loose in found
        if lens or labels or loose
    ]
