"""Prompt by prompt: how far apart the systems are on each, and what they dreamed and said, side by side."""

import json
from typing import Any

from distill.exam.metrics.catalogue import metric_of, shown
from distill.mining.triplets import LENSES
from distill.report.findings import Lane, Results, lanes, minus
from distill.report.numbers import TIE
from distill.report.plots import dots
from distill.report.svg import Axis, Style, axis, drawing, line, text
from distill.report.tables import label


def prompts(results: Results, marks: Style) -> str:
    """The plots, the controls and every prompt; "" where there is none."""
    found: list[dict[str, Any]] = results["disagreements"]
    if not found:
        return ""
    metric = found[0]["metric"]
    plots = "".join(
        f'<figure class="card" data-system="{text(name)}"><figcaption>{marks.key(name)}<span><bdi>{text(name)}</bdi> '
        f"against <bdi>{text(results['baseline'])}</bdi></span></figcaption>{plot}</figure>"
        for name in results["systems"]
        if name != results["baseline"] and (plot := dots(results, name, marks))
    )
    values = [value for each in found for value in each["values"].values() if value is not None]
    scale = axis(values)
    cards = "\n".join(_prompt(i, each, results, marks, scale) for i, each in enumerate(found))
    best = "".join(f'<option value="{text(name)}">{text(name)}</option>' for name in results["systems"])
    of_all = results["exam"]["prompts"]
    measure = text(metric_of(metric).label)
    if len(found) < of_all:
        told = (
            f"The {len(found)} of {of_all} prompts on which the systems differ most in {measure}. They were chosen for "
            "their differences, so they show what kind of difference there is, not how large it is on the whole."
        )
    else:
        told = f"All {of_all} prompts, those first on which the systems differ most in {measure}."
    return (
        f'<p>{told}</p><div class="plots">{plots}</div>{_note(plots, metric)}'
        '<div class="above needs-js" role="group" aria-label="Which prompts, in which order">'
        '<label>Search <input type="search" id="search" placeholder="in prompts and answers"></label>'
        '<label>Order <select id="order"><option value="spread">most different first</option>'
        '<option value="text">by prompt</option></select></label>'
        f'<label>Best is <select id="best"><option value="">any</option>{best}</select></label>'
        '<button type="button" id="dreams" aria-pressed="false">Open all dreams</button>'
        '<p id="count" aria-live="polite"></p></div>'
        f'<div id="cards">{cards}</div><button type="button" id="more" class="needs-js" hidden>Show more</button>'
    )


def _note(plots: str, metric: str) -> str:
    if not plots:
        return ""
    return (
        f'<p class="note">{text(metric_of(metric).label)}: each point is a prompt, above the line where the system is '
        "better. Choose one to go to it.</p>"
    )


def _prompt(place: int, each: dict[str, Any], results: Results, marks: Style, scale: Axis) -> str:
    known = {name: value for name, value in each["values"].items() if value is not None}
    better = metric_of(each["metric"]).better or 1
    best = winners(known, better)
    teacher = (
        f'<div class="teacher"><h4>The teacher</h4><p dir="auto">{text(each["teacher"])}</p></div>'
        if each["teacher"]
        else ""
    )
    said = "".join(_said(name, each, marks, name in best) for name in results["systems"])
    return (
        f'<article class="prompt" id="prompt-{place}" data-place="{place}" data-best="{text(json.dumps(best))}">'
        f'<h3 dir="auto">{text(each["prompt"].strip()) or "<i>an empty prompt</i>"}</h3>'
        f'<div class="strip"><span>{text(label(each["metric"]))}</span>{_strip(each, marks, scale)}</div>'
        f'{teacher}<div class="answers">{said}</div></article>'
    )


def winners(values: dict[str, float], better: int) -> list[str]:
    """Systems whose value is the best one but for rounding; nobody where it is everybody's."""
    best = max((better * value for value in values.values()), default=0.0)
    found = [name for name, value in values.items() if better * value >= best - TIE]
    return found if len(found) < len(values) else []


def _strip(each: dict[str, Any], marks: Style, scale: Axis) -> str:
    """All systems' values on one line, the same scale for all prompts."""
    metric = metric_of(each["metric"])
    known = {name: value for name, value in each["values"].items() if value is not None}
    drawn = "".join(
        marks.marker(name, f"{scale.at(value)}%", 12, f"{name}: {minus(shown(value, metric))}")
        for name, value in known.items()
    )
    told = ", ".join(f"{name} {minus(shown(value, metric))}" for name, value in known.items())
    return drawing(24, f"{metric.label}: {told or 'not defined'}", line("0", 12, "100%", 12, "grid") + drawn, "values")


def _said(name: str, each: dict[str, Any], marks: Style, best: bool) -> str:
    said = each["systems"].get(name)
    value = minus(shown(each["values"].get(name), metric_of(each["metric"])))
    if said is None and value == "–":
        return ""
    answer = (said or {}).get("answer") or ""
    told = f'<p class="text" dir="auto">{text(answer)}</p>' if answer.strip() else '<p class="none">no answer</p>'
    star = '<span class="pill">best here</span>' if best else ""
    return (
        f'<div class="said" data-system="{text(name)}"><h4>{marks.key(name)}<span dir="auto">{text(name)}</span>'
        f'{star}<span class="number">{text(value)}</span></h4>{told}{_dream((said or {}).get("dream") or "")}</div>'
    )


def _dream(dream: str) -> str:
    """Its image tokens as chips, a lane a lens; what stands outside of tokens is shown as such."""
    found = lanes(dream)
    if not found:
        return '<p class="none">no dream</p>'
    steps = sum(len(lane.steps) for lane in found)
    told = "".join(_lane(lane) for lane in found)
    return f'<details class="dream"><summary>Dream, {steps} step{"s" * (steps != 1)}</summary><dl>{told}</dl></details>'


def _lane(lane: Lane) -> str:
    steps = "".join(
        f"<li>{''.join(f'<span dir=auto>{text(token)}</span>' for token in step)}</li>" for step in lane.steps
    )
    loose = f'<p class="loose" dir="auto">{text(lane.loose)}</p>' if lane.loose else ""
    inner = f"<ol>{steps}</ol>{loose}" if steps else loose or '<p class="none">nothing</p>'
    lens = lane.lens if lane.lens in LENSES else "no lens"
    return f'<div class="lane" data-lens="{lens}"><dt>{lens}</dt><dd>{inner}</dd></div>'
