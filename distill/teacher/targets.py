"""Puts what a teacher said of each answer token into arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.protocol import HALF, UNKNOWN_ID, Response, TokenTargets


@dataclass(frozen=True)
class Position:
    """One answer token: its id, its logprob (NaN: hard-only) and the alternatives, likeliest first."""

    id: int
    logprob: float = math.nan
    top_ids: Sequence[int] = field(default_factory=list[int])
    top_logprobs: Sequence[float] = field(default_factory=list[float])


def hard(i: int) -> Position:
    """A position of which only the id is known."""
    return Position(i)


def whole_text(text: str, tokens: TokenTargets | None, vocabulary: Vocabulary | None) -> str:
    """An answer's text as its tokens print it, where the token limit fell inside a character (the token that began
    it may have held a space too)."""
    if not text.endswith(HALF) or tokens is None or vocabulary is None:
        return text.rstrip(HALF)
    return vocabulary.decode(tokens.ids.tolist()).decode("utf-8", "ignore")


THINK, END_THINK = "<think>", "</think>"
"""How models that no server reads the thinking of write it."""


def apart(text: str) -> tuple[str, str]:
    """What was thought, and the answer, of an answer that opens with its thinking in plain text, or with its end where
    the prompt had opened it."""
    before, closing, after = text.partition(END_THINK)
    opened = before.lstrip().startswith(THINK)
    if opened or (closing and THINK not in before):
        return before.strip().removeprefix(THINK).strip(), after.lstrip()
    return "", text


def spelling(text: str, tokens: TokenTargets, vocabulary: Vocabulary) -> TokenTargets | None:
    """The last of an answer's tokens: as many as print its text, blanks before it aside; None where none do."""
    spelled = [vocabulary.bytes_of[i] for i in tokens.ids.tolist()]
    for start in (0, first_of(spelled, len(text.encode()))):
        printed = b"".join(spelled[start:])
        for halves in ("replace", "ignore"):  # as servers, and `whole_text`, write what is no character
            if ends_in(printed.decode("utf-8", halves), text):
                return tokens.since(start)
    return None


def ends_in(told: str, text: str) -> bool:
    """Whether a text is what was told, blanks before it aside: servers leave them out after a tag."""
    return told.endswith(text) and not told.removesuffix(text).strip()


def first_of(pieces: Sequence[bytes] | Sequence[str], size: int) -> int:
    """Where the fewest last of the pieces begin that are at least `size` long together."""
    start, there = len(pieces), 0
    while start and there < size:
        start -= 1
        there += len(pieces[start])
    return start


def respond(
    text: str,
    tokens: TokenTargets | None,
    vocabulary: Vocabulary | None,
    done_reason: str,
    timings: dict[str, float],
    thinking: str = "",
) -> Response:
    """An answer whose thinking is kept apart and whose tokens are its text's; without tokens where they aren't."""
    thought, said = apart(whole_text(text, tokens, vocabulary))
    if tokens is not None and vocabulary is not None:
        tokens = spelling(said, tokens, vocabulary)
    return Response(said, tokens, done_reason, timings, thinking or thought)


def is_cut(text: bytes) -> bool:
    """Whether it ends inside a character."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def assemble(positions: Sequence[Position], width: int) -> TokenTargets:
    """(N,) ids and logprobs, (N, width) alternatives, padded with UNKNOWN_ID and -inf."""
    shape = (len(positions), width)
    top_ids = np.full(shape, UNKNOWN_ID, np.int32)
    top_logprobs = np.full(shape, -np.inf, np.float32)
    for row, position in enumerate(positions):
        kept = min(width, len(position.top_ids))
        top_ids[row, :kept] = position.top_ids[:kept]
        top_logprobs[row, :kept] = position.top_logprobs[:kept]
    logprobs = np.array([p.logprob for p in positions], np.float32)
    return TokenTargets(
        ids=np.array([p.id for p in positions], np.int32),
        logprobs=logprobs,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        soft=~np.isnan(logprobs),
    )
