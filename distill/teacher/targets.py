"""Puts what a teacher said of each answer token into arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.protocol import HALF, UNKNOWN_ID, TokenTargets


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
