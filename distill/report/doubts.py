"""What makes a comparison's numbers less than they seem: told before anybody reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.run import Run

FEW = 20
"""Prompts below which a report warns that intervals are wide and tests weak."""

NONE_CLEAR = 5
"""With so many prompts 2^(1 − n), the least p-value of a permutation test, is not below 0.05."""

NATIVE = ("run", "checkpoint", "bundle")
"""Kinds of targets that write by `distill.student.grammar`."""

CONTAMINATED = (("exact", "word for word"), ("near", "in nearly the same words"), ("contained", "within a longer text"))
"""Kinds of contamination, and how they are told."""


def doubts(entries: Mapping[str, Mapping[str, Any]], prompts: int) -> list[str]:
    """What limits a comparison. entries: `systems` of its results; prompts: that were asked."""
    warnings: list[str] = []
    several = any(entry["seeds"] > 1 for entry in entries.values())
    if prompts <= NONE_CLEAR and not several and len(entries) > 1:
        warnings.append(
            f"Only {prompts} prompt{'s were' if prompts > 1 else ' was'} asked: whatever the difference, none can be "
            f"called clear with fewer than {NONE_CLEAR + 1}. Ask more."
        )
    elif prompts < FEW:
        warnings.append(f"Only {prompts} prompts were asked: intervals are wide and small differences can't show.")
    trainings = {name: entry["seeds"] for name, entry in entries.items() if entry["targets"]}
    if alone := [name for name, count in trainings.items() if count == 1]:
        warnings.append(
            f"One training each of {', '.join(alone)}: the numbers say how much the choice of prompts matters, and "
            "nothing of what another training seed would change."
        )
    if pairs := [name for name, count in trainings.items() if count == 2]:
        warnings.append(
            f"Two trainings each of {', '.join(pairs)}: two seeds hardly tell how much seeds matter, so intervals are "
            "very wide. Train three or more."
        )
    for name, entry in entries.items():
        if entry["left_out"]:
            warnings.append(
                f"{name}: {entry['left_out']} of {prompts} prompts don't fit its context, and its values are without "
                "them; differences are taken on the prompts that both can take."
            )
    warnings += masked(entries) + seen_before(entries)
    abouts = {name: entry["trained_on"] or {} for name, entry in entries.items()}
    tokens = {name: about["tokens"] for name, about in abouts.items() if about.get("tokens")}
    if len(set(tokens.values())) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        warnings.append(f"They were not trained for as many tokens: {told}.")
    return warnings


def mixed(name: str, runs: Sequence[Run | None], abouts: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Trainings of one system should differ by their seed alone: else it isn't the seed that their spread tells of.

    abouts: `trained_on` of each.
    """
    known: list[dict[str, Any]] = []
    for run, about in zip(runs, abouts, strict=True):
        if run is not None and about is not None:
            records, settings = run.records(), about["settings"]
            used = {key: value for key, value in settings.items() if not key.startswith(("evaluate.", "export."))}
            used |= {"seed": None, "data": about["data"]}
            # As they were trained: that the best checkpoint of one is earlier is the seed's doing.
            known.append(used | {"tokens": records["train"].summary.get("tokens") if "train" in records else None})
    keys = dict.fromkeys(key for one in known for key in one)
    other = [key for key in keys if any(one.get(key) != known[0].get(key) for one in known)]
    told = f"{name}: its trainings differ in {', '.join(other)}, not in the seed alone; better name them apart."
    return [told] if other else []


def masked(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether only some of those that dream are held to a grammar: then it isn't the weights alone that differ."""
    dreaming = {name: entry["kind"] for name, entry in entries.items() if entry["card"]["dreams"]}
    held = [name for name, kind in dreaming.items() if kind in NATIVE]
    free = [name for name in dreaming if name not in held]
    if not held or not free:
        return []
    return [
        f"{', '.join(held)} ran natively, masked: what was written is held to the grammar of dreams and answers. "
        f"{', '.join(free)} had no mask: malformed dreams and unclean answers are then of the engine, too."
    ]


def seen_before(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of the exam was trained on; systems of which the same holds are told of together."""
    told: dict[str, list[str]] = {}
    for name, entry in entries.items():
        found = entry["contamination"] or {"checked": False}
        parts = [f"{found[kind]} {words}" for kind, words in CONTAMINATED if found["checked"] and found[kind]]
        if parts:
            of_all = f"Of the {found['prompts']} prompts these were in the training of"
            told.setdefault(f"{of_all} {{}}: {', '.join(parts)}.", []).append(name)
    return [text.format(", ".join(names)) for text, names in told.items()]


def cautions(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers: the results' warnings, and what follows from the rest."""
    systems: dict[str, Any] = results["systems"]
    lines, notes = list[str](results["warnings"]), dict[str, list[str]]()
    for name, system in systems.items():
        found, cost = system["contamination"] or {"checked": False}, system["cost"]
        if not found["checked"] and system["targets"]:
            why = found.get("reason") or "nothing is known of its training data"
            lines.append(f"{name}: whether it had seen the prompts before was not checked: {why}.")
        if note := system["card"].get("note"):
            notes.setdefault(note, []).append(name)
        if cost and cost["tokens_per_second"] is None:
            why = cost["note"] if cost["note"].startswith("not measured") else "not measured: it answered nothing"
            lines.append(f"{name}: speed {why}.")
    lines += [f"{', '.join(names)}: {note}." for note, names in notes.items()]
    lines += [f"{spec} failed: {reason}" for spec, reason in results.get("failed", {}).items()]
    if judge := results["judge"]:
        own = [name for name, system in systems.items() if judge["model"] in system["targets"]]
        lines += [f"The judge, {judge['model']}, is one of those that it judges: {name}." for name in own]
        if nonsense := [f"{pair['nonsense']} ({pair['system']})" for pair in judge["pairs"] if pair["nonsense"]]:
            told = ", ".join(nonsense)
            lines.append(f"The judge gave no usable verdict on some prompts, which count for nobody: {told}.")
    return list(dict.fromkeys(lines))
