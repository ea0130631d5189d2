"""From the tokens that a student writes to the pieces that Ollama sends: dream and answer apart, as text, each piece
with what the student thought likely there.

As Ollama does it: a character of several tokens, or what may begin a stop string, waits
for the rest and becomes one piece with the last token's values; control tokens print nothing. Stop strings are the
answer's alone: a dream that holds one goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.dream.output_decoder import Part, Parts, printed
from distill.serve.scheduler import Wrote
from distill.tokens.bpe import StudentTokenizer

Entry = dict[str, Any]
"""Of `logprobs`: token, logprob, bytes (none where the token prints nothing), and top_logprobs where asked for."""


@dataclass(frozen=True)
class Piece:
    part: Part
    text: str
    logprobs: list[Entry] | None


def said(pieces: Sequence[Piece]) -> tuple[str, str, list[Entry]]:
    """Together: the answer, the dream, and the logprobs of both."""
    answer, dream = ("".join(piece.text for piece in pieces if piece.part == part) for part in ("content", "thinking"))
    return answer, dream, [entry for piece in pieces for entry in piece.logprobs or ()]


class Pieces(Parts):
    """stop: strings that end the answer, and are no part of it. parts: its first token may open a dream; without it,
    tags are text like any other. logprobs: of each piece, with so many alternatives; None: none are wanted."""

    def __init__(self, tokenizer: StudentTokenizer, stop: Sequence[str], parts: bool, logprobs: int | None) -> None:
        super().__init__(tokenizer, opens=parts)
        self.stop, self.logprobs = [text for text in stop if text], logprobs
        self.stopped = False
        """A stop string came."""
        self._fresh, self._held = False, ""
        self._last: Wrote | None = None

    def push(self, wrote: Wrote) -> Piece | None:
        """What can be sent now."""
        part = self.part
        if (text := self.text(wrote.token)) is None:  # white space around the tags belongs to the format
            left, self._fresh = self._piece(part, self._held.rstrip()), True
            return left
        if not text:
            return None
        text, self._last = self._held + text, wrote
        if self._fresh:
            text = text.lstrip()
        stop = () if self.thinking else self.stop
        found = min((place for place in map(text.find, stop) if place >= 0), default=-1)
        if found >= 0:
            self.stopped, text = True, text[:found]
        elif self._waits(text):
            self._held = text
            return None
        return self._piece(part, text)

    def rest(self) -> Piece | None:
        """What was held back until the end."""
        return self._piece(self.part, self._held.rstrip() if self.thinking else self._held)

    def _waits(self, text: str) -> bool:
        if self.thinking:
            return text != text.rstrip()
        return any(text.endswith(stop[:size]) for stop in self.stop for size in range(1, len(stop)))

    def _piece(self, part: Part, text: str) -> Piece | None:
        self._held = ""
        if not text or self._last is None:
            return None
        self._fresh = False
        return Piece(part, text, None if self.logprobs is None else [self._entry(text, self._last)])

    def _entry(self, text: str, wrote: Wrote) -> Entry:
        found = _entry(text, wrote.logprob)
        if self.logprobs:
            found["top_logprobs"] = [
                _entry(printed(self.tokenizer, id).decode("utf-8", "replace"), logprob)
                for id, logprob in zip(wrote.top_ids.tolist(), wrote.top_logprobs.tolist(), strict=True)
            ]
        return found


def _entry(text: str, logprob: float) -> Entry:
    """−∞ is no JSON: what can't be at all is as unlikely as float32 can tell."""
    found: Entry = {"token": text, "logprob": max(logprob, -3.4e38)}
    if text:
        found["bytes"] = list(text.encode())
    return found
