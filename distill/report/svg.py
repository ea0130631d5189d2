"""The plots of a comparison as SVG that grows with the page: x in percent of the width, y and text in pixels.

So text keeps its size on a phone, and no script is needed to lay anything out. Lines and areas, which can't be given in
percent, are drawn in an inner SVG that is stretched, with strokes that are not. Each system has a colour and a shape;
`data-system` is what the page's script highlights by, `<title>` what it shows on hovering.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from distill.report.findings import Results, minus

SHAPES = (
    "M0-5.2A5.2 5.2 0 1 1 0 5.2A5.2 5.2 0 1 1 0-5.2z",
    "M-4.8-4.8H4.8V4.8H-4.8z",
    "M0-6.6L6.6 0L0 6.6L-6.6 0z",
    "M0-6L5.8 4.6H-5.8z",
    "M0 6L5.8-4.6H-5.8z",
    "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2z",
    "M0-6.5L6.2-2L3.8 5.3H-3.8L-6.2-2z",
    "M0-7L1.8-2.2H6.8L2.8 1L4.3 6L0 3L-4.3 6L-2.8 1L-6.8-2.2H-1.8z",
)
"""A marker for each system in turn, around (0, 0)."""
DASHES = ("", "7 4", "2 3", "10 3 2 3", "5 2", "1 4", "12 4", "8 3 2 3 2 3")
MOST_TICKS = 5
"""On a logarithmic axis, as far as fewer leave any."""
SURE = 0.04
"""Share of the range that is left free on either side of the data."""


@dataclass(frozen=True)
class Axis:
    """Values to percent of the width (or, for heights, to a share); ticks are round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """0 to 100."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else self._plain(value)
        return round(100 * (min(max(value, low), high) - low) / (high - low), 3)

    def _plain(self, value: float) -> tuple[float, float, float]:
        return self.low, self.high, value


def axis(values: Iterable[float], count: int = 5, zero: bool = False) -> Axis:
    """A linear axis around the values, with about `count` ticks at 1, 2 or 5 times a power of ten."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known + [0.0] * zero), max(known + [0.0] * zero)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        pad = 0.1 * abs(high) if abs(high) > 1e-9 else 1.0
        low, high = low - pad, high + pad
    margin = SURE * (high - low)
    low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(float(f"{i * step:.12g}") for i in range(first, last + 1)))


def log_axis(values: Iterable[float]) -> Axis:
    """A logarithmic axis around positive values: ticks at whole multiples of powers of ten, or fewer of them."""
    known = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = min(known) / 1.25, max(known) * 1.25
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
        if len(ticks) <= MOST_TICKS:
            break
    return Axis(low, high, tuple(ticks or (known[0],)), log=True)


def tick_text(value: float, ticks: Sequence[float], percent: bool = False) -> str:
    """As many digits as tell the ticks apart, no more."""
    times = 100 if percent else 1
    step = min((abs(b - a) for a, b in pairwise(ticks)), default=abs(value) or 1) * times
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return minus(f"{value * times:,.{digits}f}") if value else "0"


class Style:
    """Colour class, shape and dash of each system, by its place among them. The baseline is the first, in grey."""

    def __init__(self, results: Results) -> None:
        names = list(results["systems"])
        names.sort(key=lambda name: name != results["baseline"])
        self.places = {name: i for i, name in enumerate(names)}

    def colour(self, system: str) -> str:
        place = self.places.get(system, 0)
        return f"s{(place + place // 8) % 8}"

    def dash(self, system: str) -> str:
        return DASHES[self.places.get(system, 0) % 8]

    def marker(self, system: str, x: str, y: float, told: str = "", hollow: bool = False, at: int | None = None) -> str:
        """At x (with its unit) and y pixels. hollow: not clear. told: shown on hovering. at: which point, for keys."""
        path = f'<path d="{SHAPES[self.places.get(system, 0) % 8]}"/>'
        kind = f"mark {self.colour(system)}{' hollow' if hollow else ''}"
        title = f"<title>{text(told)}</title>" if told else ""
        place = "" if at is None else f' data-at="{at}"'
        return (
            f'<svg class="{kind}" x="{x}" y="{number(y)}" data-system="{text(system)}"{place} overflow="visible">'
            f"{title}{path}</svg>"
        )

    def key(self, system: str) -> str:
        """The marker alone, for a line of text."""
        shape = SHAPES[self.places.get(system, 0) % 8]
        return (
            f'<svg class="key mark {self.colour(system)}" viewBox="-8 -8 16 16" aria-hidden="true">'
            f'<path d="{shape}"/></svg>'
        )


def text(value: str) -> str:
    """Escaped for HTML, inside and outside of quotes; control characters, which HTML forbids, are shown as ␀ … ␟."""
    told = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else c for c in value)
    return escape(told, quote=True)


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def drawing(height: float, label: str, inner: str, kind: str = "") -> str:
    return f'<svg class="plot {kind}" role="img" aria-label="{text(label)}" height="{number(height)}">{inner}</svg>'


def line(x1: str, y1: float, x2: str, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{number(y1)}" x2="{x2}" y2="{number(y2)}"/>'


def words(x: str, y: float, value: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x}" y="{number(y)}" text-anchor="{anchor}">{text(value)}</text>'


def x_axis(axis: Axis, height: float, names: Sequence[str]) -> str:
    """Grid lines and numbers below them; at the edges numbers stand within the plot."""
    parts: list[str] = []
    for tick, name in zip(axis.ticks, names, strict=True):
        at = axis.at(tick)
        zero = " zero" if tick == 0 and not axis.log else ""
        parts.append(line(f"{at}%", 0, f"{at}%", height, f"grid{zero}"))
        parts.append(words(f"{at}%", height + 18, name, "tick", "start" if at < 3 else "end" if at > 97 else "middle"))
    return "".join(parts)


def height_of(scale: Axis, value: float, height: float, up: bool) -> float:
    """Pixels from the top. up: larger values stand higher."""
    share = scale.at(value) / 100
    return height * (1 - share if up else share)


def clip(value: str, length: int) -> str:
    value = " ".join(value.split())
    return value if len(value) <= length else f"{value[: length - 1].rstrip()}…"
