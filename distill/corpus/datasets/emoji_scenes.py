"""Scenes of emoji: one thing or two on a plain ground, with questions that only the picture answers.

Of each picture is asked what there is, where each thing is, what is beside it, whether something is there. Names are
the emoji's own; the true dream says how the things stand to each other, first of the one that is asked about.

Some things never occur in training (split `thing`), nor do some pairs of things (split `combination`); `familiar`
pictures are new but of the training's kind.
"""

import hashlib
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from distill.corpus.datasets.emoji import LICENCE as LICENCE
from distill.corpus.datasets.emoji import Emoji, emoji_files, read_emoji
from distill.corpus.datasets.emoji import emoji_digest as digest
from distill.corpus.datasets.questions import Drawn, Question, Step
from distill.errors import BadInput
from distill.events import Listener, silent

__all__ = ["LICENCE", "VERSION", "digest", "questions"]

VERSION = 4
"""Raised when the scenes change."""

SIDE = 128
"""Pixels of a scene's side."""
GROUNDS = ("#ffffff", "#f4efe2", "#e3f0e0", "#dfeaf5", "#f3e1e6", "#e8e4f2")
UNSEEN_THINGS, UNSEEN_PAIRS = 0.1, 0.15
"""Shares that training never shows."""
SINGLE = 0.25
"""Share of pictures with one thing."""

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CENTRES = {"left of": ((33, 64), (95, 64)), "above": ((64, 33), (64, 95))}
"""Relation → where the first and the second thing stand, about. Of two things the left or upper one is named first."""
PLACES = {
    "in the middle": (64, 64),
    "on the left": (33, 64),
    "on the right": (95, 64),
    "at the top": (64, 33),
    "at the bottom": (64, 95),
}
JITTER = 6
SIZES = (40, 48, 54)


@dataclass(frozen=True)
class Scene:
    """things: one or two; at: their (x, y) and size in pixels; relation: of the first to the second, or its place."""

    things: tuple[Emoji, ...]
    relation: str
    at: tuple[tuple[int, int, int], ...]
    ground: str

    def png(self) -> bytes:
        from PIL import Image

        canvas = Image.new("RGB", (SIDE, SIDE), self.ground)
        for thing, (x, y, size) in zip(self.things, self.at, strict=True):
            small = Image.open(io.BytesIO(thing.png)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
            canvas.paste(small, (x - size // 2, y - size // 2), small)
        file = io.BytesIO()
        canvas.save(file, "PNG")
        return file.getvalue()

    def drawn(self) -> Drawn:
        about = repr((VERSION, [thing.name for thing in self.things], self.at, self.ground))
        labels = tuple(thing.name for thing in self.things)
        at = tuple((x / SIDE, y / SIDE) for x, y, _ in self.at)
        return Drawn(f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.png", self.png, labels, at)

    def seen_from(self, name: str) -> "Scene":
        """The same, that thing first, whose relation to the other is told."""
        if len(self.things) == 1 or self.things[0].name == name:
            return self
        return replace(self, things=self.things[::-1], at=self.at[::-1], relation=OPPOSITE[self.relation])

    def dream(self) -> dict[str, list[Step]]:
        first, *second = (thing.name for thing in self.things)
        spatial = [Step(first, "is", self.relation)]
        if second:
            spatial = [Step(first, self.relation, second[0]), Step(second[0], OPPOSITE[self.relation], first)]
        return {"spatial": spatial}


def a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def questions(size: int, held_out: int, seed: int, files: str = "", listen: Listener = silent) -> Iterator[Question]:
    """`size` training questions, then `held_out` of each other split; no picture twice. Deterministic by seed.

    files: see `emoji_files`. Raises BadInput for more questions than there are scenes about.
    """
    emoji = read_emoji(emoji_files(files, listen))
    draw = random.Random(f"things {seed}")
    unseen = set(draw.sample([thing.name for thing in emoji], max(2, round(UNSEEN_THINGS * len(emoji)))))
    seen: set[str] = set()
    for split, count in (("train", size), ("familiar", held_out), ("thing", held_out), ("combination", held_out)):
        draw, tries = random.Random(f"{split} {seed}"), 0
        while count:
            scene = _draw(draw, split, emoji, unseen, seed)
            tries += 1
            if tries > 1000 + 50 * (size + held_out):
                raise BadInput(f"capture.dataset_size={size}: so many scenes aren't there; ask for fewer")
            if scene is None or (drawn := scene.drawn()).name in seen:
                continue
            seen.add(drawn.name)
            others = [thing for thing in emoji if (thing.name in unseen) == (split == "thing")]
            for question in _asked(draw, scene, drawn, split, others)[:count]:
                count -= 1
                yield question


def apart(first: str, second: str, seed: int) -> bool:
    """Whether training never shows the two together."""
    return random.Random(f"{seed} {min(first, second)} {max(first, second)}").random() < UNSEEN_PAIRS


def _draw(draw: random.Random, split: str, emoji: list[Emoji], unseen: set[str], seed: int) -> Scene | None:
    """A scene of the split, or None where the draw isn't one."""
    single = draw.random() < SINGLE and split != "combination"
    things = draw.sample(emoji, 1 if single else 2)
    names = [thing.name for thing in things]
    if any(name in unseen for name in names) != (split == "thing"):
        return None
    if not single and split != "thing" and apart(names[0], names[1], seed) != (split == "combination"):
        return None
    relation = draw.choice(list(PLACES if single else CENTRES))
    centres = [PLACES[relation]] if single else CENTRES[relation]

    def jitter() -> int:
        return draw.randint(-JITTER, JITTER)

    at = tuple((x + jitter(), y + jitter(), draw.choice(SIZES)) for x, y in centres)
    return Scene(tuple(things), relation, at, draw.choice(GROUNDS))


def _asked(draw: random.Random, scene: Scene, drawn: Drawn, split: str, others: list[Emoji]) -> list[Question]:
    """The picture's questions: seven of two things, four of one. Both things are asked about, and one that is there
    beside one that isn't: of fewer a student learns late to look which is meant, and whether it is there."""
    names = [thing.name for thing in scene.things]
    said = " ".join([a(names[0]), scene.relation, *map(a, names[1:])])
    asked = [("What is in this picture?", f"{said.capitalize()}.", scene)]
    for about in map(scene.seen_from, names):
        one, *other = (thing.name for thing in about.things)
        asked.append((f"Where is the {one}?", f"The {' the '.join([f'{one} is {about.relation}', *other])}.", about))
        if other:
            asked.append((f"What is {OPPOSITE[about.relation]} the {one}?", f"{a(other[0]).capitalize()}.", about))
    # Of another kind than what is there: a poodle is a dog.
    absent = [thing.name for thing in others if thing.kind not in {thing.kind for thing in scene.things}]
    if absent:
        asked.append((f"Is there {a(name := draw.choice(absent))} in this picture?", f"No, there is no {name}.", scene))
    about = scene.seen_from(name := draw.choice(names))
    asked.append((f"Is there {a(name)} in this picture?", f"Yes, there is {a(name)}.", about))
    return [
        Question(f"{text} {drawn.path}", answer, split, len(names), seen.dream(), (drawn,))
        for text, answer, seen in asked
    ]
