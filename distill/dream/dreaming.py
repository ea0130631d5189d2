"""One prompt, read and dreamed: prompt, dream and answer share one cache, and nothing is read twice.

Shape legend: P prompt positions, H hidden of the backbone, N images, D = 512.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from distill.backbone.session import Session
from distill.dream.dreamers import (
    Dreamt,
    Watch,
    Written,
    check_room,
    decode,
    decode_guided,
    draft,
    instead,
    read_dream,
)
from distill.dream.output_decoder import Speaker, is_sure
from distill.dream.pretrained import Parts
from distill.dream.prompting import Asked, image_words
from distill.dream.record import Branch, DreamRecord
from distill.dream.view.lanes import LiveLanes
from distill.errors import BadInput
from distill.knowledge.retrieval import Labels
from distill.mining.triplets import LENSES
from distill.tokens.chat import Dream, dream_ids, prompt_ids, think_ids, with_context, with_steps

DREAM_ROOM = 96
"""Columns of the cache made for a dream at first; it grows for longer ones."""


@dataclass
class Dreaming:
    """One prompt dreamed, and the backbone ready to answer. question: tokens of the prompt; read: with the dream's.

    What is known of the dream is found out when it is first asked for: no answer waits for it.
    """

    speaker: Speaker
    started: float
    question: int
    read: int
    find: Callable[[], Dreamt]
    tell: Callable[[Dreamt], DreamRecord]

    @cached_property
    def dreamt(self) -> Dreamt:
        return self.find()

    @cached_property
    def record(self) -> DreamRecord:
        return self.tell(self.dreamt)


def dream(parts: Parts, prompt: str, images: Tensor | None, asked: Asked, known: Sequence[Labels] = ()) -> Dreaming:
    """Read a prompt, dream, and have the backbone read the dream.

    images: (1, N, D). known: triplets known of it before, put after the prompt. Raises BadInput where
    prompt and dream leave no room for an answer.
    """
    started = time.monotonic()
    asked = _spared(parts, prompt, images, asked, known)
    ids = _prompt(parts, prompt, images, asked, known)
    length = min(parts.model.config.context, len(ids) + DREAM_ROOM + asked.sampling.max_tokens)
    speaker = Speaker(Session(parts.model, 1, length), asked.sampling)
    states = speaker.read(ids)
    lanes = LiveLanes.on(sys.stdout) if asked.watch else None

    def record(dreamt: Dreamt, seconds: float) -> DreamRecord:
        who = asked.dreamer if asked.dream is None else "given"
        return DreamRecord(
            prompt,
            who,
            dreamt.branches,
            dreamt.edges,
            seconds=seconds,
            pictures=asked.pictures,
            lenses=[*parts.tokenizer.lenses],
        )

    def watch(branches: list[Branch]) -> None:
        for show in (asked.on_dream, lanes.draw if lanes else None):
            if show is not None:
                show(record(Dreamt(branches=branches), time.monotonic() - started))

    find = _dreamt(parts, speaker, states, asked, watch if asked.on_dream or lanes else None)
    if asked.replace:
        given = parts.editor.replaced(find().dream or {}, asked.replace)
        return dream(parts, prompt, images, replace(asked, dream=given, replace={}), known)
    check_room(parts, speaker, 0)
    tell = partial(record, seconds=time.monotonic() - started)
    dreaming = Dreaming(speaker, started, len(ids), len(speaker.ids), find, tell)
    if asked.on_dream is not None:
        asked.on_dream(dreaming.record)
    if lanes is not None:
        lanes.finish(dreaming.record)
    return dreaming


def _spared(parts: Parts, prompt: str, images: Tensor | None, asked: Asked, known: Sequence[Labels]) -> Asked:
    """What is asked; without a dream where none is wanted for itself and the answer can stand without."""
    wanted = asked.dream is not None or asked.guide or asked.replace or asked.mode != "text"
    if parts.config.sure >= 1 or wanted or not asked.spares:
        return asked
    silent = replace(asked, dreamer="none")
    ids = _prompt(parts, prompt, images, silent, known)
    how = asked.sampling, parts.grammar.answering, parts.tokenizer.eos_id, parts.config.sure
    return silent if is_sure(parts.model, ids, *how) else asked


def _prompt(parts: Parts, prompt: str, images: Tensor | None, asked: Asked, known: Sequence[Labels]) -> list[int]:
    """The prompt's tokens: what is seen comes first, what is known of it last, as image tokens."""
    seen = "" if images is None else image_words(parts, images[0])
    text = with_context("\n".join(part for part in (seen, prompt) if part), known)
    ids = prompt_ids(parts.tokenizer, text, False if asked.dreamer == "none" else None, parts.system)
    if len(ids) >= (context := parts.model.config.context):
        raise BadInput(f"prompt: {len(ids)} tokens leave no room for an answer in a context of {context}; shorten it")
    return ids


def _dreamt(parts: Parts, speaker: Speaker, states: Tensor, asked: Asked, watch: Watch | None) -> Callable[[], Dreamt]:
    """Dream after a prompt of these states (1, P, H); then the speaker has read the dream, and words may follow.
    Returns what finds out what is known of it."""
    if asked.dream is not None:
        return _given(parts, speaker, states, asked.dream, asked.dreamer in ("backbone", "checked"))
    if asked.dreamer == "none":  # the prompt ends in an empty dream
        speaker.obey(parts.grammar.answering)
        return Dreamt
    if asked.dreamer == "engine":
        dreamt = draft(parts, states, asked.guide, watch, asked.sampling.seed if asked.explore else None)
        _read(parts, speaker, dreamt.dream)
        speaker.obey(parts.grammar.answering)
        return lambda: dreamt
    speaker.obey(parts.grammar)
    if asked.guide:
        return partial(read_dream, parts, decode_guided(parts, speaker, asked.guide, watch), states, "guided backbone")
    source = "backbone"
    if asked.dreamer == "checked":
        assert parts.engine is not None
        # The first path of each lens.
        guessed: Dream = dict(zip(LENSES, parts.engine.guess(states.float()), strict=False))
        speaker.expect(think_ids(parts.tokenizer, guessed), instead(parts.tokenizer))
        source = "checked engine"
    return partial(read_dream, parts, decode(parts, speaker, watch), states, source)


def _read(parts: Parts, speaker: Speaker, dream: Dream | None, as_drawn: bool = False) -> None:
    ids = think_ids(parts.tokenizer, dream)
    check_room(parts, speaker, len(ids))
    speaker.read(ids, last=True, as_drawn=as_drawn)


def _given(parts: Parts, speaker: Speaker, states: Tensor, given: Dream, as_drawn: bool) -> Callable[[], Dreamt]:
    """A user's dream, read as it is. as_drawn: the answer is drawn as after a dream of the backbone's own, so that it
    differs by the dream alone."""
    within = with_steps(given)
    _read(parts, speaker, within, as_drawn and within is not None)
    speaker.obey(parts.grammar.answering)
    ids = dream_ids(parts.tokenizer, given)
    return partial(read_dream, parts, Written(ids, [1.0] * len(ids)), states, "given")
