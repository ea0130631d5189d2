"""A report as Markdown and as one page of HTML that fetches nothing: both are pure functions of its results.json.

templates/report.html is the page, report.css its style and report.js its script, which only adds to what is there
without it: highlighting, choosing, sorting. All that results say is escaped as it is put into a template; the
page's policy lets no script run but our own, by its hash, and lets nothing be fetched.
"""

import re
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill.exam.metrics.catalogue import metric_of, shown
from distill.policy import page_policy
from distill.report import findings, tables
from distill.report.doubts import cautions
from distill.report.findings import NOT_OWN, Results, minus

TEMPLATES = Path(__file__).with_name("templates")
LONG = 36
"""Characters of a title from which it is set smaller."""
GROUPS = {
    "exact": "True answers",
    "likelihood": "Likelihood of the teacher's answers",
    "targets": "The teacher's probabilities",
    "calibration": "Calibration",
    "text": "Own answers as text",
    "speech": "How replies are spelled",
    "concepts": "Own answers as concepts",
    "dreams": "Dreams",
}
JUDGING = (
    "{} was shown both answers to each prompt in both orders. A win is a verdict for the same answer in both; a tie is "
    "where it calls them equal, where the orders disagree, or where both said the same. In the win rate a tie counts "
    "half. What can't be read as a verdict counts for nobody."
)


def render_html(results: Results) -> str:
    """report.html."""
    from distill.report import plots  # matplotlib takes a second to import

    looks = plots.looks(results)
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    metrics = groupby(tables.metrics_of(results), lambda name: metric_of(name).group)
    return (
        _environment("html")
        .get_template("report.html")
        .render(
            _common(results),
            policy=page_policy(script, images=any(each.get("pictures") for each in results["disagreements"])),
            style=Markup(style),
            script=Markup(script),
            long=len(results["title"]) > LONG,
            looks={name: (colour, plots.GLYPHS[shape]) for name, (colour, shape) in looks.items()},
            forests={name: plots.forest(results, name) for name in results["metrics"]},
            groups=[(GROUPS[group], list(names)) for group, names in metrics],
        )
    )


def render_markdown(results: Results) -> str:
    """report.md."""
    return _environment("md").get_template("report.md").render(_common(results))


def _common(results: Results) -> dict[str, Any]:
    """What both templates are given."""
    return {
        "results": results,
        "f": findings,
        "t": tables,
        "cautions": cautions(results),
        "landmarks": [name for name in results["metrics"] if name.endswith(NOT_OWN)],
        "value": _value,
        "metric_of": metric_of,
        "judging": JUDGING,
    }


@cache
def _environment(kind: str) -> Environment:
    """kind: "html" or "md". Whatever a template puts in is escaped, Markup alone is not."""
    html = kind == "html"
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        finalize=_shown if html else _prose,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"said": _said, "table": _table}
    return made


def _shown(value: Any) -> Any:
    return findings.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _prose(value: Any) -> Any:
    """Our own sentence, which may hold a name that a user chose: nothing in it becomes markup."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"[\\`*]|<(?! )|\](?=\()|^#", lambda found: f"\\{found[0]}", " ".join(value.split()))


def _said(text: str) -> Markup:
    """Anything, on one line, with what Markdown or HTML would take as markup escaped and no control characters."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return Markup("".join(f"\\{c}" if c in "\\`*_[]<>|#&~" else c for c in " ".join(plain.split())) or "(nothing)")


def _table(rows: tables.Rows) -> Markup:
    return Markup(tables.markdown_table([[_prose(cell) for cell in row] for row in rows]))


def _value(name: str, value: float | None) -> str:
    """Of a metric, as text."""
    return minus(shown(value, metric_of(name)))
