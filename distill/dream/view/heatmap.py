"""Dreams as a heatmap: a row a role of a path, a column a step, the colour how sure the dreamer was.

Below each path's three roles stands the importance of its steps. Where the embeddings are at hand, the likeness of
all steps to each other is drawn beside it: bright squares off the diagonal are paths that dream the same. Where
attention was noted, what each word of the answer read stands below.

Shape legend: S paths, T steps, N = S·T steps that were dreamed, D 512.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from distill.dream.record import ROLES, Branch, DreamRecord
from distill.dream.view.records import arbitrated, winner

SHOWN = 6
"""Dreams in one picture, the last ones."""
CELL, ROW, THIN = 204, 32, 22
"""Pixels: width of a step, height of a role, height of the importance."""
LEFT, EDGE, GAP = 236, 28, 14
WORDS = 60
"""Of an answer in the picture, the first ones."""
LIKENESS = 24
"""Pixels of a step in the square of likenesses."""

INK, SOFT, GROUND, EMPTY = "#1d2129", "#5c6370", "#fdfcfa", "#eceae4"
SURE = ("#f4f1e6", "#bfe0cf", "#69b9b5", "#2a7f9e", "#1d3f74")
"""Probability 0 to 1: light to dark, so that it is read in grey too."""
MATTERS = ("#faf3ea", "#f6cf9a", "#e58b4f", "#a8323e")
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc"),
)
"""Of many scripts, the first that draw a text; then those of Chinese, Japanese and Korean."""
NOWHERE = "\U0010fffd"
"""Of no script: it is drawn as what a font lacks."""
LENS_INK = {"spatial": "#0b7285", "temporal": "#a15c00", "causal": "#b3264b", "abstract": "#5f3dc4"}

Colour = tuple[int, int, int]


def heatmap(records: Sequence[DreamRecord], vectors: Sequence[NDArray[Any] | None] = ()) -> bytes:
    """PNG of the last dreams, one below the other. vectors: (S, T, 3, D) of each record, None where there are none."""
    held = list(vectors) if vectors else [None] * len(records)
    shown = list(zip(records, held, strict=True))[-SHOWN:]
    parts = [_Picture(record, vector) for record, vector in shown]
    _warn_of_boxes(record for record, _ in shown)
    wide = max((part.width for part in parts), default=640)
    legend = 56
    image = Image.new("RGB", (wide, legend + sum(part.height for part in parts)), GROUND)
    draw = ImageDraw.Draw(image)
    _legend(draw, len(records) - len(shown))
    top = legend
    for part in parts:
        part.draw(draw, top)
        top += part.height
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class _Picture:
    """One record's place in the picture."""

    def __init__(self, record: DreamRecord, vectors: NDArray[Any] | None) -> None:
        self.record = record
        self.lanes = [(i, branch) for i, branch in enumerate(record.branches)]
        self.steps = max((len(branch.steps) for branch in record.branches), default=0)
        self.likeness, self.owners = _likeness(record, vectors)
        self.lane_height = 3 * ROW + THIN + GAP
        below = max(len(self.lanes) * self.lane_height, len(self.likeness) * LIKENESS + 24)
        self.words = record.words[:WORDS] if record.read else []
        self.reading = 92 + below
        self.height = self.reading + (len(self.words) * THIN + 56 if self.words else 0) + EDGE
        self.right = LEFT + max(2, self.steps) * CELL + EDGE
        self.width = self.right + (len(self.likeness) * LIKENESS + 24 + EDGE if len(self.likeness) else 0)

    def draw(self, draw: ImageDraw.ImageDraw, top: int) -> None:
        draw.line([(EDGE, top), (self.width - EDGE, top)], fill="#dfdcd4")
        room = self.width - 2 * EDGE
        draw.text((EDGE, top + 14), _fit(self.record.prompt, 22, room), fill=INK, font=_font(22, self.record.prompt))
        for t in range(self.steps):
            draw.text((LEFT + t * CELL + 6, top + 64), f"step {t + 1}", fill=SOFT, font=_font(14))
        best = winner(self.record)
        for row, (i, branch) in enumerate(self.lanes):
            self._lane(draw, top + 88 + row * self.lane_height, branch, i == best)
        if len(self.likeness):
            self._square(draw, top + 88)
        if self.words:
            self._reading(draw, top + self.reading)

    def _lane(self, draw: ImageDraw.ImageDraw, top: int, branch: Branch, won: bool) -> None:
        ink = LENS_INK.get(branch.lens, SOFT)
        draw.rectangle([EDGE, top, EDGE + (5 if branch.kept else 1), top + 3 * ROW + THIN - 2], fill=ink)
        draw.text((EDGE + 14, top), _fit(branch.lens, 20, 120), fill=ink, font=_font(20))
        verdict = ("won" if won else "read") if branch.kept else "set aside"
        score = f" {branch.score:.2f}" if arbitrated(branch) else ""
        told = f"{verdict}{score}" if branch.steps else "nothing dreamed"
        draw.text((EDGE + 14, top + 28), told, fill=INK if branch.kept else SOFT, font=_font(15))
        draw.text((EDGE + 14, top + 50), _fit(branch.provenance, 13, 120), fill=SOFT, font=_font(13))
        for r, role in enumerate((*ROLES, "importance")):
            y = top + r * ROW + (9 if r < 3 else 4)
            draw.text((LEFT - 8, y), role, fill=SOFT, font=_font(13), anchor="ra")
        for t in range(self.steps):
            step = branch.steps[t] if t < len(branch.steps) else None
            x = LEFT + t * CELL
            for r in range(3):
                slot = step.slots[r] if step else None
                box = (x, top + r * ROW, x + CELL - 4, top + (r + 1) * ROW - 2)
                _cell(draw, box, slot and slot.probability, slot.label if slot else "", SURE, 16)
            y = top + 3 * ROW
            _cell(draw, (x, y, x + CELL - 4, y + THIN - 2), step and step.importance, "", MATTERS, 13)

    def _reading(self, draw: ImageDraw.ImageDraw, top: int) -> None:
        """A row a word of the answer, a column a step: its share of what the word read of the dream."""
        more = len(self.record.words) - len(self.words)
        told = "what each word read of the dream, %" + (f" ({more} more words are not shown)" if more else "")
        draw.text((EDGE, top + 8), told, fill=SOFT, font=_font(14))
        wide = (self.right - EDGE - LEFT) // len(self.record.read)
        for s, (i, t) in enumerate(self.record.read):
            lens = self.record.branches[i].lens
            x, ink = LEFT + s * wide, LENS_INK.get(lens, SOFT)
            draw.text((x, top + 30), _fit(f"{lens[:1]}{t + 1}", 13, wide), fill=ink, font=_font(13))
            for row, word in enumerate(self.words):
                y = top + 50 + row * THIN
                _cell(draw, (x, y, x + wide - 2, y + THIN - 2), word.steps[s], "", SURE, 12)
        for row, word in enumerate(self.words):
            y = top + 50 + row * THIN + THIN // 2
            draw.text(
                (LEFT - 8, y), _fit(word.text, 14, LEFT - EDGE - 8), fill=INK, font=_font(14, word.text), anchor="rm"
            )

    def _square(self, draw: ImageDraw.ImageDraw, top: int) -> None:
        """Cosine of each step to each, −1 to 1 drawn as 0 to 1; a bar of its lens's colour before each row."""
        draw.text((self.right, top - 26), "likeness of steps (cosine, −1 to 1)", fill=SOFT, font=_font(14))
        for a, row in enumerate(self.likeness):
            y = top + a * LIKENESS
            lens = self.record.branches[self.owners[a]].lens
            draw.rectangle([self.right, y, self.right + 5, y + LIKENESS - 2], fill=LENS_INK.get(lens, SOFT))
            for b, value in enumerate(row):
                x = self.right + 10 + b * LIKENESS
                fill = _shade((float(value) + 1) / 2, SURE)
                draw.rectangle([x, y, x + LIKENESS - 2, y + LIKENESS - 2], fill=fill)


def _likeness(record: DreamRecord, vectors: NDArray[Any] | None) -> tuple[NDArray[np.float32], list[int]]:
    """(N, N) cosines between the dreamed steps' triplets (3·D numbers each), and the branch of each step."""
    places = [(i, t) for i, branch in enumerate(record.branches) for t in range(len(branch.steps))]
    if vectors is not None:
        places = [(i, t) for i, t in places if i < vectors.shape[0] and t < vectors.shape[1]]
    if vectors is None or not places:
        return np.zeros((0, 0), np.float32), []
    rows = np.stack([np.asarray(vectors[i, t], np.float32).ravel() for i, t in places])
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return rows @ rows.T, [i for i, _ in places]


def _cell(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    value: float | None,
    label: str,
    ramp: Sequence[str],
    size: int,
) -> None:
    """A value as colour, its label and its number; an empty cell where there is no value."""
    if value is None:
        draw.rectangle(box, fill=EMPTY)
        return
    fill = _shade(value, ramp)
    ink = "#ffffff" if sum(w * c for w, c in zip((0.299, 0.587, 0.114), fill, strict=True)) < 140 else INK
    draw.rectangle(box, fill=fill)
    middle = (box[1] + box[3]) // 2
    number = f"{100 * value:.0f}" if ramp is SURE else f"{value:.2f}"
    draw.text((box[2] - 6, middle), number, fill=ink, font=_font(12), anchor="rm")
    draw.text((box[0] + 7, middle), _fit(label, size, CELL - 44), fill=ink, font=_font(size, label), anchor="lm")


def _legend(draw: ImageDraw.ImageDraw, more: int) -> None:
    x = EDGE
    for name, ramp in (("probability, %", SURE), ("importance, 0 to 1", MATTERS)):
        for i in range(120):
            draw.rectangle([x + i, 22, x + i + 1, 34], fill=_shade(i / 119, ramp))
        draw.text((x + 130, 28), name, fill=SOFT, font=_font(14), anchor="lm")
        x += 290
    if more:
        draw.text((x, 28), f"{more} earlier dreams are not shown", fill=SOFT, font=_font(14), anchor="lm")


def _shade(value: float, ramp: Sequence[str]) -> Colour:
    """Along a ramp of hexadecimal colours; a value that is no number is at its beginning."""
    place = min(1.0, max(0.0, value)) * (len(ramp) - 1) if math.isfinite(value) else 0.0
    low = min(int(place), len(ramp) - 2)
    first, second = (bytes.fromhex(colour[1:]) for colour in ramp[low : low + 2])
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(first, second, strict=True)]
    return mixed[0], mixed[1], mixed[2]


@cache
def _fonts(size: int) -> list[Any]:
    """The system's fonts of FONTS, else the Latin one that Pillow brings."""
    found: list[Any] = []
    for name in FONTS:
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return found or [ImageFont.load_default(size)]


def _font(size: int, text: str = "") -> Any:
    """The font that draws most of a text, of equals the first."""
    return min(_fonts(size), key=lambda font: len(_lacking(font, text)))


def _lacking(font: Any, text: str) -> set[str]:
    """The characters for which a font has but its empty box."""
    return {c for c in set(text) if c.isprintable() and not c.isascii() and not _has(font, c)}


@cache
def _has(font: Any, character: str) -> bool:
    return bytes(font.getmask(character)) != bytes(font.getmask(NOWHERE))


def _warn_of_boxes(records: Iterable[DreamRecord]) -> None:
    """Say which characters are drawn as boxes: each text is drawn with one font."""
    texts: list[str] = []
    for record in records:
        slots = (slot for branch in record.branches for step in branch.steps for slot in step.slots)
        texts += [record.prompt, *(slot.label for slot in slots), *(word.text for word in record.words)]
    if lacking := set[str]().union(*(_lacking(_font(16, text), text) for text in texts)):
        told = "".join(sorted(lacking)[:20]) + ("…" if len(lacking) > 20 else "")
        why = "which no font here has with the rest of their text"
        warnings.warn(f"the picture has boxes for {told}, {why}; export .html", stacklevel=4)


def _fit(text: str, size: int, room: int) -> str:
    """As much of the text, on one line, as `room` pixels hold."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    font = _font(size, text)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text.rstrip()}…"
