"""The aligned kind: the teacher's own byte-level BPE, cut down to what a corpus uses.

Why the cut splits the corpus exactly as the teacher does. Let K be the kept tokens, closed under derivation: with
a token, every token that the teacher's merges pass through on the way to it. The cut keeps the merges (a, b) → ab
with a, b and ab in K, in order of rank. BPE applies, at each step, the applicable merge of lowest rank. Suppose
both have reached the same pieces of a corpus text. The merge m that the full tokenizer applies now lies inside one
token of its final split, and inside it merges happen as if it stood alone; the token is in K, so m's parts and
result are, so the cut has m. All merges of the cut are the teacher's, so none of lower rank applies. Both apply m.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import BadInput
from distill.mining.triplets import LENSES
from distill.teacher.gguf_tokenizer import NORMAL, byte_alphabet
from distill.teacher.pre_tokenizers import byte_level_bpe, why_unknown
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.bpe import Origin, StudentTokenizer

CHAT_WORDS = ("user", "assistant", "system", "tool", "\n")
"""What the chat format itself writes."""


def why_not(tokenizer: TeacherTokenizer | None) -> str | None:
    """Why a student's tokenizer can't be aligned to this one, or None where it can."""
    if tokenizer is None:
        return "the teacher's vocabulary can't be read"
    return why_unknown(tokenizer)


class AlignedCut:
    """Grows the set K of kept teacher tokens, then builds the student's tokenizer from it."""

    def __init__(self, teacher: TeacherTokenizer) -> None:
        """Raises BadInput where the teacher's tokenizer is no byte-level BPE that we can reproduce."""
        if reason := why_not(teacher):
            raise BadInput(f"tokenize.kind=aligned: {reason}; use tokenize.kind=sentencepiece")
        self.teacher = teacher
        self.merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in teacher.merges)]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        ids = teacher.token_to_id
        self.normal = np.array([kind == NORMAL for kind in teacher.types])
        vocabulary = {token: i for token, i in ids.items() if self.normal[i]}
        merges = [(a, b) for a, b in self.merges if a in vocabulary and b in vocabulary and a + b in vocabulary]
        self.full = byte_level_bpe(vocabulary, merges, teacher.pre)
        self.kept = {ids[symbol] for symbol in byte_alphabet() if symbol in ids}
        self.left_out: tuple[int, float] | None = None
        """Tokens of the corpus for which there was no room, and their share of its tokens."""
        self.told: dict[str, NDArray[Any]] = {}
        """What was counted in the corpus (build.py)."""

    @property
    def size(self) -> int:
        """BPE tokens that the student will have: the kept ones and the bytes that the teacher lacks."""
        return len(self.kept) + sum(symbol not in self.teacher.token_to_id for symbol in byte_alphabet())

    def derivation(self, id: int) -> set[int]:
        """The token and every token that the teacher's merges pass through on the way to it."""
        pieces = list(self.teacher.tokens[id])
        seen = {self.teacher.tokens[id], *pieces}
        while len(pieces) > 1:
            rank, at = min((self.ranks.get((a, b), len(self.ranks)), i) for i, (a, b) in enumerate(pairwise(pieces)))
            if rank == len(self.ranks):  # taken whole (ignore_merges): no merges lead to it
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
            seen.add(pieces[at])
        ids = self.teacher.token_to_id
        return {ids[piece] for piece in seen if piece in ids}

    def keep(self, ids: Iterable[int]) -> None:
        """Keep these tokens and their derivations. Control tokens and ids out of range are passed over."""
        for id in set(ids) - self.kept:
            if 0 <= id < len(self.normal) and self.normal[id]:
                self.kept |= self.derivation(id)

    def keep_text(self, texts: Iterable[str]) -> None:
        """Keep what the teacher's own tokenizer makes of these texts."""
        for encoding in self.full.encode_batch(list(texts), add_special_tokens=False):
            self.keep(encoding.ids)

    def keep_likely(self, mass: NDArray[np.float64], size: int) -> None:
        """Keep more tokens, those of most probability `mass` (teacher vocabulary,) first, up to `size` in all."""
        room = size - self.size
        for id in np.argsort(-mass, kind="stable").tolist():
            if mass[id] <= 0 or room <= 0:
                return
            if self.normal[id] and id not in self.kept:
                new = self.derivation(id) - self.kept
                if len(new) <= room:
                    self.kept |= new
                    room -= len(new)

    def build(
        self, labels: Sequence[str], teacher_digest: str = "", lenses: Sequence[str] = LENSES
    ) -> StudentTokenizer:
        """The student's tokenizer: kept tokens in the teacher's order, then the bytes that the teacher lacks."""
        order = sorted(self.kept)
        vocabulary = {self.teacher.tokens[id]: i for i, id in enumerate(order)}
        for symbol in byte_alphabet():
            vocabulary.setdefault(symbol, len(vocabulary))
        merges = [(a, b) for a, b in self.merges if a in vocabulary and b in vocabulary and a + b in vocabulary]
        base = byte_level_bpe(vocabulary, merges, self.teacher.pre)
        teacher_map = np.full(len(self.teacher.tokens), -1, dtype=np.int32)
        teacher_map[order] = np.arange(len(order))
        origin = Origin("aligned", self.teacher.pre, teacher=teacher_digest)
        student = StudentTokenizer.assemble(base, labels, origin, teacher_map, lenses)
        teacher_map[[self.teacher.eos_id, *self.teacher.extra_stop_ids]] = student.eos_id
        return student
