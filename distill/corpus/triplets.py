"""Triplets (what, action, result): what they are, how they are stored, and the `mine` stage that finds them.

A dream is, for each of four lenses, a chain of at most `mine.steps` triplets. Every triplet knows where it
was found: the trace, the sentence and the miner.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener, silent
from distill.run import Run, sha256_file, write_atomic

if TYPE_CHECKING:
    from distill.corpus.traces import Trace

LENSES = ("spatial", "temporal", "causal", "abstract")
"""The four paths of a dream, in the order in which they are dreamed."""

MAX_WORDS = 4
MAX_CHARACTERS = 28
"""Of a phrase: it must read well as the label of one image token."""

MINER_VERSION = 1
"""Raised when a miner changes what it finds, so that finished runs notice."""


@dataclass(frozen=True)
class Triplet:
    """One step of a dream.

    `step` counts from 0 within (trace, lens); `trace` is the key of the response it was found in, `sentence` the
    sentence's number there (-1 where the miner can't tell), `miner` is "syntax" or "teacher".
    """

    what: str
    action: str
    result: str
    lens: str
    step: int
    trace: str
    sentence: int
    miner: str

    @property
    def phrases(self) -> tuple[str, str, str]:
        return self.what, self.action, self.result


@dataclass(frozen=True)
class Mined:
    """What a miner found in one response: triplets, how many were ungrounded, and whether its answer broke."""

    triplets: list[Triplet]
    proposed: int
    """Triplets found, the ungrounded included."""
    grounded: int
    broken: bool = False


def clean_phrase(text: str) -> str:
    """Lower-case, single spaces, no brackets of image tokens and no control characters; "" if nothing is left."""
    kept = "".join(c if c.isprintable() and c not in "⟨⟩<>|" else " " for c in text.lower())
    return " ".join(kept.split()).strip(' .,;:!?"“”‘*_`()[]{}-–—')


def fits(phrase: str) -> bool:
    """Whether a clean phrase is short enough to be a label."""
    return bool(phrase) and len(phrase) <= MAX_CHARACTERS and len(phrase.split()) <= MAX_WORDS


# Files.


def write_triplets(path: Path, triplets: Iterable[Triplet]) -> None:
    """One JSON object a line, atomically."""
    lines = [json.dumps(asdict(triplet), ensure_ascii=False) for triplet in triplets]
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def read_triplets(path: Path) -> list[Triplet]:
    """All triplets of a file. Raises BadInput where there is none and CorruptFile with the broken line's number."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; `dream mine` writes it") from error
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _parse(line: bytes, place: str) -> Triplet:
    try:
        value = json.loads(line)
        types = {field.name: field.type for field in fields(Triplet)}
        if not isinstance(value, dict) or value.keys() != types.keys():
            raise ValueError(f"needs exactly the fields {', '.join(types)}")
        for name, kind in types.items():
            if type(value[name]) is not kind:
                raise ValueError(f"{name} must be {'a number' if kind is int else 'text'}")
        if value["lens"] not in LENSES:
            raise ValueError(f"lens is {value['lens']!r}, not one of {', '.join(LENSES)}")
    except ValueError as error:
        raise CorruptFile(f"{place}: not a triplet ({error}); mend the line or run `dream mine --force`") from error
    return Triplet(**value)


def by_trace(triplets: Iterable[Triplet]) -> dict[str, list[Triplet]]:
    """Triplets of each trace, in lens order and within a lens by step."""
    found: dict[str, list[Triplet]] = {}
    for triplet in triplets:
        found.setdefault(triplet.trace, []).append(triplet)
    for group in found.values():
        group.sort(key=lambda triplet: (LENSES.index(triplet.lens), triplet.step))
    return found


# The stage.


def partial_file(run: Run) -> Path:
    """Where an unfinished mining by the teacher keeps what it has found."""
    return run.triplets.with_suffix(".partial.jsonl")


def stage_settings(run: Run) -> dict[str, Any]:
    """All that mining depends on, besides the traces."""
    settings = run.settings
    used: dict[str, Any] = {**asdict(settings.mine), "version": MINER_VERSION}
    if settings.mine.miner == "teacher":
        used["teacher"] = {"model": settings.teacher.model}
        used["seed"] = settings.seed
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
        "lenses": {lens: lenses[lens] for lens in LENSES},
        "distinct_phrases": len({p for found in mined for t in found.triplets for p in t.phrases}),
    }


def mine(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """Find triplets in every response; write triplets.jsonl and knowledge.graphml. Returns the summary.

    What the teacher as miner has found is kept at once: killed, the stage goes on from there, `force` or not.
    Raises MissingStage without traces, BadInput for an unknown miner, MissingDependency without a spaCy model.
    """
    from distill.corpus.knowledge import build_graph, save_graph
    from distill.corpus.traces import TraceStore

    run.require("capture")
    settings = stage_settings(run)
    record = None if force else run.fresh("mine", settings)
    if record is not None:
        listen(Event("mine", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    started = time.monotonic()
    with TraceStore(run.traces, readonly=True) as store:
        traces = list(store.traces())
    listen(Event("mine", "start", f"{len(traces)} responses, {run.settings.mine.miner} miner"))
    mined: list[Mined] = []
    for found in _miner(run, traces, listen):
        mined.append(found)
        if len(mined) % 16 == 0 or len(mined) == len(traces):
            listen(Event("mine", "progress", done=len(mined), total=len(traces), unit="response"))
    triplets = [triplet for found in mined for triplet in found.triplets]
    summary = summarize(mined)
    if not triplets:
        listen(Event("mine", "warning", "no triplets found: the student will have no dreams to learn"))
    graph = build_graph(triplets)
    summary |= {"graph_nodes": graph.number_of_nodes(), "graph_edges": graph.number_of_edges()}
    write_triplets(run.triplets, triplets)
    save_graph(graph, run.knowledge, run.settings.mine.graph_nodes)
    outputs = {path.name: sha256_file(path) for path in (run.triplets, run.knowledge)}
    run.record("mine", settings, outputs, summary, time.monotonic() - started)
    partial_file(run).unlink(missing_ok=True)
    listen(Event("mine", "done", f"{len(triplets)} triplets", data=summary))
    return summary


def _miner(run: Run, traces: Sequence["Trace"], listen: Listener) -> Iterator[Mined]:
    name, steps = run.settings.mine.miner, run.settings.mine.steps
    if name == "syntax":
        from distill.corpus.syntax_miner import mine_texts

        return mine_texts(
            [(trace.key, trace.prompt, trace.response.text, trace.response.done_reason) for trace in traces], steps
        )
    if name == "teacher":
        from distill.corpus.teacher_miner import PartialMine, mine_traces

        return mine_traces(traces, run.settings, listen, partial=PartialMine(partial_file(run), stage_settings(run)))
    raise BadInput(f"mine.miner={name}: no such miner; choose syntax or teacher")
