"""ConceptNet's assertions as questions: what things are, are for, are made of, cause, need.

A row of assertions.csv has five columns parted by tabs: URI, relation, start, end, and JSON with the weight. English
rows of weight 1 or more of the relations below are taken. Subjects held out are never trained on (split `subject`).
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from distill.corpus.datasets.brought import dealt, digest, find, opened, sampled
from distill.corpus.datasets.questions import Question, Step
from distill.errors import BadInput, CorruptFile
from distill.events import Listener, silent

__all__ = ["LICENCE", "VERSION", "digest", "questions"]

VERSION = 1
LICENCE = "ConceptNet 5 (CC BY-SA 4.0), by its authors and contributors: conceptnet.io"
PATTERN, SOURCE = "*assertions*.csv*", "github.com/commonsense/conceptnet5/wiki/Downloads"

RELATIONS = {
    "IsA": ("abstract", "is a kind of", "What kind of thing is {}?"),
    "UsedFor": ("abstract", "is used for", "What is {} used for?"),
    "MadeOf": ("abstract", "is made of", "What is {} made of?"),
    "HasProperty": ("abstract", "is", "What is {} like?"),
    "AtLocation": ("spatial", "is found at", "Where is {} found?"),
    "PartOf": ("spatial", "is part of", "What is {} part of?"),
    "HasA": ("spatial", "has", "What does {} have?"),
    "CapableOf": ("causal", "can", "What can {} do?"),
    "Causes": ("causal", "causes", "What does {} cause?"),
    "HasPrerequisite": ("temporal", "needs", "What does {} need?"),
    "HasSubevent": ("temporal", "includes", "What happens in {}?"),
}
"""Relation → the lens that it is dreamed in, how it is said, how it is asked."""


class Fact(NamedTuple):
    start: str
    relation: str
    end: str


def facts(files: str, listen: Listener = silent) -> Iterator[Fact]:
    """Row by row. Raises BadInput, CorruptFile naming the line."""
    path, number = find(files, "conceptnet", PATTERN, SOURCE, listen), 0
    try:
        with opened(path) as file:
            for line in file:
                number += 1
                _, relation, start, end, about = line.rstrip("\n").split("\t")
                english = start.startswith("/c/en/") and end.startswith("/c/en/")
                if english and relation[3:] in RELATIONS and json.loads(about).get("weight", 1.0) >= 1:
                    yield Fact(_words(start), relation[3:], _words(end))
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{path}:{number}: not a row of ConceptNet's ({error}); download it again") from error


def _words(uri: str) -> str:
    """/c/en/ice_cream/n → ice cream."""
    return uri.split("/")[3].replace("_", " ")


def questions(size: int, held_out: int, seed: int, files: str = "", listen: Listener = silent) -> Iterator[Question]:
    """`size` training questions at most, then `held_out` of subjects never trained on; of an even sample."""
    chosen = sampled(facts(files, listen), 2 * size + 20 * held_out, seed, " ".join)
    asked = {RELATIONS[fact.relation][2].format(fact.start): fact for fact in reversed(chosen)}  # each once
    if not asked:
        raise BadInput(f"{files}: has no English facts of weight 1 or more; take ConceptNet's own assertions")
    for (prompt, fact), aside in dealt(asked.items(), lambda row: row[1].start, seed, size, held_out):
        lens, action, _ = RELATIONS[fact.relation]
        said, dream = f"{fact.start} {action} {fact.end}.", {lens: [Step(fact.start, action, fact.end)]}
        yield Question(prompt, said[0].upper() + said[1:], "subject" if aside else "train", 1, dream)
