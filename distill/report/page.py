"""The report of a comparison as one page of HTML that fetches nothing: a pure function of its results.json.

page.html is the page, page.css its style and page.js its script, which only adds to what is there
without it: highlighting, choosing, sorting, hovering. All that results say goes through `text`; the page's policy lets
no script run but our own, by its hash, and lets nothing be fetched.
"""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path

from distill.exam.metrics.catalogue import metric_of
from distill.report.comparison import READING, provenance
from distill.report.findings import Results, asked, cautions
from distill.report.prompts import prompts
from distill.report.sections import cost, differences, found, judge, learning, measured, points, seen, training
from distill.report.svg import Style, text
from distill.report.tables import size

LONG = 36
"""Characters of a title from which it is set smaller."""


def render_html(results: Results) -> str:
    """report.html."""
    template, style, script = _parts()
    marks = Style(results)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = [section for section in _sections(results, marks) if section[2]]
    names = list(results["systems"])
    fill = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": f"Comparison: {text(results['title'])}",
        "style": style,
        "heading": ' <span class="versus">against</span> '.join(f"<bdi>{text(name)}</bdi>" for name in names)
        if len(names) == 2
        else text(results["title"]),
        "long": ' class="long"' if len(results["title"]) > LONG else "",
        "lead": text(f"{results['exam']['name']}{_answered(results)}"),
        "systems": "\n".join(_system(results, name, marks) for name in results["systems"]),
        "contents": "\n".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections),
        "options": "".join(f'<option value="{text(name)}">{text(name)}</option>' for name in results["systems"]),
        "metrics": "".join(
            f'<option value="{text(name)}">{text(metric_of(name).label)}</option>' for name in results["metrics"]
        ),
        "sections": "\n".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n{inner}\n</section>'
            for key, title, inner in sections
        ),
        "provenance": text(provenance(results)),
        "results": island(results),
        "script": script,
    }
    # One pass: what results say is never searched for names of parts.
    return re.sub(r"\{\{(\w+)\}\}", lambda blank: fill[blank[1]], template)


@cache
def _parts() -> tuple[str, str, str]:
    """The page with its blanks, its style and its script."""
    page, style, script = (Path(__file__).with_name(f"page.{kind}") for kind in ("html", "css", "js"))
    return page.read_text(encoding="utf-8"), style.read_text(encoding="utf-8"), script.read_text(encoding="utf-8")


def island(results: Results) -> str:
    """The results as JSON that no HTML parser sees a tag or a comment in."""
    told = json.dumps(results, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", told)


def _answered(results: Results) -> str:
    teacher = results["exam"]["teacher"]
    return f", answered by {teacher}" if results["exam"]["has_answers"] and teacher else ""


def _system(results: Results, name: str, marks: Style) -> str:
    system = results["systems"][name]
    card = system["card"]
    seeds = f"{system['seeds']} seeds" if system["seeds"] > 1 else ""
    count = card["parameters"]
    parameters = "" if count is None else f"{count / 1e6:,.1f} M parameters"
    facts = [system["kind"], parameters, card["quantization"], size(card["bytes"]) if card["bytes"] else "", seeds]
    baseline = '<span class="pill">baseline</span>' if name == results["baseline"] else ""
    return (
        f'<li data-system="{text(name)}">{marks.key(name)}<span><b dir="auto">{text(name)}</b>{baseline}'
        f"<small>{text(' · '.join(filter(None, facts)))}</small></span></li>"
    )


def _sections(results: Results, marks: Style) -> list[tuple[str, str, str]]:
    """(id, heading, inner HTML) in order; without an inner one it is left out."""
    return [
        ("found", "What was found", found(results, marks)),
        ("believe", "Before you believe it", points(cautions(results))),
        ("differences", "Differences, metric by metric", differences(results, marks)),
        ("measured", "Measured", measured(results, marks)),
        ("prompts", "Prompt by prompt", prompts(results, marks)),
        ("judge", "The judge", judge(results, marks)),
        ("curves", "Learning curves", learning(results, marks)),
        ("cost", "Size, speed and quality", cost(results, marks)),
        ("training", "Trained on", training(results)),
        ("seen", "Seen before?", seen(results)),
        ("reading", "How it was asked, and how to read it", f"<p>{text(asked(results))}</p>{points(READING)}"),
    ]
