"""The causal world in pictures: what causal-world tells of a thing's state is seen here.

Three kinds of questions, in turns: what becomes of the thing in a picture, what there is in it, and what changed from
one picture to another. Splits and dreams are causal-world's.

Drawn by rule, so that what is seen is never in doubt: the thing's colour is its material, its shape tells it from
others of that material; a rim shows its temperature (ice white, blue, orange, red), the shape its condition.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from distill.corpus.datasets import causal_world as world
from distill.corpus.datasets.causal_world import State
from distill.corpus.datasets.questions import Drawn, Question, Step
from distill.errors import BadInput

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

VERSION = 1
"""Raised when the pictures change."""

SIDE, HALF = 128, 15
"""Pixels of a picture's side, and half a thing's width."""
SEEN = ("spatial", "temporal", "causal")
"""The lenses of a state's place, temperature and condition."""
PLACED = {world.SHELF: (34, 34), world.TABLE: (92, 58), world.FLOOR: (34, 104), world.POND: (96, 106)}
"""Place → the middle of a thing's foot."""
COLOURS = {
    "glass": "#8fd3c8",
    "wood": "#8a5a2b",
    "metal": "#7d8794",
    "wax": "#e8c547",
    "paper": "#f7f3e8",
    "rubber": "#b0413e",
}
RIMS = {world.FROZEN: "#f0f8ff", world.COLD: "#2f6fd6", world.WARM: "#ef8a17", world.HOT: "#e01e1e"}
SOOT, WATER, INK = "#1d1a19", "#4f8fcf", "#222222"


@dataclass(frozen=True)
class Scene:
    """One thing in its state."""

    thing: str
    state: State

    def drawn(self) -> Drawn:
        words = (self.thing, self.state.place, self.state.temperature, self.state.condition)
        # By its words a file's name would tell the answer.
        return Drawn(hashlib.sha256(repr((VERSION, words)).encode()).hexdigest()[:16] + ".png", self.png, words)

    def png(self) -> bytes:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (SIDE, SIDE), "#ece7dc")
        draw = ImageDraw.Draw(image)
        draw.rectangle((8, 34, 62, 38), "#a98256")  # shelf
        draw.rectangle((66, 58, 120, 62), "#6e4f32")  # table
        draw.rectangle((72, 62, 75, 92), "#6e4f32")
        draw.rectangle((112, 62, 115, 92), "#6e4f32")
        draw.rectangle((0, 92, SIDE, SIDE), "#b9b2a3")  # floor
        draw.ellipse((64, 94, 126, 124), "#5aa0d8")  # pond
        _thing(draw, self)
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()


def _thing(draw: "ImageDraw", scene: Scene) -> None:
    """The thing as its condition leaves it: its outline moved, split, laid flat, blackened or dripping."""
    x, foot = PLACED[scene.state.place]
    material, condition = world.material_of(scene.thing), scene.state.condition
    colour = SOOT if condition == world.BURNT else COLOURS[material]
    outline = _outline(world.THINGS[material].index(scene.thing))
    lean = 0.7 if condition == world.BENT else 0.0
    tall, wide = (0.35, 1.5) if condition == world.MELTED else (1.0, 1.0)
    for half, apart in ((-1, -5), (1, 5)) if condition == world.BROKEN else ((0, 0),):
        points = outline
        if half:  # closed along the middle
            own = sorted((point for point in outline if point[0] * half > 0), key=lambda point: point[1])
            points = [(0.0, 0.0), *own, (0.0, 1.0)]
        placed = [(x + apart + HALF * (u * wide + lean * v), foot - HALF * 2 * v * tall) for u, v in points]
        draw.polygon(placed, colour, RIMS[scene.state.temperature], width=3)
    if condition == world.BURNT:  # a spot of what it was
        draw.ellipse((x - 3, foot - 14, x + 3, foot - 8), COLOURS[material])
    if condition == world.CRACKED:
        draw.line([(x - 4, foot - 28), (x + 3, foot - 20), (x - 4, foot - 11), (x + 2, foot - 2)], INK, 2)
    if condition == world.SOGGY:
        for shift in (-12, 0, 12):
            draw.ellipse((x + shift - 2, foot - 1, x + shift + 2, foot + 7), WATER)


def _outline(kind: int) -> list[tuple[float, float]]:
    """Corners (u from −1 to 1, v from 0 at the foot to 1) of a box, a pyramid, a diamond or an hourglass."""
    return [
        [(-1.0, 0.0), (-1.0, 1.0), (1.0, 1.0), (1.0, 0.0)],
        [(-1.0, 0.0), (0.0, 1.0), (1.0, 0.0)],
        [(0.0, 0.0), (-1.0, 0.5), (0.0, 1.0), (1.0, 0.5)],
        [(-1.0, 0.0), (-0.35, 0.5), (-1.0, 1.0), (1.0, 1.0), (0.35, 0.5), (1.0, 0.0)],
    ][kind]


def questions(size: int, held_out: int, seed: int) -> Iterator[Question]:
    """`size` training questions, then `held_out` of each other split; none twice. Deterministic by seed. Raises
    BadInput where there aren't so many."""
    kinds, seen = cycle((_becomes, _what, _changed)), set[str]()
    left = {"train": size, "familiar": held_out, "combination": held_out, "depth": held_out}
    # More are told than asked: what is in a picture, or changed between two, is asked once.
    for told in world.questions(size * 4 + 2000, held_out * 4 + 2000, seed):
        question = next(kinds)(told)
        if left[told.split] and question.prompt not in seen:
            seen.add(question.prompt)
            left[told.split] -= 1
            yield question
        if not any(left.values()):
            return
    raise BadInput(f"capture.dataset_size={size}: so many questions aren't there; ask for fewer")


def _scenes(told: Question) -> list[Scene]:
    """The thing before, and after each action."""
    lenses = [told.dream[lens] for lens in SEEN]
    states = [State(*(steps[0].what for steps in lenses))]
    states += [State(*(step.result for step in steps)) for steps in zip(*lenses, strict=True)]
    return [Scene(told.dream["abstract"][0].what, state) for state in states]


def _becomes(told: Question) -> Question:
    before = _scenes(told)[0].drawn()
    asked = told.prompt.split(". ", 1)[1]
    return Question(f"{asked} {before.path}", told.answer, told.split, told.depth, told.dream, (before,))


def _what(told: Question) -> Question:
    """Of the thing as it is at the end."""
    scene = _scenes(told)[-1]
    picture, made_of = scene.drawn(), told.dream["abstract"][:1]
    place, temperature, condition = words = astuple(scene.state)
    answer = f"A {scene.thing} {place}, {temperature} and {condition}."
    dream = {lens: [Step(scene.thing, "is", word)] for lens, word in zip(SEEN, words, strict=True)}
    prompt = f"What is in this picture? {picture.path}"
    return Question(prompt, answer, told.split, 1, {**dream, "abstract": made_of}, (picture,))


def _changed(told: Question) -> Question:
    """From before to the end."""
    first, *_, last = _scenes(told)
    changes = {
        lens: [Step(before, "becomes", after)]
        for lens, before, after in zip(SEEN, astuple(first.state), astuple(last.state), strict=True)
        if before != after
    }
    said = [f"was {step.what} and is {step.result} now" for (step,) in changes.values()]
    answer = f"The {first.thing} {', '.join(said)}." if said else "Nothing changed."
    pictures, dream = (first.drawn(), last.drawn()), {**changes, "abstract": told.dream["abstract"][:1]}
    prompt = f"What changed? {' '.join(picture.path for picture in pictures)}"
    return Question(prompt, answer, told.split, len(said), dream, pictures)
