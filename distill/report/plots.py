"""The plots of a report, drawn by matplotlib as SVG that lives in the page.

Colours are the page's own variables, so plots follow its light and dark scheme.
"""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from distill.exam.metrics.catalogue import metric_of
from distill.report.findings import SIGNS, WORDS, Results, difference_text, minus, p_equals, pair_text, verdict, visible

GLYPHS = "●■◆▲▼✚⬟★"
MARKERS = "osD^vPp*"
"""A marker for each system in turn, and the character that looks like it."""
COLOURS = {f"#00f0{i:02x}": f"var(--s{i})" for i in range(8)} | {
    "#00f1f1": "var(--soft)",
    "#00f1f2": "var(--faint)",
    "#00f1f3": "var(--card)",
    "#00f1f4": "var(--better)",
    "#00f1f5": "var(--worse)",
    "#00f1f0": "var(--ink)",
}
"""matplotlib knows no variables: what it is told → what the page shall read."""
SOFT, FAINT, CARD, BETTER, WORSE, INK = list(COLOURS)[8:]
styled = matplotlib.rc_context(
    {
        "svg.fonttype": "none",
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


def looks(results: Results) -> dict[str, tuple[int, int]]:
    """System → the numbers of its colour and of its marker, 0 to 7; another colour at each turn of the markers. The
    baseline is the first, in grey."""
    names = sorted(results["systems"], key=lambda name: name != results["baseline"])
    return {name: ((i + i // 8) % 8, i % 8) for i, name in enumerate(names)}


@styled
def forest(results: Results, metric: str) -> Markup:
    """Each difference in one metric with its interval; "" where there is none. Hollow: not clear."""
    kind, style = metric_of(metric), looks(results)
    found = [d for d in results["differences"] if d["metric"] == metric and d["value"] is not None]
    if not found:
        return Markup()
    figure, axes = _axes(46 * len(found) + 54)
    beside, labels = axes.get_yaxis_transform(), list[str]()
    for i, d in enumerate(found):
        judged, who = verdict(d), pair_text(d, results["baseline"])
        corrected = "" if d["p_corrected"] is None else f", corrected p {p_equals(d['p_corrected'])}"
        labels.append(f"{who}: {difference_text(d)}{corrected} · {WORDS[judged]}")
        result = f"{SIGNS.get(judged, '')} {difference_text(d, interval=False)}".strip()
        axes.text(0, i + 0.2, clip(who, 30), transform=beside, va="center")
        shade = {"better": BETTER, "worse": WORSE}.get(judged, SOFT)
        axes.text(1, i + 0.2, result, transform=beside, va="center", ha="right", color=shade)
        colour, shape = list(COLOURS)[style[d["system"]][0]], MARKERS[style[d["system"]][1]]
        inside = colour if judged in ("better", "worse") else CARD
        if d["low"] is not None:
            axes.plot([d["low"], d["high"]], [i + 0.7] * 2, color=colour, linewidth=3)
        axes.plot([d["value"]], [i + 0.7], shape, color=colour, markerfacecolor=inside, markersize=10, clip_on=False)
    ends = (d[name] for d in found for name in ("low", "value", "high") if d[name] is not None)
    _scale(axes, "x", [0.0, *ends], kind.percent)
    axes.set_ylim(len(found), 0)
    axes.set_yticks([])
    axes.axvline(0, color=SOFT)
    way = {1: "better →", -1: "← better", 0: ""}[kind.better]
    axes.set_xlabel(" · ".join(filter(None, [way, "percentage points" if kind.percent else ""])))
    return _svg(figure, f"{kind.label}, difference to {results['baseline']}: {'; '.join(labels)}")


def _axes(height: float, left: float = 8) -> tuple[Figure, Axes]:
    """An empty plot. Pixels; the axes keep `left` free."""
    figure = Figure(figsize=(WIDE / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((left / WIDE, 46 / height, (WIDE - left - 12) / WIDE, (height - 54) / height))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    return figure, axes


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


def _svg(figure: Figure, label: str) -> Markup:
    """label: read out in its place. It makes the ids, too: one page holds many plots."""
    written = io.StringIO()
    with warnings.catch_warnings():  # of letters that its own fonts lack: the page has others
        warnings.simplefilter("ignore", UserWarning)
        with matplotlib.rc_context({"svg.hashsalt": label}):
            figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    told = written.getvalue()
    told = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", told[told.index("<svg") :], flags=re.S)
    inner = told[told.index(">") + 1 :].replace("xlink:href", "href")
    inner = re.sub(r' id="\w+_\d+"| id="matplotlib[^"]*"| transform="rotate\(-0 [^"]*"|(?<=\n) +', "", inner)
    inner = re.sub(r"font: [^;\"]*|font-family: [^;\"]*", "font: 14px system-ui, sans-serif", inner)
    inner = re.sub("|".join(COLOURS), lambda found: COLOURS[found[0]], inner)
    box = f'viewBox="0 0 {WIDE} {figure.get_figheight() * 72:g}"'
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(visible(label))}" {box}>{inner}')


def clip(value: str, length: int) -> str:
    value = "".join(c for c in " ".join(value.split()) if c.isprintable())
    return value if len(value) <= length else f"{value[: length - 1].rstrip()}…"
