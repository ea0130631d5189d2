"""Dreams chosen for what they do: the `redream` stage.

A mined dream is what rules found in an answer. A trained student samples others for the same question, and of these and
the one that it learned from, that one is kept which has the highest

    log p(answer | dream, question) + prior · log p(dream | question)

With prior 1 that is the dream's posterior given the answer, up to a constant: an expectation step as in
arXiv:2503.18866, with the likeliest dream in the place of a draw. The next training is the step that maximizes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from distill.backbone.device import pick_device
from distill.backbone.generate import log_likelihood
from distill.backbone.model import Backbone, load_backbone
from distill.config import RedreamSettings
from distill.corpus.traces import TraceStore
from distill.events import Event, Listener, silent
from distill.journal import Journal
from distill.run import Run, fingerprint, sha256_file, write_json_lines
from distill.student.grammar import dream_size
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import parse_dream, think_block
from distill.tokens.packing import Documents, chosen_dreams, pack, split_traces
from distill.training import checkpoint
from distill.training.drafts import dream_on
from distill.training.plan import data_fingerprint

VERSION = 1
TOGETHER = 64
"""Answers whose dreams are sampled together, and then written down."""
TEMPERATURE = 1.0
"""The student's own distribution."""


def redream(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """Choose a dream for each answer that has one, of training and validation; returns what that brought.

    The best checkpoint dreams. An interrupted choice goes on. Raises MissingStage before a training.
    """
    settings = run.settings.redream
    run.require("train")
    student = checkpoint.best(run)
    weights = sha256_file(student / "model.safetensors")
    how = {**asdict(settings), "seed": run.settings.seed, "student": weights, "version": VERSION}
    if not force and (record := run.fresh("redream", how)) is not None:
        return record.summary
    started = time.monotonic()
    pack(run, listen)
    partial = run.path / f"dreams-{fingerprint([how, data_fingerprint(run)])[:8]}.jsonl"
    model = load_backbone(student).to(pick_device(run.settings.train.device, "train.device"))
    with Journal(partial, force) as journal:
        done = {line["trace"] for line in journal.lines}
        parts = list(_parts(run, model))
        total = sum(len(part.keys) for part in parts)
        listen(Event("redream", "start", f"{settings.samples} dreams for each of {total} answers"))
        for part in parts:
            for keys in part.together():
                late = settings.minutes and time.monotonic() - started > 60 * settings.minutes
                if not late and not done.issuperset(keys):
                    for line in part.choose(keys, settings):
                        if line["trace"] not in done:
                            journal.append(line)
                            done.add(line["trace"])
                listen(Event("redream", "progress", done=len(journal.lines), total=total, unit="answers"))
        found = journal.lines
    # What an earlier round chose, and this one didn't come to, stays.
    earlier = [{"trace": key, "dream": dream} for key, dream in chosen_dreams(run).items() if key not in done]
    write_json_lines(run.dreams, [*found, *earlier])
    for stale in run.path.glob("dreams-*.jsonl"):
        stale.unlink()
    summary = {"answers": total, **_gains(found)}
    run.record("redream", how, {run.dreams.name: sha256_file(run.dreams)}, summary, time.monotonic() - started)
    text = f"{summary['replaced']} dreams replaced"
    if left := total - len(found):
        text += f"; {left} of {total} answers weren't come to in redream.minutes={settings.minutes:g}"
    listen(Event("redream", "done", text, data=summary))
    return summary


def _gains(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many were looked at and replaced; nats that answers and dreams gained by it, in the mean of all of these."""
    gained = np.array([[line[name][1] - line[name][0] for name in ("answer", "dream_nats")] for line in lines])
    answer, dream = gained.mean(0).round(4).tolist() if len(lines) else (0.0, 0.0)
    replaced = sum(line["replaced"] for line in lines)
    return {"dreams": len(lines), "replaced": replaced, "answer_gain": answer, "dream_gain": dream}


def _parts(run: Run, model: Backbone) -> Iterator["Part"]:
    tokenizer, steps, seed = StudentTokenizer.load(run.tokenizer), run.settings.mine.steps, run.settings.seed
    with TraceStore(run.traces, readonly=True) as store:
        traces = split_traces(store)
    for name, some in zip(("train", "validation"), traces, strict=True):
        documents = Documents.load(run.data / name)
        yield Part(model, tokenizer, documents, [trace.key for trace in some], steps, seed)
        seed += len(documents) * run.settings.redream.samples


class Part:
    """Documents, and the student that dreams of them. keys: trace → document, of those that have a dream, and whose
    prompt leaves room for any."""

    def __init__(
        self,
        model: Backbone,
        tokenizer: StudentTokenizer,
        documents: Documents,
        traces: Sequence[str],
        steps: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.documents, self.steps, self.seed = model, tokenizer, documents, steps, seed
        self.room = model.config.context - len(think_block(tokenizer, [0] * dream_size(steps)))
        prompts = np.diff(documents.prompt_ends, prepend=0)
        fit = (np.diff(documents.dream_ends, prepend=0) > 0) & (prompts < self.room)
        self.keys = {key: i for i, key in enumerate(traces) if fit[i]}

    def together(self) -> Iterator[list[str]]:
        keys = list(self.keys)
        return (keys[start : start + TOGETHER] for start in range(0, len(keys), TOGETHER))

    def choose(self, keys: Sequence[str], settings: RedreamSettings) -> Iterator[dict[str, Any]]:
        """For each trace its dream as text, whether it is another than before, and the log-likelihoods of the answer
        under it and of itself, before and now."""
        chosen = [self.keys[key] for key in keys]
        dreams = {i: [self.documents.dream(i).tolist()] for i in chosen}
        for sample in range(settings.samples):
            seed = self.seed + sample * len(self.documents)
            made = dream_on(self.model, self.documents.prompt, self.tokenizer, self.steps, seed, chosen, TEMPERATURE)
            for i, ids in made.items():
                if ids not in dreams[i] and any(parse_dream(self.tokenizer, ids).values()):
                    dreams[i].append(ids)
        scores = iter(self.scores([(i, ids) for i in chosen for ids in dreams[i]]))
        for key, i in zip(keys, chosen, strict=True):
            scored = [next(scores) for _ in dreams[i]]
            best = max(range(len(scored)), key=lambda n: scored[n][0] + settings.prior * scored[n][1])
            nats = {name: [scored[0][n], scored[best][n]] for n, name in enumerate(("answer", "dream_nats"))}
            yield {"trace": key, "dream": self.tokenizer.decode(dreams[i][best]), "replaced": best > 0, **nats}

    def scores(self, dreams: Sequence[tuple[int, list[int]]]) -> list[tuple[float, float]]:
        """log p(answer | dream, prompt) and log p(dream | prompt) of a document with a dream; of a long answer, as much
        as fits beside any dream."""
        prompts = [self.documents.prompt(i).tolist() for i, _ in dreams]
        thoughts = [think_block(self.tokenizer, ids) for _, ids in dreams]
        rooms = [self.room + 1 - len(prompt) for prompt in prompts]
        answers = [self.documents.answer(i)[:room].tolist() for (i, _), room in zip(dreams, rooms, strict=True)]
        whole = [thought + answer for thought, answer in zip(thoughts, answers, strict=True)]
        scored = log_likelihood(self.model, prompts, whole)
        cuts = [(part, len(thought)) for part, thought in zip(scored, thoughts, strict=True)]
        return [(float(part[cut:].sum()), float(part[:cut].sum())) for part, cut in cuts]
