"""The plots of a comparison: differences, wins and losses, prompts, learning curves, the frontier. SVG as text."""

import math
from collections.abc import Sequence
from typing import Any

from distill.exam.metrics.catalogue import metric_of, shown
from distill.report.findings import (
    SIGNS,
    WORDS,
    Results,
    Verdict,
    difference_text,
    interval_text,
    minus,
    p_equals,
    verdict,
)
from distill.report.svg import (
    Axis,
    Style,
    axis,
    clip,
    drawing,
    height_of,
    line,
    log_axis,
    number,
    text,
    tick_text,
    words,
    x_axis,
)
from distill.report.tables import size

# Differences to the baseline.

ROW = 46


def forest(results: Results, metric: str, style: Style) -> str:
    """Each other system's difference to the baseline in one metric, with its interval; "" where there is none."""
    kind = metric_of(metric)
    found = [d for d in results["differences"] if d["metric"] == metric and d["value"] is not None]
    if not found:
        return ""
    ends = [value for d in found for value in (d["low"], d["value"], d["high"]) if value is not None]
    scale = axis(ends, 4, zero=True)
    height = ROW * len(found)
    parts = [x_axis(scale, height, [_signed(tick, scale, kind.percent) for tick in scale.ticks])]
    for i, d in enumerate(found):
        y = ROW * i + 32
        judged = verdict(d)
        name = d["system"] if d["against"] == results["baseline"] else f"{d['system']} − {d['against']}"
        told = f"{name}: {difference_text(d)}"
        if d["p_corrected"] is not None:
            told += f", corrected p {p_equals(d['p_corrected'])}"
        told += f" · {WORDS[judged]}"
        parts.append(f'<g class="row" data-system="{text(d["system"])}">')
        parts.append(words("0", y - 13, clip(name, 30), "name", "start"))
        parts.append(words("100%", y - 13, _result(d, judged), f"result {judged}", "end"))
        if d["low"] is not None:
            parts.append(
                line(f"{scale.at(d['low'])}%", y, f"{scale.at(d['high'])}%", y, f"bar {style.colour(d['system'])}")
            )
        hollow = judged not in ("better", "worse")
        parts.append(style.marker(d["system"], f"{scale.at(d['value'])}%", y, told, hollow) + "</g>")
    way = {1: "better →", -1: "← better", 0: ""}[kind.better]
    anchor, x = ("end", "100%") if kind.better > 0 else ("start", "0")
    parts.append(words(x, height + 38, way, "way", anchor))
    unit = "percentage points" if kind.percent else ""
    parts.append(
        words("0" if kind.better > 0 else "100%", height + 38, unit, "tick", "start" if kind.better > 0 else "end")
    )
    label = f"{kind.label}, difference to {results['baseline']}: " + "; ".join(
        f"{d['system']} {difference_text(d)}, {WORDS[verdict(d)]}" for d in found
    )
    return drawing(height + 44, label, "".join(parts), "forest")


def _signed(tick: float, scale: Axis, percent: bool) -> str:
    told = tick_text(tick, scale.ticks, percent)
    return f"+{told}" if tick > 0 else told


def _result(difference: dict[str, Any], judged: Verdict) -> str:
    return f"{SIGNS.get(judged, '')} {difference_text(difference, interval=False)}".strip()


def bars(results: Results, metric: str) -> str:
    """Wins, ties and losses by prompt in one metric: a stacked bar a system; "" where none can be counted."""
    found = [d for d in results["differences"] if d["metric"] == metric and d["prompts"] and d["wins"] is not None]
    if not found or not metric_of(metric).better:
        return ""
    return stacked(
        [(d["system"], d["against"], d["wins"], d["ties"], d["losses"]) for d in found],
        f"{metric_of(metric).label}, prompts won, tied and lost",
    )


def stacked(rows: Sequence[tuple[str, str, int, int, int]], label: str) -> str:
    """Bars of (system, against, wins, ties, losses)."""
    parts: list[str] = []
    height = ROW * len(rows)
    for i, (system, against, *counts) in enumerate(rows):
        y, total, start = ROW * i + 22, sum(counts) or 1, 0.0
        parts.append(f'<g class="row" data-system="{text(system)}">')
        parts.append(words("0", y - 6, clip(system, 30), "name", "start"))
        parts.append(words("100%", y - 6, " · ".join(map(str, counts)), "result", "end"))
        for word, count in zip(("win", "tie", "loss"), counts, strict=True):
            wide = 100 * count / total
            told = f"{system} {WORDS_OF[word]} {against} on {count} of {total} prompts ({wide:.0f} %)"
            if count:
                parts.append(
                    f'<rect class="{word}" x="{number(start)}%" y="{y}" width="{number(wide)}%" height="16">'
                    f"<title>{text(told)}</title></rect>"
                )
            start += wide
        parts.append("</g>")
    parts.append(line("50%", 18, "50%", height, "half"))
    told = "; ".join(f"{system} wins {w}, ties {t}, loses {lost}" for system, _, w, t, lost in rows)
    return drawing(height + 2, f"{label}: {told}", "".join(parts), "bars")


WORDS_OF = {"win": "is better than", "tie": "is as good as", "loss": "is worse than"}


# Prompt by prompt.

DOTS = 150


def dots(results: Results, system: str, style: Style) -> str:
    """The differences of one system to the baseline on the prompts where systems differ most, sorted; "" for none."""
    baseline = results["baseline"]
    found: list[tuple[float, int, dict[str, Any]]] = []
    for i, each in enumerate(results["disagreements"]):
        one, other = each["values"].get(system), each["values"].get(baseline)
        if one is not None and other is not None:
            found.append((one - other, i, each))
    if len(found) < 2:
        return ""
    metric = metric_of(found[0][2]["metric"])
    found.sort(key=lambda each: metric.better * each[0])
    scale = axis([value for value, *_ in found], 3, zero=True)
    up = metric.better >= 0  # better is up, whichever way the numbers go
    parts: list[str] = []
    for tick in scale.ticks:
        y = height_of(scale, tick, DOTS, up)
        parts.append(line("0", y, "100%", y, "grid zero" if tick == 0 else "grid"))
        parts.append(words("-8", y + 5, _signed(tick, scale, metric.percent), "tick", "end"))
    zero = height_of(scale, 0.0, DOTS, up)
    for place, (value, i, each) in enumerate(found):
        x, y = f"{number(2 + 96 * place / (len(found) - 1))}%", height_of(scale, value, DOTS, up)
        told = f"{minus(shown(value, metric, '+'))} · {clip(each['prompt'], 90) or '(empty prompt)'}"
        parts.append(line(x, zero, x, y, f"stem {style.colour(system)}"))
        parts.append(style.marker(system, x, y, told, at=i))
    won = sum(metric.better * value > 0 for value, *_ in found)
    label = f"{system} against {baseline} on {len(found)} prompts, {metric.label}: better on {won}"
    return drawing(DOTS, label, "".join(parts), "dots side")


# Learning curves.

CURVE = 240


def curves(results: Results, field: str, style: Style) -> str:
    """`field` ("loss", "validation_loss") over the tokens trained on, a line a target; "" where nobody has any."""
    lines: list[tuple[str, str, list[tuple[float, float]]]] = []
    for name, system in results["systems"].items():
        for curve in system["curves"] or []:
            points = [
                (point["tokens"], point[field])
                for point in curve["points"]
                if point.get(field) is not None and math.isfinite(point[field]) and point.get("tokens") is not None
            ]
            if len(points) > 1:
                lines.append((name, curve["target"], points))
    if not lines:
        return ""
    across = axis([x for *_, points in lines for x, _ in points], 4)
    # The first steps' losses would press all that matters to the floor.
    tail = [y for *_, points in lines for _, y in points[len(points) // 20 :]]
    down = axis(tail, 4)
    parts = [x_axis(across, CURVE, [size_of_tokens(tick) for tick in across.ticks])]
    for tick in down.ticks:
        y = height_of(down, tick, CURVE, True)
        parts.append(line("0", y, "100%", y, "grid") + words("-8", y + 5, tick_text(tick, down.ticks), "tick", "end"))
    drawn: list[str] = []
    ends: list[str] = []
    for name, target, points in lines:
        path = " ".join(f"{number(10 * across.at(x))},{number(1000 - 10 * down.at(y))}" for x, y in points)
        dash = f' stroke-dasharray="{style.dash(name)}"' if style.dash(name) else ""
        drawn.append(f'<polyline class="curve {style.colour(name)}" data-system="{text(name)}" points="{path}"{dash}/>')
        x, y = points[-1]
        told = f"{target}: {y:.3f} after {x:,.0f} tokens"
        ends.append(style.marker(name, f"{across.at(x)}%", height_of(down, y, CURVE, True), told))
    parts.append(
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="{CURVE}">{"".join(drawn)}</svg>'
    )
    parts += [*ends, words("100%", CURVE + 38, "tokens trained on →", "way", "end")]
    label = f"{field.replace('_', ' ')} over tokens: " + "; ".join(
        f"{target} ends at {points[-1][1]:.3f}" for _, target, points in lines
    )
    return drawing(CURVE + 44, label, "".join(parts), "side")


def size_of_tokens(count: float) -> str:
    if not count:
        return "0"
    for unit, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.4g} {word}"
    return f"{count:g}"


# Size, speed and quality.

SCATTER = 260
LINE_HEIGHT = 17
"""Pixels that one name needs."""


def frontier(results: Results, across: str, style: Style) -> str:
    """Quality over `across` ("bytes", "tokens_per_second"), logarithmic, better to the right and up; "" for none.

    The line joins what nothing in this plot beats in both; rings are the frontier of all three measures.
    """
    found = [p for p in results["frontier"]["points"] if p["quality"] is not None and (p[across] or 0) > 0]
    if not found:
        return ""
    name = results["frontier"]["quality"]
    metric = metric_of(name)
    # A point's own interval is that on the prompts that all systems have; older results have none.
    entries: dict[str, Any] = {
        p["system"]: {"value": p["quality"], "low": p["low"], "high": p["high"]}
        if "low" in p
        else results["systems"][p["system"]]["metrics"].get(name) or {}
        for p in found
    }
    paces = {"alone": ", one prompt at a time", "in batches": ", in batches"}
    pace = paces.get(results["frontier"].get("speed_of", ""), "")
    ends = [e[key] for e in entries.values() for key in ("low", "high") if e.get(key) is not None]
    small_first = across == "bytes"
    wide, high = log_axis([p[across] for p in found]), axis([*ends, *(p["quality"] for p in found)], 4)
    up = metric.better >= 0
    told = [size(round(tick)) if small_first else f"{tick:g}" for tick in wide.ticks]
    parts = [x_axis(wide, SCATTER, told)]
    for tick in high.ticks:
        y = height_of(high, tick, SCATTER, up)
        parts.append(line("0", y, "100%", y, "grid"))
        parts.append(words("-8", y + 5, tick_text(tick, high.ticks, metric.percent), "tick", "end"))
    places = {p["system"]: (wide.at(p[across]), height_of(high, p["quality"], SCATTER, up)) for p in found}
    parts.append(_edge([places[p["system"]] for p in found], small_first))
    taken: list[tuple[float, float, float]] = []
    for p in found:
        system, (x, y) = p["system"], places[p["system"]]
        entry = entries[system]
        value, interval = interval_text(entry, name) if entry else (minus(shown(p["quality"], metric)), "")
        much = size(p["bytes"]) if small_first else f"{p['tokens_per_second']:.3g} tokens a second{pace}"
        parts.append(f'<g data-system="{text(system)}">')
        if entry.get("low") is not None:
            top, bottom = (height_of(high, entry[key], SCATTER, up) for key in ("high", "low"))
            parts.append(line(f"{x}%", top, f"{x}%", bottom, f"bar thin {style.colour(system)}"))
        if p["on_frontier"]:
            parts.append(f'<circle class="ring" cx="{x}%" cy="{number(y)}" r="11"/>')
        parts.append(style.marker(system, f"{x}%", y, f"{system}: {value} {interval}, {much}".strip()))
        parts.append(_label(system, x, y, taken) + "</g>")
    way = "← smaller" if small_first else f"faster{pace} →"
    parts.append(words("0" if small_first else "100%", SCATTER + 38, way, "way", "start" if small_first else "end"))
    parts.append(words("0", -10, f"↑ better: {metric.label}", "way", "start"))
    label = f"{metric.label} over {'size on disk' if small_first else f'tokens a second{pace}'}: " + "; ".join(
        f"{p['system']} {minus(shown(p['quality'], metric))}{' (on the frontier)' * bool(p['on_frontier'])}"
        for p in found
    )
    return drawing(SCATTER + 44, label, "".join(parts), "scatter side")


def _edge(places: Sequence[tuple[float, float]], small_first: bool) -> str:
    """The stairs of what nothing beats: places are (percent, pixels from the top), up is better."""
    ordered = sorted(places, key=lambda place: (place[0] if small_first else -place[0], place[1]))
    best: list[tuple[float, float]] = []
    for x, y in ordered:
        if not best or y < best[-1][1]:
            best.append((x, y))
    if len(best) < 2:
        return ""
    path = f"M{number(10 * best[0][0])} {number(1000 * best[0][1] / SCATTER)}"
    path += "".join(f"H{number(10 * x)}V{number(1000 * y / SCATTER)}" for x, y in best[1:])
    return (
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="{SCATTER}">'
        f'<path class="edge" d="{path}"/></svg>'
    )


def _label(system: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """The name beside its marker, moved down where another name stands."""
    left = x > 50
    told = clip(system, 24)
    wide = 2.2 * len(told)  # percent of a narrow plot that a name takes, about
    start = x - wide if left else x
    height = y - 10
    while any(abs(height - h) < LINE_HEIGHT and start < e and s < start + wide for h, s, e in taken):
        height += LINE_HEIGHT
    taken.append((height, start, start + wide))
    nested = words("-12" if left else "12", 0, told, "name", "end" if left else "start")
    return f'<svg x="{x}%" y="{number(height)}" overflow="visible">{nested}</svg>'
