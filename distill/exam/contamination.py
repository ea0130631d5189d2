"""Is a held-out prompt, or a near copy of it, in what a target was trained on?

A prompt is held out by a hash of its text, so the same question in other words, in capitals or with another full stop
can stand on both sides; and a target of one run may be asked prompts that another run held out. Compared are words:
Unicode NFKC, case folded, runs of letters and digits, and the signs of arithmetic. Of each question the strongest
finding counts:

exact       a training prompt has the same words
near        a training prompt resembles it: Jaccard similarity of their shingles of 3 words, beginning and end marked,
            of at least 0.7 (resemblance: Broder 1997, doi:10.1109/SEQUEN.1997.666900)
contained   all its words, 5 or more, stand in this order in a training prompt or a training answer
"""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp

from distill.corpus.traces import TraceStore
from distill.errors import CorruptFile
from distill.exam.questions import Exam
from distill.exam.targets import Target
from distill.run import Run
from distill.training.start import is_inherited, started_at

NEAR = 0.7
ORDER = 3
"""Words of a shingle."""
LEAST_WORDS = 5
"""A prompt of fewer words stands in some answer by chance."""
TOGETHER = 2048
"""Training prompts that are compared at once."""
EXAMPLES = 10
HASHES = "training_prompts.json"
"""In a bundle: hashes of the prompts that it was trained on. Exact copies can be found with them, near ones cannot."""
HASHES_VERSION = 2
"""Raised when other words are hashed."""
HASH_DIGITS = 12
"""Hexadecimal, 48 bits: 1,000 questions against 100,000 prompts meet by chance once in 2.8 million checks."""

Kind = Literal["exact", "near", "contained"]


@dataclass(frozen=True)
class Contamination:
    """What was found. checked: False where it can't be known; `reason` says why, or what the check had to leave out.

    exact, near, contained: questions of each kind, none counted twice, out of `prompts`. examples: the worst of them,
    each with prompt, found (the training text), similarity and kind. keys: of all contaminated questions, in order.
    """

    checked: bool
    reason: str = ""
    exact: int = 0
    near: int = 0
    contained: int = 0
    prompts: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        """All but the keys, as results.json has it."""
        return {name: value for name, value in asdict(self).items() if name != "keys"}


class Finding(NamedTuple):
    """Of one question. The higher rank, then the higher similarity counts; a contained prompt is there whole: 1."""

    rank: int
    similarity: float
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


def check(exam: Exam, training: Iterable[tuple[str, str]]) -> Contamination:
    """The exam's prompts against training texts, (prompt, answer) each; read once, in order, none kept."""
    search = _Search([question.prompt for question in exam.questions])
    for prompt, answer in training:
        search.read(prompt, answer)
    search.compare()
    return _summary(exam, search.found)


def _summary(exam: Exam, findings: Sequence[Finding | None], reason: str = "") -> Contamination:
    pairs = [(q, found) for q, found in zip(exam.questions, findings, strict=True) if found]
    kinds = Counter(found.kind for _, found in pairs)
    worst = sorted(pairs, key=lambda pair: (-pair[1].rank, -pair[1].similarity))[:EXAMPLES]
    return Contamination(
        True,
        reason,
        **{kind: kinds[kind] for kind in ("exact", "near", "contained")},
        prompts=len(exam.questions),
        examples=[
            {"prompt": q.prompt, "found": found.text, "similarity": round(found.similarity, 4), "kind": found.kind}
            for q, found in worst
        ],
        keys=[q.key for q, _ in pairs],
    )


class _Search:
    """Looks for all prompts at once, so that each training text is read once. found: a finding a prompt, or None.

    Shape legend: B training prompts that are compared together, P prompts, S shingles of all P.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        split = [words(prompt) for prompt in prompts]
        self.found: list[Finding | None] = [None] * len(prompts)
        self._same: dict[str, list[int]] = defaultdict(list)
        self._anchored: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._needles = [f" {' '.join(own)} " for own in split]
        often = Counter(pair for own in split for pair in set(itertools.pairwise(own)))
        for i, own in enumerate(split):
            self._same[" ".join(own)].append(i)
            if len(own) >= LEAST_WORDS:
                # Only texts with its rarest pair of words are looked through for the whole.
                self._anchored[min(itertools.pairwise(own), key=lambda pair: (often[pair], pair))].append(i)
        sets = [shingles(own) for own in split]
        self._ids = {shingle: i for i, shingle in enumerate(sorted(frozenset[Shingle]().union(*sets)))}
        self._sizes = np.array([len(own) for own in sets], np.int64)
        self._table = self._rows([[self._ids[shingle] for shingle in own] for own in sets]).T.tocsr()
        self._waiting: list[tuple[str, frozenset[Shingle]]] = []

    def _rows(self, ids: Sequence[Sequence[int]]) -> Any:
        """(len(ids), S) 0 and 1, sparse."""
        ends = np.cumsum([0, *(len(row) for row in ids)])
        columns = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(ends[-1]))
        return sp.csr_matrix((np.ones(len(columns), np.int32), columns, ends), shape=(len(ids), len(self._ids)))

    def read(self, prompt: str, answer: str) -> None:
        own = words(prompt)
        for i in self._same.get(" ".join(own), ()):
            self._note(i, Finding(2, 1.0, "exact", prompt))
        self._contained(own)
        self._contained(words(answer))
        self._waiting.append((prompt, shingles(own)))
        if len(self._waiting) == TOGETHER:
            self.compare()

    def compare(self) -> None:
        """Compare the prompts read since the last call; to be called at the end, too."""
        waiting, self._waiting = self._waiting, []
        ids = [[self._ids[shingle] for shingle in own & self._ids.keys()] for _, own in waiting]
        sizes = np.array([len(own) for _, own in waiting], np.int64)
        shared = (self._rows(ids) @ self._table).tocoo()  # (B, P)
        similarity = shared.data / (sizes[shared.row] + self._sizes[shared.col] - shared.data)
        near = np.flatnonzero(similarity >= NEAR)
        for place in near[np.lexsort((shared.col[near], shared.row[near]))]:
            finding = Finding(1, float(similarity[place]), "near", waiting[shared.row[place]][0])
            self._note(int(shared.col[place]), finding)

    def _contained(self, found: list[str]) -> None:
        anchors = self._anchored.keys() & itertools.pairwise(found)
        if anchors:
            line = f" {' '.join(found)} "
            for i in (i for anchor in sorted(anchors) for i in self._anchored[anchor]):
                needle = self._needles[i]
                if self.found[i] is None and len(needle) <= len(line) and (place := line.find(needle)) >= 0:
                    self._note(i, Finding(0, 1.0, "contained", _excerpt(line, place, len(needle))))

    def _note(self, i: int, finding: Finding) -> None:
        known = self.found[i]
        if known is None or finding[:2] > known[:2]:
            self.found[i] = finding


def _excerpt(line: str, place: int, length: int, around: int = 60) -> str:
    """The words of a text from `place` on, and some on either side."""
    start, end = max(0, place - around), place + length + around
    before, after = "… " if start else "", " …" if end < len(line) else ""
    return before + line[start:end].strip() + after


# What a target was trained on.


def of_target(target: Target, exam: Exam) -> Contamination:
    """The exam against the training traces of the run that the target came out of, whoever's exam it is.

    A bundle without its run knows the hashes of its training prompts. Raises what the trace store raises where it is
    broken.
    """
    folder = target.path if target.kind != "gguf" or target.path is None else target.path.parent
    run = target.run
    if run is not None and run.traces.exists():
        with TraceStore(run.traces, readonly=True) as store:
            found = check(exam, store.texts(held_out=False))
        if is_inherited(run):
            start = "its teacher" if started_at(run) else Path(run.settings.student.init).name
            found = replace(found, reason=f"what {start}, its start, was trained on is not known")
        return found
    if folder is not None and (folder / HASHES).is_file():
        return _by_hashes(exam, folder / HASHES)
    return Contamination(False, _unknown(target, run), prompts=len(exam.questions))


def _unknown(target: Target, run: Run | None) -> str:
    if run is not None:
        return f"{run.traces} is gone: what it was trained on is not known"
    return {
        "ollama": "Ollama does not tell what a model was trained on",
        "gguf": "a GGUF does not tell what it was trained on",
        "bundle": f"the bundle has no {HASHES}; export it again",
    }.get(target.kind, "its folder does not tell what it was trained on")


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); export the bundle again") from error
    if version != HASHES_VERSION:
        why = f"{HASHES} is of version {version}, not {HASHES_VERSION}; export the bundle again"
        return Contamination(False, why, prompts=len(exam.questions))
    # The hash is all that is known of the training prompt; it has the same words.
    findings = [
        Finding(2, 1.0, "exact", question.prompt) if prompt_hash(question.prompt) in known else None
        for question in exam.questions
    ]
    return _summary(exam, findings, "exact copies only: of its training prompts the bundle holds hashes")
