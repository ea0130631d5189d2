"""What a student may write next: a dream spelled as training spells it, then an answer of words alone, in whole UTF-8.

    <think>⏎ [⟨spatial⟩ triplets ⟨temporal⟩ triplets ⟨causal⟩ triplets ⟨abstract⟩ triplets ⏎] </think>⏎ words <|im_end|>

The dream in brackets may be missing, as in the examples without one, and a lens may have no triplet, but not all of
them. Natively it is a mask over the logits: a table of states, and where each token leads. In Ollama the weights alone
must keep to it.

Shape legend: B rows, S states, M masks (states that allow the same share one), K kinds of tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from distill.config import Settings
from distill.mining.triplets import LENSES
from distill.teacher.gguf_tokenizer import BYTE, NORMAL
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.utf8 import NOWHERE, STATES, WHOLE, Leads, leads

AROUND = 2
"""Tokens of a full dream besides its lenses and triplets: its line break and closing tag."""

HEAD = 3
"""Tokens around a dream that `dream_size` leaves out: `<think>` with its line break, and the last one's."""
ROOM = 32
"""Tokens of the context that what doesn't fit in it leaves for the answer."""

KINDS = WORD, NEWLINE, IMAGE, THINK, END_THINK, EOS, NEVER, FIRST_LENS = range(8)
FIRST_PART = FIRST_LENS + len(LENSES)
"""Of tokens; the lenses follow each other from FIRST_LENS on, then whatever is a part of a character, told apart by
where it leads. NEVER: control tokens that nobody writes, and bytes that no text holds."""

START, OPENED, INSIDE, CLOSING, CLOSED, ANSWER = range(6)
FIRST_PATH = ANSWER + STATES
"""States: before `<think>` · its line break · the first lens, or no dream · `</think>` after a dream · its line break ·
the answer, and what a character of it lacks (utf8.py) · and, for each lens in turn, how many image tokens it has; then,
for each lens, that none has any yet."""


def dream_size(steps: int) -> int:
    """Tokens of the longest dream with `steps` triplets a lens, its line break and closing tag among them."""
    return len(LENSES) * (1 + 3 * steps) + AROUND


def think_size(steps: int) -> int:
    """Tokens of the longest dream with `steps` triplets a lens, and of all that stands around it."""
    return HEAD + dream_size(steps)


def reply_room(steps: int, dreams: bool) -> int:
    """Tokens of the context that what doesn't fit in it leaves for a reply: the answer, and before it the longest dream
    with `steps` triplets a lens, where it dreams."""
    return ROOM + (think_size(steps) if dreams else 0)


def steps_within(tokens: int) -> int:
    """Triplets a lens of the longest dream of so many tokens, rounded up; 1 at least."""
    return max(1, -(-(tokens - dream_size(0)) // (3 * len(LENSES))))


def longest_path(settings: Settings) -> int:
    """Triplets that a lens has at most in what a run's student learns: mined ones, or its engine's."""
    return max(settings.mine.steps, settings.dreaming.dream_length)


class DreamGrammar:
    """A `distill.backbone.generate.Grammar` for whole replies; `inside` and `answering` are the same from further on.

    steps: triplets that a lens has at most. What is written without being allowed changes no state, but for
    `</think>`, which ends a dream wherever it stands, and for what comes before a character is whole: it is given up.
    whole: only words that make whole characters may follow. What a training charges for knows nothing of that.
    """

    def __init__(self, tokenizer: StudentTokenizer, steps: int, whole: bool = True) -> None:
        self.steps = steps
        self.start = START
        kinds, parts = _kinds(tokenizer, whole)
        allowed, after = _machine(steps, parts)
        masks, mask_of = allowed.unique(dim=0, return_inverse=True)
        # Added to logits, this takes a sixth of the time that filling them does.
        self._tables = torch.where(masks[:, kinds], 0.0, float("-inf")), mask_of, kinds, after
        # For `rows`: a walk over tensors takes a hundred times as long.
        self._lists: tuple[list[int], list[int], list[list[int]]] = mask_of.tolist(), kinds.tolist(), after.tolist()

    @property
    def inside(self) -> Self:
        """After `<think>` and its line break."""
        return self._from(INSIDE)

    @property
    def answering(self) -> Self:
        """After the dream, or an empty one."""
        return self._from(ANSWER)

    def _from(self, state: int) -> Self:
        other = copy.copy(self)
        other.start = state
        return other

    def rows(self, ids: Sequence[int]) -> list[int]:
        """For each of the ids of a reply, from `start` on, the row of `forbidden` that holds where it is written."""
        mask_of, kinds, after = self._lists
        state, found = self.start, list[int]()
        for id in ids:
            found.append(mask_of[state])
            state = after[state][kinds[id]]
        return found

    @property
    def forbidden(self) -> Tensor:
        """(M, V) float32: −∞ for what may not be written, 0 elsewhere."""
        return self._tables[0]

    def mask(self, logits: Tensor, states: Tensor) -> Tensor:
        """logits (B, V) with −∞ for what may not follow in the rows' states (B,). Some token always may: a vocabulary
        has all bytes that go on with a character."""
        masks, mask_of, _, _ = self._on(logits.device)
        return logits + masks.index_select(0, mask_of[states])

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The states (B,) after tokens (B,)."""
        _, _, kinds, after = self._on(states.device)
        return after[states, kinds[tokens]]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """masks (M, V) of 0 and −∞, mask_of (S,), kinds (V,), after (S, K)."""
        if self._tables[0].device != device:
            masks, mask_of, kinds, after = self._tables
            self._tables = masks.to(device), mask_of.to(device), kinds.to(device), after.to(device)
        return self._tables


def _kinds(tokenizer: StudentTokenizer, whole: bool) -> tuple[Tensor, dict[Leads, int]]:
    """(V,) int64: the kind of each token; and the kinds of words and parts of them, by where their bytes lead."""
    parts, found = {WHOLE: WORD, NOWHERE: NEVER}, list[int]()
    for id, kind in enumerate(tokenizer.types):
        spoken = leads(tokenizer.token_bytes(id)) if whole else WHOLE
        lead = spoken if kind in (NORMAL, BYTE) else NOWHERE
        found.append(parts.setdefault(lead, FIRST_PART + len(parts) - 2))
    kinds = torch.tensor(found)
    kinds[torch.from_numpy(tokenizer.image_ids).long()] = IMAGE
    for lens, id in enumerate(tokenizer.lens_ids):
        kinds[id] = FIRST_LENS + lens
    kinds[tokenizer.newline_id], kinds[tokenizer.eos_id] = NEWLINE, EOS
    kinds[tokenizer.think_id], kinds[tokenizer.end_think_id] = THINK, END_THINK
    return kinds, parts


def _machine(steps: int, parts: dict[Leads, int]) -> tuple[Tensor, Tensor]:
    """allowed (S, K) bool, and after (S, K) int64: the state that a kind of token leads to."""
    path = 1 + 3 * steps
    bare = FIRST_PATH + len(LENSES) * path
    states, kinds = bare + len(LENSES), FIRST_PART + len(parts) - 2
    allowed = torch.zeros((states, kinds), dtype=torch.bool)
    after = torch.arange(states).unsqueeze(1).repeat(1, kinds)
    after[:ANSWER, END_THINK] = after[FIRST_PATH:, END_THINK] = CLOSED
    after[ANSWER:FIRST_PATH] = ANSWER

    def may(state: int, kind: int, then: int) -> None:
        allowed[state, kind], after[state, kind] = True, then

    may(START, THINK, OPENED)
    may(OPENED, NEWLINE, INSIDE)
    may(INSIDE, END_THINK, CLOSED)
    may(INSIDE, FIRST_LENS, bare)
    for lens in range(len(LENSES)):
        begins = FIRST_PATH + lens * path
        is_last = lens == len(LENSES) - 1
        may(bare + lens, IMAGE, begins + 1)
        if not is_last:
            may(bare + lens, FIRST_LENS + lens + 1, bare + lens + 1)
        for count in range(path):
            if count + 1 < path:
                may(begins + count, IMAGE, begins + count + 1)
            if count % 3 == 0:
                leaves = (NEWLINE, CLOSING) if is_last else (FIRST_LENS + lens + 1, begins + path)
                may(begins + count, *leaves)
    may(CLOSING, END_THINK, CLOSED)
    may(CLOSED, NEWLINE, ANSWER)
    for kind in (NEWLINE, EOS):
        may(ANSWER, kind, ANSWER)
    for lead, kind in parts.items():
        for lacking, then in enumerate(lead):
            if then is not None:
                may(ANSWER + lacking, kind, ANSWER + then)
            elif lead[0] is not None:
                after[ANSWER + lacking, kind] = ANSWER + lead[0]
    nowhere = ~allowed.any(1)  # states that no vocabulary without parts of characters comes to
    allowed[nowhere] = allowed[ANSWER].clone()
    return allowed, after
