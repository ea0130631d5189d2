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
from distill.exam.examinees.opening import open_examinee
from distill.exam.examinees.protocol import Examinee
from distill.exam.provenance import machine
from distill.exam.questions import Exam, Question
from distill.exam.targets import How, Target, device_of
from distill.run import Run, fingerprint, write_atomic

VERSION = 1
"""Raised when what is measured, or how, changes."""

PROMPTS = 8
"""Answered one at a time, at most; before them one more to warm up, which isn't timed."""

MINUTES = 10
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


def measure_cost(
    target: Target,
    exam: Exam,
    settings: EvaluateSettings,
    *,
    seed: int = 0,
    dream_tokens: int = 66,
    device: str = "auto",
    timeout: float = 60.0 * MINUTES,
) -> dict[str, Any]:
    """{"tokens_per_second", "first_token_seconds": each {"median", "low", "high"} over prompts (low and high are the
    range) or None, "peak_bytes": or None, "threads": of torch and of llama.cpp, "prompts": how many, "note"}.

    Where it can't be measured (the process failed, or took longer than `timeout` seconds), `note` says why.
    """
    request = {
        "target": _plain(target),
        "how": {"seed": seed, "dream_tokens": dream_tokens, "device": device, "timeout": timeout},
        "max_tokens": settings.max_tokens,
        "questions": [{"key": q.key, "prompt": q.prompt, "system": q.system} for q in exam.questions[: PROMPTS * 4]],
    }
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
        return _unknown(f"took longer than {timeout:.0f} s")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        return _unknown(last[0])


def kept_cost(
    target: Target,
    exam: Exam,
    settings: EvaluateSettings,
    *,
    seed: int,
    dream_tokens: int,
    device: str,
    force: bool = False,
) -> dict[str, Any]:
    """`measure_cost`, kept: it differs from call to call, and one that goes on says what it said.

    What is kept is of this target on this exam, on this machine with as many threads, or of this server.
    """
    where = target.host or default_host() if target.kind == "ollama" else device_of(target, device)
    about = [VERSION, target.kind, target.digest(), exam.digest, settings.max_tokens, dream_tokens, where, machine()]
    path = exam.folder / "costs" / f"{fingerprint(about)[:24]}.json"
    if not force and path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            pass  # cut short: measured again
    found = measure_cost(target, exam, settings, seed=seed, dream_tokens=dream_tokens, device=device)
    if found["tokens_per_second"] is not None:
        write_atomic(path, json.dumps(found) + "\n")
    return found


def _plain(target: Target) -> dict[str, Any]:
    return {
        "spec": target.spec,
        "kind": target.kind,
        "path": None if target.path is None else str(target.path.absolute()),
        "model": target.model,
        "host": Address(target.host).with_password if target.host else "",
        "run": None if target.run is None else str(target.run.path.absolute()),
    }


def _unknown(reason: str) -> dict[str, Any]:
    return summarize([], None, 0, f"not measured: {reason}")


def summarize(timed: Sequence[Timed], peak: int | None, threads: int, note: str) -> dict[str, Any]:
    """Of what was timed, one entry a prompt."""
    speeds = [each.tokens / each.seconds for each in timed if each.tokens and each.seconds > 0]
    return {
        "tokens_per_second": _spread(speeds),
        "first_token_seconds": _spread([each.first for each in timed if each.tokens]),
        "peak_bytes": peak,
        "threads": threads,
        "prompts": len(timed),
        "note": note,
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}


# In the process of its own.


def _measure(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    given: dict[str, Any] = request["target"]
    path, run = (None if given[name] is None else Path(given[name]) for name in ("path", "run"))
    run = None if run is None else Run.open(run)
    target = Target(given["spec"], given["kind"], path, given["model"], given["host"], run)
    how = How(**request["how"])
    examinee = open_examinee(target, how)
    try:
        questions = [Question(**question) for question in request["questions"]]
        fitting = [question for question in questions if examinee.fits(question, how.dream_tokens)]
        if not fitting:
            return _unknown("no prompt fits its context")
        # What was asked before is answered faster: the one to warm up is asked again only where there is no other.
        *asked, warm = fitting[: PROMPTS + 1]
        asked = asked or [warm]
        if target.kind == "ollama":
            return _of_ollama(examinee, warm, asked, request["max_tokens"])
        _timed(examinee, warm, request["max_tokens"])
        timed = [_timed(examinee, question, request["max_tokens"]) for question in asked]
        return summarize(timed, _peak(), torch.get_num_threads(), NOTE)
    finally:
        examinee.close()


def _timed(examinee: Examinee, question: Question, max_tokens: int) -> Timed:
    """Two calls: one that ends with the answer's first token, one that is timed whole."""
    started = time.perf_counter()
    _answer(examinee, question, 1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    tokens = _answer(examinee, question, max_tokens)
    return Timed(first, tokens, time.perf_counter() - started)


def _answer(examinee: Examinee, question: Question, max_tokens: int) -> int:
    (spoken,) = examinee.answer([question], think=True, temperature=0.0, max_tokens=max_tokens, draw=0)
    return spoken.tokens


def _peak() -> int | None:
    """Bytes that this process held at most, and on a CUDA device that its tensors took there besides."""
    import torch

    return (_resident() or 0) + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0) or None


def _resident() -> int | None:
    """Peak resident memory. Linux's ru_maxrss begins with what the parent held: /proc counts from the start."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
    return None


def _of_ollama(examinee: Examinee, warm: Question, questions: Sequence[Question], max_tokens: int) -> dict[str, Any]:
    from distill.exam.examinees.ollama import OllamaExaminee

    assert isinstance(examinee, OllamaExaminee)
    examinee.ask(warm, max_tokens)
    timed = [_told(examinee.ask(question, max_tokens)) for question in questions]
    return summarize(timed, examinee.loaded_bytes(), 0, NOTE_OLLAMA)


def _told(answer: Mapping[str, Any]) -> Timed:
    """Of /api/chat's answer; its durations are nanoseconds. The dream's share of the time is its share of the text."""
    message = answer.get("message") or {}
    dream, said = len(message.get("thinking") or ""), len(message.get("content") or "")
    reading = (answer.get("prompt_eval_duration") or 0) / 1e9
    writing = (answer.get("eval_duration") or 0) / 1e9
    tokens = int(answer.get("eval_count") or 0)
    before = writing * dream / (dream + said) if dream + said else 0.0
    # The first token is there when the prompt is read; after a dream it takes one step.
    return Timed(reading + before, tokens, reading + writing)


def _main() -> None:
    """A request on stdin; its answer is the last line on stdout, whatever libraries may write there before."""
    try:
        found = _measure(json.load(sys.stdin))
    except DistillError as error:
        found = _unknown(str(error))
    json.dump(found, sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
