"""From the token texts of an answer of Ollama to ids, and to what it said of each."""

import math
from collections.abc import Sequence
from typing import Any, cast

from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.protocol import HALF, UNKNOWN_ID, TokenTargets
from distill.teacher.targets import Position, assemble, ends_in, first_of, hard, within

ROUNDING = 1e-3
"""By so much a logprob may be above 0."""


def _last_entries(entries: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Of entries of `logprobs`, the last that spell the answer, blanks before it aside: thinking stands before them.
    None where they spell something else."""
    tokens = [text_of(entry["token"]) for entry in entries]
    start = first_of(tokens, len(text))
    return entries[start:] if ends_in("".join(tokens[start:]), text) else []


def text_of(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def is_distribution(logprobs: Sequence[float]) -> bool:
    """Whether they can be of one distribution: none a NaN, and no more than 1 together."""
    return all(value <= ROUNDING for value in logprobs) and sum(map(math.exp, logprobs)) <= 1 + len(logprobs) * ROUNDING


class Words:
    """From the token texts of an answer to ids."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self.vocabulary = vocabulary
        self._ids: dict[str, int] = {}

    def targets(self, answer: dict[str, Any], width: int) -> TokenTargets | None:
        """Of one answer of /api/generate, or None where ids can't be had.

        An entry's text names its token: byte-level and SentencePiece vocabularies spell no two tokens alike.
        Only a character of several tokens has no name; its ids come from `context` and are hard-only, as the
        entry carries the last one's values with half characters for alternatives. (`context` is the answer
        tokenized again, so it is not used where an entry knows better.) EOS has no entry: it is put back.
        """
        vocabulary = self.vocabulary
        if vocabulary is None:
            return None
        entries = _last_entries(cast("list[dict[str, Any]]", answer.get("logprobs") or []), answer["response"])
        tail = self._tail(answer.get("context") or [], answer["response"].encode())
        if entries:
            positions = self._positions(entries, tail)
        elif tail:
            while tail and HALF.encode() in vocabulary.bytes_of[tail[-1]]:
                tail.pop()
            positions = [hard(i) for i in tail]
        else:
            return None
        if answer.get("done_reason") == "stop":
            positions.append(hard(vocabulary.tokenizer.eos_id))
        return assemble(positions, width)

    def thought(self, answer: dict[str, Any], thinking: str, width: int) -> TokenTargets | None:
        """Of the thinking before an answer, whose tokens come first; None where they don't spell it."""
        if self.vocabulary is None or not thinking:
            return None
        entries = cast("list[dict[str, Any]]", answer.get("logprobs") or [])
        after = _last_entries(entries, answer["response"])
        before = assemble(self._positions(entries[: len(entries) - len(after)], []), width)
        return within(thinking, before, self.vocabulary)

    def _positions(self, entries: list[dict[str, Any]], tail: list[int]) -> list[Position]:
        assert self.vocabulary is not None
        starts: dict[int, int] = {}  # byte offset in the answer → index in tail
        offset = 0
        for index, i in enumerate(tail):
            starts.setdefault(offset, index)
            offset += len(self.vocabulary.bytes_of[i])
        starts.setdefault(offset, len(tail))
        positions: list[Position] = []
        offset = 0
        for entry in entries:
            text = str(entry["token"])
            i = self._id(text)
            size = len(text.encode())
            if i != UNKNOWN_ID:
                positions.append(self._soft(i, entry))
            elif HALF in text:
                pass  # a character that the token limit cut
            elif offset in starts and offset + size in starts:
                positions += [hard(i) for i in tail[starts[offset] : starts[offset + size]]]
            else:
                positions += [hard(i) for i in self.vocabulary.spell(text.encode())]
            offset += size
        return positions

    def _soft(self, i: int, entry: dict[str, Any]) -> Position:
        """Hard where the values are no logprobs of one distribution."""
        top = cast("list[dict[str, Any]]", entry.get("top_logprobs") or [])
        logprobs = [float(alternative["logprob"]) for alternative in top]
        if not (float(entry["logprob"]) <= ROUNDING and is_distribution(logprobs)):
            return hard(i)
        ids = [self._id(alternative["token"]) for alternative in top]
        # A control token prints nothing. The likeliest such is taken for EOS; a second one has no name.
        for place, alternative in enumerate(top):
            if alternative["token"] == "":
                assert self.vocabulary is not None
                ids[place] = self.vocabulary.tokenizer.eos_id
                break
        return Position(i, float(entry["logprob"]), ids, logprobs)

    def _id(self, text: str) -> int:
        """UNKNOWN_ID for "", half characters and what no single token spells."""
        known = self._ids.get(text)
        if known is None:
            assert self.vocabulary is not None
            found = None if HALF in text else self.vocabulary.id_of(text.encode())
            known = self._ids[text] = UNKNOWN_ID if found is None else found
        return known

    def _tail(self, context: list[int], text: bytes) -> list[int]:
        """The end of `context` that prints the answer; empty where none does."""
        assert self.vocabulary is not None
        size, start = 0, len(context)
        while start and size < len(text) and 0 <= context[start - 1] < len(self.vocabulary.bytes_of):
            start -= 1
            size += len(self.vocabulary.bytes_of[context[start]])
        tail = context[start:]
        return tail if self.vocabulary.decode(tail) == text else []
