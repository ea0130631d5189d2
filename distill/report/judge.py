"""A teacher as judge: which of two answers is better, asked in both orders, and what cannot be read is never averaged.

What is counted, and what a judge is worth, is told in docs/judging.md.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from scipy.stats import binomtest

from distill.errors import BadInput, DistillError, TeacherError
from distill.events import Event, Listener, silent
from distill.exam.metrics.significance import holm
from distill.exam.metrics.statistics import PairedBootstrap, Ratio
from distill.exam.questions import Question
from distill.journal import Journal
from distill.run import fingerprint
from distill.teacher import room_for
from distill.teacher.crew import AT_ONCE, Crew
from distill.teacher.protocol import GenerateOptions, Teacher
from distill.turns import transcript
from distill.written import repaired

VERSION = 1
MANY_LOST = 0.1
"""Share of verdicts that no host gives above which the others say too little."""

MAX_TOKENS = 160
SECOND_TEMPERATURE = 0.7
"""Of the second try: at 0 another seed would change nothing."""

VERDICTS = ("A", "B", "tie")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "verdict": {"type": "string", "enum": list(VERDICTS)},
        "reason": {"type": "string", "maxLength": 160},
    },
    "required": ["verdict"],
    "additionalProperties": False,
}

RUBRIC = """Two assistants were asked the same question. Decide whose answer is better.

Look at this, in this order:
1. Is what it says true?
2. Does it answer what was asked?
3. Is it clear, in whole sentences, without repetition?
A longer answer is not better for being longer. Which answer stands first means nothing. If neither is better, it is a
tie.
{system}
### Question
{prompt}

### Answer A
{first}

### Answer B
{second}

### Verdict
Reply with a JSON object: "verdict" is "A", "B" or "tie"; "reason" is one short sentence."""

Outcome = Literal["win", "loss", "tie", "disagreed", "identical", "nonsense"]
"""Of one prompt, for the system: what both orders said, or why they say nothing (nonsense: one brought no verdict)."""


MEANT: dict[tuple[str | None, str | None], Outcome] = {
    ("A", "B"): "win",
    ("B", "A"): "loss",
    ("tie", "tie"): "tie",
}
"""Of the system, whose answer is A in the first order and B in the second."""


@dataclass(frozen=True)
class Verdict:
    """One order's. choice: "A", "B" or "tie", None where two tries brought nothing that can be read."""

    choice: str | None
    reason: str = ""


def judge(
    answers: Mapping[str, Sequence[str | None]],
    questions: Sequence[Question],
    teachers: Sequence[Teacher],
    *,
    baseline: str,
    folder: Path,
    resamples: int = 2000,
    seed: int = 0,
    listen: Listener = silent,
    force: bool = False,
) -> dict[str, Any]:
    """Each system's answers beside the baseline's: what `results.json` holds as "judge", and "warnings".

    answers: system → one answer a question, None where it was not asked; a system without any is passed over. folder:
    every verdict is kept there, in a file for each judge, under a fingerprint of all that it was shown, so a judging
    that was interrupted goes on. teachers: hosts of one model; a verdict that none of them gives is nobody's, and
    asked for again the next time. force: ask for all of them anew. Raises BadInput for an unknown baseline, and what
    `Crew` raises, or TeacherError where many verdicts can't be had.
    """
    if baseline not in answers:
        raise BadInput(f"baseline={baseline!r}: is none of {', '.join(answers)}")
    crew = Crew(
        teachers,
        partial(_verdict, seed),
        stage="judge",
        listen=listen,
        fixed=min(teachers[0].slots or AT_ONCE, 2 * (os.cpu_count() or 1)),
    )
    who = crew.info
    beside = _beside(answers, baseline)
    judge_mark = [VERSION, who.digest, who.template_digest, seed]

    def asked(i: int, one: str, other: str) -> dict[str, str]:
        """Fingerprint → prompt, of both orders; of the same text there is nothing to ask."""
        prompts = (shown(questions[i], one, other), shown(questions[i], other, one)) if one != other else ()
        return {fingerprint([*judge_mark, prompt]): prompt for prompt in prompts}

    wanted = {key: prompt for _, i, both in beside for key, prompt in asked(i, *both).items()}
    with Journal(folder / f"{fingerprint(judge_mark)[:12]}.jsonl") as journal:
        known = {line["key"]: Verdict(line["choice"], line["reason"]) for line in journal.lines}
        unknown = {key: prompt for key, prompt in wanted.items() if force or key not in known}
        lost = _ask(crew, unknown, known, journal, listen)
    if len(lost) > MANY_LOST * len(wanted):
        raise TeacherError(f"{lost[-1]} ({len(lost)} verdicts can't be had; the others are kept, ask again for these)")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in _others(answers, baseline)}
    for name, i, both in beside:
        outcomes[name].append(outcome_of([known[key] for key in asked(i, *both)]))
    pairs: list[dict[str, Any]] = [
        {"system": name, "against": baseline, **count(each, resamples, seed)} for name, each in outcomes.items()
    ]
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_corrected"] = corrected
    return {"model": who.spec, "pairs": pairs, "warnings": _warnings(who.spec, pairs)}


def context_for(answers: Mapping[str, Sequence[str | None]], questions: Sequence[Question], baseline: str) -> int:
    """Tokens of the longest prompt and its verdict: what an embedded judge needs."""
    return room_for((shown(questions[i], *both) for _, i, both in _beside(answers, baseline)), MAX_TOKENS)


def _others(answers: Mapping[str, Sequence[str | None]], baseline: str) -> list[str]:
    """The systems that are judged."""
    return [name for name in answers if name != baseline and answers[name] and answers[baseline]]


def _beside(answers: Mapping[str, Sequence[str | None]], baseline: str) -> list[tuple[str, int, tuple[str, str]]]:
    """System, place of the question, and the two answers as the judge reads them: without blanks around them."""
    return [
        (name, i, (one.strip(), other.strip()))
        for name in _others(answers, baseline)
        for i, (one, other) in enumerate(zip(answers[name], answers[baseline], strict=True))
        if one is not None and other is not None
    ]


def shown(question: Question, first: str, second: str) -> str:
    """What the judge reads. first, second: answers without blanks around them."""
    system = f"\nThey had been told: {question.system}\n" if question.system else ""
    blank = "(no answer)"
    asked = transcript(question.prompt)
    return RUBRIC.format(system=system, prompt=asked, first=first or blank, second=second or blank)


def _ask(
    crew: Crew[tuple[str, str], Verdict],
    prompts: Mapping[str, str],
    known: dict[str, Verdict],
    journal: Journal,
    listen: Listener,
) -> list[DistillError]:
    """Several at once; each verdict is on disk before it counts. Returns why others can't be had."""
    if not prompts:
        return []
    listen(Event("judge", "start", total=len(prompts), unit="verdicts"))
    done = 0
    lost: list[DistillError] = []
    try:
        for outcome in crew.run(prompts.items(), some=bool(known)):
            if outcome is None:
                continue
            done, key, verdict = done + 1, outcome.what[0], outcome.answer
            if outcome.problem is not None:
                lost.append(outcome.problem)
                listen(Event("judge", "warning", f"no verdict: {outcome.problem}"))
            elif verdict is not None:
                journal.append({"key": key, "choice": verdict.choice, "reason": verdict.reason})
                known[key] = verdict
            known.setdefault(key, Verdict(None))
            listen(Event("judge", "progress", done=done, total=len(prompts), unit="verdicts"))
    finally:
        crew.stop()
    listen(Event("judge", "done", f"{len(prompts) - len(lost)} verdicts"))
    return lost


def _verdict(seed: int, teacher: Teacher, question: tuple[str, str]) -> Verdict:
    """Asked at temperature 0; where that can't be read, once more, sampled with another seed."""
    for temperature, draw in ((0.0, seed), (SECOND_TEMPERATURE, seed + 1)):
        options = GenerateOptions(max_tokens=MAX_TOKENS, temperature=temperature, seed=draw, top_logprobs=0)
        verdict = read(teacher.generate_json(question[1], SCHEMA, options))
        if verdict is not None:
            return verdict
    return Verdict(None)


def read(text: str) -> Verdict | None:
    """None for anything but a JSON object with one of the three verdicts."""
    try:
        said = json.loads(text)
        choice, reason = said["verdict"], said.get("reason")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if choice not in VERDICTS:
        return None
    if not isinstance(reason, str):
        return Verdict(choice)
    # Where `maxLength` ends it between the two escapes of one character, half of a pair is left.
    return Verdict(choice, repaired(reason))


def outcome_of(verdicts: Sequence[Verdict]) -> Outcome:
    """Of the two orders. () where both answers are the same."""
    if not verdicts:
        return "identical"
    choices = [verdict.choice for verdict in verdicts]
    if None in choices:
        return "nonsense"
    return MEANT.get((choices[0], choices[1]), "disagreed")


def count(outcomes: Sequence[Outcome], resamples: int, seed: int) -> dict[str, Any]:
    """One pair's numbers. `ties` holds equal verdicts, answers that are the same text and disagreements of the orders.

    win_rate is (wins + ties / 2) / (wins + ties + losses) with a bootstrap interval over prompts; p the exact two-sided
    sign test of wins against losses; agreement the share of readable prompts on which both orders said the same. None
    where there is nothing to divide by.
    """
    found = Counter(outcomes)
    wins, losses = found["win"], found["loss"]
    ties = found["tie"] + found["disagreed"] + found["identical"]
    points = [{"win": 1.0, "loss": 0.0, "nonsense": math.nan}.get(outcome, 0.5) for outcome in outcomes]
    rate = PairedBootstrap(len(points), resamples, seed).interval(Ratio.of(points)) if points else None
    agreed = wins + losses + found["tie"]
    asked = agreed + found["disagreed"]
    return {
        "wins": wins,
        "ties": ties,
        "losses": losses,
        **{name: found[name] for name in ("nonsense", "disagreed", "identical")},
        "agreement": agreed / asked if asked else None,
        **{"win_rate": rate and rate.value, "low": rate and rate.low, "high": rate and rate.high},
        "p": float(binomtest(wins, wins + losses).pvalue) if wins + losses else (1.0 if ties else None),
        "p_corrected": None,
        "prompts": len(outcomes),
    }


def _warnings(model: str, pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    asked = sum(pair["prompts"] - pair["identical"] for pair in pairs)
    nonsense, disagreed = (sum(pair[name] for pair in pairs) for name in ("nonsense", "disagreed"))
    larger = "Choose a larger model."
    if 2 * nonsense > asked:
        unread = f"on {nonsense} of {asked} prompts it gave no verdict that can be read"
        return [f"{model} can't be used as a judge: {unread}. {larger}"]
    if 2 * disagreed > asked - nonsense:
        turned = f"on {disagreed} of {asked - nonsense} prompts it changed its mind with the order of the answers"
        return [f"{model} says little as a judge: {turned}. {larger}"]
    return []
