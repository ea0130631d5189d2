"""Soft targets of an answer, once a dream that was mined from it has been read.

The teacher read no dream. Taken as they are, its soft targets teach that dreams say nothing: they are the same with
one and without. By Bayes' rule p(w | dream) ∝ p(w) · p(dream | w), and a dream that was mined from the answer holds
words that come in it, those of a step near each other: the second factor is e^g, with the gains g below for words of
the dream and for the answer's end, and 1 for all else. They are the likeliest for 477 answers of SmolLM2-135M at
temperature 1, after dreams of all that was mined (docs/several-answers.yaml with mine.choose=all, mine.steps=10);
`python -m bench.dreams told RUN` says what they save.

Shape legend: n tokens of an answer, S alternatives of each.
"""

from collections.abc import Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from distill.mining.inflect import STOP_WORDS, stem, telling
from distill.tokens.bpe import StudentTokenizer

NEAR, NEXT, FAR = 4.4, 3.9, 3.2
"""Nats by which a word of the dream that was not said yet becomes likelier: in the step of the one said last, in the
step after it, in others. Of a word of several tokens that is its first one."""
WITHIN = 4.0
"""Nats of each token that goes on with such a word."""
ASKED = 0.42
"""So much of that where the question has the word, too: then the teacher expected it."""
AGAIN = 0.95
"""Nats by which those that were said are likelier than other words."""
END = (3.1, 2.5, 0.3, -1.4, -5.0)
"""Nats of the answer's end where so many words of the dream are not said yet, the last for all numbers above."""
LONGEST = 8
"""Tokens of a word at most."""

Word = str | tuple[int, ...]
"""A word of a dream: its root, whose forms are tokens, or the tokens that write it."""


class Told:
    """Which of a tokenizer's tokens are words of a dream, whatever their form."""

    def __init__(self, tokenizer: StudentTokenizer) -> None:
        self._tokenizer = tokenizer
        forms: dict[str, list[int]] = {}
        self._root: dict[int, str] = {}
        for id in range(tokenizer.base_size):
            word = tokenizer.token_bytes(id).decode("utf-8", "ignore").lower()
            if len(word) > 2 and word[0] == " " and word[1:].isalpha() and word[1:] not in STOP_WORDS:
                self._root[id] = stem(word[1:])
                forms.setdefault(self._root[id], []).append(id)
        self._forms = {root: np.array(ids) for root, ids in forms.items()}
        self._said_by = [self._words(label) for label in tokenizer.labels]

    def _words(self, label: str) -> list[Word]:
        """What a code stands for."""
        return [
            root if (root := stem(word)) in self._forms else tuple(self._tokenizer.encode(f" {word}"))
            for word in telling(label)
        ]

    def gains(
        self, prompt: NDArray[np.int64], dream: Sequence[int], answer: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """(n, 1 + S) nats, of the tokens of an answer (n,) and of its alternatives, slots (n, S), after a dream."""
        first = int(self._tokenizer.image_ids[0])
        steps: dict[Word, list[int]] = {}  # of each word
        for place, code in enumerate(id - first for id in dream if id >= first):
            for word in self._said_by[code]:
                steps.setdefault(word, []).append(place // 3)
        asked: set[Word] = {self._root.get(id, "") for id in prompt.tolist()}
        tokens = np.concatenate([answer[:, None], slots], axis=1)
        gains = np.empty(tokens.shape, np.float32)
        spelled = [word for word in steps if isinstance(word, tuple)]
        unsaid, last, now = set(steps), -2, self._now(steps, set(steps), -2, asked)
        for place in range(len(answer)):
            text = answer[max(0, place - LONGEST) : place + 1].tolist()
            within = [word[n] for word in spelled for n in range(1, len(word)) if text[-n - 1 : -1] == [*word[:n]]]
            gains[place] = now[tokens[place]]
            if within:
                gains[place, np.isin(tokens[place], within)] = WITHIN
            said: list[Word] = [word for word in spelled if text[-len(word) :] == [*word]]
            if (root := self._root.get(text[-1], "")) in steps:
                said.append(root)
            for word in said:
                unsaid.discard(word)
                last = min(steps[word], key=lambda step: (step < last, step))
            if said:
                now = self._now(steps, unsaid, last, asked)
        return gains

    def _now(
        self, steps: Mapping[Word, Sequence[int]], unsaid: Set[Word], last: int, asked: Set[Word]
    ) -> NDArray[np.float32]:
        """(V,) nats of every token, the last word that was said being of the step `last`."""
        now = np.zeros(self._tokenizer.vocab_size, np.float32)
        for word, those in steps.items():
            gain = NEAR if last in those else NEXT if last + 1 in those else FAR
            gain = AGAIN if word not in unsaid else gain * ASKED if word in asked else gain
            now[self._forms[word] if isinstance(word, str) else word[0]] = gain
        now[self._tokenizer.eos_id] = END[min(len(unsaid), len(END) - 1)]
        return now


def tilted(logprobs: NDArray[np.float32], gains: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities (n, 1 + S), −inf for none, after gains in nats, where all other tokens gain nothing."""
    rest = 1 + (np.exp(logprobs) * np.expm1(gains)).sum(1, keepdims=True)
    return logprobs + gains - np.log(rest)
