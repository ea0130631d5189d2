"""Dream records to look at: one as an engine leaves it, one of the backbone's, and one that tries to break out."""

import re

from distill.dream.record import Branch, DreamRecord, Edge, Slot, Step, Word
from distill.mining.triplets import LENSES

CHAINS = {
    "spatial": [
        ("a glass ball", "lies on", "the shelf"),
        ("the shelf", "is above", "the stone floor"),
        ("the stone floor", "is below", "a glass ball"),
        ("a glass ball", "is near", "the edge"),
        ("the edge", "is over", "the stone floor"),
    ],
    "temporal": [
        ("a hand", "pushes", "a glass ball"),
        ("a glass ball", "rolls", "to the edge"),
        ("a glass ball", "falls", "to the floor"),
        ("a glass ball", "hits", "the stone floor"),
        ("a glass ball", "breaks", "into pieces"),
    ],
    "causal": [
        ("the push", "moves", "a glass ball"),
        ("gravity", "pulls", "a glass ball"),
        ("the hard floor", "stops", "the fall"),
        ("the impact", "shatters", "the glass"),
    ],
    "abstract": [
        ("a fragile thing", "meets", "a hard thing"),
        ("force", "exceeds", "strength"),
        ("a whole", "becomes", "parts"),
    ],
}
SCORES = {"spatial": 0.31, "temporal": 0.94, "causal": 0.87, "abstract": 0.46}


def _varied(*place: int) -> float:
    """A number in 0 to 1 that looks drawn and is always the same."""
    seed = sum((i + 3) * 7919 * (p + 1) for i, p in enumerate(place))
    return (seed * 2654435761 % 4096) / 4095


def engine_record() -> DreamRecord:
    """Four paths of 5, 5, 4 and 3 steps with 13 temporal edges, and causal ones both ways at each step."""
    branches: list[Branch] = []
    for k, lens in enumerate(LENSES):
        steps = [
            Step(
                *(
                    Slot(label, 100 * k + 10 * t + r, round(0.42 + 0.57 * _varied(k, t, r), 4))
                    for r, label in enumerate(triple)
                ),
                importance=round((0.25 + 0.7 * _varied(k, t)) * (0.5 + SCORES[lens] / 2), 4),
            )
            for t, triple in enumerate(CHAINS[lens])
        ]
        weights = [0.06 + 0.1 * _varied(k, i, 9) + (0.7 if i == k else 0) for i in range(4)]
        gates = {name: round(w / sum(weights), 4) for name, w in zip(LENSES, weights, strict=True)}
        branches.append(Branch(lens, steps, SCORES[lens], SCORES[lens] > 0.5, f"engine path {k}", gates))
    lengths = [len(branch.steps) for branch in branches]
    edges = [
        Edge((k, t), (k, t + 1), "temporal", round(0.3 + 0.65 * _varied(k, t, 5), 4))
        for k in range(4)
        for t in range(lengths[k] - 1)
    ]
    edges += [
        Edge((a, t), (b, t), "causal", round(0.02 + 0.7 * _varied(a, b, t) ** 3, 4))
        for t in range(5)
        for a in range(4)
        for b in range(4)
        if a != b and t < lengths[a] and t < lengths[b]
    ]
    answer = (
        "It falls to the stone floor and breaks into pieces: the floor stops it at once, "
        "and glass is too brittle to take the impact."
    )
    return DreamRecord(
        "A glass ball lies on a shelf above a stone floor. Someone pushes it over the edge. What happens to it?",
        "engine",
        branches,
        edges,
        answer,
        0.0431,
        [_word(i, text, 3 * (lengths[1] + lengths[2])) for i, text in enumerate(re.findall(r"\s*\S+", answer))],
    )


def _word(number: int, text: str, tokens: int) -> Word:
    drawn = [_varied(number, n) ** 4 for n in range(tokens)]
    return Word(text, 0.5, 0.3, 0.2, [round(part / sum(drawn), 5) for part in drawn])


def backbone_record() -> DreamRecord:
    """As decoded: no gates, no graph, two lenses empty."""
    chains = {
        "spatial": [("a ball", "release", "falls")],
        "temporal": [],
        "causal": [("a ball", "hits", "the floor")] * 2,
    }
    branches = [
        Branch(
            lens,
            [Step(*(Slot(label, i, 0.75) for i, label in enumerate(triple))) for triple in chains.get(lens, [])],
            0.0,
            True,
            "backbone",
        )
        for lens in LENSES
    ]
    return DreamRecord("What happens when you drop a ball?", "backbone", branches, [], "It falls.", 1.25)


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; <!-- {{dreams}} "
    "\u2028 \x1b[31m \udc80 日本語"
)


def hostile_record() -> DreamRecord:
    """Every text that a user or a model may have written, and all of it markup."""
    slot = Slot(HOSTILE, 0, 0.5)
    branch = Branch(HOSTILE, [Step(slot, slot, slot, 0.5)] * 2, 0.5, True, HOSTILE, {HOSTILE: 1.0})
    words = [Word(HOSTILE, 0.5, 0.3, 0.2, [1 / 6] * 6)]
    return DreamRecord(HOSTILE, HOSTILE, [branch], [Edge((0, 0), (0, 1), "temporal", 0.5)], HOSTILE, 0.1, words)


def as_it_forms(record: DreamRecord) -> list[DreamRecord]:
    """What a listener is told: a record after each step, without answer, scores or edges, then the whole."""
    longest = max(len(branch.steps) for branch in record.branches)
    partial = [
        DreamRecord(
            record.prompt,
            record.dreamer,
            [
                Branch(branch.lens, branch.steps[:n], 0.0, False, branch.provenance, branch.gates)
                for branch in record.branches
            ],
        )
        for n in range(1, longest + 1)
    ]
    return [*partial, record]
