"""What a target costs its user: tokens a second, and the time to the first word of an answer.

Each target is opened for itself and answers a few prompts one at a time, whoever computes.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.address import default_host
from distill.config import EvaluateSettings
from distill.errors import DistillError
from distill.exam.examinees.opening import limits_of, open_examinee
from distill.exam.examinees.protocol import Examinee
from distill.exam.provenance import machine
from distill.exam.questions import Exam, Question
from distill.exam.targets import How, Target, device_of
from distill.run import fingerprint, write_atomic

VERSION = 4
"""Raised when what is measured, or how, changes."""

PROMPTS = 8
"""Answered one at a time, at most; before them one more to warm up, which isn't timed."""

NOTE = "one prompt at a time, greedily, after another to warm up; seconds hold the dream"


@dataclass(frozen=True)
class Timed:
    """One prompt. first: seconds until the answer's first token was there, its dream before it included; None where
    none came. tokens: all that were written in `seconds`."""

    first: float | None
    tokens: int
    seconds: float


def kept_cost(
    target: Target, exam: Exam, settings: EvaluateSettings, how: How, *, force: bool = False
) -> dict[str, Any]:
    """`measure_cost`, kept: it differs from call to call, and one that goes on says what it said.

    What is kept is of this target on this exam, on this machine with as many threads, or of this server.
    """
    asked = [settings.max_tokens, *limits_of(target, how), place_of(target, how.device)]
    about = [VERSION, target.kind, target.digest(), exam.digest, *asked]
    path = exam.folder / "costs" / f"{fingerprint(about)[:24]}.json"
    if not force and path.is_file():
        with contextlib.suppress(ValueError):  # cut short: measured again
            return json.loads(path.read_text(encoding="utf-8"))
    found = measure_cost(target, exam, settings, how)
    if found["tokens_per_second"] is not None:
        write_atomic(path, json.dumps(found) + "\n")
    return found


def place_of(target: Target, device: str) -> str:
    """A digest of where it computes, which decides how fast: the server or the device, and this machine with as many
    threads."""
    where = target.host or default_host() if target.kind == "ollama" else device_of(target, device)
    return fingerprint([where, machine()])


def measure_cost(target: Target, exam: Exam, settings: EvaluateSettings, how: How) -> dict[str, Any]:
    """{"tokens_per_second", "first_token_seconds": each {"median", "low", "high"} over prompts (low and high are the
    range) or None, "prompts": how many, "note"}. Where it can't be measured, `note` says why."""
    try:
        examinee = open_examinee(target, how)
    except DistillError as error:
        return _not_measured(str(error))
    try:
        fitting = [q for q in exam.questions[: PROMPTS * 4] if examinee.fits(q, how.dream_tokens)]
        if not fitting:
            return _not_measured("no prompt fits its context")
        # What was asked before is answered faster: the one to warm up is asked again only where there is no other.
        *asked, warm = fitting[: PROMPTS + 1]
        _timed(examinee, warm, settings.max_tokens)
        return summarize([_timed(examinee, question, settings.max_tokens) for question in asked or [warm]])
    except DistillError as error:
        return _not_measured(str(error))
    finally:
        examinee.close()


def _timed(examinee: Examinee, question: Question, max_tokens: int) -> Timed:
    """Two calls: one that ends with the answer's first token, one that is timed whole."""
    started = time.perf_counter()
    begun = examinee.begin(question)
    first = time.perf_counter()
    (spoken,) = examinee.answer([question], think=True, temperature=0.0, max_tokens=max_tokens, draw=0)
    return Timed(first - started if begun else None, spoken.written, time.perf_counter() - first)


def _not_measured(reason: str) -> dict[str, Any]:
    return {"tokens_per_second": None, "first_token_seconds": None, "prompts": 0, "note": f"not measured: {reason}"}


def summarize(timed: Sequence[Timed]) -> dict[str, Any]:
    """Of what was timed, one entry a prompt."""
    answered = [each for each in timed if each.tokens and each.seconds > 0]
    if not answered:
        return _not_measured("it answered nothing")
    begun = [each.first for each in answered if each.first is not None]
    return {
        "tokens_per_second": _spread([each.tokens / each.seconds for each in answered]),
        "first_token_seconds": _spread(begun) if begun else None,
        "prompts": len(timed),
        "note": NOTE,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}
