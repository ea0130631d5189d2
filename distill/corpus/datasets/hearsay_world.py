"""The causal world of things that nobody has seen: their names are made up, and what a name means has to be looked up.

A question is one of causal_world.py about a `bamok`. A bamok is a kind of tilux and a tilux is made of glass: two facts
away. All questions are such that the answer depends on it. The graph knows these facts of all things. Of some kinds
training never asks about any thing (split `unseen`), so that no weights can know them; `familiar` questions are new
ones about things that it did ask about.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from distill.corpus.datasets.causal_world import (
    CRACKED,
    NATURE,
    PLACES,
    TEMPERATURES,
    THINGS,
    WHOLE,
    WORDS,
    State,
    asked,
    outcomes,
)
from distill.corpus.datasets.questions import Question, Step

VERSION = 1
"""Raised when the world changes."""
KINDS, UNSEEN_KINDS, EACH = 8, 2, 5
"""Kinds of each material, those of them that training never asks about, and things of each kind."""
DEPTHS = (1, 1, 2)
"""Actions in a question, drawn from evenly."""


def things_of(seed: int) -> dict[str, list[tuple[str, str, str]]]:
    """ "train" and "unseen" → their (thing, kind, material)."""
    draw = random.Random(f"names {seed}")
    sounds = ("bdfgklmnprtv", "aiou", "bdfgklmnprtv", "aiou", "kmnptx")
    names = draw.sample(["".join(sound) for sound in product(*sounds)], k=len(THINGS) * KINDS * (1 + EACH))
    found: dict[str, list[tuple[str, str, str]]] = {"train": [], "unseen": []}
    for material in THINGS:
        for number in range(KINDS):
            kind = names.pop()
            split = "unseen" if number < UNSEEN_KINDS else "train"
            found[split] += [(names.pop(), kind, material) for _ in range(EACH)]
    return found


def facts(seed: int) -> Iterator[list[Step]]:
    """Of every thing what it is, and what that is made of."""
    for things in things_of(seed).values():
        yield from (_known(*thing) for thing in things)


def _known(thing: str, kind: str, material: str) -> list[Step]:
    return [Step(thing, "kind of", kind), Step(kind, "made of", material), Step(material, "tends to", NATURE[material])]


def questions(size: int, held_out: int, seed: int) -> Iterator[Question]:
    """`size` training questions, then `held_out` of each other split; no question twice. Deterministic by seed."""
    things = things_of(seed)
    seen: set[str] = set()
    for split, count in (("train", size), ("familiar", held_out), ("unseen", held_out)):
        draw = random.Random(f"{split} {seed}")
        while count:
            question = _draw(draw, split, things["unseen" if split == "unseen" else "train"])
            if question is not None and question.prompt not in seen:
                seen.add(question.prompt)
                count -= 1
                yield question


def _draw(draw: random.Random, split: str, things: list[tuple[str, str, str]]) -> Question | None:
    """A question of the split, or None where the draw isn't one: twice the same in a row, or the same answer whatever
    the thing is made of."""
    thing, kind, material = draw.choice(things)
    start = State(draw.choice(PLACES), draw.choice(TEMPERATURES), draw.choice((WHOLE, WHOLE, CRACKED)))
    actions = draw.choices(list(WORDS), k=draw.choice(DEPTHS))
    if any(action == then for action, then in pairwise(actions)) or len(ends(start, actions)) == 1:
        return None
    return asked(thing, actions, outcomes(material, start, actions), split, _known(thing, kind, material))


def ends(start: State, actions: Sequence[str]) -> Counter[State]:
    """The states that actions may end in, each with the number of materials that it does of. The largest share is what
    the best guess is worth to whoever doesn't know the material."""
    return Counter(outcomes(material, start, actions)[-1] for material in THINGS)
