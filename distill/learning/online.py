"""Learning from lines as they come: `dream learn RUN --follow`."""

import hashlib
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.journal import Journal
from distill.knowledge.graph import build_graph, load_graph, merge, save_graph
from distill.learning import facts
from distill.learning.continuous_learning import OnlineLearningLoop
from distill.learning.feedback import FEEDBACK
from distill.learning.keeping import Keeping
from distill.learning.new_lines import new_lines
from distill.run import Run
from distill.student.made_with import made_with
from distill.training import checkpoint
from distill.turns import SYSTEM, joined

TOGETHER = 32
"""Lines learned at a time."""
BOUND = 0.05
"""Bits per byte of held-out old answers: worse by more than that than they were at best, and it steps back."""
PATIENCE = 10.0
"""Seconds without a new line after which fewer than TOGETHER are learned."""

Read = tuple[int, str]
"""Lines of a file that were read, and their SHA-256: "" where it wasn't written down."""


class RunLearner:
    """A run's student: an example is where a line stands, and the line as new_lines.py reads it. Each learning is a
    checkpoint, of which the last two stay; what it learned grows the run's knowledge graph. What the run holds out is
    left out."""

    def __init__(self, run: Run, keeping: Keeping, listen: Listener = silent, **how: Any) -> None:
        self.run, self.keeping, self.listen, self.how = run, keeping, listen, how
        self.before = set(checkpoint.of_stage(run, "facts"))
        """Not to be deleted: `dream learn --from` left them, and may be undone."""

    def learn(self, examples: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, float]:
        """examples: each with its place. Raises BadInput for a line that is none."""
        # Of what is new nothing is measured, so that no share of it needs to be held out.
        said = [(place, {**line, "held_out": line.get("held_out") or False}) for place, line in examples]
        lines = new_lines(self.run, said)
        new = replace(lines, traces=[trace for trace in lines.traces if not trace.held_out])
        if (aside := len(lines.traces) - len(new.traces)) > 0:
            self.listen(Event("online", "note", f"{aside} lines ask what the run holds out: not learned"))
        if not new.traces:
            return {}
        told = facts.learn_facts(self.run, self.listen, source=new, keeping=self.keeping, **self.how)
        own = [path for path in checkpoint.of_stage(self.run, "facts") if path not in self.before]
        for path in own[:-2]:
            checkpoint.delete(path)
        self.learned = new
        watched = {"watched_before": told["old_bits_per_byte_before"], "watched": told["old_bits_per_byte"]}
        return {**watched, "held_out": 0.0, "bits_per_byte": told["new_bits_per_byte"], "lines": told["answers"]}

    def step_back(self) -> None:
        facts.undo(self.run)

    def grow(self) -> None:
        """Add what the last lines' dreams say to the knowledge graph: in the place of its least important nodes, where
        it is full."""
        graph, most = load_graph(self.run.knowledge), self.run.settings.mine.graph_nodes
        new = build_graph(triplet for trace in self.learned.traces for triplet in self.learned.triplets[trace.key])
        merge(graph, new)
        save_graph(graph, self.run.knowledge, most, first=new)
        if (gone := len(graph) - most) > 0:
            text = f"{self.run.knowledge.name} is full (mine.graph_nodes={most}): without its {gone} least nodes now"
            self.listen(Event("online", "note", text))


def follow(
    run: Run,
    source: Path | None,
    listen: Listener = silent,
    *,
    keeping: Keeping,
    together: int = TOGETHER,
    bound: float = BOUND,
    patience: float = PATIENCE,
    once: bool = False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Learn from lines as they come: of a file, of all .jsonl files of a folder, or of the run's feedback (None), until
    it is interrupted, or (`once`) nothing more has come for `patience` seconds. What was learned is in
    RUN/online.jsonl: begun again, it goes on after what the student still knows of that. Returns its entries.

    Raises BadInput for a line that is none, and as `learn_facts` does.
    """
    learner, root = RunLearner(run, keeping, listen, **how), run.path.resolve()
    system = made_with(run).capture.system
    base = checkpoint.weights_of(checkpoint.best(run, "facts"))
    with Journal(run.path / "online.jsonl") as journal:
        learned = [path for path in checkpoint.of_stage(run, "facts") if facts.is_whole(path)]
        known = _known(journal.lines, base, {facts.source_of(path) for path in learned})
        if journal.lines[-1:] != known[-1:]:
            text = "what an earlier student learned, or what was taken back, is learned again"
            listen(Event("online", "note", text))
        kept = [entry for entry in known if not entry["stepped_back"]]
        best = min((min(entry["watched_before"], entry["watched"]) for entry in kept), default=math.inf)
        loop = OnlineLearningLoop(learner, together=together, bound=bound, best=best, listen=listen)
        last: dict[str, Any] = known[-1] if known else {"read": {}}
        digests: dict[str, str] = last.get("digests", {})
        done: dict[str, Read] = {
            str(root / name): (count, digests.get(name, "")) for name, count in last["read"].items()
        }
        ours = {entry.get("learned") for entry in journal.lines}
        learner.before = {path for path in learner.before if facts.source_of(path) not in ours}
        read = dict(done)
        for place in arriving((source or run.path / FEEDBACK).resolve(), done, patience, listen):
            found: dict[str, float] = {}
            if place is None:
                found = loop.flush()
            else:
                file, number, digest, line = place
                read[str(file)] = number, digest
                try:
                    line = spoken(line, system)
                except ValueError as error:
                    raise BadInput(f"{file}, line {number}: is no feedback ({error}); mend or delete it") from error
                if line is not None:
                    found = loop.step((f"{file}, line {number}", line))
            if found:
                named = {_name(Path(file), root): each for file, each in read.items()}
                entry = {"read": {name: count for name, (count, _) in named.items()}}
                entry |= {"digests": {name: digest for name, (_, digest) in named.items() if digest}}
                entry |= {"base": base, "learned": learner.learned.digest, **found}
                journal.append(entry)
                text = f"{found['lines']} lines, held-out {found['watched']:.3f} bits a byte"
                listen(Event("online", "note", text, data=entry))
            if place is None and once:
                break
        return journal.lines


def _known(entries: Sequence[dict[str, Any]], base: str, sources: Collection[str | None]) -> list[dict[str, Any]]:
    """Entries up to the last whose lines the student still knows, and those after it that it stepped back from; each
    says all that was read by then. base: the student before any. sources: what the run's checkpoints learned. What an
    entry doesn't say is taken to be so."""
    entries = [entry for entry in entries if entry.get("base", base) == base]
    held = [not entry["stepped_back"] and entry.get("learned") in {*sources, None} for entry in entries]
    end = max((place for place, holds in enumerate(held, 1) if holds), default=0)
    return [*entries[:end], *takewhile(lambda entry: entry["stepped_back"], entries[end:])]


def _name(file: Path, root: Path) -> str:
    """Of a file in the run's folder as seen from there: the folder may be moved."""
    return str(file.relative_to(root) if file.is_relative_to(root) else file)


def spoken(line: dict[str, Any], system: str = "") -> dict[str, Any] | None:
    """A line of feedback as one to learn: what was better, or good. Others as they are, but for what is to be held out.
    system: the run's own message, which is put before every prompt. Raises ValueError for messages that are none."""
    if line.get("held_out") is True:
        return None
    if "verdict" not in line:
        return line
    said, asked = line.get("better") or line.get("answer"), line.get("messages") or []
    parts = {"role", "content"}
    if not isinstance(asked, list) or not all(isinstance(each, dict) and parts <= each.keys() for each in asked):
        raise ValueError("messages must be a conversation")
    turns = [(str(message["role"]), str(message["content"])) for message in asked]
    if system and turns[:1] == [(SYSTEM, system)]:
        del turns[0]
    if line["verdict"] == "bad" or not turns or said == "":
        return None
    found = {"prompt": joined(turns), "answer": said}
    return found | ({"done_reason": "length"} if line.get("cut") and line["verdict"] == "good" else {})


def arriving(
    source: Path, done: Mapping[str, Read], patience: float, listen: Listener = silent, wait: float = 0.5
) -> Iterator[tuple[Path, int, str, dict[str, Any]] | None]:
    """Whole lines that are there or will be, each with its file, its number and the SHA-256 of all up to it; None each
    time that none came for `patience` seconds. done: lines of each file that are known already; where they aren't what
    they were, all are new."""
    read: dict[Path, Read] = {}
    idle = time.monotonic()
    while True:
        for file in sorted(source.glob("*.jsonl")) if source.is_dir() else [source]:
            try:
                lines = file.read_bytes().split(b"\n")[:-1]
            except FileNotFoundError:
                continue
            start, digest = read.get(file) or done.get(str(file), (0, ""))
            sha256 = hashlib.sha256(b"\n".join([*lines[:start], b""]))
            if len(lines) < start or digest not in ("", sha256.hexdigest()):
                text = "lines that were read before are gone or changed; read from its first again"
                listen(Event("online", "warning", f"{file}: {text}"))
                start, sha256 = 0, hashlib.sha256()
            read[file] = start, sha256.hexdigest()
            for number, line in enumerate(lines[start:], start + 1):
                sha256.update(line + b"\n")
                read[file] = number, sha256.hexdigest()
                idle = time.monotonic()
                if line.strip():
                    yield file, *read[file], _parsed(file, number, line)
        if time.monotonic() - idle >= patience:
            yield None
            idle = time.monotonic()
        time.sleep(wait)


def _parsed(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise TypeError("it is no object")
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file}, line {number}: is no line of JSON ({error}); mend or delete it") from error
    return found
