"""The plots of a report, drawn by matplotlib as SVG that lives in the page.

Colours are the page's own variables, so plots follow its light and dark scheme; `data-system` is what its script
highlights by, `<title>` what it shows on hovering.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

from distill.exam.metrics.catalogue import metric_of
from distill.report.findings import (
    SIGNS,
    WORDS,
    Results,
    difference_text,
    interval_text,
    minus,
    p_equals,
    verdict,
)
from distill.report.tables import size

GLYPHS = "●■◆▲▼✚⬟★"
MARKERS = "osD^vPp*"
"""A marker for each system in turn, and the character that looks like it."""
DASHES = ("-", (0, (7, 4)), (0, (2, 3)), (0, (10, 3, 2, 3)), (0, (5, 2)), (0, (1, 4)), (0, (12, 4)), (0, (8, 3, 2, 3)))
COLOURS = {f"#00f0{i:02x}": f"var(--s{i})" for i in range(8)} | {
    "#00f1f0": "var(--ink)",
    "#00f1f1": "var(--soft)",
    "#00f1f2": "var(--faint)",
    "#00f1f3": "var(--card)",
    "#00f1f4": "var(--better)",
    "#00f1f5": "var(--worse)",
}
"""matplotlib knows no variables: what it is told → what the page shall read."""
INK, SOFT, FAINT, CARD, BETTER, WORSE = list(COLOURS)[8:]
matplotlib_style = matplotlib.rc_context(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",  # else equal results would make different files
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "font.size": 14.0,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "grid.color": FAINT,
    }
)
WIDE = 440
"""Pixels of a plot's own width; the page scales it."""


class Looks:
    """Colour, marker and dash of each system, by its place among them. The baseline is the first, in grey."""

    def __init__(self, results: Results) -> None:
        names = sorted(results["systems"], key=lambda name: name != results["baseline"])
        self.places = {name: i for i, name in enumerate(names)}
        self.plots = 0
        """Drawn so far: on one page each has ids of its own."""

    def place(self, system: str) -> int:
        """Of its colour, 0 to 7: another at each turn of the markers."""
        place = self.places.get(system, 0)
        return (place + place // 8) % 8

    def colour(self, system: str) -> str:
        return list(COLOURS)[self.place(system)]

    def glyph(self, system: str) -> str:
        """Its marker in a line of text."""
        return GLYPHS[self.shape(system)]

    def shape(self, system: str) -> int:
        """Of its marker, 0 to 7."""
        return self.places.get(system, 0) % 8


class Drawing:
    """One plot. Marks are told of in the page by what is kept of them here, and found again by their ids."""

    def __init__(self, looks: Looks, height: float, left: float = 8, top: float = 8, bottom: float = 46) -> None:
        """Pixels; the axes keep left, top and bottom free."""
        self.looks, self.height, self.tags = looks, height, list[str]()
        self.figure = Figure(figsize=(WIDE / 72, height / 72), dpi=72)
        FigureCanvasSVG(self.figure)
        across, up = (WIDE - left - 12) / WIDE, (height - top - bottom) / height
        self.axes: Axes = self.figure.add_axes((left / WIDE, bottom / height, across, up))
        self.axes.spines[:].set_visible(False)
        self.axes.tick_params(length=0)
        self.axes.set_axisbelow(True)

    def tag(self, system: str, told: str = "") -> str:
        """An id for what is drawn next: whose it is, and what is shown on hovering."""
        title = f"<title>{visible(told)}</title>" if told else ""
        self.tags.append(f'<g class="{"mark" if told else ""}" data-system="{visible(system)}">{title}')
        return f"tag-{len(self.tags) - 1}"

    def marker(self, system: str, x: float, y: float, told: str, hollow: bool = False) -> None:
        """hollow: not clear."""
        colour = self.looks.colour(system)
        self.axes.plot(
            [x],
            [y],
            MARKERS[self.looks.shape(system)],
            markersize=10,
            markerfacecolor=CARD if hollow else colour,
            markeredgecolor=colour if hollow else CARD,
            markeredgewidth=2.2 if hollow else 1.2,
            clip_on=False,
            zorder=4,
            gid=self.tag(system, told),
        )

    def line(self, system: str, x: Sequence[float], y: Sequence[float], width: float, dash: Any = "-") -> None:
        colour = self.looks.colour(system)
        self.axes.plot(x, y, color=colour, linestyle=dash, linewidth=width, gid=self.tag(system))

    def svg(self, label: str, kind: str) -> Markup:
        """label: read out in its place. kind: the page's classes."""
        written = io.StringIO()
        self.looks.plots += 1
        with warnings.catch_warnings():  # of letters that its own fonts lack: the page has others
            warnings.simplefilter("ignore", UserWarning)
            self.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        told = written.getvalue()
        told = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", told[told.index("<svg") :], flags=re.S)
        inner = told[told.index(">") + 1 :].replace("xlink:href", "href")
        inner = re.sub(r'<g id="tag-(\d+)">', lambda found: self.tags[int(found[1])], inner)
        inner = re.sub(r' id="\w+_\d+"| id="matplotlib[^"]*"| transform="rotate\(-0 [^"]*"|(?<=\n) +', "", inner)
        # One page holds many plots, whose clips and markers are found by their ids.
        inner = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>p{self.looks.plots}-", inner)
        inner = re.sub(r"font: [^;\"]*|font-family: [^;\"]*", "font: 14px system-ui, sans-serif", inner)
        inner = re.sub("|".join(COLOURS), lambda found: COLOURS[found[0]], inner)
        box = f'viewBox="0 0 {WIDE} {self.height:g}"'
        return Markup(f'<svg class="plot {kind}" role="img" aria-label="{visible(label)}" {box}>{inner}')


def visible(text: str) -> Markup:
    """Escaped for HTML, inside and outside of quotes; control characters, which HTML forbids, are shown as ␀ … ␟."""
    return escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else c for c in text))


def clip(value: str, length: int) -> str:
    value = "".join(c for c in " ".join(value.split()) if c.isprintable())
    return value if len(value) <= length else f"{value[: length - 1].rstrip()}…"


def _scale(axes: Axes, name: str, values: Sequence[float], percent: bool = False) -> None:
    """Room around the values of the axis "x" or "y", a few round ticks, a grid; shares in percent."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set(**{f"{name}lim": (low - room, high + room)})
    axis: Any = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(4))

    def told(value: float, _place: int | None = None) -> str:
        return minus(f"{(100 if percent else 1) * value:,.6g}")

    axis.set_major_formatter(FuncFormatter(told))
    axes.grid(axis="x" if name == "x" else "y")


@matplotlib_style
def forest(results: Results, metric: str, looks: Looks) -> Markup:
    """Each other system's difference to the baseline in one metric, with its interval; "" where there is none."""
    kind = metric_of(metric)
    found = [d for d in results["differences"] if d["metric"] == metric and d["value"] is not None]
    if not found:
        return Markup()
    plot = Drawing(looks, 46 * len(found) + 54)
    axes, beside = plot.axes, plot.axes.get_yaxis_transform()
    labels: list[str] = []
    for i, d in enumerate(found):
        judged = verdict(d)
        corrected = "" if d["p_corrected"] is None else f", corrected p {p_equals(d['p_corrected'])}"
        labels.append(f"{d['system']}: {difference_text(d)}{corrected} · {WORDS[judged]}")
        result = f"{SIGNS.get(judged, '')} {difference_text(d, interval=False)}".strip()
        colour = {"better": BETTER, "worse": WORSE}.get(judged, SOFT)
        axes.text(0, i + 0.2, clip(d["system"], 30), transform=beside, va="center")
        axes.text(1, i + 0.2, result, transform=beside, va="center", ha="right", color=colour)
        if d["low"] is not None:
            plot.line(d["system"], [d["low"], d["high"]], [i + 0.7] * 2, 3)
        plot.marker(d["system"], d["value"], i + 0.7, labels[-1], hollow=judged not in ("better", "worse"))
    ends = (d[name] for d in found for name in ("low", "value", "high") if d[name] is not None)
    _scale(axes, "x", [0.0, *ends], kind.percent)
    axes.set_ylim(len(found), 0)
    axes.set_yticks([])
    axes.axvline(0, color=SOFT)
    way = {1: "better →", -1: "← better", 0: ""}[kind.better]
    axes.set_xlabel(" · ".join(filter(None, [way, "percentage points" if kind.percent else ""])))
    return plot.svg(f"{kind.label}, difference to {results['baseline']}: {'; '.join(labels)}", "forest")


@matplotlib_style
def curves(results: Results, field: str, looks: Looks) -> Markup:
    """`field` ("loss", "validation_loss") over the tokens trained on, a line a target; "" where nobody has any."""
    lines: list[tuple[str, str, list[tuple[float, float]]]] = []
    for name, system in results["systems"].items():
        for curve in system["curves"]:
            known = [(p["tokens"], p.get(field)) for p in curve["points"] if p.get("tokens") is not None]
            points = [(x, y) for x, y in known if y is not None and math.isfinite(y)]
            if len(points) > 1:
                lines.append((name, curve["target"], points))
    if not lines:
        return Markup()
    plot = Drawing(looks, 290, left=60)
    labels: list[str] = []
    for name, target, points in lines:
        plot.line(name, [x for x, _ in points], [y for _, y in points], 1.8, DASHES[looks.shape(name)])
        x, y = points[-1]
        labels.append(f"{target}: {y:.3f} after {x:,.0f} tokens")
        plot.marker(name, x, y, labels[-1])
    # The first steps' losses would press all that matters to the floor.
    _scale(plot.axes, "y", [y for *_, points in lines for _, y in points[len(points) // 20 :]])
    plot.axes.xaxis.set_major_locator(MaxNLocator(4))
    plot.axes.xaxis.set_major_formatter(EngFormatter())
    plot.axes.set_xlabel("tokens trained on →")
    return plot.svg(f"{field.replace('_', ' ')} over tokens: {'; '.join(labels)}", "curves")


@matplotlib_style
def frontier(results: Results, across: str, looks: Looks) -> Markup:
    """Quality over `across` ("bytes", "tokens_per_second"), logarithmic, better is up; "" for none. Rings are the
    frontier of size, speed and quality."""
    found = [p for p in results["frontier"]["points"] if p["quality"] is not None and (p[across] or 0) > 0]
    if not found:
        return Markup()
    name, small_first = results["frontier"]["quality"], across == "bytes"
    metric = metric_of(name)
    pace = {"alone": ", one prompt at a time", "in batches": ", in batches"}.get(
        results["frontier"].get("speed_of"), ""
    )
    plot = Drawing(looks, 300, left=70, top=26)
    axes, labels, ends = plot.axes, list[str](), list[float]()
    for p in found:
        # A point's own interval is that on the prompts that all systems have; older results have none.
        entry = {"value": p["quality"], "low": p.get("low"), "high": p.get("high")}
        value, interval = interval_text(entry, name)
        much = size(p["bytes"]) if small_first else f"{p['tokens_per_second']:.3g} tokens a second{pace}"
        labels.append(f"{p['system']}: {f'{value} {interval}'.strip()}, {much}")
        ends += [end for end in entry.values() if end is not None]
        if interval:
            plot.line(p["system"], [p[across]] * 2, [p["low"], p["high"]], 2)
        if p["on_frontier"]:
            axes.plot([p[across]], [p["quality"]], "o", markersize=20, markerfacecolor="none", markeredgecolor=INK)
        plot.marker(p["system"], p[across], p["quality"], labels[-1])
    axes.set_xscale("log")
    axes.set_xlim(min(p[across] for p in found) / 1.3, max(p[across] for p in found) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axes.xaxis.set_major_formatter(EngFormatter("B" if small_first else ""))
    axes.minorticks_off()
    _scale(axes, "y", ends, metric.percent)
    if metric.better < 0:
        axes.invert_yaxis()
    axes.set_xlabel("← smaller" if small_first else f"faster{pace} →")
    axes.set_title(f"↑ better: {metric.label}", loc="left", fontsize=14, color=SOFT)
    return plot.svg(f"{metric.label} over {across.replace('_', ' ')}: {'; '.join(labels)}", "frontier")
