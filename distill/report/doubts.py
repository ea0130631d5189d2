"""What makes a comparison's numbers less than they seem: told before anybody reads them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from distill.exam.measured import Measured
from distill.teacher.names import name_key

FEW = 20
"""Prompts below which a report warns that intervals are wide and tests weak."""

CONTAMINATED = (("exact", "word for word"), ("near", "in nearly the same words"), ("contained", "within a longer text"))
"""Kinds of contamination, and how they are told."""

Entries = Mapping[str, Mapping[str, Any]]
"""`systems` of results."""


def doubts(entries: Entries, prompts: int) -> list[str]:
    """What limits a comparison. prompts: that were asked."""
    warnings: list[str] = []
    if prompts < FEW:
        warnings.append(f"Only {prompts} prompts were asked: intervals are wide and small differences can't show.")
    trained = {name: entry for name, entry in entries.items() if entry["targets"]}
    warnings += _of(
        trained,
        lambda entry: entry["seeds"] == 1,
        "one training each, so the intervals say nothing of what another training seed would change",
    )
    warnings += _of(trained, lambda entry: entry["seeds"] == 2, "two seeds hardly tell how much seeds matter")
    for name, entry in entries.items():
        if entry["left_out"]:
            warnings.append(
                f"{name}: {entry['left_out']} of {prompts} prompts don't fit its context, and its values are without "
                "them; differences are taken on the prompts that both can take."
            )
    for kind, words in CONTAMINATED:
        found = {name: (entry["contamination"] or {}).get(kind, 0) for name, entry in entries.items()}
        if told := ", ".join(f"{name} {count}" for name, count in found.items() if count):
            warnings.append(f"Of the {prompts} prompts, so many were in a training {words}: {told}.")
    tokens = {name: (entry["trained_on"] or {}).get("tokens") for name, entry in entries.items()}
    if len(set(filter(None, tokens.values()))) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in tokens.items() if count)
        warnings.append(f"They were not trained for as many tokens: {told}.")
    onward = {name: entry["trained_on"].get("onward") or "nothing" for name, entry in entries.items() if tokens[name]}
    if len(set(onward.values())) > 1:
        told = "; ".join(f"{name} by {stages}" for name, stages in onward.items())
        warnings.append(f"They did not go on from their training alike: {told}.")
    return warnings


def mixed(name: str, abouts: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Trainings of one system should differ by their seed alone: else it isn't the seed that their spread tells of.

    abouts: `trained_on` of each.
    """
    # Their settings tell how long they were trained: that the best checkpoint of one is earlier is the seed's doing.
    known = [
        {key: value for key, value in about["settings"].items() if not key.startswith(("evaluate.", "export.", "seed"))}
        | {"data": about["data"], "what they went on by": about["onward"]}
        for about in abouts
        if about is not None
    ]
    keys = dict.fromkeys(key for one in known for key in one)
    other = [key for key in keys if any(one.get(key) != known[0].get(key) for one in known)]
    told = f"{name}: its trainings differ in {', '.join(other)}, not in the seed alone; better name them apart."
    return [told] if other else []


def cut_short(name: str, found: Sequence[Measured]) -> list[str]:
    """One that thought up to the limit has said nothing: its numbers are those of empty answers."""
    cut, answers = sum(each.cut_thinking for each in found), sum(len(each.answers) for each in found)
    told = f"{name}: {cut} of {answers} answers are empty, for it was still thinking when its tokens were spent"
    remedy = "; raise teacher.thinking_tokens" * (found[0].card.kind == "ollama")  # for others it is no room
    return [f"{told}{remedy}."] if cut else []


def cautions(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers: the results' warnings, and what follows from the rest."""
    systems: dict[str, Any] = results["systems"]
    lines = list[str](results["warnings"])
    targets = {name: system for name, system in systems.items() if system["targets"]}
    for name, system in targets.items():
        found = system["contamination"] or {"checked": False}
        if not found["checked"]:
            why = found.get("reason") or "nothing is known of its training data"
            lines.append(f"{name}: whether it had seen the prompts before was not checked: {why}.")
        if system["cost"] and system["cost"]["tokens_per_second"] is None:
            lines.append(f"{name}: speed {system['cost']['note']}.")
    for note in dict.fromkeys(system["card"].get("note") for system in systems.values()):
        lines += _of(systems, lambda system, note=note: note and system["card"].get("note") == note, note)
    lines += [f"{spec} failed: {reason}" for spec, reason in results.get("failed", {}).items()]
    if judge := results["judge"]:
        own = [name for name, system in systems.items() if _key(judge["model"]) in map(_key, system["targets"])]
        lines += [f"The judge, {judge['model']}, is one of those that it judges: {name}." for name in own]
        if told := ", ".join(f"{pair['nonsense']} ({pair['system']})" for pair in judge["pairs"] if pair["nonsense"]):
            lines.append(f"The judge gave no usable verdict on some prompts, which count for nobody: {told}.")
    return list(dict.fromkeys(lines))


def _key(spec: str) -> object:
    """Equal for specs that name one model of Ollama."""
    return name_key(spec.removeprefix("ollama:")) if spec.startswith("ollama:") else spec


def _of(entries: Entries, holds: Callable[[Any], object], told: str) -> Iterable[str]:
    """One line for all systems of which something holds."""
    names = [name for name, entry in entries.items() if holds(entry)]
    return [f"{', '.join(names)}: {told}."] if names else []
