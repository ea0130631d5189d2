"""Which of an answer's candidates make its dream: those that tell most about this answer.

A triplet tells what its words tell that neither the question nor the triplets before it have told: of each such word
−log p, where p is the share of answers that hold it: of the other answers to the same question if there are any,
smoothed by all answers (Dirichlet's prior of weight 1; C. Zhai, J. Lafferty, "A Study of Smoothing Methods for
Language Models", 2001). Triplets are taken greedily until none tells any more.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import fsum, log

from distill.mining.clauses import Candidate
from distill.mining.inflect import content_stems
from distill.mining.readings import Readings
from distill.mining.syntax_miner import Found

PROMPTS = 1024
"""Of which what their answers say is remembered, not looked up again."""


def by_rarity(found: Readings) -> Iterator[list[Candidate]]:
    """Of each response its candidates that tell something, the most telling first."""
    everywhere = Counter(word for each in found for word in each.said)

    @lru_cache(PROMPTS)
    def siblings(prompt: str) -> tuple[int, Counter[str]]:
        answers = found.answers_to(prompt)
        return len(answers), Counter(word for each in answers for word in each.said)

    def nats(own: Found) -> dict[str, float]:
        answers, said = siblings(own.prompt)
        shares = {word: everywhere[word] / (len(found) + 1) for word in own.said - own.asked}
        return {
            word: -log((said[word] - 1 + share) / answers if answers > 1 else share) for word, share in shares.items()
        }

    return (_telling(each.candidates, nats(each)) for each in found)


def _telling(candidates: Sequence[Candidate], nats: dict[str, float]) -> list[Candidate]:
    """Greedily, each for the nats of those of its words that were not told before. Of equals, the first.

    Where none tells anything the first is left, which pictures what the question says.
    """
    words = {candidate: content_stems(candidate.phrases) & nats.keys() for candidate in candidates}
    chosen: list[Candidate] = []
    told: set[str] = set()
    while words:
        best = max(words, key=lambda candidate: fsum(nats[word] for word in words[candidate] - told))
        new = words.pop(best) - told
        if not new:
            break
        told |= new
        chosen.append(best)
    return chosen or [*candidates[:1]]
