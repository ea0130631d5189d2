"""What polishing is worth beside learning from the teacher's answers for as long. Writes docs/results/TABLE.json.

    python -m bench.polish TABLE MINUTES WAY,… RUN…

WAY: of NAMES; each is compared with reading the teacher's answers for longer. RUN: trained by a seed each, of one
teacher whose weights can be read; they stay as they are. What was measured is kept in RUN/continual.json, and not
measured again. Each way has MINUTES of the processor, for answers, their targets and its steps, and for the teacher too
where it runs here. Intervals are over seeds and held-out prompts, all of them.
"""

import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.continual import copied, kept
from bench.figures import write_table
from distill.backbone.generate import generate
from distill.backbone.model import Backbone
from distill.config import PolishSettings
from distill.corpus.teachers_source import teachers_source
from distill.errors import BadInput
from distill.exam.metrics.statistics import HierarchicalBootstrap, Ratio
from distill.exam.metrics.text import chrf, repeated
from distill.exam.questions import load_exam
from distill.learning.consult import consulting
from distill.learning.polish import Polishing, further_prompts, judged
from distill.run import Run
from distill.tokens.chat import prompt_ids, think_block
from distill.tokens.packing import Documents
from distill.training.drafts import dream_on

LOG = logging.getLogger(__name__)
SAMPLES, RESAMPLES = 2, 2000
TRAINED, LONGER = "as trained", "its teacher's answers for as long"
FRESH = "new ones of its teacher's to further prompts, too"
WAYS: dict[str, dict[str, Any]] = {
    TRAINED: {},
    LONGER: {"teachers_share": 1.0},
    "its own, by its teacher's weights": {},
    "its own to further prompts, too": {"prompts": ["everyday"]},
    "its own, its teacher is asked": {"through": "server"},
    FRESH: {"prompts": ["everyday"]},
}
NAMES: dict[str, str] = dict(zip(("trained", "longer", "own", "further", "asked", "new"), WAYS, strict=True))
COLUMNS: dict[str, dict[str, Any]] = {
    "bits": {"label": "bits per byte of the teacher's answers ↓", "digits": 3},
    "chrf": {"label": "chrF2 of its own ↑", "digits": 1},
    "likely": {"label": "bits per byte of its own to the teacher ↓", "digits": 3},
    "repeated": {"label": "repeated 4-grams ↓", "digits": 1, "percent": True},
    "ends": {"label": "its own that end ↑", "digits": 1, "percent": True},
    "length": {"label": "their length to the teacher's", "digits": 2},
}


class Timed(Polishing):
    """A polishing whose minutes are the processor's, not the clock's."""

    started: float | None = None

    def progress(self) -> float:
        now = time.process_time()
        self.started = now if self.started is None else self.started
        return (now - self.started) / (60 * self.settings.minutes)


class Fresh(Timed):
    """Learns from answers that its teacher's weights give meanwhile, after no dream, in the place of its own."""

    def _said(
        self, number: int, random: np.random.Generator, most: int
    ) -> tuple[list[int], dict[int, list[int]], list[list[int]]]:
        student, train = self.model, self.run.settings.train
        self.model, train.dreams, dreams = self.teacher, False, train.dreams
        try:
            return super()._said(number, random, most)
        finally:
            self.model, train.dreams = student, dreams


def polished(run: Run, way: str, minutes: float) -> dict[str, Any]:
    """What a copy of the run is worth when it has learned so: steps, rounds, and for each metric what is summed over a
    held-out prompt's answers, and by what that is divided."""
    with copied(run) as copy:
        return _polished(copy, way, minutes)


def _polished(copy: Run, way: str, minutes: float) -> dict[str, Any]:
    how = WAYS[way]
    copy.settings.polish = PolishSettings(minutes=minutes, **how)
    further, source = further_prompts(copy, tell), teachers_source(copy, tell)
    polishing = (Fresh if way == FRESH else Timed)(copy, {}, tell, further=further)
    if isinstance(source, str):
        raise BadInput(f"{copy.path}: {source}")
    polishing.read(source)
    polishing.told["before"] = 0.0
    if how.get("through") == "server":
        with consulting(copy, polishing.tokenizer, {}, tell, further=further) as consultation:
            polishing.consultation = consultation
            told = polishing.perform()
    elif way != TRAINED:
        told = polishing.perform()
    else:
        told = {"steps": 0, "rounds": 0, "answers": 0}
    counts = {name: told[name] for name in ("steps", "rounds", "answers")}
    return {**counts, "sums": measured(polishing, polishing.teacher)}


def tell(event: Any) -> None:
    if event.kind != "progress" or "kl" in event.data:
        LOG.info("%s: %s %s %s", event.stage, event.message, event.done or "", event.data or "")


def measured(polishing: Polishing, teacher: Backbone) -> dict[str, list[list[float]]]:
    """Of SAMPLES answers to each held-out prompt, sampled as the teacher's were, each after a dream of its own."""
    asked, tokenizer, capture = (
        load_exam(polishing.run, 0).questions,
        polishing.tokenizer,
        polishing.run.settings.capture,
    )
    prompts = [prompt_ids(tokenizer, question.prompt, system=capture.system) for question in asked]
    references = [[*tokenizer.encode(question.text), tokenizer.eos_id] for question in asked]
    documents = judged(teacher, tokenizer, prompts, references)
    sums = {name: np.zeros((2, len(prompts))) for name in COLUMNS}
    polishing.model.eval()
    sums["bits"][:] = bits(judged(polishing.model, tokenizer, prompts, references))
    for sample in range(SAMPLES):
        seed = 1000 * (1 + sample)
        dreams = dream_on(polishing.model, documents.prompt, tokenizer, polishing.steps, seed, range(len(prompts)))
        polishing.model.eval()
        contexts = [[*prompt, *think_block(tokenizer, dreams.get(i, []))] for i, prompt in enumerate(prompts)]
        answers = generate(
            polishing.model,
            contexts,
            max_tokens=capture.max_tokens,
            temperature=capture.temperature,
            seed=[seed + len(prompts) + i for i in range(len(prompts))],
            stop_ids=[tokenizer.eos_id],
            batch_rows=64,
            grammar=polishing.grammar.answering,
        )
        sums["likely"] += bits(judged(teacher, tokenizer, prompts, answers))
        for i, ids in enumerate(answers):
            text = tokenizer.decode([id for id in ids if id != tokenizer.eos_id])
            sums["chrf"][:, i] += chrf(text, asked[i].text), 1
            sums["repeated"][:, i] += repeated(text)
            sums["ends"][:, i] += ids[-1] == tokenizer.eos_id, 1
            sums["length"][:, i] += len(ids), len(references[i])
    return {name: each.tolist() for name, each in sums.items()}


def bits(scored: Documents) -> NDArray[np.float64]:
    """(2, N): bits of each document's answer, and its bytes."""
    nats = np.add.reduceat(-scored.slot_logprobs[:, 0].astype(float), [0, *scored.answer_ends[:-1]])
    return np.stack([nats / math.log(2), scored.answer_bytes.astype(float)])


def rows_of(way: str, own: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each metric of a way, a run each; and its difference to the control's, with the interval."""
    row: dict[str, Any] = {"name": way, "steps": round(float(np.mean([one["steps"] for one in own])))}
    less: dict[str, Any] = {"name": "… less its teacher's for as long"}
    for metric in COLUMNS:
        here, there = ([Ratio.of(*one["sums"][metric]) for one in those] for those in (own, control))
        bootstrap = HierarchicalBootstrap(len(own), len(here[0].numerator), RESAMPLES, 0)
        value, contrast = bootstrap.interval(here), bootstrap.contrast(here, there, by_seed=True)
        assert value is not None, "there are prompts"
        assert contrast is not None, "there are prompts"
        row[metric] = round(value.value, 4)
        less[metric] = [round(each, 4) for each in (contrast[0].value, contrast[0].low, contrast[0].high)]
    return [row] if own is control else [row, less]


def main(table: str, minutes: str, ways: str, *paths: str) -> None:
    runs = [Run.open(Path(path)) for path in paths]
    chosen = {NAMES[name] for name in ways.split(",")} | {LONGER}
    found = {
        way: [
            kept(run, f"polish {minutes} minutes, {way}", lambda run=run, way=way: polished(run, way, float(minutes)))
            for run in runs
        ]
        for way in WAYS
        if way in chosen
    }
    rows = [row for way, own in found.items() for row in rows_of(way, own, found[LONGER])]
    columns = {"name": {"label": "what it learned from"}, "steps": {"label": "steps", "digits": 0}, **COLUMNS}
    count = len(found[LONGER][0]["sums"]["chrf"][0])
    machine = (
        f"1 core of a busy machine; students of {len(runs)} seeds; {minutes} minutes of the processor each; "
        f"{SAMPLES} answers to each of {count} held-out prompts"
    )
    command = f"python -m bench.polish {table} {minutes} {ways} RUN (one of each seed)"
    write_table(table, command, machine, columns, rows)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:])
