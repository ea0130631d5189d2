"""A small world in which a dream can be right or wrong: things, what is done to them, and what becomes of them.

A question names a thing, its state and up to five actions; the answer is its state afterwards. What an action does
depends on the thing's material, which is never said, and on the state before it, so that the order counts: metal
bends back and forth, hot glass cracks in cold water, frozen rubber breaks. The true dream is the simulation's own
steps, a lens each for place, temperature and condition, and one for what is known of the thing.

Some pairs of thing and action never occur in training (split `combination`), nor do five actions in a row (split
`depth`); `familiar` questions are new but of the training's kind.
"""

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise

from distill.corpus.datasets.questions import Question, Step

VERSION = 1
"""Raised when the world changes."""

THINGS: dict[str, tuple[str, ...]] = {
    "glass": ("vase", "bottle", "mirror", "bulb"),
    "wood": ("plank", "ladle", "chair", "crate"),
    "metal": ("nail", "key", "kettle", "coin"),
    "wax": ("candle", "crayon", "seal", "figurine"),
    "paper": ("letter", "map", "book", "kite"),
    "rubber": ("ball", "boot", "tire", "duck"),
}
"""Material → the things made of it."""

LATER: dict[str, tuple[str, ...]] = {
    "clay": ("pot", "tile", "jug", "bowl"),
    "cloth": ("towel", "scarf", "flag", "sock"),
}
"""Things that training never tells of, of materials that do what no other does: to be learned afterwards."""

NATURE = {"glass": "shatter", "wood": "split", "metal": "bend", "wax": "melt", "paper": "soak", "rubber": "bounce"}
NATURE_LATER = {"clay": "harden", "cloth": "soak"}

SHELF, TABLE, FLOOR, POND = PLACES = ("on the shelf", "on the table", "on the floor", "in the pond")
FROZEN, COLD, WARM, HOT = TEMPERATURES = ("frozen", "cold", "warm", "hot")
WHOLE, CRACKED, BROKEN, BENT, MELTED, BURNT, SOGGY = "whole", "cracked", "broken", "bent", "melted", "burnt", "soggy"

WORDS = {
    "drop": "dropped",
    "lift": "lifted",
    "push": "pushed",
    "swap": "swapped",
    "throw": "thrown into the water",
    "heat": "heated",
    "cool": "cooled",
    "freeze": "left in the snow",
    "hammer": "hammered",
    "twist": "twisted",
    "mend": "mended",
    "dry": "dried",
}
"""Action → how a question says it."""

MOVES: dict[str, dict[str, str]] = {
    "drop": {SHELF: FLOOR, TABLE: FLOOR},
    "lift": {POND: FLOOR, FLOOR: TABLE, TABLE: SHELF},
    "push": {SHELF: TABLE, TABLE: FLOOR, FLOOR: POND},
    "swap": {SHELF: FLOOR, FLOOR: SHELF, TABLE: POND, POND: TABLE},
    "throw": dict.fromkeys(PLACES, POND),
}
"""Action → place before → place after; other places stay."""

DEEPER = {WHOLE: CRACKED, CRACKED: BROKEN}
TURNS = {WHOLE: BENT, BENT: WHOLE}
MENDS = {BROKEN: CRACKED, CRACKED: WHOLE, BENT: WHOLE}
SHATTERS = {WHOLE: BROKEN, CRACKED: BROKEN}
BURNS: dict[str, dict[str, str]] = {
    "wax": dict.fromkeys((WHOLE, CRACKED, BROKEN, BENT), MELTED),
    "wood": {WHOLE: BURNT, CRACKED: BURNT},
    "paper": {SOGGY: WHOLE, WHOLE: BURNT, BENT: BURNT, CRACKED: BURNT},
    "clay": {SOGGY: WHOLE, BENT: CRACKED, CRACKED: BROKEN},
    "cloth": {SOGGY: WHOLE, WHOLE: BURNT, BENT: BURNT},
}
SOAKS: dict[str, dict[str, str]] = {
    "paper": dict.fromkeys((WHOLE, CRACKED, BENT), SOGGY),
    "clay": dict.fromkeys((BENT, BROKEN), SOGGY),
    "cloth": dict.fromkeys((WHOLE, BENT), SOGGY),
}

UNSEEN_ACTIONS = 2
"""Actions of each thing that training never shows."""
TRAIN_DEPTHS = (1, 2, 2, 3, 3, 3, 4, 4, 4)
"""Drawn from evenly."""
DEEPEST = 5


@dataclass(frozen=True)
class State:
    place: str
    temperature: str
    condition: str


def made_of(things: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Thing → its material."""
    return {thing: material for material, some in things.items() for thing in some}


def act(material: str, state: State, action: str) -> State:
    """The state after an action."""
    place = MOVES.get(action, {}).get(state.place, state.place)
    temperature = _temperature(state, action, place)
    after = replace(state, place=place, temperature=temperature)
    return replace(after, condition=_condition(material, state, after, action))


def _temperature(state: State, action: str, place: str) -> str:
    level = TEMPERATURES.index(state.temperature)
    if place == POND and state.place != POND:
        return COLD
    if action == "heat":
        return TEMPERATURES[min(level + 1, 3)] if place != POND else state.temperature
    if action == "cool":
        return TEMPERATURES[max(level - 1, 0)]
    return FROZEN if action == "freeze" else state.temperature


def _condition(material: str, before: State, after: State, action: str) -> str:
    """What an action leaves of a thing: by its hit, its twist, its fall, water and fire."""
    condition = before.condition
    changes: dict[str, str] = {}
    brittle = material == "glass" or (material in ("wax", "rubber") and before.temperature == FROZEN)
    if action == "drop" and brittle:
        changes = {SHELF: SHATTERS, TABLE: DEEPER}.get(before.place, {})
    elif action in ("hammer", "twist"):
        changes = _force(material, brittle, before.temperature, action)
    elif action == "mend":
        changes = MENDS
    elif action == "dry":
        changes = {SOGGY: WHOLE}
    elif action == "heat" and after.temperature == HOT:
        changes = BURNS.get(material, {})
    elif after.place == POND and before.place != POND:
        cracks = material == "glass" and before.temperature == HOT
        changes = DEEPER if cracks else SOAKS.get(material, {})
    return changes.get(condition, condition)


def _force(material: str, brittle: bool, temperature: str, action: str) -> dict[str, str]:
    if brittle:
        return SHATTERS
    if material == "metal":
        return TURNS if action == "hammer" or temperature in (WARM, HOT) else {}
    if material == "wood":
        return DEEPER
    if material == "paper":
        return TURNS if action == "twist" else {}
    if material == "wax":
        return TURNS if temperature in (WARM, HOT) else DEEPER
    if material == "clay":
        return {SOGGY: BENT} if action == "twist" else SHATTERS
    if material == "cloth" and action == "twist":
        return {SOGGY: WHOLE, WHOLE: BENT}
    return {}


def unseen_pairs(seed: int) -> set[tuple[str, str]]:
    """(thing, action) pairs kept from training. Of each material and action at most half of the things lack it."""
    draw = random.Random(f"pairs {seed}")
    pairs: set[tuple[str, str]] = set()
    for things in THINGS.values():
        actions = list(WORDS)
        draw.shuffle(actions)
        for i, thing in enumerate(things):
            pairs |= {(thing, action) for action in actions[UNSEEN_ACTIONS * i : UNSEEN_ACTIONS * (i + 1)]}
    return pairs


def questions(size: int, held_out: int, seed: int) -> Iterator[Question]:
    """`size` training questions, then `held_out` of each other split; no question twice. Deterministic by seed."""
    counts = {"train": size, "familiar": held_out, "combination": held_out, "depth": held_out}
    return drawn(made_of(THINGS), unseen_pairs(seed), counts, seed)


def drawn(
    things: Mapping[str, str], unseen: Set[tuple[str, str]], counts: Mapping[str, int], seed: int
) -> Iterator[Question]:
    """So many questions of each split, about some things (thing → material). unseen: (thing, action) pairs that only
    the questions of split `combination` hold."""
    seen: set[str] = set()
    for split, count in counts.items():
        draw = random.Random(f"{split} {seed}")
        while count:
            question = _draw(draw, split, unseen, things)
            if question is not None and question.prompt not in seen:
                seen.add(question.prompt)
                count -= 1
                yield question


def _draw(draw: random.Random, split: str, unseen: Set[tuple[str, str]], things: Mapping[str, str]) -> Question | None:
    """A question of the split, or None where the draw isn't one: of an unseen pair that changes nothing, say."""
    thing = draw.choice([*things])
    depth = DEEPEST if split == "depth" else draw.choice(TRAIN_DEPTHS)
    start = State(draw.choice(PLACES), draw.choice(TEMPERATURES), draw.choice((WHOLE, WHOLE, CRACKED)))
    allowed = [action for action in WORDS if (thing, action) not in unseen]
    actions = draw.choices(allowed, k=depth)
    place = draw.randrange(depth)
    if split == "combination":
        actions[place] = draw.choice([action for action in WORDS if (thing, action) in unseen])
    if any(action == then for action, then in pairwise(actions)):
        return None  # twice the same that changes nothing would be one step of a dream
    states = outcomes(things[thing], start, actions)
    if split == "combination" and states[place] == states[place + 1]:
        return None
    material = things[thing]
    known = [Step(thing, "made of", material), Step(material, "tends to", (NATURE | NATURE_LATER)[material])]
    return asked(thing, actions, states, split, known)


def outcomes(material: str, start: State, actions: Sequence[str]) -> list[State]:
    """The state at first and after each action."""
    states = [start]
    for action in actions:
        states.append(act(material, states[-1], action))
    return states


def asked(thing: str, actions: list[str], states: list[State], split: str, known: list[Step]) -> Question:
    """A question, its answer and its true dream. known: of the thing, that the question doesn't say."""
    start, end = states[0], states[-1]
    told = ", then ".join(WORDS[action] for action in actions)
    changes = list(zip(states, actions, states[1:], strict=False))
    return Question(
        prompt=(
            f"A {thing} is {start.place}, {start.temperature} and {start.condition}. It is {told}. What becomes of it?"
        ),
        answer=f"The {thing} is {end.place}, {end.temperature} and {end.condition}.",
        split=split,
        depth=len(actions),
        dream={
            "spatial": [Step(before.place, action, after.place) for before, action, after in changes],
            "temporal": [Step(before.temperature, action, after.temperature) for before, action, after in changes],
            "causal": [Step(before.condition, action, after.condition) for before, action, after in changes],
            "abstract": known,
        },
    )
