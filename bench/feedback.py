"""Whether a hundred pairs teach a rule that nobody states: one sentence is enough. Writes docs/results/learn.json.

    python -m bench.feedback RUN…

RUN: trained by a seed each, of answers of several sentences among others; they stay as they are. The pairs are training
answers, their first sentence as what would have been better. What was measured is kept in RUN/continual.json.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.continual import copied, interval, kept
from bench.figures import write_table
from distill.corpus.traces import TraceStore
from distill.exam.examinees.opening import open_examinee
from distill.exam.questions import load_exam
from distill.exam.targets import How, find_target
from distill.learning.feedback import FEEDBACK, keep_said
from distill.learning.learn import learn
from distill.learning.reinforce import reinforce
from distill.run import Run
from distill.tokens.chat import Message
from distill.tokens.packing import split_traces

PAIRS, EPOCHS, TEMPERATURE = 100, 3, 0.7
COLUMNS: dict[str, dict[str, Any]] = {
    "rule": {"label": "answers of one sentence, whole, held out ↑", "digits": 1, "percent": True},
    "better": {"label": "better answers likelier than what was said ↑", "digits": 1, "percent": True},
    "length": {"label": "tokens of a dream and its answer", "digits": 0},
    "ends": {"label": "answers that end by themselves ↑", "digits": 1, "percent": True},
    "bits": {"label": "bits per byte of the teacher's answers ↓", "digits": 3},
    "reward": {"label": "pairs told right by a reward model that hasn't seen them ↑", "digits": 1, "percent": True},
}


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def told(run: Run) -> list[tuple[str, str, str]]:
    """The prompt, the answer and what would have been better, of the first PAIRS answers that say more."""
    with TraceStore(run.traces, readonly=True) as store:
        training = {trace.key for trace in split_traces(store)[0]}
        answers = [
            (trace.prompt, trace.response.text)
            for trace in store.traces()
            if trace.key in training and trace.response.done_reason == "stop"
        ]
    return [(prompt, text, sentences(text)[0]) for prompt, text in answers if len(sentences(text)) > 1][:PAIRS]


def followed(run: Run) -> dict[str, float]:
    """What the run's student says to the held-out prompts, each after a dream of its own."""
    exam, room = load_exam(run), run.settings.capture.max_tokens
    examinee = open_examinee(find_target(str(run.path)), How(device="cpu"))
    said = examinee.answer(exam.questions, think=True, temperature=TEMPERATURE, max_tokens=room, draw=0)
    return {
        "rule": float(np.mean([each.form.ended and len(sentences(each.answer)) == 1 for each in said])),
        "length": float(np.mean([each.tokens for each in said])),
        "ends": float(np.mean([each.form.ended for each in said])),
    }


def learned(run: Run) -> list[dict[str, float]]:
    """What holds before and after; the run itself is left alone."""
    with copied(run) as copy:
        system: list[Message] = [{"role": "system", "content": text}] if (text := run.settings.capture.system) else []
        for prompt, answer, better in told(run):
            messages: list[Message] = [*system, {"role": "user", "content": prompt}]
            keep_said(copy.path / FEEDBACK, messages, "", answer, "better", better)
        before = followed(copy)
        reward = reinforce(copy, by="feedback", rounds=0)["pairs_right"]
        found = learn(copy, epochs=EPOCHS)
        after = followed(copy)
    both = [before | {"better": found["preferred_before"], "bits": found["bits_per_byte_before"], "reward": reward}]
    return [*both, after | {"better": found["preferred"], "bits": found["bits_per_byte"]}]


def main(*paths: str) -> None:
    runs = [Run.open(Path(path)) for path in paths]
    found: Sequence[list[dict[str, float]]] = [kept(run, "feedback", lambda run=run: learned(run)) for run in runs]
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(("as trained", f"and learned from {PAIRS} pairs")):
        each = [one[i] for one in found]
        rows.append({"student": name} | {key: interval(one[key] for one in each) for key in COLUMNS if key in each[0]})
    columns = {"student": {"label": "student"}, **COLUMNS}
    asked = len(load_exam(runs[0]).questions)
    machine = (
        f"1 core of a busy machine; {len(runs)} seeds of the demo's student; {asked} held-out prompts at temperature "
        f"{TEMPERATURE:g}, bits of validation answers"
    )
    write_table("learn", "python -m bench.feedback RUN (one of each seed)", machine, columns, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
