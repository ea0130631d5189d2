"""The `mine` stage: triplets from every response, and the knowledge graph of them all."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput, TeacherError
from distill.events import Event, Listener, silent
from distill.knowledge.graph import build_graph, save_graph
from distill.mining.thinking import dream_first, thought_aloud
from distill.mining.triplets import LENSES, Mined, write_triplets
from distill.run import Run, sha256_file

MINER_VERSION = 3
"""Raised when a miner changes what it finds, so that finished runs notice."""


if TYPE_CHECKING:
    from distill.mining.likelihood import Judge

T = TypeVar("T")
CHOICES = ("rarity", "likelihood", "all")


def partial_file(run: Run) -> Path:
    """Where an unfinished mining by the teacher keeps what it has found."""
    return run.triplets.with_suffix(".partial.jsonl")


def stage_settings(run: Run) -> dict[str, Any]:
    """All that mining depends on, besides the traces."""
    settings = run.settings
    used: dict[str, Any] = {**asdict(settings.mine), "version": MINER_VERSION}
    if settings.capture.dataset:
        used["dataset"] = settings.capture.dataset
    elif settings.mine.miner == "teacher":
        context = settings.teacher.context  # what doesn't fit is refused, and not asked again
        used["teacher"] = {"model": settings.teacher.model, **({"context": context} if context else {})}
        used["seed"] = settings.seed
    elif settings.mine.choose == "likelihood":
        used["teacher"] = {"model": settings.teacher.model, "weights": settings.teacher.weights}
    return used


def summarize(mined: Sequence[Mined]) -> dict[str, Any]:
    """Counts for run.json: yield, grounding and lens balance."""
    lenses = Counter(triplet.lens for found in mined for triplet in found.triplets)
    triplets = sum(lenses.values())
    proposed = sum(found.proposed for found in mined)
    with_any = sum(bool(found.triplets) for found in mined)
    return {
        "responses": len(mined),
        "responses_with_triplets": with_any,
        "yield": round(with_any / len(mined), 4) if mined else 0.0,
        "triplets": triplets,
        "triplets_a_response": round(triplets / len(mined), 3) if mined else 0.0,
        "grounding": round(sum(found.grounded for found in mined) / proposed, 4) if proposed else 0.0,
        "ungrounded_dropped": proposed - sum(found.grounded for found in mined),
        "broken_answers": sum(found.broken for found in mined),
        "failed": sum(found.failed for found in mined),
        "lenses": {lens: lenses[lens] for lens in LENSES},
        "distinct_phrases": len({p for found in mined for t in found.triplets for p in t.phrases}),
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
    started = time.monotonic()
    with TraceStore(run.traces, readonly=True) as store:
        traces = list(store.traces())
    miner = "the dataset's own dreams" if run.settings.capture.dataset else f"{run.settings.mine.miner} miner"
    listen(Event("mine", "start", f"{len(traces)} responses, {miner}"))
    mined: list[Mined] = []
    try:
        mined.extend(_miner(run, [thought_aloud(trace) for trace in traces], listen))
    except TeacherError as error:
        if record is None:
            raise
        listen(Event("mine", "warning", f"{record.summary['failed']} responses still wait for a miner: {error}"))
        return record.summary
    steps = run.settings.mine.steps
    mined = [dream_first(trace, found, steps) for trace, found in zip(traces, mined, strict=True)]
    triplets = [triplet for found in mined for triplet in found.triplets]
    summary = summarize(mined)
    if not triplets:
        listen(Event("mine", "warning", "no triplets found: the student will have no dreams to learn"))
    # What is known must not tell the answers that a student is examined on.
    held_out = {trace.key for trace in traces if trace.held_out}
    if run.settings.capture.dataset:
        from distill.mining.dataset_miner import known_facts

        triplets += known_facts(run)
    graph = build_graph(triplet for triplet in triplets if triplet.trace not in held_out)
    summary |= {"graph_nodes": graph.number_of_nodes(), "graph_edges": graph.number_of_edges()}
    write_triplets(run.triplets, triplets)
    save_graph(graph, run.knowledge, run.settings.mine.graph_nodes)
    outputs = {path.name: sha256_file(path) for path in (run.triplets, run.knowledge)}
    run.record("mine", settings, outputs, summary, time.monotonic() - started)
    if not summary["failed"]:
        partial_file(run).unlink(missing_ok=True)
    listen(Event("mine", "done", f"{len(triplets)} triplets", data=summary))
    return summary


def _miner(run: Run, traces: Sequence[Trace], listen: Listener) -> Iterator[Mined]:
    if run.settings.capture.dataset:
        from distill.mining.dataset_miner import mine_dataset

        return _told(mine_dataset(run, traces), len(traces), listen)
    if run.settings.mine.miner == "syntax":
        return _by_syntax(run, traces, listen)
    if run.settings.mine.miner == "teacher":
        from distill.mining.teacher_miner import PartialMine, mine_traces

        partial = PartialMine(partial_file(run), stage_settings(run))
        return _told(mine_traces(traces, run.settings, listen, partial=partial), len(traces), listen)
    raise BadInput(f"mine.miner={run.settings.mine.miner}: no such miner; choose syntax or teacher")


def _by_syntax(run: Run, traces: Sequence[Trace], listen: Listener) -> Iterator[Mined]:
    """All are read before some of it is chosen: what is rare shows only then."""
    from distill.mining.choose import by_rarity
    from distill.mining.syntax_miner import read_texts

    settings = run.settings.mine
    if settings.choose not in CHOICES:
        raise BadInput(f"mine.choose={settings.choose}: choose one of {', '.join(CHOICES)}")
    judge = _judge(run, listen) if settings.choose == "likelihood" else None
    texts = ((trace.key, trace.prompt, trace.response.text, trace.response.done_reason) for trace in traces)
    found = list(_told(read_texts(texts, settings.details), len(traces), listen))
    ranked = [each.candidates for each in found] if settings.choose == "all" else by_rarity(found)
    if judge is not None:
        from distill.mining.likelihood import by_likelihood

        ranked = by_likelihood(found, ranked, judge, settings.minutes, listen)
    for each, candidates in zip(found, ranked, strict=True):
        yield each.mined(candidates, settings.steps)


def _judge(run: Run, listen: Listener) -> "Judge":
    """The teacher's weights; before anything is parsed, as they may not be there. Raises BadInput."""
    from distill.corpus.teachers_source import teachers_source
    from distill.mining.likelihood import Judge

    source = teachers_source(run, listen)
    if isinstance(source, str):
        raise BadInput(f"mine.choose=likelihood: needs the teacher's weights ({source}); or take mine.choose=rarity")
    return Judge(source, run.settings.capture.system)


def _told(found: Iterable[T], total: int, listen: Listener) -> Iterator[T]:
    for done, each in enumerate(found, 1):
        yield each
        if done % 16 == 0 or done == total:
            listen(Event("mine", "progress", done=done, total=total, unit="response"))
