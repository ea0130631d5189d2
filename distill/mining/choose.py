"""Which of an answer's candidates make its dream: those that tell most about this answer.

A triplet tells what its words tell that neither the question nor the triplets before it have told: of each such word
−log p, where p is the share of answers that hold it: of the other answers to the same question if there are any,
smoothed by all answers (Dirichlet's prior of weight 1; C. Zhai, J. Lafferty, "A Study of Smoothing Methods for
Language Models", 2001). Triplets are taken greedily until none tells any more.
"""

from collections import Counter
from collections.abc import Sequence
from math import log

from distill.mining.clauses import Candidate
from distill.mining.inflect import content_stems
from distill.mining.syntax_miner import Found


def by_rarity(found: Sequence[Found]) -> list[list[Candidate]]:
    """Of each response its candidates that tell something, the most telling first."""
    everywhere = Counter(word for each in found for word in each.said)
    answers = Counter(each.prompt for each in found)
    siblings: dict[str, Counter[str]] = {prompt: Counter() for prompt in answers}
    for each in found:
        if answers[each.prompt] > 1:
            siblings[each.prompt].update(each.said)

    def nats(word: str, own: Found) -> float:
        share = everywhere[word] / (len(found) + 1)
        others = answers[own.prompt] - 1
        return -log((siblings[own.prompt][word] - 1 + share) / (others + 1) if others else share)

    return [_telling(each.candidates, {word: nats(word, each) for word in each.said - each.asked}) for each in found]


def _telling(candidates: Sequence[Candidate], nats: dict[str, float]) -> list[Candidate]:
    """Greedily, each for the nats of those of its words that were not told before. Of equals, the first.

    Where none tells anything the first is left, which pictures what the question says.
    """
    words = {candidate: content_stems(candidate.phrases) & nats.keys() for candidate in candidates}
    chosen: list[Candidate] = []
    told: set[str] = set()
    while words:
        best = max(words, key=lambda candidate: sum(nats[word] for word in words[candidate] - told))
        new = words.pop(best) - told
        if not new:
            break
        told |= new
        chosen.append(best)
    return chosen or [*candidates[:1]]
