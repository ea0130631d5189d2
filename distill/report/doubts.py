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


def doubts(entries: Mapping[str, Mapping[str, Any]], prompts: int) -> list[str]:
    """What limits a comparison. entries: `systems` of its results; prompts: that were asked."""
    warnings: list[str] = []
    alone = [name for name, entry in entries.items() if entry["seeds"] == 1]
    if prompts <= NONE_CLEAR and len(alone) == len(entries):
        warnings.append(
            f"Only {prompts} prompt{'s were' if prompts > 1 else ' was'} asked: whatever the difference, none can be "
            f"called clear with fewer than {NONE_CLEAR + 1}. Ask more."
        )
    elif prompts < FEW:
        warnings.append(f"Only {prompts} prompts were asked: intervals are wide and small differences can't show.")
    if alone:
        warnings.append(
            f"One training each of {', '.join(alone)}: the numbers say how much the choice of prompts matters, and "
            "nothing of what another training seed would change."
        )
    if pairs := [name for name, entry in entries.items() if entry["seeds"] == 2]:
        warnings.append(
            f"Two trainings each of {', '.join(pairs)}: two seeds hardly tell how much seeds matter, so intervals are "
            "very wide. Train three or more."
        )
    for name, entry in entries.items():
        if entry["left_out"]:
            warnings.append(
                f"{name}: {entry['left_out']} of {prompts} prompts don't fit its context; differences "
                "are taken on the prompts that both can take."
            )
    warnings += masked(entries)
    warnings += seen_before(entries)
    tokens = {
        name: entry["trained_on"]["tokens"]
        for name, entry in entries.items()
        if entry["trained_on"] and entry["trained_on"].get("tokens")
    }
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
        found = entry["contamination"]
        parts = [
            f"{found[kind]} {words}"
            for kind, words in (
                ("exact", "word for word"),
                ("near", "in nearly the same words"),
                ("contained", "within a longer text"),
            )
            if found["checked"] and found[kind]
        ]
        if parts:
            told.setdefault(f"{', '.join(parts)}", []).append(name)
    return [
        f"Of the {next(iter(entries.values()))['contamination']['prompts']} prompts these were in the training of "
        f"{', '.join(names)}: {text}."
        for text, names in told.items()
    ]
