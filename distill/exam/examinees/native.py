"""Students of ours in a folder, as examinees: a run's checkpoint, a checkpoint by itself, or a bundle's weights."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.backbone.device import pick_device
from distill.backbone.model import count_parameters
from distill.corpus.traces import TraceStore
from distill.dream.pretrained import load_parts
from distill.errors import TeacherError
from distill.exam.examinees.common import check_finite
from distill.exam.examinees.protocol import Ability, AnswerScore, Card, Dreamt, Spoken, Thinks
from distill.exam.metrics.likelihood import SoftTargets, soft_targets
from distill.exam.metrics.speech import Letters
from distill.exam.questions import Question
from distill.exam.scoring import (
    OwnDream,
    batched,
    dream_context,
    sample_dreams,
    score_answers,
    spoken_of,
    write_answers,
)
from distill.exam.targets import How, Target
from distill.mining.triplets import Triplet, by_trace, read_triplets
from distill.run import Run
from distill.student.grammar import DreamGrammar
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, prompt_ids
from distill.tokens.image_tokens import Codebook, dream_of, load_codes
from distill.tokens.packing import Aligner, split_traces, training_recall
from distill.tokens.recall import Recall
from distill.tokens.shown import load_shown

TOGETHER = 32
"""Prompts dreamed and answered at once."""

CLOSING = 4
"""Tokens around a dream: its tags and their line breaks."""


@dataclass(frozen=True)
class Asked:
    """A question in the student's tokens.

    header: the prompt and, for a run with `train.retrieve`, what was retrieved for it, up to where the student goes
    on. answer: the teacher's, without EOS; targets: its soft targets. mined: the dream mined from it, [] for none.
    """

    header: list[int]
    answer: list[int]
    targets: SoftTargets | None
    mined: list[int]


MASKED = "what it writes is held to the grammar of dreams and answers by a mask, as natively always"
RETRIEVED = "its prompts carry what was retrieved for them, as in its training"


class NativeExaminee:
    """A student on our own backbone. Raises what `load_parts` does for broken folders.

    It dreams if its run trained it to; where the run isn't known, if it has image tokens.
    """

    def __init__(self, target: Target, how: How) -> None:
        assert target.path is not None
        self.target, self.how, folder = target, how, target.path
        parts = load_parts(folder, pick_device(how.device))
        check_finite(parts.model, folder)
        self.model, self.codebook = parts.model.eval(), parts.codebook
        self.cannot: dict[Ability, str] = {}
        self._asked_before: dict[str, tuple[Question, Asked]] = {}
        self.tokenizer, reason = with_teacher_map(parts.tokenizer, how.vocabulary)
        self.tokenizer.shown = parts.tokenizer.shown or ({} if target.run is None else load_shown(target.run.tokenizer))
        if reason:
            self.cannot["targets"] = reason
        self._grammar = DreamGrammar(self.tokenizer, how.steps)
        self._letters = _letters(self.tokenizer)
        words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        self._codes = _codes_in(words, self.codebook)
        dreams = self._find_dreams()
        self._recall = _recall_of(target.run, self._codes, self.tokenizer)
        self.card = Card(
            kind=target.kind,
            name=target.name,
            parameters=count_parameters(self.model),
            bytes=sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
            context=self.model.config.context,
            quantization="float32",
            dreams=dreams,
            note=MASKED if self._recall is None else f"{MASKED}; {RETRIEVED}",
        )

    def _find_dreams(self) -> bool:
        """Whether it dreams; notes why not, and why no mined dream can be had."""
        train = None if self.target.run is None else self.target.run.settings.train
        reason = ""
        if train is not None and (train.pause or not train.dreams):
            reason = "it was trained " + ("on pause tokens instead of dreams" if train.pause else "without dreams")
        elif not len(self.tokenizer.image_ids):
            reason = "it has no image tokens to dream in"
        if reason:
            self.cannot |= {"dreams": reason, "mined": reason}
        elif self.codebook is None:
            self.cannot |= {"mined": "it ships no codebook that says which image tokens stand for a phrase"}
        elif not self._codes:
            try:
                self.codebook.encode(["a probe"])
            except TeacherError as error:
                self.cannot |= {"mined": f"its codebook can't place phrases here: {error}"}
        return not reason

    # What is known of a question.

    def fits(self, question: Question, dream_tokens: int) -> bool:
        asked = self._asked(question)
        dream = max(dream_tokens, len(asked.mined) + 1) + CLOSING
        return len(asked.header) + dream + max(len(asked.answer), 1) <= self.model.config.context

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        if self.codebook is None or "mined" in self.cannot:
            return None
        codes = (self.tokenizer.image_code(id) for id in self._mined(triplets))
        return [self.tokenizer.labels[code] for code in codes if code is not None]

    def _asked(self, question: Question) -> Asked:
        """Worked out once, as every phase asks anew."""
        kept = self._asked_before.get(question.key)
        if kept is None or kept[0] is not question:
            prompt = question.prompt if self._recall is None else self._recall.prompt(question.prompt)
            answer, targets = self._aligned(question)
            header = prompt_ids(self.tokenizer, prompt, system=question.system)
            kept = question, Asked(header, answer, targets, self._mined(question.triplets))
            self._asked_before[question.key] = kept
        return kept[1]

    def _aligned(self, question: Question) -> tuple[list[int], SoftTargets | None]:
        """The alignment of training: the teacher's own tokens where the student has them all."""
        tokens, teacher_map = question.tokens, self.tokenizer.teacher_map
        aligned = Aligner(self.tokenizer, None).align(question.text, tokens, question.done_reason)
        answer = aligned.ids.tolist()
        answer = answer[:-1] if answer and answer[-1] == self.tokenizer.eos_id else answer
        if tokens is None or teacher_map is None:
            return answer, None
        return answer, soft_targets(aligned, tokens, teacher_map, len(answer))

    def _mined(self, triplets: Sequence[Triplet]) -> list[int]:
        """The dream that triplets are, in its own image tokens; [] without triplets or a codebook that can name them.

        Phrases that its tokenizer hasn't seen go to the nearest image token.
        """
        codebook = self.codebook
        if not triplets or codebook is None or not len(codebook):
            return []
        new = sorted({phrase for triplet in triplets for phrase in triplet.phrases} - self._codes.keys())
        if new and "mined" not in self.cannot:
            self._codes |= dict(zip(new, codebook.encode(new).tolist(), strict=True))
        return dream_ids(self.tokenizer, dream_of(triplets, self._codes))

    # The exam.

    def score(self, questions: Sequence[Question], dream: Dreamt, draw: int = 0) -> list[AnswerScore]:
        asked = [self._asked(question) for question in questions]
        if dream == "own":
            dreams = [own.ids for own in self._dreamed(questions, 1.0, draw)]
        else:
            dreams = [each.mined if dream == "mined" else [] for each in asked]
        contexts = [dream_context(self.tokenizer, a.header, ids) for a, ids in zip(asked, dreams, strict=True)]
        found = dict(score_answers(self.model, contexts, [a.answer for a in asked], [a.targets for a in asked]))
        return [found[i] for i in range(len(asked))]

    def answer(
        self, questions: Sequence[Question], *, think: Thinks, temperature: float, max_tokens: int, draw: int
    ) -> list[Spoken]:
        """The dream is drawn as `draw`, the answer as `draw` + 1: it must not read on in its dream's numbers."""
        spoken: list[Spoken] = []
        for group in batched(questions, TOGETHER):
            started = time.perf_counter()
            if think == "mined":
                dreams = [OwnDream(self._asked(question).mined, True) for question in group]
            elif think and self.card.dreams:
                dreams = self._dreamed(group, temperature, draw)
            else:
                dreams = [OwnDream([], True)] * len(group)
            headers = [self._asked(question).header for question in group]
            answers = write_answers(
                self.model,
                self._grammar,
                [dream_context(self.tokenizer, header, d.ids) for header, d in zip(headers, dreams, strict=True)],
                max_tokens=max_tokens,
                temperature=temperature,
                seeds=[question.seed(self.how.seed, draw + 1) for question in group],
                eos_id=self.tokenizer.eos_id,
            )
            share = (time.perf_counter() - started) / len(group)
            spoken += [self._spoken(dream, ids, share) for dream, ids in zip(dreams, answers, strict=True)]
        return spoken

    def _spoken(self, dream: OwnDream, answer: list[int], seconds: float) -> Spoken:
        ended = answer[-1:] == [self.tokenizer.eos_id]
        answer = answer[:-1] if ended else answer
        thought, said = self.tokenizer.decode(dream.ids), self.tokenizer.decode(answer)
        return spoken_of(
            dream, answer, thought, said, self._letters, ended=ended, steps=self.how.steps, seconds=seconds
        )

    def _dreamed(self, questions: Sequence[Question], temperature: float, draw: int) -> list[OwnDream]:
        dreams: list[OwnDream] = []
        for group in batched(questions, TOGETHER):
            dreams += sample_dreams(
                self.model,
                self.tokenizer,
                self._grammar,
                [self._asked(question).header for question in group],
                max_tokens=self.how.dream_tokens,
                temperature=temperature,
                seeds=[question.seed(self.how.seed, draw) for question in group],
            )
        return dreams

    def close(self) -> None:
        """Nothing runs beside it: its memory goes with it."""


def _letters(tokenizer: StudentTokenizer) -> Letters:
    added = {id: tokenizer.tokens[id] for id in range(tokenizer.base_size, tokenizer.vocab_size)}
    return Letters(added, range(tokenizer.pad_id, tokenizer.eos_id + 1), [tokenizer.newline_id])


def _codes_in(words: Path, codebook: Codebook | None) -> dict[str, int]:
    """phrases.json of a tokenizer's folder; {} where it has none, as a bundle."""
    if codebook is None or not (words / "phrases.json").is_file():
        return {}
    return load_codes(words, codebook)


def _recall_of(run: Run | None, codes: Mapping[str, int], tokenizer: StudentTokenizer) -> Recall | None:
    """What a student that learned with retrieval is given to read; None where it did not, or its run can't tell."""
    if run is None or not run.settings.train.retrieve or not run.traces.exists() or not run.triplets.exists():
        return None
    # A copy: the examinee's own grow by phrases that training never saw.
    codes = dict(codes) or _codes_in(run.tokenizer, Codebook.load(run.tokenizer))
    with closing(TraceStore(run.traces, readonly=True)) as store:
        train = split_traces(store)[0]
    return training_recall(run, train, by_trace(read_triplets(run.triplets)), codes, tokenizer)


# The teacher's ids in the student's.


def with_teacher_map(tokenizer: StudentTokenizer, vocabulary: TeacherTokenizer | None) -> tuple[StudentTokenizer, str]:
    """The tokenizer with the map of this vocabulary's ids, and "" or why there can be none (it then has no map).

    A bundle is saved without its map, and a saved one may be of another teacher than the exam's: so it is made anew.
    Where the exam tells no vocabulary, its teacher is taken for the student's own.
    """
    if tokenizer.kind != "aligned":
        return _mapped(tokenizer, None), "its tokenizer is its own, not cut out of the teacher's (tokenize.kind)"
    if vocabulary is None:
        return tokenizer, "" if tokenizer.teacher_map is not None else "the exam doesn't tell its teacher's vocabulary"
    found = teacher_map_of(tokenizer, vocabulary)
    if found is None:
        return _mapped(tokenizer, None), "its tokenizer was cut out of another teacher's than the exam's"
    return _mapped(tokenizer, found), ""


def _mapped(tokenizer: StudentTokenizer, teacher_map: NDArray[np.int32] | None) -> StudentTokenizer:
    return StudentTokenizer(tokenizer.hf, tokenizer.origin, teacher_map)


def teacher_map_of(tokenizer: StudentTokenizer, vocabulary: TeacherTokenizer) -> NDArray[np.int32] | None:
    """The map that `AlignedCut.build` made, (teacher vocabulary,) int32, from the tokens' spelling alone.

    None where the student wasn't cut out of this vocabulary: its tokens stand there in the same order, then
    only single bytes that the vocabulary lacks.
    """
    ids = [vocabulary.token_to_id.get(token, -1) for token in tokenizer.tokens[: tokenizer.base_size]]
    kept = [id for id in ids if id >= 0]
    lacking = tokenizer.tokens[len(kept) : tokenizer.base_size]
    if vocabulary.model != "gpt2" or tokenizer.origin.pre != vocabulary.pre or kept != sorted(kept):
        return None
    if kept != ids[: len(kept)] or any(len(token) > 1 for token in lacking):
        return None
    found = np.full(len(vocabulary.tokens), -1, dtype=np.int32)
    found[kept] = np.arange(len(kept))
    found[[vocabulary.eos_id, *vocabulary.extra_stop_ids]] = tokenizer.eos_id
    return found
