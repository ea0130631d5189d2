"""What a teacher thought before it answered, as the miners read it: prose, or, of a student, a dream."""

import re
from dataclasses import replace

from distill.corpus.traces import Trace
from distill.mining.triplets import LENSES, Mined, Triplet, clean_phrase, fits

_DREAM = re.compile(r"(\s*⟨[^⟨⟩]+⟩)+\s*")
_LABEL = re.compile(r"⟨([^⟨⟩]+)⟩")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n")
_OF_ITSELF = re.compile(
    r"\b(?:(?:the|this|my) (?:users?|questions?|prompts?|query|answers?|responses?|explanations?)"
    r"|let(?: me|'s|’s| us)|(?:I|we) (?:should|need|will|can|could|want|have to|might)|I['’](?:ll|m|ve|d))\b",
    re.IGNORECASE,
)
"""What a sentence of a thinking says that is about the talk, and not about the world."""


def thought_aloud(trace: Trace) -> Trace:
    """The trace with all that is mined of it as its text: what was thought of the world, then the answer."""
    thinking = trace.response.thinking
    if not thinking or _DREAM.fullmatch(thinking):
        return trace
    told = [line for line in _SENTENCES.split(thinking) if not _OF_ITSELF.search(line)]
    return replace(trace, response=replace(trace.response, text="\n".join([*told, trace.response.text])))


def dream_first(trace: Trace, found: Mined, steps: int) -> Mined:
    """What was found, and before it what the teacher dreamed, where its thinking is a dream: `steps` a lens at most."""
    if not _DREAM.fullmatch(trace.response.thinking):
        return found
    dream = [step for step in _steps(trace.response.thinking) if all(map(fits, step[1:]))]
    triplets: list[Triplet] = []
    for lens in LENSES:
        dreamed = dict.fromkeys(step[1:] for step in dream if step[0] == lens)
        chain = [Triplet(*phrases, lens, 0, trace.key, -1, "dream") for phrases in dreamed]
        chain += [triplet for triplet in found.triplets if triplet.lens == lens and triplet.phrases not in dreamed]
        triplets += [replace(triplet, step=i) for i, triplet in enumerate(chain[:steps])]
    more = len(dream)
    return replace(found, triplets=triplets, proposed=found.proposed + more, grounded=found.grounded + more)


def _steps(dream: str) -> list[tuple[str, str, str, str]]:
    """(lens, what, action, result) of a dream's labels: a lens, then three for each step; what is no whole step is
    left out."""
    steps: list[tuple[str, str, str, str]] = []
    lens, phrases = "", list[str]()
    for label in _LABEL.findall(dream):
        if label in LENSES:
            lens, phrases = label, []
            continue
        phrases.append(clean_phrase(label))
        if len(phrases) == 3:
            steps += [(lens, phrases[0], phrases[1], phrases[2])] if lens else []
            phrases = []
    return steps
