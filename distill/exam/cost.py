"""What a target costs its user: tokens a second, the time to the first word of an answer, and memory.

Each target is opened alone, in a process of its own that answers a few prompts one at a time, so that neither what was
measured before nor what else is loaded counts. Of a model in Ollama, which has a process already, the server tells the
durations.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.address import Address, default_host
from distill.config import EvaluateSettings
from distill.errors import DistillError
from distill.exam.examinees.ollama import OllamaExaminee
from distill.exam.examinees.opening import open_examinee
from distill.exam.examinees.protocol import Examinee
from distill.exam.provenance import machine
from distill.exam.questions import Exam, Question
from distill.exam.targets import How, Target, device_of, find_target
from distill.run import fingerprint, write_atomic

VERSION = 2
"""Raised when what is measured, or how, changes."""

PROMPTS = 8
"""Answered one at a time, at most; before them one more to warm up, which isn't timed."""

SECONDS = 600.0
"""That the process may take."""

NOTE = (
    "one prompt at a time, greedily, alone in a process after another to warm up; seconds hold the reading of the "
    "prompt and the dream; memory is that of the whole process, its libraries included"
)
NOTE_OLLAMA = (
    "one prompt at a time, greedily, after another to warm up; durations as its server reports them, loading left "
    "out; memory as /api/ps reports it"
)


@dataclass(frozen=True)
class Timed:
    """One prompt. first: seconds until the answer's first token was there, its dream before it included."""

    first: float
    tokens: int
    seconds: float


def kept_cost(
    target: Target,
    exam: Exam,
    settings: EvaluateSettings,
    *,
    seed: int = 0,
    dream_tokens: int = 66,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """`measure_cost`, kept: it differs from call to call, and one that goes on says what it said.

    What is kept is of this target on this exam, on this machine with as many threads, or of this server.
    """
    where = target.host or default_host() if target.kind == "ollama" else device_of(target, device)
    about = [VERSION, target.kind, target.digest(), exam.digest, settings.max_tokens, dream_tokens, where, machine()]
    path = exam.folder / "costs" / f"{fingerprint(about)[:24]}.json"
    if not force and path.is_file():
        with contextlib.suppress(ValueError):  # cut short: measured again
            return json.loads(path.read_text(encoding="utf-8"))
    found = measure_cost(target, exam, settings, How(seed, dream_tokens, device))
    if found["tokens_per_second"] is not None:
        write_atomic(path, json.dumps(found) + "\n")
    return found


def measure_cost(
    target: Target, exam: Exam, settings: EvaluateSettings, how: How, timeout: float = SECONDS
) -> dict[str, Any]:
    """{"tokens_per_second", "first_token_seconds": each {"median", "low", "high"} over prompts (low and high are the
    range) or None, "peak_bytes": or None, "prompts": how many, "note"}.

    Where it can't be measured (the process failed, or took longer than `timeout` seconds), `note` says why.
    """
    request = {
        "target": {
            "spec": target.spec,
            "path": None if target.path is None else str(target.path.absolute()),
            "host": Address(target.host).with_password if target.host else "",
        },
        "how": {"seed": how.seed, "dream_tokens": how.dream_tokens, "device": how.device, "timeout": timeout},
        "max_tokens": settings.max_tokens,
        "questions": [{"key": q.key, "prompt": q.prompt, "system": q.system} for q in exam.questions[: PROMPTS * 4]],
    }
    if target.kind == "ollama":  # its process is the server
        return _told(request)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "distill.exam.cost"],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _not_measured(f"took longer than {timeout:.0f} s")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        return _not_measured(last[0])


def _not_measured(reason: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("tokens_per_second", "first_token_seconds", "peak_bytes"))
    return {**nothing, "prompts": 0, "note": f"not measured: {reason}"}


def summarize(timed: Sequence[Timed], peak: int | None, note: str) -> dict[str, Any]:
    """Of what was timed, one entry a prompt."""
    answered = [each for each in timed if each.tokens and each.seconds > 0]
    if not answered:
        return _not_measured("it answered nothing")
    return {
        "tokens_per_second": _spread([each.tokens / each.seconds for each in answered]),
        "first_token_seconds": _spread([each.first for each in answered]),
        "peak_bytes": peak,
        "prompts": len(timed),
        "note": note,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}


# In the process of its own; of a model in Ollama, in this one.


def _measure(request: Mapping[str, Any]) -> dict[str, Any]:
    given, how = request["target"], How(**request["how"])
    path = None if given["path"] is None or given["spec"].startswith("embedded:") else Path(given["path"])
    examinee = open_examinee(find_target(given["spec"], path, given["host"]), how)
    try:
        questions = [Question(**question) for question in request["questions"]]
        fitting = [question for question in questions if examinee.fits(question, how.dream_tokens)]
        if not fitting:
            return _not_measured("no prompt fits its context")
        # What was asked before is answered faster: the one to warm up is asked again only where there is no other.
        *asked, warm = fitting[: PROMPTS + 1]
        measure = _of_server if isinstance(examinee, OllamaExaminee) else _by_the_clock
        measure(examinee, warm, request["max_tokens"])
        timed = [measure(examinee, question, request["max_tokens"]) for question in asked or [warm]]
        if isinstance(examinee, OllamaExaminee):
            return summarize(timed, examinee.loaded_bytes(), NOTE_OLLAMA)
        return summarize(timed, _peak(), NOTE)
    finally:
        examinee.close()


def _by_the_clock(examinee: Examinee, question: Question, max_tokens: int) -> Timed:
    """Two calls: one that ends with the answer's first token, one that is timed whole."""
    times = [time.perf_counter()]
    for most in (1, max_tokens):
        (spoken,) = examinee.answer([question], think=True, temperature=0.0, max_tokens=most, draw=0)
        times.append(time.perf_counter())
    return Timed(times[1] - times[0], spoken.tokens, times[2] - times[1])


def _of_server(examinee: Any, question: Question, max_tokens: int) -> Timed:
    return told(examinee.ask(question, max_tokens))


def told(answer: Mapping[str, Any]) -> Timed:
    """Of /api/chat's answer; its durations are nanoseconds. The dream's share of the time is its share of the text."""
    message = answer.get("message") or {}
    dream, said = len(message.get("thinking") or ""), len(message.get("content") or "")
    reading = (answer.get("prompt_eval_duration") or 0) / 1e9
    writing = (answer.get("eval_duration") or 0) / 1e9
    before = writing * dream / (dream + said) if dream + said else 0.0
    # The first token is there when the prompt is read; after a dream it takes one step.
    return Timed(reading + before, int(answer.get("eval_count") or 0), reading + writing)


def _peak() -> int | None:
    """Bytes that this process held at most, and on a CUDA device that its tensors took there besides; None where the
    system has no /proc."""
    import torch

    with contextlib.suppress(OSError, StopIteration):
        # Linux's ru_maxrss begins with what the parent held: this counts from the start.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        resident = 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
    return None


def _told(request: Mapping[str, Any]) -> dict[str, Any]:
    """Or why nothing can be measured."""
    try:
        return _measure(request)
    except DistillError as error:
        return _not_measured(str(error))


if __name__ == "__main__":  # the answer is the last line on stdout, whatever libraries may write there before
    json.dump(_told(json.load(sys.stdin)), sys.stdout)
