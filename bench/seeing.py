"""What students tell of pictures that they never saw, and without them: `python -m bench.seeing RUN…`.

RUN: of configs/emoji-scenes.yaml, by another seed each; one that was exported as a pair reads the pictures themselves,
too, natively and, the first of them, in llama.cpp. Writes docs/results/seeing.json; answers are the likeliest."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import write_table
from bundle.load import load_student
from bundle.looking import PictureEngine
from bundle.seen import Shown
from distill.corpus.datasets.emoji_scenes import OPPOSITE, PLACES
from distill.corpus.truth import same_answer
from distill.exam.examinees.opening import open_examinee
from distill.exam.questions import Question, load_exam
from distill.exam.targets import How, find_target
from distill.run import Run
from distill.vision import PROJECTOR
from distill.vision.sight import Sight

COLUMNS = {
    "names": "names of things",
    "relation": "where they are",
    "whether": "whether there is one",
    "exact": "exact match",
}
PLACED = re.compile("|".join([*OPPOSITE, *PLACES]))
SPLITS = {"combination": "unseen pairs", "familiar": "new pictures of known pairs", "thing": "things never trained on"}

WAYS = {
    "tokens": "{}",
    "picture": "{}, the picture itself",
    "llama.cpp": "{}, the picture itself in llama.cpp",
    "nothing": "{}, without the picture",
}
"""How a picture is read → what a split is called then."""
MOST = 64
"""Tokens of a dream and its answer."""


def judged(prompt: str, truth: str, answer: str) -> Iterator[tuple[str, bool]]:
    """What the answer has of the true one, column by column: things by name, the relation or place, yes or no."""
    yield "exact", same_answer(answer, truth)
    if prompt.startswith("Is there"):
        yield "whether", answer.split(",")[0] == truth.split(",")[0]
    elif prompt.startswith("Where"):
        yield "relation", PLACED.findall(answer) == PLACED.findall(truth)
    else:
        said = named(answer)
        yield from (("names", thing in said) for thing in named(truth))


def named(answer: str) -> list[str]:
    """`An owl above a birthday cake.` → owl, birthday cake."""
    parts = PLACED.split(answer.strip(" ."))
    return [part.strip().partition(" ")[2] for part in parts if part.strip()]


def measure(run: Run, way: str) -> dict[str, dict[str, float]]:
    """Split → column → share of what was right."""
    questions = load_exam(run, 0).questions
    if way != "tokens":  # what is seen in them comes after the question
        questions = [replace(question, prompt=question.prompt.partition("?")[0] + "?") for question in questions]
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in zip(questions, answers(run, questions, way), strict=True):
        assert question.truth is not None, "of a dataset"
        for column, right in judged(question.prompt, question.truth.answer, answer):
            found[question.truth.split][column].append(right)
    return {split: {name: float(np.mean(hits)) for name, hits in columns.items()} for split, columns in found.items()}


def answers(run: Run, questions: Sequence[Question], way: str) -> list[str]:
    if way in ("tokens", "nothing"):
        examinee = open_examinee(find_target(str(run.path)), How(device="cpu"))
        said = examinee.answer(questions, think=True, temperature=0.0, max_tokens=24, draw=0)
        return [spoken.answer for spoken in said]
    student, projector = load_student(run.bundle), run.bundle / PROJECTOR
    shown = Shown(student, Sight.load(projector), [(question.prompt, question.pictures[0]) for question in questions])
    if way == "picture":
        written = shown.ours(MOST)
    else:
        context = student.model.config.context
        with PictureEngine(run.bundle / "model.gguf", projector, context=context, threads=1) as engine:
            written = shown.theirs(engine, MOST)
    words, end = student.tokenizer, student.tokenizer.end_think_id
    after = [ids[ids.index(end) + 1 if end in ids else 0 :] for ids in written]
    return [words.decode(ids, skip_special=True).strip() for ids in after]


def main(paths: list[str]) -> None:
    runs, rows = [Run.open(Path(path)) for path in paths], list[dict[str, Any]]()
    pairs = all((run.bundle / PROJECTOR).is_file() for run in runs)
    for way, called in WAYS.items():
        if way in ("picture", "llama.cpp") and not pairs:
            continue
        found = [measure(run, way) for run in (runs[:1] if way == "llama.cpp" else runs)]
        for split, label in SPLITS.items():
            shares = {name: [own[split][name] for own in found] for name in COLUMNS}
            cells = {n: [float(np.mean(own)), min(own), max(own)] if own[1:] else own[0] for n, own in shares.items()}
            rows.append({"name": called.format(label), **cells})
    columns = {name: {"label": label, "digits": 1, "percent": True} for name, label in COLUMNS.items()}
    settings, seeds = runs[0].settings, len(runs)
    steps, asked = f"{settings.train.steps} + {settings.see.steps}", len(load_exam(runs[0], 0).questions)
    about = f"{seeds} seed{'s' * (seeds > 1)} of {steps} steps, {asked}"
    machine = f"2 shared cores; {about} questions{'; mean, least and most' * (seeds > 1)}"
    columns = {"name": {"label": "questions about"}, **columns}
    write_table("seeing", "python -m bench.seeing RUN (one of each seed)", machine, columns, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
