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


def begin_of(text: str, tokens: TokenTargets, vocabulary: Vocabulary) -> int | None:
    """The first of an answer's last tokens that print its text, blanks before it aside; None where none do."""
    spelled = [vocabulary.bytes_of[i] for i in tokens.ids.tolist()]
    for start in (0, first_of(spelled, len(text.encode()))):
        printed = b"".join(spelled[start:])
        for halves in ("replace", "ignore"):  # as servers, and `whole_text`, write what is no character
            if ends_in(printed.decode("utf-8", halves), text):
                return start
    return None


def within(text: str, tokens: TokenTargets, vocabulary: Vocabulary) -> TokenTargets | None:
    """Those of the tokens that print a text, blanks around it aside: without the tags. None where none do."""
    spelled = [vocabulary.bytes_of[i] for i in tokens.ids.tolist()]
    sought, printed = text.strip().encode(), b"".join(spelled)
    at = printed.find(sought)
    if not sought or at < 0:
        return None
    ends = np.cumsum([len(piece) for piece in spelled])
    start, end = int(np.searchsorted(ends, at, "right")), int(np.searchsorted(ends, at + len(sought))) + 1
    return tokens.part(start, end) if b"".join(spelled[start:end]).strip() == sought else None


def shortened(text: str, tokens: TokenTargets, vocabulary: Vocabulary, limit: int) -> tuple[str, TokenTargets]:
    """An answer's first tokens, `limit` of them at most, and the text that they print."""
    ids, count = tokens.ids.tolist(), limit
    while count and is_cut(vocabulary.decode(ids[:count])):
        count -= 1
    kept = vocabulary.decode(ids[:count]).decode("utf-8", "replace")
    return kept if text.startswith(kept) else kept.lstrip(), tokens.part(0, count)


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
    *,
    limit: int,
    opened: bool = False,
    thinking: str = "",
    thought: TokenTargets | None = None,
) -> Response:
    """An answer whose thinking is kept apart and whose tokens are its text's; without tokens where they aren't.

    limit: tokens of an answer, which ends there: room for thinking that wasn't used isn't the answer's. opened: whether
    the prompt ends in the tag that begins thinking. thinking, thought: what was told beside the text, if any was.
    """
    inside, said = apart((THINK if opened else "") + whole_text(text, tokens, vocabulary))
    if tokens is not None and vocabulary is not None:
        start = begin_of(said, tokens, vocabulary)
        if inside and not thinking:
            thought = within(inside, tokens.part(0, start), vocabulary)
        tokens = None if start is None else tokens.part(start)
        if tokens is not None and len(tokens) > limit:
            (said, tokens), done_reason = shortened(said, tokens, vocabulary, limit), "length"
    return Response(said, tokens, done_reason, timings, thinking or inside, thought)


def opens(prompt: str) -> bool:
    """Whether what continues a prompt is thinking."""
    return prompt.rstrip().endswith(THINK)


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
