"""On-policy distillation: the `polish` stage.

Training shows a student its teacher's answers; its own go on from what it said itself, where no teacher ever was. Here
it answers training prompts, dreams before some of them, and at each word learns what its teacher would have said next
(generalized knowledge distillation, arXiv:2306.13649): soft targets alone, of the teacher's 20 likeliest and a tail.
Where the teacher's weights can't be read, it is asked to go on with what the student began (consult.py). Some steps
learn from the teacher's own answers as before, lest those be forgotten.

A round is so many answers, their targets and the steps that learn from them; at its end there is a checkpoint, so that
a polishing that was stopped goes on with the round that it was in.

Shape legend: A answer tokens of all documents, K alternatives of each.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.backbone.generate import generate, states_before
from distill.backbone.model import Backbone
from distill.corpus.prompts import load_prompts
from distill.corpus.teachers_source import teachers_source
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, RunMismatch
from distill.events import Event, Listener, silent
from distill.learning.consult import EARLY, JOURNAL, ON, Begun, Consultation, consulting, early
from distill.learning.divergence import divergence
from distill.learning.onward import Onward, take_back
from distill.run import Run, fingerprint_of
from distill.student.grammar import longest_path
from distill.student.initialize import transplant
from distill.teacher.protocol import MAX_TOP_LOGPROBS
from distill.teacher.source import Source
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import prompt_ids, think_block
from distill.tokens.packing import Documents, is_validation, pack, spelled_bytes
from distill.training import checkpoint, numerics
from distill.training.batches import Batch, Batches, Row
from distill.training.drafts import dream_on
from distill.training.losses import Kernel, alternatives, tail_kernel
from distill.training.mixture import Mixture
from distill.training.step import forward_backward, move

VERSION = 3
WAYS = ("auto", "weights", "server")
SCORED = 2048
"""Tokens whose targets are made at once."""
LEAST_RATE = 0.1
"""Share of the learning rate that is left at the end; it falls evenly."""
WARMUP = 20
"""Steps in which it rises before: a new optimizer knows few gradients, and its first steps are wild."""


def polish(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """Let the run's best checkpoint learn from its own answers, or go on; what comes out is the run's best checkpoint
    then. Returns what it changed.

    Raises MissingStage before a training, BadInput where the teacher's weights can't be read and it can't be asked,
    what becomes of a teacher that is asked (what it said is kept, and not asked again), RunMismatch where a polishing
    with other settings is there (with `force` it goes once the teacher has answered, or the first round by its weights
    is done), or the student has learned more since.
    """
    settings = run.settings.polish
    run.require("train")
    if settings.through not in WAYS:
        raise BadInput(f"polish.through={settings.through}: is none of {', '.join(WAYS)}")
    for name in ("teachers_share", "beta"):
        if not 0 <= (value := getattr(settings, name)) <= 1:
            raise BadInput(f"polish.{name}={value}: lies between 0 and 1")
    begun, asked = bool(checkpoint.of_stage(run, "polish")), (run.checkpoints / JOURNAL).exists()
    if force:  # as it will be once the teacher was found
        begun = asked = False
    asks = settings.through == "server" or (settings.through == "auto" and asked)
    further = further_prompts(run, listen)
    if not force and (record := run.fresh("polish", _how(run, asks, further))) is not None:
        listen(Event("polish", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    checkpoint.refuse(run, "polish")
    source = "it was begun so" if asked else f"polish.through={settings.through}" if asks else _readable(run, listen)
    if isinstance(source, str) and not asks:
        if begun or settings.through == "weights":
            raise BadInput(f"{run.path}: {source}")
        asks = True
    how = _how(run, asks, further)
    polishing = Polishing(run, how, listen, force, further)
    if not isinstance(source, str):
        polishing.read(source)
        summary = polishing.perform()
    else:
        listen(Event("polish", "note", f"asking the teacher to go on with what the student begins ({source})"))
        with consulting(run, polishing.tokenizer, polishing.told["how"], listen, force, further) as consultation:
            if force:  # its journal has gone by now
                take_back(run, "polish")
            polishing.consultation = consultation
            summary = polishing.perform()
    polishing.record("polish", how, summary, polishing.told["seconds"])
    listen(Event("polish", "done", f"{summary['answers']} answers of its own", data=summary))
    return summary


def further_prompts(run: Run, listen: Listener = silent) -> list[str]:
    """Those of `polish.prompts` that training neither read nor kept back, nor an exam asks. Raises BadInput."""
    if not run.settings.polish.prompts:
        return []
    if run.settings.train.retrieve:
        raise BadInput("polish.prompts: what the graph knows of them is in no prompt; not with train.retrieve")
    found = load_prompts(run.settings.polish.prompts, run.settings.capture.held_out, listen=listen)
    with TraceStore(run.traces, readonly=True) as store:
        known = {prompt for _, prompt, _ in store.answers()}
    further = [p.text for p in found if not (p.held_out or is_validation(p.text) or p.text in known)]
    listen(Event("polish", "note", f"{len(further):,} of {len(found):,} further prompts are answered, too"))
    return further


def _how(run: Run, asks: bool, further: Sequence[str]) -> dict[str, Any]:
    """All that a polishing of that way depends on."""
    settings = asdict(run.settings.polish)
    del settings["through"]
    settings.update({"texts": fingerprint_of(further)} if settings.pop("prompts") else {})
    return {**settings, "seed": run.settings.seed, "version": VERSION, **({"asked": [EARLY, ON]} if asks else {})}


def _readable(run: Run, listen: Listener) -> Source | str:
    """The teacher's weights, or why they are of no use."""
    source = teachers_source(run, listen)
    if isinstance(source, str):
        return f"polishing by its teacher's weights needs them (--teacher-weights): {source}"
    if StudentTokenizer.load(run.tokenizer).kind != "aligned":
        return "polishing by its teacher's weights needs its teacher's tokens; tokenize with --kind aligned"
    listen(Event("polish", "note", f"by its teacher's weights, {source.path}"))
    return source


def undo(run: Run) -> int:
    """Go back to the training: delete what polishing left, and what went on from there; returns how many checkpoints
    that were."""
    (run.checkpoints / JOURNAL).unlink(missing_ok=True)
    return take_back(run, "polish")


class Polishing(Onward):
    """One polishing of a run, by its teacher's weights (`read`) or by a consultation. told: what its checkpoints know
    of it. anew: it begins with the student before any polishing. further: prompts beside those of training."""

    teacher: Backbone
    consultation: Consultation | None = None

    def __init__(
        self,
        run: Run,
        how: Mapping[str, Any],
        listen: Listener,
        anew: bool = False,
        further: Sequence[str] = (),
    ) -> None:
        self.listen, self.settings, self.seed = listen, run.settings.polish, run.settings.seed
        pack(run, listen)
        kept = numerics.load(run.checkpoints / "numerics.json")
        super().__init__(run, self.settings.lr, kept.precision if kept else "float32", "polish" if anew else "")
        same = {key: value for key, value in how.items() if key not in ("rounds", "minutes")}
        self.told: dict[str, Any] = {"how": same, "round": 0, "steps": 0, "answers": 0, "seconds": 0.0, "kl": []}
        if checkpoint.stage_of(self.begun) == "polish":
            self.told = checkpoint.read_loop(self.begun).settings["polish"]
            if self.told["how"] != same:
                text = f"{self.begun}: polished with other settings; --force begins again where training ended"
                raise RunMismatch(text)
            checkpoint.load_optimizer(self.begun, self.model, self.optimizer)
        self.base = checkpoint.read_loop(checkpoint.latest(run, "polish"))
        self.steps = longest_path(run.settings)
        self.further = [prompt_ids(self.tokenizer, text, system=run.settings.capture.system) for text in further]
        self.kernel = divergence(self.settings.beta)
        if self.settings.beta and self.tokenizer.kind != "aligned":
            listen(Event("polish", "note", "by forward KL: polish.beta is for a student with its teacher's tokens"))

    def read(self, source: Source) -> None:
        """Take the teacher's weights. Raises BadInput where memory is too small for them."""
        self.teacher = transplant(source, self.tokenizer, self.run.settings.student.context).to(self.model.cos.device)

    def progress(self) -> float:
        """Share of all rounds, or of the minutes, that is done."""
        if self.settings.rounds:
            return self.told["round"] / self.settings.rounds
        return self.told["seconds"] / max(60 * self.settings.minutes, 1e-9)

    def perform(self) -> dict[str, Any]:
        """Round after round, each kept; the summary."""
        self.told.setdefault("before", self.bits_per_byte())
        self.listen(Event("polish", "start", "the student answers, its teacher says what it would have said"))
        with self.board("polish", self.told["round"]) as board:
            while (progress := self.progress()) < 1:
                started = time.monotonic()
                kl = self._round(self.told["round"], self.settings.lr * max(LEAST_RATE, 1 - progress))
                self.told["round"] += 1
                if kl is not None:
                    self.told["kl"] = [*self.told["kl"][:1], round(kl, 4)]
                    board.add_scalar("kl", kl, self.told["round"])
                self.told["seconds"] = round(self.told["seconds"] + time.monotonic() - started, 1)
                self.keep(self.base, self.told["steps"], "polish", self.told)
                if self.consultation is None:  # what an earlier polishing asked goes with its checkpoints
                    (self.run.checkpoints / JOURNAL).unlink(missing_ok=True)
                self._tell(kl=kl, answers=self.told["answers"])
        told, (first, *_, last) = self.told, (self.told["kl"] * 2 or [0.0, 0.0])
        bits = {"bits_per_byte_before": told["before"], "bits_per_byte": self.bits_per_byte()}
        counts = {"rounds": told["round"], "answers": told["answers"], "steps": told["steps"]}
        if self.consultation is not None:
            counts["seconds_waited_for_the_teacher"] = round(self.consultation.waited, 1)
        return {**counts, "kl_of_own_answers_before": first, "kl_of_own_answers": last, **bits}

    def _tell(self, **data: Any) -> None:
        total, unit = (self.settings.rounds, "rounds") if self.settings.rounds else (60 * self.settings.minutes, "s")
        done = min(self.progress(), 1.0) * total
        self.listen(Event("polish", "progress", done=round(done, 1), total=total, unit=unit, data=data))

    def _round(self, number: int, rate: float) -> float | None:
        """Answers, their targets and what is learned from both; the divergence on them, nats a token, None where
        no word of them has a soft target."""
        random = np.random.default_rng([self.seed, number])
        size, share = self.run.settings.train.batch_rows, self.settings.teachers_share
        given = self.given.epoch(number)
        steps: list[tuple[Batches, list[Row]]] = []
        if share < 1:
            own, rows = self._own(number, random)
            steps = [(own, rows[start : start + size]) for start in range(0, len(rows), size)]
            count = round(len(steps) * share / (1 - share))
        else:  # as many answers of the teacher's as there would be own ones
            count = max(1, self.settings.answers * len(given) // (size * len(self.given.documents)))
        steps += [(self.given, [given[(i * size + j) % len(given)] for j in range(size)]) for i in range(count)]
        kl: list[float] = []
        for place in random.permutation(len(steps)):
            source, chosen = steps[place]
            found = self._step(source.assemble(chosen), rate, self.kernel if source is not self.given else tail_kernel)
            if source is not self.given:
                kl.append(found)
        known = [each for each in kl if not math.isnan(each)]
        if not known and share < 1:
            text = f"round {number + 1}: of its own answers no word has a soft target; nothing is learned from them"
            self.listen(Event("polish", "warning", text))
        return float(np.mean(known)) if known else None

    def _own(self, number: int, random: np.random.Generator) -> tuple[Batches, list[Row]]:
        """Rows of the student's own answers, with what its teacher would have said."""
        if self.consultation is None:
            documents, dreams = self.own_answers(number, random)
        else:
            how = (self.settings.rounds, self.begin, self.prompt, self._tell)
            documents, dreams = self.consultation.answers(number, *how)
        self.told["answers"] += len(documents)
        mixture = Mixture(dreams=True, empty=0.0, drafts=1.0, gaps=self.run.settings.train.gaps)
        own = self.batches(documents, mixture, soft=1.0)
        return own, own.drafted(0, own.epoch(0), 0, dreams)

    def prompt(self, i: int) -> list[int]:
        """Ids of a training document's, or of one of those after them."""
        given = self.given.documents
        return given.prompt(i).tolist() if i < len(given) else self.further[i - len(given)]

    def own_answers(self, number: int, random: np.random.Generator) -> tuple[Documents, dict[int, list[int]]]:
        """Documents of the student's answers with its teacher's targets, and the dreams that some were given after."""
        chosen, dreamed, answers = self._said(number, random, self.run.settings.capture.max_tokens)
        documents = judged(self.teacher, self.tokenizer, [self.prompt(i) for i in chosen], answers)
        return documents, {place: dreamed[i] for place, i in enumerate(chosen) if i in dreamed}

    def begin(self, number: int) -> list[Begun]:
        """What the student says first, in a round whose answers its teacher goes on with."""
        random = np.random.default_rng([self.seed, number])
        chosen, dreamed, answers = self._said(number, random, EARLY + 1)
        return [
            Begun(i, dreamed.get(i, []), early(answer, self.tokenizer, random))
            for i, answer in zip(chosen, answers, strict=True)
        ]

    def _said(
        self, number: int, random: np.random.Generator, most: int
    ) -> tuple[list[int], dict[int, list[int]], list[list[int]]]:
        """Prompts, the dreams that some were answered after, and the student's answers to all of them."""
        run, given = self.run.settings, self.given.documents
        count, fit = len(given) + len(self.further), self.fitting(given, self.further)
        chosen = [int(i) for i in random.choice(fit, min(self.settings.answers, len(fit)), replace=False)]
        seed = self.seed + 2 * number * count
        dreaming = [i for i in chosen if run.train.dreams and random.random() >= run.train.empty_dreams]
        how = (self.prompt, self.tokenizer, self.steps, seed, dreaming, self.settings.temperature)
        dreamed = dream_on(self.model, *how)
        contexts = [[*self.prompt(i), *think_block(self.tokenizer, dreamed.get(i, []))] for i in chosen]
        self.model.eval()
        answers = generate(
            self.model,
            contexts,
            max_tokens=most,
            temperature=self.settings.temperature,
            seed=[seed + count + i for i in chosen],  # not its dream's numbers once more
            stop_ids=[self.tokenizer.eos_id],
            batch_rows=64,
            grammar=self.grammar.answering,
        )
        self.model.train()
        return chosen, dreamed, answers

    def _step(self, batch: Batch, rate: float, kernel: Kernel) -> float:
        batch = move(batch, self.model.cos.device)
        found = forward_backward(self.model, batch, self.precision, kernel)
        self.told["steps"] += 1
        self.descend(rate * min(1.0, self.told["steps"] / WARMUP))
        if batch.chunks is not None:
            return float(found["kl"].mean())
        return float(found["kl"][(batch.targets.weight > 0) & (batch.targets.soft_weight > 0) & batch.answers].mean())


@torch.inference_mode()
def judged(
    teacher: Backbone, tokenizer: StudentTokenizer, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Documents:
    """Documents of answers that a student gave, without dreams; the targets are what its teacher, under the student's
    vocabulary, would have said after the prompt and the answer so far: of words, and of the end."""
    parts: list[NDArray[Any]] = [np.zeros((0, MAX_TOP_LOGPROBS))] * len(answers)
    scores: list[NDArray[Any]] = [np.zeros((0, 1 + MAX_TOP_LOGPROBS))] * len(answers)
    unsaid = torch.ones(tokenizer.vocab_size, dtype=torch.bool, device=teacher.cos.device)
    unsaid[: tokenizer.base_size] = unsaid[tokenizer.eos_id] = False
    for batch, hidden in states_before(teacher, prompts, answers, SCORED):
        labels = torch.tensor([[token] for i in batch for token in answers[i]], device=hidden.device)
        logprobs = teacher.lm_head(hidden).float().masked_fill_(unsaid, float("-inf")).log_softmax(-1)
        ids, both = alternatives(logprobs, labels, MAX_TOP_LOGPROBS)
        ends = np.cumsum([len(answers[i]) for i in batch])[:-1]
        for i, some, said in zip(
            batch, np.split(ids.cpu().numpy(), ends), np.split(both.cpu().numpy(), ends), strict=True
        ):
            parts[i], scores[i] = some, said
    return Documents(
        prompt_ids=np.concatenate(prompts),
        prompt_ends=np.cumsum([len(prompt) for prompt in prompts]),
        dream_ids=np.zeros(0, np.int64),
        dream_ends=np.zeros(len(answers), np.int64),
        answer_ids=np.concatenate(answers),
        answer_ends=np.cumsum([len(answer) for answer in answers]),
        slot_ids=np.concatenate(parts).astype(np.int64),
        slot_logprobs=np.concatenate(scores).astype(np.float16),
        chunk_ids=np.full(sum(map(len, answers)), -1, np.int32),
        chunk_logprobs=np.zeros(0, np.float32),
        answer_bytes=np.array([spelled_bytes(np.array(answer), tokenizer) for answer in answers], np.int64),
    )
