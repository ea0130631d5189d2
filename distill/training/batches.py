"""Packed rows: which documents share a row, and the tensors of a batch.

Each epoch draws every document's dream anew (mined, empty, the student's own draft, or pauses) and packs the documents
into rows of T tokens by best fit decreasing. What is left of a row is filled with the beginning of another
document, so nothing is padding. All of it follows from (seed, epoch, drafts).

A document of more than T tokens is read in windows: its head (prompt and think block) again and again, each time with
another part of the answer, of which half was read before. Each of its tokens is a target in one window alone. It is
what Ollama does with an answer that outgrows its context: the beginning stays, and half of the rest. A head that takes
more than half of T is not repeated.

Shape legend: B rows, T positions of a row, M positions with loss (a multiple of CHUNK), S target slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.backbone.attention import Documents as Spans
from distill.backbone.attention import Span
from distill.errors import BadInput
from distill.student.grammar import DreamGrammar
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training.best_fit import best_fit
from distill.training.losses import CHUNK, ChunkTargets, Targets
from distill.training.mixture import Mixture, stuttered
from distill.training.told import Told, tilted

EMPTY, MINED, DRAFT, PAUSE = 0, 1, 2, 3
"""What stands in a document's think block."""

HIDE, GAPS = 1, 2
"""Streams of the random numbers that say what of a question isn't read, and where tokens stand, beside its noise's."""

GAP = 10
"""Tokens for one gap: most within a step of a dream stand together, as they will."""
BREAKS = 0.1
"""Of the tokens that are read as others, so many are line breaks: in a dream one stands before `</think>`."""


@dataclass(frozen=True)
class Piece:
    """`length` inputs of a document, with one of its dreams: its first; or, with `start`, a later window, which is its
    head and what goes on from there. again: it fills up a row, and is read elsewhere too. dream: what it holds, if not
    its document's own; said: which of its tokens are there for the second time, and not learned. noise: the seed of
    what is read as something else, or not at all."""

    document: int
    variant: int
    length: int
    start: int = 0
    again: bool = False
    dream: tuple[int, ...] = ()
    said: tuple[int, ...] = ()
    noise: int = 0


Row = list[Piece]


@dataclass
class Batch:
    """ids, positions (B, T) int64; where (M,) int64: flat positions with loss; targets of these.

    answers (M,) bool: the position predicts an answer token (else the dream). loss_positions: M without what
    fills it up to a multiple of CHUNK, which has weight 0. alike (B, T) bool: what was read up to there holds no dream,
    so that a teacher would have read it too.
    """

    ids: Tensor
    positions: Tensor
    spans: Spans
    where: Tensor
    targets: Targets
    answers: Tensor
    loss_positions: int
    alike: Tensor
    chunks: ChunkTargets | None = None


class Batches:
    """Packed rows of one data set, in an order that only (seed, epoch, drafts) decide."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: StudentTokenizer,
        length: int,
        mixture: Mixture,
        seed: int,
        soft: float,
        grammar: DreamGrammar | None = None,
        strict: float = 0.0,
    ) -> None:
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        self.mixture, self.seed, self.soft = mixture, seed, soft
        self.grammar, self.strict = grammar if strict else None, strict
        newline = tokenizer.newline_id
        self._told = Told(tokenizer) if mixture.told and soft > 0 else None
        self._before = np.array([tokenizer.think_id, newline])
        self._after = np.array([newline, tokenizer.end_think_id, newline])
        self._empty = np.array([tokenizer.think_id, newline, tokenizer.end_think_id, newline])
        self._chunk_sizes = np.bincount(documents.chunk_ids[documents.chunk_ids >= 0], minlength=1)
        room = length - len(self._empty)
        self.usable = np.flatnonzero(np.diff(documents.prompt_ends, prepend=0) < room)
        """Documents whose prompt leaves room for an answer."""
        self.left_out = len(documents) - len(self.usable)
        if not len(self.usable):
            raise BadInput(f"student.context: no prompt is shorter than {length} tokens; raise it")
        self._has_dream = np.diff(documents.dream_ends, prepend=0) > 0
        inputs = np.diff(documents.prompt_ends + documents.answer_ends, prepend=0) + len(self._empty) - 1
        self.in_windows = int((inputs[self.usable] > length).sum())

    def epoch(self, number: int) -> list[Row]:
        """The epoch's rows, without drafts. Every document whose prompt fits is in them, whole or in windows."""
        random = np.random.default_rng([self.seed, number])
        dreaming = self._has_dream & (random.random(len(self.documents)) >= self.mixture.empty) & self.mixture.dreams
        variants = np.where(dreaming, PAUSE if self.mixture.pause else MINED, EMPTY)
        twice: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        if self.mixture.stutter:
            stutters = (variants == MINED) & (random.random(len(variants)) < self.mixture.stutter)
            most = self.grammar.steps if self.grammar else None
            for i in np.flatnonzero(stutters).tolist():
                twice[i] = stuttered(self.documents.dream(i).tolist(), self.tokenizer.lens_ids, most, random)
        pieces = [piece for i in self.usable.tolist() for piece in self._windows(i, variants[i], *twice.get(i, ()))]
        return self._pack(pieces, pieces, random)

    @property
    def drafts_wanted(self) -> bool:
        return self.mixture.dreams and self.mixture.drafts > 0

    def to_draft(self, number: int, rows: Sequence[Row], begun: int) -> list[int]:
        """Documents of an epoch's `rows` that shall hold a dream of the student's own: `mixture.drafts` of those that
        have a mined one and are read only from row `begun` on, where the prompt leaves room for it."""
        chosen = np.random.default_rng([self.seed, number, DRAFT]).random(len(self.documents)) < self.mixture.drafts
        prompts = np.diff(self.documents.prompt_ends, prepend=0)
        fit = chosen & (prompts < self.length // 2)
        return sorted(
            {p.document for p in self._unread(rows, begun) if p.variant == MINED and fit[p.document] and not p.start}
        )

    def drafted(self, number: int, rows: Sequence[Row], begun: int, drafts: Mapping[int, Sequence[int]]) -> list[Row]:
        """The epoch's rows, packed anew from row `begun` on with drafts (document → ids): every document still is in
        them once."""
        fresh = {piece.document for piece in self._unread(rows, begun)} & drafts.keys()
        left = [piece for row in rows[begun:] for piece in row if not piece.again]
        pieces = [piece for piece in left if piece.document not in fresh]
        pieces += [piece for i in sorted(fresh) for piece in self._windows(i, DRAFT, tuple(drafts[i]))]
        every = [piece for row in rows for piece in row if not piece.again]
        random = np.random.default_rng([self.seed, number, DRAFT, begun])
        return [*rows[:begun], *self._pack(pieces, pieces if fresh else every, random)]

    @staticmethod
    def _unread(rows: Sequence[Row], begun: int) -> list[Piece]:
        """Pieces of the documents of which nothing was read before row `begun`."""
        read = {piece.document for row in rows[:begun] for piece in row if not piece.again}
        return [p for row in rows[begun:] for p in row if not p.again and p.document not in read]

    def _pack(self, pieces: Sequence[Piece], every: Sequence[Piece], random: np.random.Generator) -> list[Row]:
        """Rows of these pieces, each filled up with beginnings of documents among `every`, in any order."""
        beginnings = [piece for piece in every if not piece.start]
        seeds = random.integers(2**31, size=len(pieces)).tolist()
        given = [replace(pieces[i], noise=seeds[i]) for i in random.permutation(len(pieces))]
        rows = [[given[i] for i in row] for row in best_fit([piece.length for piece in given], self.length)]
        for row in rows:
            while (room := self.length - sum(piece.length for piece in row)) > 0:
                piece = beginnings[random.integers(len(beginnings))]
                row.append(replace(piece, length=min(piece.length, room), again=True))
        return [rows[i] for i in random.permutation(len(rows))]

    def _windows(self, i: int, variant: int, dream: tuple[int, ...] = (), said: tuple[int, ...] = ()) -> list[Piece]:
        whole = Piece(i, int(variant), self.length, dream=dream, said=said)
        repeated, inputs = self._size(whole)
        pieces = [replace(whole, length=min(inputs, self.length))]
        start, room = repeated, self.length - repeated
        while start + room < inputs:
            start += room - room // 2
            pieces.append(replace(whole, length=repeated + min(room, inputs - start), start=start))
        return pieces

    def _places(self, piece: Piece) -> tuple[NDArray[np.int64], int]:
        """Where in its document's text a piece's inputs stand, and the first of them whose target is this window's."""
        if not piece.start:
            return np.arange(piece.length), 0
        repeated, _ = self._size(piece)
        rest = np.arange(piece.start, piece.start + piece.length - repeated)
        return np.concatenate([np.arange(repeated), rest]), piece.start + (self.length - repeated) // 2

    def _size(self, piece: Piece) -> tuple[int, int]:
        """Tokens that each window of a document repeats, and inputs of the whole: the last token is only a target."""
        head = len(self.documents.prompt(piece.document)) + len(self._think(piece))
        return head if head <= self.length // 2 else 0, head + len(self.documents.answer(piece.document)) - 1

    def _think(self, piece: Piece) -> NDArray[Any]:
        if piece.variant == EMPTY:
            return self._empty
        dream = np.array(piece.dream) if piece.dream else self.documents.dream(piece.document)
        if piece.variant == PAUSE:
            dream = np.full(len(dream), self.tokenizer.pad_id)
        return np.concatenate([self._before, dream, self._after])

    def assemble(self, rows: Sequence[Row], unread: float = 0.0) -> Batch:
        """Tensors of some rows. unread: so much of `mixture.bottleneck` and `mixture.prompt_dropout` holds, 0 to 1."""
        count, length = len(rows), self.length
        ids = np.zeros((count, length), np.int64)
        positions = np.zeros((count, length), np.int64)
        alike = np.zeros((count, length), np.bool_)
        spans: list[Span] = []
        hidden: dict[Span, tuple[int, int, int]] = {}
        where: list[NDArray[np.int64]] = []
        labels: list[NDArray[np.int64]] = []
        answer_at: list[NDArray[np.int64]] = []
        which: list[NDArray[np.int64]] = []
        slips: list[NDArray[np.bool_]] = []
        gains: list[NDArray[np.float32]] = []
        for number, row in enumerate(rows):
            start = 0
            for piece in row:
                text, kinds, first = self._document(piece)
                places, fresh = self._places(piece)
                end = start + piece.length
                read = self._read(piece, text, kinds, unread)
                ids[number, start:end] = read[places]
                positions[number, start:end] = self._positions(piece)
                shared = len(self.documents.prompt(piece.document)) if piece.variant != EMPTY else len(text)
                alike[number, start:end] = places < shared
                spans.append((number, start, end))
                if self._is_bottlenecked(piece, unread):
                    hidden[number, start, end] = self._hidden(piece, places)
                kept = np.flatnonzero((kinds[places] > 0) & (places >= fresh))
                where.append(number * length + start + kept)
                at = places[kept]
                labels.append(text[at + 1])
                answer_at.append(np.where(kinds[at] == 2, first + at, -1))
                which.append(self._masks(piece, text)[at])
                slips.append(read[at] != text[at])
                if self._told is not None:
                    gains.append(self._gains(self._told, piece, len(kinds))[at])
                start = end
        places = Spans(count, length, spans, torch.device("cpu"), hidden)
        return self._batch(ids, positions, alike, places, gains, where, labels, answer_at, which, slips)

    def _positions(self, piece: Piece) -> NDArray[np.int64]:
        """One after the other, or with gaps before one token in `GAP`, as far as the row goes."""
        share, n = self.mixture.gaps, piece.length
        if not share or (random := np.random.default_rng([piece.noise, GAPS])).random() >= share:
            return np.arange(n)
        before = random.integers(n, size=max(1, n // GAP))
        sizes = random.multinomial(random.integers(self.length - n + 1), np.full(len(before), 1 / len(before)))
        return np.arange(n) + np.bincount(before, sizes, n).astype(np.int64).cumsum()

    def _gains(self, told: Told, piece: Piece, length: int) -> NDArray[np.float32]:
        """(length, 1 + S) nats by which its dream makes targets of its inputs likelier: the answer ends them."""
        answer = Documents.span(self.documents.answer_ends, piece.document)
        slots = self.documents.slot_ids[answer].astype(np.int64)
        gains = np.zeros((length, 1 + slots.shape[1]), np.float32)
        if piece.variant == MINED:
            prompt, dream = self.documents.prompt(piece.document), self.documents.dream(piece.document).tolist()
            own = self.documents.answer(piece.document).astype(np.int64)
            gains[length - len(own) :] = told.gains(prompt, dream, own, slots)
        return gains

    def _is_bottlenecked(self, piece: Piece, unread: float) -> bool:
        """Whether its answer reads its dream alone. A draft may be wrong: how far to trust it, the question tells."""
        share = unread * self.mixture.bottleneck if piece.variant in (MINED, PAUSE) else 0.0
        return share > 0 and np.random.default_rng([piece.noise, HIDE]).random() < share

    def _hidden(self, piece: Piece, places: NDArray[np.int64]) -> tuple[int, int, int]:
        """What inputs at these places of a document don't read, as in `Spans`: those after the dream, of all that
        knows the question before it."""
        head = len(self.documents.prompt(piece.document))
        begins, closes = head + len(self._before), head + len(self._think(piece)) - len(self._after)
        ends = (closes, self._frame[0], begins)
        after, begin, end = np.searchsorted(places, ends).tolist()
        return after, begin, end

    @cached_property
    def _frame(self) -> tuple[int, int]:
        """Tokens that all prompts begin with, and end with: they tell nothing of a question."""
        prompts = [self.documents.prompt(i) for i in range(len(self.documents))]
        columns = (zip(*(prompt[::way] for prompt in prompts), strict=False) for way in (1, -1))
        starts, ends = (sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, ways)) for ways in columns)
        return starts, ends

    def _read(
        self, piece: Piece, text: NDArray[np.int64], kinds: NDArray[np.int64], unread: float
    ) -> NDArray[np.int64]:
        """The text, where some of an answer's tokens are other words or line breaks, as a student's own may be. What
        comes right after them is not learned from, but that it is of an answer, and no dream. Before a dream, some of
        the question's tokens are blank."""
        if (share := unread * self.mixture.prompt_dropout) and piece.variant in (MINED, PAUSE):
            starts, ends = self._frame
            question = np.arange(starts, len(self.documents.prompt(piece.document)) - ends)
            blank = np.random.default_rng([piece.noise, HIDE]).random(len(question)) < share
            text = text.copy()
            text[question[blank]] = self.tokenizer.pad_id
        if not self.mixture.noise:
            return text
        random = np.random.default_rng(piece.noise)
        slip = np.zeros(len(text), np.bool_)
        slip[1:-1] = (kinds[:-1] == 2) & (random.random(len(text) - 2) < self.mixture.noise)
        other = random.integers(self.tokenizer.base_size, size=len(text))
        other[random.random(len(text)) < BREAKS] = self.tokenizer.newline_id
        return np.where(slip, other, text)

    def _masks(self, piece: Piece, text: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each input of a document, the row of the grammar's masks that its target must keep to."""
        if self.grammar is None:
            return np.zeros(len(text) - 1, np.int64)
        asked = len(self.documents.prompt(piece.document))
        return np.array([0] * (asked - 1) + self.grammar.rows(text[asked:].tolist()))

    def _document(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Tokens; for each input what its target is (0 no loss, 1 dream, 2 answer); and the number that, added to
        an input's place, gives its target's place in the flat answers."""
        i = piece.document
        prompt, think = self.documents.prompt(i), self._think(piece)
        answer = self.documents.answer(i)
        text = np.concatenate([prompt, think, answer]).astype(np.int64)
        kinds = np.zeros(len(text) - 1, np.int64)
        context = len(prompt) + len(think)
        if piece.variant == MINED:
            kinds[len(prompt) - 1 : context - 1] = 1
            kinds[len(prompt) - 1 + len(self._before) + np.array(piece.said, np.int64)] = 0
        kinds[context - 1 + (0 if self.documents.begun is None else int(self.documents.begun[i])) :] = 2
        return text, kinds, Documents.span(self.documents.answer_ends, i).start - (context - 1)

    def _batch(
        self,
        ids: NDArray[Any],
        positions: NDArray[Any],
        alike: NDArray[np.bool_],
        spans: Spans,
        gains: list[NDArray[np.float32]],
        *parts: list[NDArray[Any]],
    ) -> Batch:
        where, labels, places, which, slips = (np.concatenate(part) for part in parts)
        real = len(where)
        filler = -real % CHUNK
        where, labels, which, slips = (np.pad(part, (0, filler)) for part in (where, labels, which, slips))
        places = np.pad(places, (0, filler), constant_values=-1)
        answers = places >= 0
        flat = np.where(answers, places, 0)
        slots = np.where(answers[:, None], self.documents.slot_ids[flat].astype(np.int64), labels[:, None])
        logprobs = self.documents.slot_logprobs[flat].astype(np.float32)
        if gains:
            logprobs = tilted(logprobs, np.pad(np.concatenate(gains), ((0, filler), (0, 0))))
        soft = answers & ~np.isnan(logprobs[:, 0])
        hard = np.full_like(logprobs, -np.inf)
        hard[:, 0] = 0.0
        even = ((np.arange(len(where)) < real) / max(real, 1)).astype(np.float32)
        weight = np.where(answers, 1.0, self.mixture.dream_weight).astype(np.float32) * even
        targets = Targets(
            labels=torch.from_numpy(labels),
            slots=torch.from_numpy(np.concatenate([labels[:, None], slots], axis=1)),
            logprobs=torch.from_numpy(np.where(soft[:, None], logprobs, hard)),
            soft_weight=torch.from_numpy(np.where(soft, self.soft, 0.0).astype(np.float32)),
            weight=torch.from_numpy(np.where(slips, 0.0, weight).astype(np.float32)),  # only the form follows a slip
            words=self.tokenizer.base_size,
            forbidden=self.grammar.forbidden if self.grammar else None,
            which=torch.from_numpy(which),
            strict=torch.from_numpy(self.strict * even) if self.grammar else None,
        )
        chunks = self._chunks(answers & ~slips, flat) if len(self.documents.chunk_logprobs) and self.soft > 0 else None
        tensors = (torch.from_numpy(ids), torch.from_numpy(positions))
        told = (torch.from_numpy(answers), real, torch.from_numpy(alike))
        return Batch(*tensors, spans, torch.from_numpy(where), targets, *told, chunks)

    def _chunks(self, answers: NDArray[np.bool_], flat: NDArray[np.int64]) -> ChunkTargets:
        """Chunks that lie whole in the batch. A document may be cut by the end of a row, and may occur twice."""
        owner = np.where(answers, self.documents.chunk_ids[flat], -1)
        begins = np.concatenate([[True], (owner[1:] != owner[:-1]) | (flat[1:] != flat[:-1] + 1)])
        run = np.cumsum(begins) - 1
        size = np.bincount(run)
        first = owner[begins]
        good = (first >= 0) & (size == self._chunk_sizes[np.maximum(first, 0)])
        number = np.where(good, np.cumsum(good) - 1, -1)
        return ChunkTargets(
            chunk=torch.from_numpy(number[run]),
            logprobs=torch.from_numpy(self.documents.chunk_logprobs[first[good]].astype(np.float32)),
            soft=self.soft,
        )
