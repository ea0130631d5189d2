"""How own answers read, as plain text: against the teacher's, by themselves, and against true ones.

Formulas and sources are in docs/metrics.md.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

from distill.corpus.truth import Truth, same_answer
from distill.exam.metrics.statistics import Ratio


def text_metrics(answers: Sequence[str], references: Sequence[str] | None = None) -> dict[str, Ratio]:
    """chrF, ROUGE-L and length against the teacher's answers (`references`); repetition and distinct-n of themselves.

    An empty reference is none: what needs one isn't defined there. Without references there is only what needs none.
    """
    metrics = {name: measure(answers) for name, measure in OWN.items()}
    if references is None:
        return metrics
    pairs = list(zip(answers, references, strict=True))
    lengths = [(len(own.encode()) if theirs else 0, len(theirs.encode())) for own, theirs in pairs]
    return {
        "chrf": Ratio.of([chrf(own, theirs) if theirs else math.nan for own, theirs in pairs]),
        "rouge_l": Ratio.of([rouge_l(own, theirs) if theirs else math.nan for own, theirs in pairs]),
        **metrics,
        "length_ratio": Ratio.of([own for own, _ in lengths], [theirs for _, theirs in lengths]),
    }


# Against the teacher's answer.


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF2 in percent: character n-grams of orders 1 to 6, β = 2, without spaces (sacrebleu)."""
    return float(_chrf().sentence_score(answer, [reference]).score)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1, 0 to 1: the longest common subsequence of words against the words of both (rouge-score).

    A word is a run of a–z and 0–9 after lower-casing, as in Lin's program: other letters part words, and a reference
    without any such word has no score. NaN there.
    """
    from rouge_score.scoring import fmeasure  # its scorer takes time as both lengths multiplied
    from rouge_score.tokenize import tokenize

    if not any(character.isascii() and character.isalnum() for character in reference):
        return math.nan
    theirs, own = tokenize(reference, None), tokenize(answer, None)
    common = longest_common(theirs, own)
    return float(fmeasure(common / len(own), common / len(theirs))) if common else 0.0


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence: a row of the table at a time, as the bits of a number (Hyyrö 2004,
    "Bit-parallel LCS-length computation revisited")."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    row = whole = (1 << len(one)) - 1
    for word in other:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & whole
    return len(one) - row.bit_count()


# By themselves.


def ngrams(text: str, order: int) -> list[tuple[str, ...]]:
    """Of whitespace-separated words, lower-cased: independent of any tokenizer."""
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(order)), strict=False))


def repeated(text: str) -> tuple[int, int]:
    """(4-grams that occurred before in the same text, all 4-grams)."""
    grams = ngrams(text, 4)
    return len(grams) - len(set(grams)), len(grams)


def distinct(texts: Sequence[str], order: int) -> tuple[list[float], list[int]]:
    """Distinct-n over a collection, split by text: (each text's share of the distinct n-grams, its n-grams).

    An n-gram that occurs c times in the collection gives 1/c to each occurrence: the shares add up to the count
    of distinct n-grams.
    """
    grams = [ngrams(text, order) for text in texts]
    counts = Counter(gram for row in grams for gram in row)
    return [math.fsum(1 / counts[gram] for gram in row) for row in grams], [len(row) for row in grams]


def repetition(answers: Sequence[str]) -> Ratio:
    grams = [repeated(answer) for answer in answers]
    return Ratio.of([again for again, _ in grams], [total for _, total in grams])


OWN: dict[str, Callable[[Sequence[str]], Ratio]] = {
    "repetition": repetition,
    "distinct_1": lambda answers: Ratio.of(*distinct(answers, 1)),
    "distinct_2": lambda answers: Ratio.of(*distinct(answers, 2)),
}
"""What answers are like by themselves: a student's, and its teacher's beside them."""


# Against true answers.


class Examined(Protocol):
    """What is asked: a question, or an example."""

    @property
    def truth(self) -> Truth | None: ...


def exact_match(answers: Sequence[str], questions: Sequence[Examined]) -> dict[str, Ratio]:
    """Whether each answer is the true one but for white space: over all prompts, and over those of each split."""
    truths = [question.truth for question in questions]
    hits = [
        truth is not None and same_answer(answer, truth.answer) for answer, truth in zip(answers, truths, strict=True)
    ]
    metrics = {"exact_match": Ratio.of(hits, [truth is not None for truth in truths])}
    for split in sorted({truth.split for truth in truths if truth}):
        inside = [truth is not None and truth.split == split for truth in truths]
        both = [hit and here for hit, here in zip(hits, inside, strict=True)]
        metrics[f"exact_match_{split}"] = Ratio.of(both, inside)
    return metrics
