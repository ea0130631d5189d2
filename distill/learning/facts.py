"""Learning new facts and keeping the old ones: `dream learn RUN --from`, the stage `facts`.

Each new answer is learned after the dream that comes with it; where none does, after the student's own of that prompt
and after none. What keeps the old ones is in keeping.py. A learning goes on from the one before it, each is a
checkpoint, and remembers what it learned for the next one. Killed, it goes on from the last `train.checkpoint_every`
steps, and ends as one that wasn't.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distill.backbone.generate import generate
from distill.backbone.model import Backbone, load_backbone
from distill.corpus.traces import TraceStore
from distill.events import Event, Listener, silent
from distill.learning.keeping import FISHER, MEMORY, Keeper, Keeping
from distill.learning.new_lines import NewLines, read_new
from distill.learning.onward import Onward
from distill.learning.replay import Memory, with_dreams
from distill.run import Run
from distill.student.grammar import longest_path
from distill.student.made_with import taught_to_dream
from distill.tokens.chat import think_block
from distill.tokens.packing import Documents, pack
from distill.training import checkpoint
from distill.training.batches import Row
from distill.training.drafts import TEMPERATURE, dream_on
from distill.training.losses import tail_kernel
from distill.training.mixture import Mixture
from distill.training.plan import CHANCE_LR, INHERITED_LR
from distill.training.start import began_as
from distill.training.step import forward_backward, move
from distill.training.validate import validate

VERSION = 1
TOGETHER = 4
"""Rows of new answers a step."""
MEASURED = 128
"""Held-out answers, of old and of new ones each, that are measured."""
GENTLER = 3
"""The learning rate is the training's, divided by this."""
RISES = 0.1
"""Share of the steps in which it rises; then it falls evenly."""


def learn_facts(
    run: Run,
    listen: Listener = silent,
    force: bool = False,
    *,
    source: Path | NewLines,
    epochs: int = 10,
    lr: float = 0.0,
    keeping: Keeping | None = None,
    measure: int = MEASURED,
) -> dict[str, Any]:
    """Teach the run's student the answers in `source` (new_lines.py says which); what comes out is the run's best
    checkpoint. Returns how well it knows new and old answers that are held out, before and now.

    lr: 0 for a third of the training's. measure: so many held-out answers of each at most. force: learn them once more.
    Raises MissingStage before a training, BadInput for a source that can't be read, RunMismatch where it has learned
    from feedback since.
    """
    run.require("train")
    keeping = keeping or Keeping()
    inherited = began_as(run, checkpoint.best(run))
    lr = lr or (run.settings.train.lr or (INHERITED_LR if inherited else CHANCE_LR)) / GENTLER
    new = read_new(run, source) if isinstance(source, Path) else source
    how: dict[str, Any] = {"source": new.digest, "epochs": epochs, "lr": lr, **asdict(keeping)}
    how |= {"seed": run.settings.seed, "version": VERSION}
    if not force and (record := run.fresh("facts", how)) is not None:
        listen(Event("facts", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    checkpoint.refuse(run, "facts")
    pack(run, listen if isinstance(source, Path) else silent)  # who follows learns again and again
    learning = Facts(run, new, how, keeping, measure)
    summary = learning.perform(listen)
    learning.record("facts", how, summary, learning.told["seconds"])
    listen(Event("facts", "done", f"{summary['steps']} steps", data=summary))
    return summary


def undo(run: Run) -> int:
    """Go back to the student before the last learning; returns how many checkpoints went."""
    found = checkpoint.of_stage(run, "facts")
    gone = of_learning(run, checkpoint.read_loop(found[-1]).settings["facts"]["from"]) if found else []
    for path in reversed(gone):
        checkpoint.delete(path)
    run.forget("facts")
    return len(gone)


class Facts(Onward):
    """One learning of a run. told: what its checkpoints know of it."""

    def __init__(self, run: Run, new: NewLines, how: Mapping[str, Any], keeping: Keeping, measure: int) -> None:
        super().__init__(run, how["lr"])
        self.how, self.longest, self.seed = how, longest_path(run.settings), run.settings.seed
        self.told: dict[str, Any] = {"how": how, "from": self.begun.name, "steps": 0, "seconds": 0.0, "done": False}
        before = checkpoint.read_loop(self.begun).settings.get("facts")
        recorded = run.records().get("facts")
        if before and before["how"] == how and not (before["done"] and recorded and recorded.settings == how):
            self.told = before
            checkpoint.load_optimizer(self.begun, self.model, self.optimizer)
        elif before and not before["done"]:  # another learning was begun and left: this one begins where it did
            self.told["from"] = before["from"]
            self.model.load_state_dict(load_backbone(run.checkpoints / before["from"]).state_dict())
        base = run.checkpoints / self.told["from"]
        own = of_learning(run, self.told["from"])
        newest = [path for path in checkpoint.list_checkpoints(run) if path not in own][-1]  # which needn't be the best
        self.base, was = checkpoint.read_loop(newest), load_backbone(base).to(self.model.cos.device)
        folder = self.begun if self.told["steps"] else base
        kept, given = folder / MEMORY, self.given.documents
        memory = Memory.load(kept) if kept.is_file() else Memory.of(given, keeping.memory, self.seed)
        self.keeper = Keeper(self, keeping, was, memory, folder / FISHER if self.told["steps"] else None)
        self.new = new.documents(run, held_out=False)
        self.dreams = self.own_dreams(was, self.new, TEMPERATURE)
        self.own = self.batches(self.new, Mixture.of(run.settings.train), run.settings.train.soft_weight)
        with TraceStore(run.traces, readonly=True) as store:
            old = list(islice(store.traces(held_out=True), measure))
        asked = [trace for trace in new.traces if trace.held_out][:measure]
        self.held = {"new": self.new, "old": self.validation.documents}  # where nothing is held out
        for name, lines in (("new", replace(new, traces=asked)), ("old", NewLines(old))):
            if lines.traces:
                self.held[name] = lines.documents(run, held_out=True)

    def own_dreams(self, model: Backbone, documents: Documents, temperature: float) -> dict[int, list[int]]:
        """Of documents that have none, where the student dreams."""
        if not taught_to_dream(self.run.settings):
            return {}
        room = model.config.context // 2
        chosen = [i for i in range(len(documents)) if not len(documents.dream(i)) and len(documents.prompt(i)) < room]
        return dream_on(model, documents.prompt, self.tokenizer, self.longest, self.seed, chosen, temperature)

    def plan(self) -> Iterator[list[Row]]:
        """The new rows of each step. Every epoch has another draw of what is read after no dream."""
        for epoch in range(self.how["epochs"]):
            random = np.random.default_rng([self.seed, epoch])
            read = {i: dream for i, dream in self.dreams.items() if random.random() >= self.own.mixture.empty}
            rows = self.own.drafted(epoch, self.own.epoch(epoch), 0, read)
            yield from (rows[start : start + TOGETHER] for start in range(0, len(rows), TOGETHER))

    def perform(self, listen: Listener) -> dict[str, Any]:
        """All steps that are left, the last of them kept; the summary."""
        self.told.setdefault("before", self.measured())
        steps, every = list(self.plan()), self.run.settings.train.checkpoint_every
        if left_out := self.own.left_out:
            text = f"{left_out} new prompts fill the context of {self.own.length} tokens: left out"
            listen(Event("facts", "warning", text))
        answers = len(self.own.usable)
        listen(Event("facts", "start", f"{answers} new answers, {len(self.keeper.memory)} old ones remembered"))
        with self.board("facts", self.base.step + self.told["steps"]) as board:
            while (number := self.told["steps"]) < len(steps):
                started = time.monotonic()
                losses = self.step(steps[number], number, len(steps))
                self.told["steps"] += 1
                self.told["seconds"] += time.monotonic() - started
                if (number + 1) % every == 0 and number + 1 < len(steps):
                    self._keep()
                for name, value in losses.items():
                    board.add_scalar(name, value, self.base.step + number + 1)
                listen(Event("facts", "progress", done=number + 1, total=len(steps), unit="steps", data=losses))
            if not self.told["done"]:
                self.told["done"] = True
                read = {i: self.new.dream(i).tolist() or self.dreams.get(i, []) for i in range(len(self.new))}
                learned = with_dreams(self.new, read)
                self.keeper.memory = self.keeper.memory.with_new(learned, self.keeper.keeping.memory, self.seed)
                self._keep()
            now = self.measured()
            rate = 1 - now["new_bits_per_byte"] / max(self.told["before"]["new_bits_per_byte"], 1e-9)
            board.add_scalar("adaptation_rate", rate, self.base.step + len(steps))
        held_out = 0 if self.held["new"] is self.new else len(self.held["new"])
        summary = {"answers": answers, "steps": len(steps), "held_out": held_out}
        summary |= {f"{name}_before": value for name, value in self.told["before"].items()} | now
        return summary

    def step(self, rows: Sequence[Row], number: int, total: int) -> dict[str, float]:
        """Learn from new rows and as many old ones; losses, nats a token."""
        progress = number / total
        batch = move(self.own.assemble(rows), self.model.cos.device)
        found = forward_backward(self.model, batch, self.precision, tail_kernel)
        random = np.random.default_rng([self.seed, number, len(self.new)])
        losses = {"loss": float(found["loss"]), **self.keeper.backward(len(rows), progress, random)}
        self.descend(self.how["lr"] * min(1.0, (number + 1) / (RISES * total), (1 - progress) / (1 - RISES)))
        return losses

    def _keep(self) -> None:
        """A checkpoint in the place of the one before in this learning."""
        before = of_learning(self.run, self.told["from"])
        self.keep(self.base, self.told["steps"], "facts", self.told, before)

    def beside(self, folder: Path) -> None:
        super().beside(folder)
        self.keeper.save(folder)

    def measured(self) -> dict[str, float]:
        """What it knows of held-out answers after its own greedy dreams: bits a byte and, in a dataset's run, whose
        answers are true ones, the share of its own that are the same word by word."""
        found: dict[str, float] = {}
        for name, documents in self.held.items():
            found |= {f"{name}_{key}": round(value, 4) for key, value in self.examined(documents).items()}
        return found

    def examined(self, documents: Documents) -> dict[str, float]:
        """The same of some documents."""
        dreams = self.own_dreams(self.model, with_dreams(documents, {}), 0.0)
        train = self.run.settings.train
        mixture = Mixture(dreams=train.dreams, empty=0.0, drafts=0.0)
        batches = self.batches(with_dreams(documents, dreams), mixture, 0.0)
        told = validate(self.model, batches, train.batch_rows, self.precision, tail_kernel)
        found = {"bits_per_byte": told["validation_bits_per_byte"]}
        if self.run.settings.capture.dataset:
            found["exact_match"] = float(np.mean(self.right(documents, dreams)))
        return found

    def right(self, documents: Documents, dreams: Mapping[int, list[int]]) -> list[bool]:
        """Whether greedy answers after these dreams are the documents' own, but for white space."""
        tokenizer = self.tokenizer
        asked = [
            [*map(int, documents.prompt(i)), *think_block(tokenizer, dreams.get(i, []))] for i in range(len(documents))
        ]
        self.model.eval()
        room, grammar = int(max(np.diff(documents.answer_ends, prepend=0)) + 8), self.grammar.answering
        fit = [i for i, ids in enumerate(asked) if len(ids) < self.model.config.context]
        fitting = [asked[i] for i in fit]
        written = generate(self.model, fitting, max_tokens=room, stop_ids=[tokenizer.eos_id], grammar=grammar)
        self.model.train()
        answered = dict(zip(fit, written, strict=True))
        said = [answered.get(i, []) for i in range(len(asked))]  # what doesn't fit has no answer
        texts = [
            [tokenizer.decode(ids, skip_special=True).split() for ids in some]
            for some in (said, [documents.answer(i).tolist() for i in range(len(documents))])
        ]
        return [own == true for own, true in zip(*texts, strict=True)]


def source_of(path: Path) -> str | None:
    """The digest of what a checkpoint learned last; None where that were no facts."""
    facts = checkpoint.read_loop(path).settings.get("facts")
    return facts["how"]["source"] if facts else None


def is_whole(path: Path) -> bool:
    """Whether what a checkpoint learned last was learned to its end."""
    return checkpoint.read_loop(path).settings["facts"]["done"]


def of_learning(run: Run, base: str) -> list[Path]:
    """Checkpoints that the learning which began with `base` left: the one before, too, where it was killed."""
    found = checkpoint.of_stage(run, "facts")
    return [path for path in found if checkpoint.read_loop(path).settings["facts"]["from"] == base]
