"""The `mine` stage: triplets from every response, and the knowledge graph of them all."""

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distill.cluster import open_cluster
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput, DistillError, TeacherError
from distill.events import Event, Listener, silent
from distill.knowledge.graph import Tally, save_graph
from distill.mining.thinking import dream_first, thought_aloud
from distill.mining.triplets import LENSES, Mined, Triplet, write_triplets
from distill.ranges import check_choice
from distill.run import Run, sha256_file

MINER_VERSION = 3
"""Raised when a miner changes what it finds, so that finished runs notice."""


if TYPE_CHECKING:
    from distill.mining.likelihood import Judge

T = TypeVar("T")


def partial_file(run: Run) -> Path:
    """Where an unfinished mining by the teacher keeps what it has found."""
    return run.triplets.with_suffix(".partial.jsonl")


def stage_settings(run: Run) -> dict[str, Any]:
    """All that mining depends on, besides the traces."""
    settings = run.settings
    used: dict[str, Any] = {**asdict(settings.mine), "version": MINER_VERSION}
    del used["processes"]  # they find the same
    if settings.capture.dataset:
        used["dataset"] = settings.capture.dataset
    elif settings.mine.miner == "teacher":
        context = settings.teacher.context  # what doesn't fit is refused, and not asked again
        used["teacher"] = {"model": settings.teacher.model, **({"context": context} if context else {})}
        used["seed"] = settings.seed
    elif settings.mine.choose == "likelihood":
        used["teacher"] = {"model": settings.teacher.model, "weights": settings.teacher.weights}
        # To the first one answers began with BOS, to the second a folder's template was ChatML.
        used["judge"] = 3 if Path(settings.teacher.weights).is_dir() and settings.teacher.weights else 2
    return used


class Counts:
    """For run.json: yield, grounding and lens balance."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()
        self.lenses: Counter[str] = Counter()
        self.proposed = self.grounded = 0

    def add(self, found: Mined) -> None:
        self.lenses.update(triplet.lens for triplet in found.triplets)
        self.proposed += found.proposed
        self.grounded += found.grounded
        self.of.update(
            {"responses": 1, "with any": bool(found.triplets), "broken": found.broken, "failed": found.failed}
        )

    def summary(self, phrases: int) -> dict[str, Any]:
        """phrases: how many different ones there are."""
        responses, triplets = self.of["responses"], self.lenses.total()
        return {
            "responses": responses,
            "responses_with_triplets": self.of["with any"],
            "yield": round(self.of["with any"] / responses, 4) if responses else 0.0,
            "triplets": triplets,
            "triplets_a_response": round(triplets / responses, 3) if responses else 0.0,
            "grounding": round(self.grounded / self.proposed, 4) if self.proposed else 0.0,
            "ungrounded_dropped": self.proposed - self.grounded,
            "broken_answers": self.of["broken"],
            "failed": self.of["failed"],
            "lenses": {lens: self.lenses[lens] for lens in LENSES},
            "distinct_phrases": phrases,
        }


def mine(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """Find triplets in every response; write triplets.jsonl and, of what is trained on, knowledge.graphml.

    Returns the summary.
    What the teacher as miner has found is kept at once: killed, or where it failed at some responses, the stage goes on
    from there, `force` or not.
    Raises MissingStage without traces, BadInput for an unknown miner, MissingDependency without a spaCy model.
    """
    run.require("capture")
    settings = stage_settings(run)
    record = None if force else run.fresh("mine", settings)
    if record is not None and not record.summary.get("failed"):
        listen(Event("mine", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    started, records = time.monotonic(), run.records()
    tally, counts = Tally(), Counts()
    with TraceStore(run.traces, readonly=True) as store:
        total = store.stats().responses
        miner = "the dataset's own dreams" if run.settings.capture.dataset else f"{run.settings.mine.miner} miner"
        listen(Event("mine", "start", f"{total} responses, {miner}"))
        try:
            with closing(_miner(run, store, total, listen)) as mined, closing(store.traces(soft=False)) as traces:
                write_triplets(run.triplets, _written(run, traces, mined, tally, counts))
        except TeacherError as error:
            if record is None:
                raise
            listen(Event("mine", "warning", f"{record.summary['failed']} responses still wait for a miner: {error}"))
            return record.summary
        except DistillError:  # the file that was there is there
            run.keep(records)
            raise
    graph = tally.graph(run.settings.mine.graph_nodes)
    summary = counts.summary(len(tally.phrases))
    if not summary["triplets"]:
        listen(Event("mine", "warning", "no triplets found: the student will have no dreams to learn"))
    if tally.dropped:
        text = f"{run.knowledge.name} holds the commonest edges, without {tally.dropped:,} others between its nodes"
        listen(Event("mine", "note", text))
    summary |= {"graph_nodes": tally.nodes, "graph_edges": tally.edges}
    save_graph(graph, run.knowledge, run.settings.mine.graph_nodes)
    outputs = {path.name: sha256_file(path) for path in (run.triplets, run.knowledge)}
    run.record("mine", settings, outputs, summary, time.monotonic() - started)
    if not summary["failed"]:
        partial_file(run).unlink(missing_ok=True)
    listen(Event("mine", "done", f"{summary['triplets']} triplets", data=summary))
    return summary


def _written(
    run: Run, traces: Iterable[Trace], mined: Iterable[Mined], tally: Tally, counts: Counts
) -> Generator[Triplet]:
    """All triplets, in order. The graph is of what is trained on: it must not tell the answers that a student is
    examined on."""
    for each, trace in zip(mined, traces, strict=True):
        found = dream_first(trace, each, run.settings.mine.steps)
        counts.add(found)
        if not trace.held_out:
            tally.add(found.triplets)
        for triplet in found.triplets:
            for phrase in triplet.phrases:
                tally.number(phrase)
            yield triplet
    if run.settings.capture.dataset:
        from distill.mining.dataset_miner import known_facts

        for _, chain in groupby(known_facts(run), key=attrgetter("trace")):
            tally.add(facts := list(chain))
            yield from facts
    run.forget("mine")  # the file takes its place next, and a kill before the graph is there leaves it without one


def _miner(run: Run, store: TraceStore, total: int, listen: Listener) -> Generator[Mined]:
    """What is found in each response, by key."""
    if run.settings.capture.dataset:
        from distill.mining.dataset_miner import mine_dataset

        yield from _told(mine_dataset(run, store.traces(soft=False)), total, listen)
    elif run.settings.mine.miner == "syntax":
        yield from _by_syntax(run, store, total, listen)
    else:
        check_choice("mine.miner", run.settings.mine.miner)
        from distill.mining.teacher_miner import PartialMine, mine_traces

        partial = PartialMine(partial_file(run), stage_settings(run))
        traces = [thought_aloud(trace) for trace in store.traces(soft=False)]
        yield from _told(mine_traces(traces, run.settings, listen, partial=partial), total, listen)


def _by_syntax(run: Run, store: TraceStore, total: int, listen: Listener) -> Iterator[Mined]:
    """All are read before some of it is chosen: what is rare shows only then."""
    from distill.mining.choose import by_rarity
    from distill.mining.readings import Readings, read_all

    settings = run.settings.mine
    check_choice("mine.choose", settings.choose)
    judge = _judge(run, listen) if settings.choose == "likelihood" else None
    with Readings(run.triplets) as found:
        cluster = open_cluster(where, listen) if (where := run.settings.runtime.cluster) else None
        lines = read_all(run.traces, settings.details, settings.processes, cluster)
        found.fill(_told(lines, total, listen))
        ranked = (each.candidates for each in found) if settings.choose == "all" else by_rarity(found)
        if judge is not None:
            from distill.mining.likelihood import by_likelihood

            answered = ((trace.prompt, trace.response.text) for trace in store.traces(soft=False))
            ranked = by_likelihood(answered, ranked, judge, settings.minutes, listen)
        for each, candidates in _told(zip(found, ranked, strict=True), total, listen, "dream"):
            yield each.mined(candidates, settings.steps)


def _judge(run: Run, listen: Listener) -> "Judge":
    """The teacher's weights; before anything is parsed, as they may not be there. Raises BadInput."""
    from distill.corpus.teachers_source import teachers_source
    from distill.mining.likelihood import Judge

    source = teachers_source(run, listen)
    if isinstance(source, str):
        raise BadInput(f"mine.choose=likelihood: needs the teacher's weights ({source}); or take mine.choose=rarity")
    return Judge(source, run.settings.capture.system)


def _told(found: Iterable[T], total: int, listen: Listener, unit: str = "response") -> Iterator[T]:
    said = time.monotonic()
    for done, each in enumerate(found, 1):
        yield each
        if done % 16 == 0 or done == total or time.monotonic() - said > 1:
            said = time.monotonic()
            listen(Event("mine", "progress", done=done, total=total, unit=unit))
