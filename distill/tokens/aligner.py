"""A teacher's answer in its student's tokens, with what the teacher said of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.teacher.protocol import TokenTargets
from distill.tokens.bpe import StudentTokenizer


@dataclass(frozen=True)
class Aligned:
    """One answer in the student's tokens, with the teacher's targets; fields as in `Documents`."""

    ids: NDArray[np.int64]
    slot_ids: NDArray[np.int64]
    slot_logprobs: NDArray[np.float16]
    chunk_ids: NDArray[np.int64]
    chunk_logprobs: NDArray[np.float32]


class Words(Protocol):
    """What aligning asks of a tokenizer; as in StudentTokenizer."""

    @property
    def teacher_map(self) -> NDArray[np.int32] | None: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...


class Aligner:
    """Carries the teacher's targets over to the student's tokens.

    With an aligned tokenizer ids map one to one and alternatives outside the student's vocabulary join the tail.
    Otherwise both tokenizations of an answer are cut where their bytes agree, and each such chunk carries the
    teacher's likelihood of it (approximate likelihood matching, arXiv:2503.20083).
    """

    def __init__(self, tokenizer: Words, teacher_bytes: Sequence[bytes] | None) -> None:
        self.tokenizer = tokenizer
        self.teacher_bytes = teacher_bytes

    def align(self, text: str, targets: TokenTargets | None, done_reason: str) -> Aligned:
        """Targets of an answer; hard labels alone where the teacher gave no more."""
        if targets is not None and len(targets):
            if self.tokenizer.teacher_map is not None:
                ids = self.tokenizer.teacher_map[targets.ids].astype(np.int64)
                if (found := self._spelled(ids, targets)) is not None:
                    return self._one_to_one(*found)
            elif self.teacher_bytes is not None:
                return self._by_chunks(text, targets, done_reason)
        return self._hard(self._encode(text, done_reason))

    def _encode(self, text: str, done_reason: str) -> NDArray[np.int64]:
        ids = self.tokenizer.encode(text)
        return np.array([*ids, self.tokenizer.eos_id] if done_reason == "stop" else ids, np.int64)

    def _hard(self, ids: NDArray[np.int64]) -> Aligned:
        return Aligned(
            ids=ids,
            slot_ids=np.zeros((len(ids), 0), np.int64),
            slot_logprobs=np.full((len(ids), 1), np.nan, np.float16),
            chunk_ids=np.full(len(ids), -1),
            chunk_logprobs=np.zeros(0, np.float32),
        )

    def _spelled(self, ids: NDArray[np.int64], targets: TokenTargets) -> tuple[NDArray[np.int64], TokenTargets] | None:
        """The same with what the student has no token for (−1) in smaller ones, hard there; None where it can't be."""
        missing = np.flatnonzero(ids < 0)
        if not len(missing):
            return ids, targets
        if self.teacher_bytes is None:
            return None
        try:
            words = [self.tokenizer.encode(self.teacher_bytes[int(targets.ids[i])].decode()) for i in missing]
        except UnicodeDecodeError:  # a part of a character
            return None
        if not all(words):  # a control token
            return None
        counts = np.ones(len(ids), np.int64)
        counts[missing] = [len(word) for word in words]
        rows, hard = np.repeat(np.arange(len(ids)), counts), np.repeat(ids < 0, counts)
        ours = ids[rows]
        ours[hard] = [id for word in words for id in word]
        logprobs = np.where(hard, np.nan, targets.logprobs[rows]).astype(np.float32)
        soft = targets.soft[rows] & ~hard
        told = TokenTargets(targets.ids[rows], logprobs, targets.top_ids[rows], targets.top_logprobs[rows], soft)
        return ours, told

    def _one_to_one(self, ids: NDArray[np.int64], targets: TokenTargets) -> Aligned:
        assert self.tokenizer.teacher_map is not None
        known = targets.top_ids >= 0
        slots = np.where(known, self.tokenizer.teacher_map[np.where(known, targets.top_ids, 0)], -1).astype(np.int64)
        logprobs = targets.top_logprobs.astype(np.float16)
        used = (slots >= 0) & (slots != ids[:, None]) & targets.soft[:, None] & np.isfinite(logprobs)
        # Several control tokens of the teacher become our one EOS: the likeliest, which stands first, counts.
        eos = used & (slots == self.tokenizer.eos_id)
        used &= ~(eos & (eos.cumsum(1) > 1))
        own = np.where(targets.soft, targets.logprobs, np.nan).astype(np.float16)
        return Aligned(
            ids=ids,
            slot_ids=np.where(used, slots, ids[:, None]),
            slot_logprobs=np.concatenate([own[:, None], np.where(used, logprobs, -np.inf)], axis=1).astype(np.float16),
            chunk_ids=np.full(len(ids), -1),
            chunk_logprobs=np.zeros(0, np.float32),
        )

    def _by_chunks(self, text: str, targets: TokenTargets, done_reason: str) -> Aligned:
        assert self.teacher_bytes is not None
        hard = self._hard(self._encode(text, done_reason))
        ended = done_reason == "stop"
        spoken = len(targets) - ended
        theirs = np.cumsum([len(self.teacher_bytes[int(id)]) for id in targets.ids[:spoken]])
        spelled = hard.ids[: len(hard.ids) - ended]
        ours = np.cumsum([len(self.tokenizer.token_bytes(int(id))) for id in spelled])
        if len(theirs) and len(ours) and theirs[-1] == ours[-1] + 1:
            theirs -= 1  # SentencePiece writes a space before the first word, which the server trimmed
        if not len(theirs) or not len(ours) or theirs[-1] != ours[-1]:
            return hard  # the teacher's tokens don't spell its text; nothing to align by
        shared = np.intersect1d(theirs, ours)
        chunk_of_theirs = np.searchsorted(shared, theirs)
        sums = np.zeros(len(shared), np.float64)
        np.add.at(sums, chunk_of_theirs, targets.logprobs[:spoken])
        chunk_ids = np.searchsorted(shared, ours)
        if ended:
            chunk_ids = np.append(chunk_ids, len(shared))
            sums = np.append(sums, targets.logprobs[-1])
        chunk_ids = np.where(np.isnan(sums)[chunk_ids], -1, chunk_ids)  # a hard-only token spoils its chunk
        return Aligned(hard.ids, hard.slot_ids, hard.slot_logprobs, chunk_ids, sums.astype(np.float32))


_NO_END = re.compile(rb"(^\s*(\d+|[A-Za-z])|\b(e\.g|i\.e|Dr|Mr|Mrs|Ms|vs))\.$")
"""A line's number in a list, an abbreviation: its full stop ends no sentence."""


def to_last_sentence(answer: Aligned, tokenizer: StudentTokenizer) -> Aligned:
    """An answer that the token limit cut off, up to its last whole sentence, and then an end (a hard label): else
    nothing would teach a student to stop. As it is where that would leave less than half."""
    pieces = [tokenizer.token_bytes(int(id)) for id in answer.ids]
    text, places = b"".join(pieces), np.cumsum([len(piece) for piece in pieces])
    ends = [
        i + 1
        for i in range(len(pieces) // 2, len(pieces) - 1)
        if pieces[i].rstrip(b"\"')*").endswith((b".", b"!", b"?"))
        and pieces[i + 1][:1].isspace()  # not within 3.14
        and not _NO_END.search(text[: places[i]].rpartition(b"\n")[2])
        and (answer.chunk_ids[i] < 0 or answer.chunk_ids[i] != answer.chunk_ids[i + 1])
    ]
    if not ends:
        return answer
    kept, width = ends[-1], answer.slot_ids.shape[1]
    logprobs = np.full((1, answer.slot_logprobs.shape[1]), -np.inf, np.float16)
    logprobs[0, 0] = np.nan
    return Aligned(
        ids=np.append(answer.ids[:kept], tokenizer.eos_id),
        slot_ids=np.concatenate([answer.slot_ids[:kept], np.full((1, width), tokenizer.eos_id)]),
        slot_logprobs=np.concatenate([answer.slot_logprobs[:kept], logprobs]),
        chunk_ids=np.append(answer.chunk_ids[:kept], -1),
        chunk_logprobs=answer.chunk_logprobs[: int(answer.chunk_ids[:kept].max(initial=-1)) + 1],
    )
