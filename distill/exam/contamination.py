"""Is a held-out prompt, or a near copy of it, in what a target was trained on?

A prompt is held out by a hash of its text, so the same question in other words, in capitals or with another full stop
can stand on both sides; and a target of one run may be asked prompts that another run held out. Compared are words:
Unicode NFKC, case folded, runs of letters and digits, and the signs of arithmetic. Of each question the strongest
finding counts:

exact       a training prompt has the same words
near        a training prompt resembles it: Jaccard similarity of their shingles of 3 words, beginning and end marked,
            of at least 0.7 (resemblance: Broder 1997, doi:10.1109/SEQUEN.1997.666900)
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.corpus.traces import TraceStore
from distill.events import Event, Listener, silent
from distill.exam.questions import Exam
from distill.exam.targets import Target
from distill.run import Run, fingerprint
from distill.tokens.shown import load_shown, show
from distill.training.checkpoint import LoopState, read_loop
from distill.training.start import began_as

NEAR = 0.7
ORDER = 3
"""Words of a shingle."""
EXAMPLES = 10
TOLD = 5_000
"""Training prompts between two events of progress."""
HASHES = "training_prompts.json"
"""In a bundle: hashes of the prompts that it was trained on. Exact copies can be found with them, near ones cannot."""
HASHES_VERSION = 2
"""Raised when other words are hashed."""
HASH_DIGITS = 12
"""Hexadecimal, 48 bits: 1,000 questions against 100,000 prompts meet by chance once in 2.8 million checks."""

Kind = Literal["exact", "near"]


@dataclass(frozen=True)
class Contamination:
    """What was found. checked: False where it can't be known; `reason` says why, or what the check had to leave out.

    exact, near: questions of each kind, none counted twice, out of `prompts`. examples: the worst of them,
    each with prompt, found (the training text), similarity and kind.
    """

    checked: bool
    reason: str = ""
    exact: int = 0
    near: int = 0
    prompts: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class Finding(NamedTuple):
    """Of one question. The higher similarity counts, and of equal ones the same words."""

    similarity: float
    same: bool
    kind: Kind
    text: str


_WORD = re.compile(r"[^\W_]+|[-/](?![^\W\d_])|(?<![^\W\d_])[-/]|[+*<>=%#^≠≤≥]")
"""A run of letters and digits, or a sign: + and − ask different things, as do C and C#. A hyphen, or a stroke, that
joins two letters parts words."""
_SIGNS = str.maketrans("−×÷", "-*/")


def words(text: str) -> list[str]:
    """What texts are compared by. A text without letters and digits is one word, itself."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = text.casefold()
    found = _WORD.findall(text)
    return found if any(word.isalnum() for word in found) else [text.strip()]


Shingle = tuple[str, ...]


def shingles(found: Sequence[str]) -> frozenset[Shingle]:
    """Runs of ORDER words, "" standing before the first and after the last."""
    padded = ["", *found, ""]
    return frozenset(zip(*(padded[i:] for i in range(ORDER)), strict=False))


def check(exam: Exam, training: Iterable[str], listen: Listener = silent) -> Contamination:
    """The exam's prompts against training prompts; read once, in order, none kept."""
    search = _Search([question.prompt for question in exam.questions])
    for done, prompt in enumerate(training, 1):
        search.read(prompt)
        if done % TOLD == 0:
            told = {"phase": "contamination"}
            listen(Event("evaluate", "progress", done=done, unit="training prompts", data=told))
    return _summary(exam, search.found)


def _summary(exam: Exam, findings: Sequence[Finding | None], reason: str = "") -> Contamination:
    pairs = [(q.prompt, found) for q, found in zip(exam.questions, findings, strict=True) if found]
    kinds = Counter(found.kind for _, found in pairs)
    worst = sorted(pairs, key=lambda pair: pair[1][:2], reverse=True)[:EXAMPLES]
    return Contamination(
        True,
        reason,
        exact=kinds["exact"],
        near=kinds["near"],
        prompts=len(exam.questions),
        examples=[
            {"prompt": prompt, "found": found.text, "similarity": round(found.similarity, 4), "kind": found.kind}
            for prompt, found in worst
        ],
    )


class _Search:
    """Looks for all prompts at once, so that each training text is read once. found: a finding a prompt, or None.

    A text that is near to a prompt has at least NEAR of its shingles, and so one of any of them that are more than the
    rest: only where it has one of the prompt's rarest is it compared (prefix filtering: Chaudhuri et al. 2006,
    doi:10.1109/ICDE.2006.9).
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self._words = [words(prompt) for prompt in prompts]
        theirs = [shingles(own) for own in self._words]
        often = Counter(shingle for own in theirs for shingle in own)
        self._ranks = {
            shingle: rank for rank, shingle in enumerate(sorted(often, key=lambda each: (often[each], each)))
        }
        """All of their shingles, the rarest first; tuples don't keep their hashes, as numbers do."""
        self._shingles = [{self._ranks[shingle] for shingle in own} for own in theirs]
        self.found: list[Finding | None] = [None] * len(prompts)
        self._holding = defaultdict[int, list[int]](list)
        """Which prompts have this shingle among their rarest?"""
        for i, own in enumerate(self._shingles):
            least = math.ceil(NEAR * len(own) - 1e-9)  # of them that a near text has
            for rank in sorted(own)[: len(own) - least + 1]:
                self._holding[rank].append(i)

    def read(self, prompt: str) -> None:
        own = words(prompt)
        there = shingles(own)
        known = {self._ranks[shingle] for shingle in there if shingle in self._ranks}
        for i in {i for rank in known if rank in self._holding for i in self._holding[rank]}:
            shared = len(known & self._shingles[i])
            similarity = shared / (len(there) + len(self._shingles[i]) - shared)
            if similarity >= NEAR:
                same = own == self._words[i]
                found = Finding(similarity, same, "exact" if same else "near", prompt)
                if found[:2] > (self.found[i] or (0.0, False))[:2]:
                    self.found[i] = found


# What a target was trained on.

LATER = {"facts", "learn", "reward"}
"""Stages that learn from other prompts than the training's."""


def selects_what_it_read(run: Run) -> bool:
    """Whether the traces that are selected now are what the run's training read: they may have been captured, or held
    out, anew since."""
    record = run.records().get("train")
    return record is None or record.fingerprint == run.fingerprint("train", record.settings)


def _learned_of_others(loop: LoopState) -> bool:
    further = loop.settings.get("polish", {}).get("how", {}).get("texts")
    return bool(further or LATER & loop.settings.keys())


Searched = MutableMapping[str, Contamination]


def of_target(target: Target, exam: Exam, listen: Listener = silent, searched: Searched | None = None) -> Contamination:
    """The exam against the training traces of the run that the target came out of, whoever's exam it is.

    A bundle without its run, or whose run was trained anew, knows the hashes of its training prompts. searched: what
    was found in each training set, read and written here: targets may share one. Raises what the trace store raises
    where it is broken.
    """
    run, folder, checkpoint = target.trained_in, target.path, target.checkpoint
    if run is not None and not selects_what_it_read(run):
        why = f"the data of {run.name} was made anew since its training; `dream train {run.path}`"
        return Contamination(False, why, prompts=len(exam.questions))
    if run is not None and run.traces.exists():
        found = _in_traces(run, exam, listen, {} if searched is None else searched)
        reasons: list[str] = []
        if began := began_as(run, checkpoint or run.checkpoints):
            start = "its teacher" if began == "teacher" else Path(began).name
            reasons.append(f"what {start}, its start, was trained on is not known")
        if checkpoint and (checkpoint / "loop.json").is_file() and _learned_of_others(read_loop(checkpoint)):
            later = "(`dream learn`, `dream reward`, `dream polish --prompts`)"
            reasons.append(f"what it learned after its training {later} wasn't looked at")
        return replace(found, reason="; ".join(reasons))
    if folder is not None:
        hashes = (folder.parent if target.kind == "gguf" else folder) / HASHES
        if hashes.is_file():
            return _by_hashes(exam, hashes)
    why = "nothing here tells what it was trained on"
    if run is not None:
        why = f"{run.traces} is gone: what it was trained on is not known"
    elif target.kind == "bundle":
        why = f"the bundle has no {HASHES}; export it again"
    return Contamination(False, why, prompts=len(exam.questions))


def _in_traces(run: Run, exam: Exam, listen: Listener, searched: Searched) -> Contamination:
    shown = load_shown(run.tokenizer)  # as the exam's pictures are
    with TraceStore(run.traces, readonly=True) as store:
        # A key is of its prompt, too.
        learned = sorted(key for key, held_out in store.selected().items() if not held_out)
        mark = fingerprint([learned, shown, exam.digest])
        if mark not in searched:
            prompts = (show(prompt, shown) for _, prompt, _ in store.answers(held_out=False))
            searched[mark] = check(exam, prompts, listen)
    return searched[mark]


# Hashes of prompts.


def prompt_hash(prompt: str) -> str:
    """The first HASH_DIGITS of the SHA-256 of a prompt's words, a space between them."""
    return hashlib.sha256(" ".join(words(prompt)).encode()).hexdigest()[:HASH_DIGITS]


def hashes_json(prompts: Iterable[str]) -> str:
    """What a bundle keeps of its training prompts."""
    about = "SHA-256 of a prompt's words (NFKC, case folded, a space between), first 12 digits"
    hashes = sorted({prompt_hash(prompt) for prompt in prompts})
    return json.dumps({"version": HASHES_VERSION, "hash": about, "prompts": hashes}, separators=(",", ":")) + "\n"


def _by_hashes(exam: Exam, path: Path) -> Contamination:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, known = content["version"], set(content["prompts"])
        if version != HASHES_VERSION:
            raise ValueError(f"version {version}, not {HASHES_VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{path} can't be read ({error}); export the bundle again"
        return Contamination(False, why, prompts=len(exam.questions))
    # The hash is all that is known of the training prompt; it has the same words.
    findings = [
        Finding(1.0, True, "exact", question.prompt) if prompt_hash(question.prompt) in known else None
        for question in exam.questions
    ]
    return _summary(exam, findings, "exact copies only: of its training prompts the bundle holds hashes")
