"""A dream drawn as text while it forms: a lane per path, its image tokens, the gates, and which branch won.

On a terminal the lanes are drawn over themselves after each step; into a pipe each new step is one line.
Nothing here prints: whoever calls says where the text goes.
"""

import math
import os
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TextIO

from distill.dream.record import Branch, DreamRecord, Step
from distill.dream.view.records import arbitrated, winner

BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"spatial": "36", "temporal": "33", "causal": "35", "abstract": "34"}
"""SGR codes by lens: the terminal's own colours, so that its theme is kept."""
GUTTER = 14
"""Columns left of the tokens: lens, gates, verdict."""
SMALLEST, PIPED = 24, 120
"""Columns at least, and where there is no terminal to have any."""


class LiveLanes:
    """Draws what it is told of one dream; call `draw` with each partial record and `finish` with the whole.

    size: (columns, lines) of the terminal, asked at each drawing. ansi: draw over what was drawn. colour: use SGR.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        *,
        ansi: bool,
        colour: bool = False,
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
    ) -> None:
        self.write, self.ansi, self.colour, self.size = write, ansi, colour, size
        self._drawn = 0  # lines on the terminal that are ours to draw over
        self._said: dict[tuple[int, int], list[str]] = {}  # into a pipe: what was told of each step of each branch
        self._asked = False

    @classmethod
    def on(cls, stream: TextIO) -> "LiveLanes":
        """On a terminal drawn over itself, in colour unless NO_COLOR is set (https://no-color.org); elsewhere lines."""

        def write(text: str) -> None:
            stream.write(text)
            stream.flush()

        ansi = stream.isatty() and os.environ.get("TERM") != "dumb"
        return cls(write, ansi=ansi, colour=ansi and not os.environ.get("NO_COLOR"))

    def draw(self, record: DreamRecord) -> None:
        """The dream as far as it has formed."""
        if self.ansi:
            self._redraw(record, final=False)
        else:
            self._tell(record)

    def finish(self, record: DreamRecord) -> None:
        """The dream as it became: scores, gates, which branches are read, and which won."""
        if self.ansi:
            self._redraw(record, final=True)
            self._drawn = 0
            return
        self._tell(record)
        best = winner(record)
        lines = [f"{_name(record, i)}: {_verdict(branch, i == best, told=True)}" for i, branch in record.lanes]
        self.write("".join(f"{line}\n" for line in lines))

    def words(self, record: DreamRecord) -> None:
        """What the answer read: its words, before them the step that they attended to most, and a line for each step.

        Numbers before a step's tokens are those that they are replaced by.
        """
        if not record.words:
            return
        columns = max(SMALLEST, self.size()[0] - 1) if self.ansi else PIPED
        steps = [(record.branches[i], t) for i, t in record.read]
        shares = {part: fmean(getattr(word, part) for word in record.words) for part in ("question", "dream", "answer")}
        told = ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items())
        self.write("".join(f"{line}\n" for line in (clip(f"read: {told}", columns), *self._said_by(record, columns))))
        for s, (branch, t) in enumerate(steps):
            share = fmean(word.steps[s] for word in record.words)
            head = f"[{s + 1}] {visible(branch.lens)} {100 * share:.0f} %"
            tokens = "  ".join(f"{3 * s + r + 1} {token}" for r, token in enumerate(_tokens(branch.steps[t])))
            line = clip(f"{head:19} {tokens}", columns)
            self.write(self._style(line[: len(head)], COLOURS.get(branch.lens, "37")) + line[len(head) :] + "\n")

    def _said_by(self, record: DreamRecord, columns: int) -> list[str]:
        """The words of an answer, the number of a step before those that attended to it most."""
        words: list[str] = []
        styles: list[str] = []
        before = -1
        for word in record.words:
            best = max(range(len(word.steps)), key=word.steps.__getitem__)
            ink = COLOURS.get(record.branches[record.read[best][0]].lens, "37")
            if best != before:
                words.append(f"[{best + 1}]")
                styles.append(f"1;{ink}")
            words.append(visible(word.text))
            styles.append(ink)
            before = best
        inks = iter(styles)
        return [" ".join(self._style(word, next(inks)) for word in line) for line in _filled(words, columns)]

    def _tell(self, record: DreamRecord) -> None:
        lines = [] if self._asked else [visible(record.prompt)]
        self._asked = True
        for i, branch in record.lanes:
            for t, step in enumerate(branch.steps):
                if self._said.get((i, t)) != (tokens := _tokens(step)):  # it is new, or a user replaced some of it
                    lines.append(f"{_name(record, i)} {t + 1}: {' '.join(tokens)}")
                    self._said[i, t] = tokens
        self.write("".join(f"{line}\n" for line in lines))

    def _redraw(self, record: DreamRecord, final: bool) -> None:
        columns, rows = self.size()
        columns = max(SMALLEST, columns - 1)  # a full last column would wrap on some terminals
        lanes = record.lanes
        # What has scrolled away can't be drawn over, so the frame never outgrows the terminal.
        most = max(1, (rows - 3) // max(1, len(lanes)))
        best = winner(record) if final else None
        lines = [self._style(clip(visible(record.prompt), columns), "1"), ""]
        for i, branch in lanes:
            lines += self._lane(_name(record, i), branch, columns, most, final, i == best)
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self.write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self._drawn = len(lines)

    def _lane(self, name: str, branch: Branch, columns: int, most: int, final: bool, won: bool) -> list[str]:
        colour = COLOURS.get(branch.lens, "37")
        verdict = _verdict(branch, won) if final else ""
        style = ("32" if branch.kept else "2") if final else ""
        left = [(self._style(cell := clip(name, GUTTER - 2), f"1;{colour}"), cell)]
        if branch.gates and (most > 2 or not verdict):
            left.append((self._gates(branch), "x" * len(branch.gates)))
        if verdict:
            left.append((self._style(verdict, style), verdict))
        right = self._chain(branch.steps, columns - GUTTER, most, aside=final and not branch.kept)
        height = min(most, max(len(left), len(right), 2))
        bar = self._style("│", colour)
        lines: list[str] = []
        for row in range(height):
            cell, plain = left[row] if row < len(left) else ("", "")
            pad = " " * max(0, GUTTER - 2 - width(plain))
            lines.append(f"{cell}{pad}{bar} {right[row] if row < len(right) else ''}")
        return lines

    def _chain(self, steps: Sequence[Step], columns: int, most: int, aside: bool) -> list[str]:
        """The steps' tokens, filled into lines; where there are too many, the first make place for the last."""
        words: list[str] = []
        for t, step in enumerate(steps):
            words += (["→"] if t else []) + _tokens(step)
        lines = _filled(words, columns)
        if len(lines) > most:
            lines = [["…"], *lines[len(lines) - most + 1 :]]
        return [self._style(" ".join(line), "2") if aside and line else " ".join(line) for line in lines]

    def _gates(self, branch: Branch) -> str:
        """One bar an expert, in its lens's colour."""
        return "".join(
            self._style(BARS[round(_share(weight) * (len(BARS) - 1))], COLOURS.get(expert, "37"))
            for expert, weight in branch.gates.items()
        )

    def _style(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text


def _name(record: DreamRecord, number: int) -> str:
    """The lens; numbered where it has several paths."""
    lens = record.branches[number].lens
    same = [i for i, branch in enumerate(record.branches) if branch.lens == lens]
    return visible(lens if len(same) == 1 else f"{lens} {same.index(number) + 1}")


def _tokens(step: Step) -> list[str]:
    return [f"⟨{visible(slot.label)}⟩" for slot in step.slots]


def _verdict(branch: Branch, won: bool, told: bool = False) -> str:
    if not branch.steps:
        return "nothing dreamed" if told else ""
    verdict = ("★ won" if won else "✓ read") if branch.kept else ("set aside" if told else "✗")
    if not told:
        return f"{verdict} {branch.score:.2f}" if arbitrated(branch) else verdict
    parts = [verdict, f"steps {len(branch.steps)}"]
    if arbitrated(branch):
        parts.append(f"score {branch.score:.2f}")
    if branch.gates:
        parts.append(f"gates {' '.join(f'{visible(expert)} {weight:.2f}' for expert, weight in branch.gates.items())}")
    return ", ".join([*parts, visible(branch.provenance)])


def _share(value: float) -> float:
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0


def visible(text: str) -> str:
    """On one line, without anything that a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def width(text: str) -> int:
    """Columns that a terminal gives to the text: two for wide East Asian characters and emoji, none for marks."""
    return sum(_columns(c) for c in text)


def _columns(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def _filled(words: Sequence[str], columns: int) -> list[list[str]]:
    """Words, clipped if need be, in lines that fit; one empty line for none."""
    lines: list[list[str]] = [[]]
    used = 0
    for word in (clip(word, columns) for word in words):
        if lines[-1] and used + 1 + width(word) > columns:
            lines.append([])
            used = 0
        used += width(word) + (1 if lines[-1] else 0)
        lines[-1].append(word)
    return lines


def clip(text: str, columns: int) -> str:
    """The text if it fits, else its beginning and an ellipsis; an image token keeps its closing bracket."""
    if width(text) <= columns:
        return text
    end = "…⟩" if text.endswith("⟩") and columns > 2 else "…"
    kept, room = "", columns - width(end)
    for c in text:
        room -= _columns(c)
        if room < 0:
            break
        kept += c
    return kept.rstrip() + end
