"""What students of the causal world keep while they learn of new things, and how few examples are enough.

    python -m bench.continual facts RUN…     docs/results/new-facts.json
    python -m bench.continual few RUN…       docs/results/few-examples.json

RUN: of configs/causal-world.yaml, by another seed each; they stay as they are. What was measured of its student is kept
in RUN/continual.json, and not measured again. Intervals are Student's t over the runs.
"""

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bench.figures import write_table
from distill.corpus.datasets.causal_world import LATER, THINGS, WORDS, State, drawn, made_of
from distill.corpus.datasets.hearsay_world import ends
from distill.corpus.datasets.questions import Question
from distill.learning.facts import Facts
from distill.learning.keeping import Keeping
from distill.learning.new_lines import NewLines, read_line
from distill.learning.replay import gather, with_dreams
from distill.run import Run, write_atomic
from distill.student.grammar import dream_size
from distill.tokens.chat import Message, render
from distill.training.drafts import dream_on
from distill.training.losses import tail_kernel
from distill.training.step import forward_backward

EWC = 3000.0
KEEPS = {
    "nothing (plain fine-tuning)": Keeping(replay=0),
    "replay and elastic weights": Keeping(ewc=EWC),
    "replay": Keeping(),
    "elastic weights": Keeping(replay=0, ewc=EWC),
    "its own past": Keeping(replay=0, past=1),
    "all three": Keeping(past=1, ewc=EWC),
}
NEW, HELD_OUT, EPOCHS, LR = 600, 120, 3, 2e-3
"""New answers to learn, those held out (of old ones, too), how often each is read, and how fast."""


def line(question: Question) -> dict[str, Any]:
    """As `dream learn --from` reads it, with its true dream."""
    chains = {lens: [[s.what, s.action, s.result] for s in steps] for lens, steps in question.dream.items()}
    return {
        "prompt": question.prompt,
        "answer": question.answer,
        "held_out": question.split != "train",
        "dream": chains,
    }


def lines_of(questions: Iterable[Question]) -> NewLines:
    told = [read_line(line(question), 0.0) for question in questions]
    return NewLines([trace for trace, _ in told], "", {trace.key: dream for trace, dream in told})


def kept(run: Run, name: str, measure: Callable[[], Any]) -> Any:
    """What was measured of a run's student before, or is now."""
    path, student = run.path / "continual.json", run.require("train").outputs

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found["found"] if found.get("student") == student else {}

    found = read()
    if name not in found:
        value = measure()
        found = read() | {name: value}
        write_atomic(path, json.dumps({"student": student, "found": found}, indent=1) + "\n")
    return found[name]


@contextmanager
def copied(run: Run) -> Generator[Run]:
    """A copy to alter, beside the run, without what was made of its student; it is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=run.path.parent) as folder:
        left_out = shutil.ignore_patterns("bundle", "evaluation")
        yield Run.open(shutil.copytree(run.path, Path(folder) / "run", ignore=left_out))


def learned(run: Run, keeping: Keeping | None) -> dict[str, float]:
    """What the run's student knows when it has learned of LATER, as `dream learn --from` teaches it; None: before."""
    counts = {"train": NEW, "familiar": HELD_OUT}
    new = lines_of(drawn(made_of(LATER), set(), counts, run.settings.seed))
    learner = Facts(run, new, {"epochs": EPOCHS, "lr": LR}, keeping or Keeping(replay=0, memory=1), HELD_OUT)
    if keeping:
        teach(learner)
    return learner.measured()


def teach(learner: Facts) -> None:
    """All its steps; nothing is written."""
    steps = [*learner.plan()]
    for number, rows in enumerate(steps):
        learner.step(rows, number, len(steps))


def interval(values: Iterable[float]) -> list[float] | float:
    """Mean and its 95 % interval."""
    from scipy.stats import t

    found = np.array([*values])
    if len(found) < 2:
        return float(found[0])
    half = float(t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5)
    return [float(found.mean()), float(found.mean()) - half, float(found.mean()) + half]


def measure_facts(runs: Sequence[Run]) -> None:
    before = [kept(run, "facts, before", lambda run=run: learned(run, None)) for run in runs]
    rows: list[dict[str, Any]] = [
        {"keeps": "before", **{key: interval(one[key] for one in before) for key in before[0]}}
    ]
    plain: dict[str, float] = {}
    for name, keeping in KEEPS.items():
        told = [kept(run, f"facts, {name}", lambda run=run, keeping=keeping: learned(run, keeping)) for run in runs]
        moved = {
            key: float(np.mean([one[key] - was[key] for one, was in zip(told, before, strict=True)])) for key in told[0]
        }
        plain = plain or moved
        found: dict[str, Any] = {key: interval(one[key] for one in told) for key in told[0]}
        for what in ("new", "old"):
            key = f"{what}_exact_match"
            found[f"{what}_ratio"] = moved[key] / plain[key] if plain[key] else None
        rows.append({"keeps": name, **found})
    columns: dict[str, Any] = {"keeps": {"label": "what keeps old answers"}}
    for what, ratio in (("new", "gain, of plain fine-tuning's ↑"), ("old", "forgetting, of plain fine-tuning's ↓")):
        columns[f"{what}_exact_match"] = {"label": f"{what} answers right ↑", "digits": 1, "percent": True}
        columns[f"{what}_ratio"] = {"label": ratio, "digits": 0, "percent": True}
    for what in ("new", "old"):
        columns[f"{what}_bits_per_byte"] = {"label": f"bits per byte, {what} ↓", "digits": 3}
    about = (
        f"{NEW} answers about 8 things of 2 new materials, {EPOCHS} epochs; {HELD_OUT} held-out answers of each kind"
    )
    write("facts", runs, about, columns, rows)


NAMES = {"mir": "glass", "figu": "metal", "swa": "paper"}
"""Things that nobody knows, of one token each, and what they are made of."""
COUNTS = (0, 1, 5, 20)
FEW_EPOCHS, FEW_LR = {1: 20, 5: 20, 20: 10}, 1e-3
UNSEEN = 6
"""Actions of a thing that its examples never show; the questions that are asked about it do."""
ASKED = 40
PLAIN, REPLAY = Keeping(replay=0, memory=1), Keeping(memory=512)
TASKS, INNER, TOWARDS = 60, 5, 0.3
"""Reptile's tasks, steps within each, and how far it then goes."""


@dataclass(frozen=True)
class Thing:
    """A thing that is new: questions to learn from, and others with actions that those never show. hinges: where
    another material would have another answer."""

    examples: list[Question]
    asked: list[Question]
    hinges: list[bool]


def things(seed: int) -> list[Thing]:
    found: list[Thing] = []
    for name, material in NAMES.items():
        draw = random.Random(f"{name} {seed}")
        unseen = {(name, action) for action in draw.sample([*WORDS], UNSEEN)}
        counts = {"train": max(COUNTS), "combination": ASKED}
        made = [*drawn({name: material}, unseen, counts, seed)]
        examples, asked = made[: max(COUNTS)], made[max(COUNTS) :]
        found.append(Thing(examples, asked, [hinges(question) for question in asked]))
    return found


def hinges(question: Question) -> bool:
    """Whether another material would have another answer."""
    first = [question.dream[lens][0] for lens in ("spatial", "temporal", "causal")]
    actions = [step.action for step in question.dream["spatial"]]
    return len(ends(State(*(step.what for step in first)), actions)) > 1


class FewExamples:
    """A run's student and what it learns of a thing from a few examples, each time from where it was."""

    def __init__(self, run: Run) -> None:
        self.run, self.things = run, things(run.settings.seed)
        self.reptiles: dict[str, Tensor] = {}

    def learner(self, examples: Sequence[Question], keeping: Keeping) -> Facts:
        how = {"epochs": FEW_EPOCHS.get(len(examples), 1), "lr": FEW_LR}
        return Facts(self.run, lines_of(examples), how, keeping, ASKED)

    def right(self, learner: Facts, thing: Thing) -> tuple[list[bool], float]:
        """Which of a thing's questions are answered right, and how many of the old ones."""
        told = learner.examined(learner.held["old"])["exact_match"]
        asked = lines_of(thing.asked).documents(self.run, held_out=True)
        dreams = learner.own_dreams(learner.model, with_dreams(asked, {}), 0.0)
        return learner.right(asked, dreams), told

    def tuned(self, thing: Thing, count: int, keeping: Keeping, weights: Mapping[str, Tensor] | None = None) -> Any:
        learner = self.learner(thing.examples[: max(count, 1)], keeping)
        if weights:
            learner.model.load_state_dict(weights)
        if count:
            teach(learner)
        return self.right(learner, thing)

    def reptile(self) -> Mapping[str, Tensor]:
        """Weights from which a few steps learn a new thing (Nichol et al., arXiv:1803.02999): task after task, each a
        made-up thing of a material that is known and five answers about it, they go some of the way that a few steps
        of learning it lead."""
        if self.reptiles:
            return self.reptiles
        draw = random.Random(self.run.settings.seed)
        tasks: list[Question] = []
        for number in range(TASKS):
            name = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.choice((2, 3))))
            tasks += drawn({name: draw.choice([*THINGS])}, set(), {"train": 5}, number)
        learner = self.learner(tasks, PLAIN)
        own = learner.new
        for number in range(TASKS):
            before = {name: value.clone() for name, value in learner.model.state_dict().items()}
            batches = learner.batches(
                gather([(own, i) for i in range(5 * number, 5 * number + 5)]), learner.own.mixture, 0.0
            )
            learner.optimizer.state.clear()
            for epoch in range(INNER):
                forward_backward(learner.model, batches.assemble(batches.epoch(epoch)[:1]), "float32", tail_kernel)
                learner.descend(FEW_LR)
            after = learner.model.state_dict()
            learner.model.load_state_dict({n: value.lerp(after[n], TOWARDS) for n, value in before.items()})
        self.reptiles = {name: value.clone() for name, value in learner.model.state_dict().items()}
        return self.reptiles

    def prompted(self, thing: Thing, count: int) -> Any:
        """Examples as turns of a conversation before the question: as many as fit the context."""
        learner = self.learner(thing.examples[:1], PLAIN)
        asked = lines_of(thing.asked).documents(self.run, held_out=True)
        room = learner.model.config.context - dream_size(learner.longest) - 16
        prompts: list[list[int]] = []
        for question in thing.asked:
            shown = thing.examples[:count]
            while True:
                turns = [turn for one in shown for turn in (("user", one.prompt), ("assistant", one.answer))]
                said = [Message(role=role, content=text) for role, text in (*turns, ("user", question.prompt))]
                if len(ids := learner.tokenizer.encode(render(said), special=True)) <= room:
                    break
                shown = shown[1:]
            prompts.append(ids)
        ends = np.cumsum([len(ids) for ids in prompts])
        asked = replace(asked, prompt_ids=np.concatenate(prompts), prompt_ends=ends)
        dreams = dream_on(learner.model, asked.prompt, learner.tokenizer, learner.longest, 0, range(len(asked)), 0.0)
        return learner.right(asked, dreams), None


WAYS: dict[str, Callable[[FewExamples, Thing, int], Any]] = {
    "fine-tuning": lambda few, thing, count: few.tuned(thing, count, PLAIN),
    "fine-tuning with replay": lambda few, thing, count: few.tuned(thing, count, REPLAY),
    "Reptile's weights, then the same": lambda few, thing, count: few.tuned(thing, count, REPLAY, few.reptile()),
    "examples in the prompt": lambda few, thing, count: few.prompted(thing, count),
}
UNTAUGHT = {"fine-tuning": "nothing", "Reptile's weights, then the same": "Reptile's weights alone"}
"""What a way is called without an example."""


def answered(few: FewExamples, name: str, count: int) -> list[float | None]:
    """Shares of right answers: of all things' questions, of those that hinge on materials, and of old ones."""
    told = [WAYS[name](few, thing, count) for thing in few.things]
    right = np.array([hit for hits, _ in told for hit in hits])
    hinges = [hinge for thing in few.things for hinge in thing.hinges]
    old = [one for _, one in told if one is not None]
    return [float(right.mean()), float(right[hinges].mean()), float(np.mean(old)) if old else None]


def measure_few(runs: Sequence[Run]) -> None:
    fews, rows = [FewExamples(run) for run in runs], list[dict[str, Any]]()
    for count in COUNTS:
        for name in WAYS if count else UNTAUGHT:
            found = [
                kept(
                    few.run, f"few, {name}, {count}", lambda few=few, name=name, count=count: answered(few, name, count)
                )
                for few in fews
            ]
            new, hinging, old = ([one for one in column if one is not None] for column in zip(*found, strict=True))
            cells = {"new": interval(new), "hinging": interval(hinging), "old": interval(old) if old else None}
            rows.append({"way": name if count else UNTAUGHT[name], "count": count, **cells})
    columns: dict[str, Any] = {"count": {"label": "examples", "digits": 0}, "way": {"label": "how"}}
    for key, label in (
        ("new", "unseen combinations right ↑"),
        ("hinging", "those that hinge on its material ↑"),
        ("old", "old answers right ↑"),
    ):
        columns[key] = {"label": label, "digits": 1, "percent": True}
    about = f"a new thing of each of 3 materials, {ASKED} questions each with actions that its examples don't show"
    write("few", runs, about, columns, rows)


def write(name: str, runs: Sequence[Run], about: str, columns: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    train, count = runs[0].settings.train, len(runs)
    trained = f"{count} seed{'s' * (count > 1)} of {train.steps} steps{', train.gaps = 1' if train.gaps == 1 else ''}"
    machine = f"1 shared core; {trained}; {about}"
    write_table(FILES[name], f"python -m bench.continual {name} RUN (one of each seed)", machine, columns, rows)


FILES = {"facts": "new-facts", "few": "few-examples"}
"""Of docs/results."""


def main(what: str, *paths: str) -> None:
    {"facts": measure_facts, "few": measure_few}[what]([Run.open(Path(path)) for path in paths])


if __name__ == "__main__":
    main(*sys.argv[1:])
