"""Dreams as one page of HTML that fetches nothing: lanes per lens, steps as cards, edges to follow.

page.html, page.css and page.js are the page. All that a record says goes through `_text` or into an attribute
escaped by it; the page's policy lets no script run but our own, by its hash, and lets nothing be fetched.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path

from distill.dream.record import ROLES, Branch, DreamRecord, Edge, Slot, Step
from distill.dream.view.records import arbitrated, to_json, winner
from distill.policy import page_policy

HINT = (
    "Choose a step to follow it: blue edges lead to it, orange ones lead on. ← → walk along a path, ↑ ↓ across paths, "
    "Esc lets go. Bars under the tokens say how sure the dreamer was; the bar at a step's left, and the number above, "
    "how much the step matters in the graph."
)
READ = (
    "Choose a word to see what it read: the stronger a step shines, the more of the dream's attention it got. Choose a "
    "step, and the words that read it shine."
)
SHOWN = 200
"""Dreams on a page, the last ones: each is some 30 kB."""
DREAMED_BY = {
    "engine": "dreamed by the engine",
    "checked": "drafted by the engine, checked by the backbone",
    "backbone": "decoded by the backbone",
    "given": "written by the user",
    "none": "not dreamed",
}


def page(records: Sequence[DreamRecord], notes: Sequence[str] = ()) -> bytes:
    """The whole page, UTF-8. The first record is shown; a picker leads to the others, the last `SHOWN` at most.

    notes: what is told of each record beside itself; the picker names it by that."""
    template, style, script = _parts()
    earlier, records = len(records[:-SHOWN]), records[-SHOWN:]
    notes = notes[-SHOWN:] or [""] * len(records)
    fill = {
        "policy": page_policy(script),
        "style": style,
        "title": _text(_clip(records[0].prompt, 60) if len(records) == 1 else f"{len(records)} dreams"),
        "picker": _picker(records, notes, earlier) if len(records) > 1 else "",
        "dreams": "\n".join(
            _dream(i, record, note, i > 0) for i, (record, note) in enumerate(zip(records, notes, strict=True))
        )
        or "<p>No dream yet.</p>",
        "records": _island(records),
        "script": script,
    }
    # One pass: what a record says is never searched for names of parts.
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: fill[found[1]], template)
    return text.encode(errors="backslashreplace")


@cache
def _parts() -> list[str]:
    """The page with its blanks, its style and its script."""
    return [Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")]


def _text(value: str) -> str:
    """Escaped for HTML, inside and outside of quotes; control characters, which HTML forbids, are shown as ␀ … ␟."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else c for c in value)
    return escape(shown, quote=True)


def _island(records: Iterable[DreamRecord]) -> str:
    """The records as JSON that no HTML parser sees a tag or a comment in."""
    text = json.dumps(to_json(records), ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _clip(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def _part(value: float) -> float:
    """A share as a bar can show it, whatever a diverged model says."""
    return round(min(1.0, max(0.0, value)), 4) if math.isfinite(value) else 0.0


def _picker(records: Sequence[DreamRecord], notes: Sequence[str], earlier: int) -> str:
    options = "".join(
        f'<option value="{i}">{earlier + i + 1}. {_text(_clip(note or record.prompt, 90))}</option>'
        for i, (record, note) in enumerate(zip(records, notes, strict=True))
    )
    left_out = f"<p>{earlier} earlier left out</p>" if earlier else ""
    return f'<label class="picker">Dream <select id="picker">{options}</select></label>{left_out}'


def _dream(number: int, record: DreamRecord, note: str, hidden: bool) -> str:
    name = f"dream-{number + 1}"
    best = winner(record)
    steps = max((len(branch.steps) for branch in record.branches), default=0)
    lanes = "\n".join(_lane(i, branch, record, i == best) for i, branch in record.lanes)
    return (
        f'<article class="dream" id="{name}" aria-labelledby="{name}-prompt"{" hidden" if hidden else ""}>\n'
        f'<h1 id="{name}-prompt">{_text(record.prompt)}</h1>\n{_pictures(record)}'
        f'<p class="facts">{_facts(record)}</p>\n{_noted(note)}'
        '<div class="scroll"><div class="board" role="group" aria-label="Paths of the dream" '
        f'style="--steps:{max(1, steps)}">\n'
        f"{_edges(record)}\n{lanes}\n</div></div>\n"
        f"{_answer(record)}\n"
        f'<aside class="detail" aria-live="polite" aria-label="What is chosen"><p>{HINT}</p></aside>\n</article>'
    )


def _noted(note: str) -> str:
    return "".join(f'<p class="facts">{_text(line)}</p>\n' for line in note.splitlines())


def _pictures(record: DreamRecord) -> str:
    """What was asked about, under the image tokens that it was read as."""
    shown = (
        f'<img alt="picture {i}" src="data:image/jpeg;base64,{_text(data)}">'
        for i, data in enumerate(record.pictures, 1)
    )
    return f'<p class="pictures">{"".join(shown)}</p>\n' if record.pictures else ""


def _answer(record: DreamRecord) -> str:
    """Its words can be chosen where their attention was noted."""
    if not record.answer:
        return ""
    words = "".join(_word(i, word.text) for i, word in enumerate(record.words))
    hint = f'<p class="facts">{READ}</p>' if words else ""
    return f'<section class="answer"><h2>Answer</h2><p class="said">{words or _text(record.answer)}</p>{hint}</section>'


def _word(number: int, text: str) -> str:
    said = text.lstrip()
    return (
        f'{_text(text[: len(text) - len(said)])}<span class="word" role="button" data-word="{number}" '
        f'aria-pressed="false" tabindex="{0 if number == 0 else -1}">{_text(said)}</span>'
    )


def _facts(record: DreamRecord) -> str:
    paths = [branch for branch in record.branches if branch.steps]
    facts = [
        _text(DREAMED_BY.get(record.dreamer, record.dreamer)),
        f"{len(paths)} path{'s' * (len(paths) != 1)}, {sum(len(branch.steps) for branch in paths)} steps",
        f"{sum(branch.kept for branch in paths)} read by the backbone",
    ]
    if record.seconds > 0:
        took = f"{record.seconds:.2f} s" if record.seconds >= 1 else f"{1000 * record.seconds:.0f} ms"
        facts.append(took)
    return " · ".join(facts)


def _lane(number: int, branch: Branch, record: DreamRecord, won: bool) -> str:
    same = [i for i, other in enumerate(record.branches) if other.lens == branch.lens]
    lens = f"{branch.lens} {same.index(number) + 1}" if len(same) > 1 else branch.lens
    verdict = ("★ won" if won else "✓ read") if branch.kept else "set aside"
    score = f'<p class="score">score {branch.score:.2f}</p>' if arbitrated(branch) and branch.steps else ""
    pill = f'<span class="verdict">{verdict}</span>' if branch.steps else ""
    read = record.read.index((number, 0)) if branch.kept and branch.steps else None
    nodes = "".join(
        _node(number, t, step, lens, len(branch.steps), None if read is None else read + t)
        for t, step in enumerate(branch.steps)
    )
    steps = f'<ol class="steps">{nodes}</ol>' if nodes else '<p class="none">nothing dreamed</p>'
    kind = f"lane{' kept' * branch.kept}{' won' * won}"
    return (
        f'<section class="{kind}" data-lens="{_text(branch.lens)}" '
        f'aria-label="{_text(lens)}, {verdict if branch.steps else "nothing dreamed"}">'
        f'<div class="head"><h2>{_text(lens)}</h2>{pill}{score}'
        f'<p class="origin">{_text(branch.provenance)}</p>{_gates(branch.gates)}</div>{steps}</section>'
    )


def _gates(gates: dict[str, float]) -> str:
    if not gates:
        return ""
    told = _text("Experts: " + ", ".join(f"{expert} {weight:.2f}" for expert, weight in gates.items()))
    bars = "".join(
        f'<span data-lens="{_text(expert)}" style="--p:{_part(weight)}"><i></i>{_text(expert[:1])}</span>'
        for expert, weight in gates.items()
    )
    return f'<p class="gates" role="img" aria-label="{told}" title="{told}">{bars}</p>'


def _node(branch: int, number: int, step: Step, lens: str, steps: int, read: int | None) -> str:
    """read: where the step stands among those that the backbone read."""
    slots = "".join(_slot(role, slot) for role, slot in zip(ROLES, step.slots, strict=True))
    told = ", ".join(f"{slot.label} ({100 * _part(slot.probability):.0f} %)" for slot in step.slots)
    label = f"{lens}, step {number + 1} of {steps}: {told}; importance {_part(step.importance):.2f}"
    place = f'data-branch="{branch}" data-step="{number}"' + ("" if read is None else f' data-read="{read}"')
    importance = f'<span title="importance">{_part(step.importance):.2f}</span>' if step.importance else ""
    return (
        f'<li><button type="button" class="node" {place} aria-pressed="false" '
        f'tabindex="{0 if number == 0 else -1}" style="--p:{_part(step.importance)}" aria-label="{_text(label)}">'
        f'<span class="top"><span>step {number + 1}</span>{importance}</span>{slots}</button></li>'
    )


def _slot(role: str, slot: Slot) -> str:
    sure = _part(slot.probability)
    return (
        f'<span class="slot"><span class="label">{_text(slot.label)}</span>'
        f'<span class="sure" style="--p:{sure}">{role}<i></i>{100 * sure:.0f} %</span></span>'
    )


def _edges(record: DreamRecord) -> str:
    """Paths without geometry, which depends on the window. Strength is relative to the strongest of its kind."""
    strongest: dict[str, float] = {}
    edges = [edge for edge in record.edges if all(_exists(record, place) for place in (edge.source, edge.target))]
    for edge in edges:
        strongest[edge.kind] = max(strongest.get(edge.kind, 0.0), _part(edge.importance))
    drawn = "".join(_edge(edge, strongest[edge.kind] or 1.0) for edge in edges)
    return f'<svg class="edges" aria-hidden="true">{drawn}</svg>'


def _exists(record: DreamRecord, place: tuple[int, int]) -> bool:
    branch, step = place
    return 0 <= branch < len(record.branches) and 0 <= step < len(record.branches[branch].steps)


def _edge(edge: Edge, strongest: float) -> str:
    (a, s), (b, t) = edge.source, edge.target
    weight = round(_part(edge.importance) / strongest, 4)
    kind = _text(edge.kind)
    return (
        f'<path class="edge {kind}" data-from="{a}.{s}" data-to="{b}.{t}" data-kind="{kind}" '
        f'data-importance="{_part(edge.importance)}" data-weight="{weight}" style="--w:{weight}"></path>'
    )
