"""What students tell of pictures that they never saw, and without them: `python -m bench.seeing RUN…`.

RUN: of configs/emoji-scenes.yaml, by another seed each. Writes docs/results/seeing.json; answers are the likeliest."""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.figures import RESULTS
from distill.corpus.datasets.emoji_scenes import OPPOSITE, PLACES
from distill.exam.examinees.opening import open_examinee
from distill.exam.questions import Question, load_exam
from distill.exam.targets import How, find_target
from distill.exam.truth import same_answer
from distill.run import Run, write_atomic

COLUMNS = {
    "names": "names of things",
    "relation": "where they are",
    "whether": "whether there is one",
    "exact": "exact match",
}
PLACED = re.compile("|".join([*OPPOSITE, *PLACES]))
SPLITS = {"combination": "unseen pairs", "familiar": "new pictures of known pairs", "thing": "things never trained on"}


def judged(question: Question, answer: str) -> Iterator[tuple[str, bool]]:
    """What the answer has of the true one, column by column: things by name, the relation or place, yes or no."""
    assert question.truth is not None
    truth = question.truth.answer
    yield "exact", same_answer(answer, truth)
    if question.prompt.startswith("Is there"):
        yield "whether", answer.split(",")[0] == truth.split(",")[0]
    elif question.prompt.startswith("Where"):
        yield "relation", PLACED.findall(answer) == PLACED.findall(truth)
    else:
        said = named(answer)
        yield from (("names", thing in said) for thing in named(truth))


def named(answer: str) -> list[str]:
    """`An owl above a birthday cake.` → owl, birthday cake."""
    parts = PLACED.split(answer.strip(" ."))[::2]
    return [part.strip().partition(" ")[2] for part in parts if part.strip()]


def measure(run: Run, pictures: bool) -> dict[str, dict[str, float]]:
    """Split → column → share of what was right. pictures: False takes them away."""
    exam = load_exam(run)
    examinee = open_examinee(find_target(str(run.path)), How(device="cpu"))
    questions = exam.questions
    if not pictures:  # what is seen in them comes after the question
        questions = [replace(question, prompt=question.prompt.partition("?")[0] + "?") for question in questions]
    said = examinee.answer(questions, think=True, temperature=0.0, max_tokens=24, draw=0)
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, spoken in zip(questions, said, strict=True):
        for column, right in judged(question, spoken.text):
            found[question.truth.split if question.truth else ""][column].append(right)
    return {split: {name: float(np.mean(hits)) for name, hits in columns.items()} for split, columns in found.items()}


def main(paths: list[str]) -> None:
    runs = [Run.open(Path(path)) for path in paths]
    rows: list[dict[str, object]] = []
    for pictures in (True, False):
        found = [measure(run, pictures) for run in runs]
        for split, label in SPLITS.items():
            shares = {name: [own[split][name] for own in found] for name in COLUMNS}
            cells = {name: float(np.mean(own)) for name, own in shares.items()}
            spreads = {name: [cells[name], min(own), max(own)] for name, own in shares.items() if len(own) > 1}
            rows.append({"name": f"{label}{'' if pictures else ', without the picture'}", **cells, **spreads})
            print(rows[-1])
    write_atomic(RESULTS / "seeing.json", json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
