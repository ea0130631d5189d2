"""The sections of a comparison's page: what was found, plots and tables, as HTML. An empty one is left out."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from distill.exam.metrics.catalogue import metric_of, shown
from distill.report.comparison import JUDGING
from distill.report.findings import (
    NOT_OWN,
    SIGNS,
    WORDS,
    Finding,
    Results,
    difference_text,
    equal_tokens,
    findings,
    judged,
    minus,
    missing_reasons,
    unequal_prompts,
    verdict,
)
from distill.report.plots import bars, curves, forest, frontier, stacked
from distill.report.svg import Style, text
from distill.report.tables import (
    Rows,
    contamination_rows,
    cost_rows,
    difference_rows,
    judge_rows,
    label,
    metric_cells,
    training_rows,
)

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
CURVES = (
    ("validation_bits_per_byte", "Bits per byte of held-out rows"),
    ("validation_loss", "Loss on held-out rows"),
    ("loss", "Training loss"),
)
"""What is drawn over the tokens trained on, where a training has it."""
CHIPS = 8
"""Metrics of a pair up to which those without a clear difference stand open."""
LONG = 24
"""Rows up to which the table of differences stands open."""


def _said(sentences: str) -> str:
    """The finding large, up to the colon before its numbers; those, and what else was looked at, below it."""
    lead, colon, rest = sentences.partition(": ")
    told = f'<p class="say">{text(lead + colon.strip())}</p>'
    return told + (f"<p>{text(rest)}</p>" if rest else "")


def points(lines: Iterable[str]) -> str:
    told = "".join(f'<li dir="auto">{text(line)}</li>' for line in lines)
    return f'<ul class="points">{told}</ul>' if told else ""


def found(results: Results, marks: Style) -> str:
    told = findings(results)
    if not told:
        return "<p>There is nothing to compare with: one system was measured.</p>"
    return f'<div class="findings">{"".join(_finding(each, results, marks) for each in told)}</div>'


def _finding(finding: Finding, results: Results, marks: Style) -> str:
    pair = (finding.system, finding.against)
    own = [
        d for d in results["differences"] if (d["system"], d["against"]) == pair and not d["metric"].endswith(NOT_OWN)
    ]
    ranks = {"better": 0, "worse": 1, "open": 2}
    shown = sorted((d for d in own if verdict(d) in ranks), key=lambda d: ranks[verdict(d)])
    clear = [d for d in shown if verdict(d) != "open"]
    chips = "".join(_chip(d) for d in shown)
    listed = f'<ul class="chips">{chips}</ul>'
    if len(shown) > CHIPS:
        chips = ["".join(_chip(d) for d in part) for part in (clear, shown[len(clear) :])]
        listed = f'<ul class="chips">{chips[0]}</ul>' if chips[0] else ""
        count = len(shown) - len(clear)
        if count:
            listed += f"<details><summary>No clear difference: {count}</summary>"
            listed += f'<ul class="chips">{chips[1]}</ul></details>'
    lines = [*finding.better, *finding.worse]
    numbers = f"<details><summary>In numbers</summary>{points(lines)}</details>" if lines else ""
    judge: Results = results["judge"] or {"model": "", "pairs": []}
    said = "".join(
        f'<p class="judged">{text(judged(each, judge["model"]))}</p>'
        for each in judge["pairs"]
        if (each["system"], each["against"]) == pair
    )
    return (
        f'<article class="finding" data-system="{text(finding.system)}"><h3>{marks.key(finding.system)}'
        f'<span dir="auto">{text(finding.system)}</span></h3>{_said(finding.text)}'
        f"{listed}{said}{numbers}</article>"
    )


def _chip(difference: dict[str, Any]) -> str:
    found = verdict(difference)
    name = metric_of(difference["metric"]).label
    sign = f'<span aria-hidden="true">{SIGNS.get(found, "○")}</span> '
    return (
        f'<li class="chip {found}">{sign}<span class="sr">{WORDS[found]}: </span>{text(name)} '
        f"<b>{text(difference_text(difference, interval=False))}</b></li>"
    )


def differences(results: Results, marks: Style) -> str:
    if not results["differences"]:
        return ""
    figures = {name: _figure(results, name, marks) for name in results["metrics"]}
    own = "".join(figure for name, figure in figures.items() if not name.endswith(NOT_OWN))
    landmarks = [figure for name, figure in figures.items() if name.endswith(NOT_OWN) and figure]
    aside = (
        f"<details><summary>Landmarks: oracles and chance ({len(landmarks)})</summary>"
        f'<div class="plots">{"".join(landmarks)}</div></details>'
        if landmarks
        else ""
    )
    rows = difference_rows(results)
    table = _table(rows, "Paired differences", results, "differences-table sortable", _difference_row(results))
    return (
        f"<p>Each system minus {text(results['baseline'])}, which is the line at zero. A filled marker is a clear "
        "difference, a hollow one is none; the line through it is the 95 % interval. The bar counts prompts: "
        '<span class="swatch win"></span> better, <span class="swatch tie"></span> as good, '
        f'<span class="swatch loss"></span> worse.</p><div class="plots">{own}</div>{aside}'
        f"<details{' open' if len(rows) <= LONG else ''}><summary>All {len(rows) - 1} differences as a table</summary>"
        f'{table}</details><p class="note">{text(results["tests"]["method"])}</p>'
    )


def _figure(results: Results, metric: str, marks: Style) -> str:
    plot = forest(results, metric, marks)
    if not plot:
        return ""
    return (
        f'<figure class="card" data-metric="{text(metric)}"><figcaption>{text(label(metric))}</figcaption>{plot}'
        f"{bars(results, metric)}</figure>"
    )


def _difference_row(results: Results) -> list[tuple[str, list[Any]]]:
    """For each row of the table: its attributes, and what its cells are sorted by (None: their text)."""
    return [
        (
            f' data-system="{text(d["system"])}" data-metric="{text(d["metric"])}" class="{verdict(d)}"',
            [
                None,
                None,
                d["value"],
                d["p"],
                d["p_corrected"],
                d["wins"] - d["losses"] if d["wins"] is not None else None,
            ],
        )
        for d in results["differences"]
    ]


def _table(
    rows: Rows, caption: str, results: Results, kind: str = "", attributes: list[tuple[str, list[Any]]] | None = None
) -> str:
    """A table that scrolls by itself where it is too wide; headings that are systems carry their names."""
    heading, *body = rows
    head = "".join(f'<th scope="col"{_of_system(cell, results)}>{text(cell)}</th>' for cell in heading)
    lines: list[str] = []
    for i, (first, *cells) in enumerate(body):
        of_row, values = attributes[i] if attributes else (_of_system(first, results), [])
        told = "".join(
            f"<td{_of_system(heading[j], results)}{_sorted_by(values, j)}>{text(cell)}</td>"
            for j, cell in enumerate(cells, 1)
        )
        lines.append(f'<tr{of_row}><th scope="row">{text(first)}</th>{told}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table class="{kind}">'
        f"<caption><span>{text(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _of_system(name: str, results: Results) -> str:
    return f' data-system="{text(name)}"' if name in results["systems"] else ""


def _sorted_by(values: list[Any], column: int) -> str:
    return f' data-value="{values[column]}"' if column < len(values) and values[column] is not None else ""


def measured(results: Results, marks: Style) -> str:
    names = list(results["systems"])
    head = "".join(
        f'<th scope="col" data-system="{text(name)}">{marks.key(name)}<span dir="auto">{text(name)}</span>'
        f"{'<small>baseline</small>' if name == results['baseline'] else ''}</th>"
        for name in names
    )
    groups = groupby(results["metrics"], lambda name: metric_of(name).group)
    bodies = "".join(
        f'<tbody><tr class="group"><th scope="rowgroup" colspan="{len(names) + 1}"><span>{GROUPS[group]}</span></th>'
        f"</tr>{''.join(_metric_row(results, name) for name in metrics)}</tbody>"
        for group, metrics in groups
    )
    reasons = [f"{name} lacks {'; '.join(labels)}: {reason}" for name, reason, labels in missing_reasons(results)]
    note = unequal_prompts(results)
    unequal = f'<p class="note" dir="auto">{text(note)}</p>' if note else ""
    many = any(system["seeds"] > 1 for system in results["systems"].values())
    toggle = '<label class="needs-js"><input type="checkbox" id="seeds"> each seed</label>' if many else ""
    return (
        f'<div class="above"><p>▲ ▼ mark what is clearly better or worse than the baseline.</p>{toggle}</div>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Measured"><table class="measured">'
        "<caption><span>Every metric of every system, with its 95 % interval</span></caption>"
        f'<thead><tr><th scope="col">metric</th>{head}</tr></thead>{bodies}</table></div>{unequal}{points(reasons)}'
    )


def _metric_row(results: Results, metric: str) -> str:
    cells: list[str] = []
    words = {sign: WORDS[kind] for kind, sign in SIGNS.items()}
    for name, (value, interval, sign) in zip(results["systems"], metric_cells(results, metric), strict=True):
        entry = results["systems"][name]["metrics"].get(metric) or {}
        seeds = entry.get("seeds") or []
        each = f'<span class="seeds">{text(_seeds(seeds, metric))}</span>' if len(seeds) > 1 else ""
        mark = (
            f'<span class="sign" title="{words[sign]}"><span aria-hidden="true">{sign}</span>'
            f'<span class="sr">{words[sign]} than the baseline</span></span>'
            if sign
            else ""
        )
        kind = ' class="missing"' if value in ("missing", "–") else ""
        cells.append(
            f'<td data-system="{text(name)}"{kind}><span class="value">{mark}{text(value)}</span>'
            f'<span class="interval">{text(interval)}</span>{each}</td>'
        )
    return f'<tr data-metric="{text(metric)}"><th scope="row">{text(label(metric))}</th>{"".join(cells)}</tr>'


def _seeds(values: list[float], metric: str) -> str:
    return "seeds " + " · ".join(minus(shown(value, metric_of(metric))) for value in values)


def judge(results: Results, marks: Style) -> str:
    """What a judge made of the answers, and whether it is of one mind."""
    if not results["judge"]:
        return ""
    model, pairs = results["judge"]["model"], results["judge"]["pairs"]
    bar = stacked([(p["system"], p["against"], p["wins"], p["ties"], p["losses"]) for p in pairs], "Judged")
    examples = "".join(_judged_example(each) for each in results["judge"].get("examples") or [])
    shown_examples = f'<details><summary>Examples</summary><ul class="points">{examples}</ul></details>'
    return (
        f"<p>{text(JUDGING.format(model=model))}</p>"
        f'<figure class="card wide"><figcaption>Prompts won, tied and lost in the eyes of {text(model)}</figcaption>'
        f"{bar}</figure>{_table(judge_rows(results), 'Judged', results)}{shown_examples if examples else ''}"
    )


def _judged_example(example: dict[str, Any]) -> str:
    """One prompt: both answers, and what the judge said of them in each order."""
    answers = "".join(
        f'<blockquote dir="auto">{text(answer) or "<i>no answer</i>"}</blockquote><p>— {text(name)}</p>'
        for name, answer in example["answers"].items()
    )
    said = "".join(
        f"<p>With {text(each['A'])} first: <b>{text(each['verdict'] or 'no verdict')}</b> "
        f'<span dir="auto">{text(each["reason"] or "")}</span></p>'
        for each in example["verdicts"]
    )
    outcome = f"{example['outcome']} for {example['system']}"
    return f'<li><b dir="auto">{text(example["prompt"])}</b>{answers}{said}<p>Counted as: {text(outcome)}</p></li>'


def legend(results: Results, marks: Style, names: Iterable[str]) -> str:
    """Which marker is whose."""
    told = "".join(
        f'<li data-system="{text(name)}">{marks.key(name)}<span dir="auto">{text(name)}</span></li>' for name in names
    )
    return f'<ul class="legend">{told}</ul>'


def learning(results: Results, marks: Style) -> str:
    """Loss over the tokens trained on, of what is a run."""
    named = [name for name, system in results["systems"].items() if system["curves"]]
    plots = "".join(
        f'<figure class="card"><figcaption>{title}</figcaption>{plot}</figure>'
        for field, title in CURVES
        if (plot := curves(results, field, marks))
    )
    if not plots:
        return ""
    return (
        f'{legend(results, marks, named)}<div class="plots big">{plots}</div><p class="note">A line a training, its '
        "end marked; of several seeds each has its own. Losses compare only between trainings of the same "
        "kind of loss and the same tokenizer, bits per byte between all. The first steps may stand above the plot.</p>"
    )


def cost(results: Results, marks: Style) -> str:
    """The frontier, and what each system costs."""
    points_of = results["frontier"]["points"] if results["frontier"] else []
    of = str((results["frontier"] or {}).get("speed_of"))
    speed = {"alone": "Quality over speed, one prompt at a time", "in batches": "Quality over speed, in batches"}
    titles = (("bytes", "Quality over size on disk"), ("tokens_per_second", speed.get(of, "Quality over speed")))
    plots = "".join(
        f'<figure class="card"><figcaption>{title}</figcaption>{plot}</figure>'
        for across, title in titles
        if points_of and (plot := frontier(results, across, marks))
    )
    drawn = (
        f'<div class="plots big">{plots}</div><p class="note">The stairs join what nothing in the plot beats in both. '
        "A ring: no other system is at least as good in size, speed and quality and better in one.</p>"
        if plots
        else ""
    )
    notes = [
        f"{name}: {system['cost']['note']}"
        for name, system in results["systems"].items()
        if system["cost"] and system["cost"].get("note")
    ]
    return drawn + _table(cost_rows(results), "What each system costs", results) + points(notes)


def training(results: Results) -> str:
    """What differs between the trainings, and what is equal."""
    rows, equal = training_rows(results)
    if len(rows) == 1 and not equal:
        return ""
    table = _table(rows, "What differs between the trainings", results) if len(rows) > 1 else ""
    same = "".join(f"<li>{text(each)}</li>" for each in equal)
    alike = f'<h3>Equal in all of which it is known</h3><ul class="equal">{same}</ul>' if same else ""
    return f"<p><strong>{text(equal_tokens(results))}</strong></p>{table}{alike}"


def seen(results: Results) -> str:
    """Whether held-out prompts are in what a system was trained on, and which."""
    examples = "".join(
        f"<li><b>{text(name)}</b>, {text(example['kind'])}, {100 * example['similarity']:.0f} % alike"
        f'<blockquote dir="auto">{text(example["prompt"])}</blockquote>was held out, and trained on was'
        f'<blockquote dir="auto">{text(example["found"])}</blockquote></li>'
        for name, system in results["systems"].items()
        for example in (system["contamination"] or {}).get("examples", [])
    )
    shown_examples = f'<details open><summary>What was found</summary><ul class="points">{examples}</ul></details>'
    table = _table(contamination_rows(results), "Held-out prompts in the training data", results, "prose")
    return table + (shown_examples if examples else "")
