"""How dreams of its own compare with those mined from the teacher's answers, read from their text.

A dream's text is `⟨label⟩` after `⟨label⟩`; labels that are lenses' names part it. What it is read from needs no
tokenizer: dreams of any target can be measured, whoever printed them. Formulas are in docs/metrics.md.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from distill.exam.metrics.statistics import Ratio
from distill.mining.triplets import LENSES

TOKEN = re.compile(r"⟨([^⟨⟩]+)⟩")
"""An image token or a lens, as printed."""


def dream_metrics(dreams: Sequence[str], mined: Sequence[Sequence[str]] | None) -> dict[str, Ratio]:
    """How long they are, recall (and by chance) and precision.

    mined: for each prompt the labels that its mined triplets have in the target's own codebook, None where it ships
    none: then there is nothing to compare with. Where nothing was mined, nothing is known.
    """
    tokens = {"tokens_dreamed": Ratio.of([len(TOKEN.findall(dream)) for dream in dreams])}
    if mined is None:
        return tokens
    own = [labels_of(dream) for dream in dreams]
    hits = [recalled(labels, wanted) for labels, wanted in zip(own, mined, strict=True)]
    totals = [total for _, total in hits]
    return tokens | {
        "dream_recall": Ratio.of([found for found, _ in hits], totals),
        "dream_recall_chance": Ratio.of(chance_recalled(own, mined), totals),
        "dream_precision": Ratio.of(
            [found for found, _ in hits],
            [len(set(labels)) if total else 0 for labels, total in zip(own, totals, strict=True)],
        ),
    }


def labels_of(dream: str) -> list[str]:
    """Labels of the image tokens in a dream's text, in order; the lenses' names are none."""
    return [label for label in TOKEN.findall(dream) if label not in LENSES]


def recalled(own: Iterable[Hashable], mined: Iterable[Hashable]) -> tuple[int, int]:
    """(mined image tokens that the own dream has, mined image tokens), each token counted once."""
    wanted = set(mined)
    return len(wanted & set(own)), len(wanted)


def chance_recalled(own: Sequence[Sequence[Hashable]], mined: Sequence[Sequence[Hashable]]) -> list[float]:
    """For each prompt, `recalled` averaged over the own dreams of all other prompts: what guessing yields."""
    if len(own) < 2:
        return [math.nan] * len(own)
    sets = [set(codes) for codes in own]
    dreams_with = Counter(code for codes in sets for code in codes)
    return [
        sum(dreams_with[code] - (code in codes) for code in set(wanted)) / (len(own) - 1)
        for codes, wanted in zip(sets, mined, strict=True)
    ]
