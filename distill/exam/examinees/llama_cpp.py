"""A GGUF sits the exam: llama.cpp computes, whoever made the file.

Shape legend: A answer tokens of one answer, in the GGUF's own tokens; S tokens named by a soft target; V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from distill.exam.examinees.common import STORED, engine_seed, without_thought
from distill.exam.examinees.protocol import Ability, AnswerScore, Card, Dreamt, Spoken, Thinks
from distill.exam.metrics.likelihood import SoftTargets, bucket_kl
from distill.exam.metrics.speech import Letters, form_of
from distill.exam.questions import Question
from distill.exam.targets import How, Target
from distill.mining.triplets import Triplet
from distill.teacher.gguf_file import read_gguf, read_metadata
from distill.teacher.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED, Vocabulary
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.protocol import HALF, TeacherTokenizer, TokenTargets
from distill.tokens.chat import END_THINK, THINK

CONTEXT = 4096
"""Tokens of context that the engine makes room for, at most: its float32 cache takes 46 kB a token in SmolLM2-135M."""

KL_VOCABULARY = 16384
"""KL needs the probability of every token that the teacher named, so the engine has to print all V of them for each
position: 0.1 s at V = 4,096 and 0.4 s at 16,384 on one slow core; 49,152 would take hours for an exam."""

RIVALS = 5
"""Alternatives asked for where KL isn't: enough for agreement and calibration."""


class GgufExaminee:
    """A .gguf behind llama.cpp's server, one request at a time, so that equal questions give equal numbers.

    It dreams where its vocabulary has `<think>` and `</think>` and its template knows how not to. The mined dream it
    can't be given: a GGUF doesn't say which image tokens stand for a triplet.
    """

    def __init__(self, target: Target, how: How) -> None:
        """Raises BadInput, CorruptFile; what LlamaCpp raises."""
        assert target.path is not None
        self._how = how
        metadata = read_metadata(target.path)
        trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        context = min(int(trained or CONTEXT), CONTEXT)
        # As many threads as all other computing here: on a machine that is shared, more would wait for one another.
        threads = torch.get_num_threads()
        self._engine = LlamaCpp(target.path, context=context, threads=threads, exact=True, timeout=how.timeout)
        self._vocabulary = self._engine.vocabulary
        self._tags = _tags(self._vocabulary.tokenizer)
        self._cannot: dict[Ability, str] = {
            "mined": "a GGUF doesn't say which image tokens stand for a triplet",
            **_no_targets(self._vocabulary, how.vocabulary),
        }
        if self._tags is None:
            self._cannot["dreams"] = f"its vocabulary has no {THINK} and {END_THINK}"
        elif self._engine.render("?") == self._engine.render("?", think=True):
            self._cannot["dreams"] = "its chat template can't tell it not to dream"
        self._letters = _letters(self._vocabulary)
        self._card = _card(target.path, target.name, int(trained) if trained else None, self.dreams)
        self._width = len(self._vocabulary.bytes_of)
        if "targets" not in self._cannot and self._width > KL_VOCABULARY:
            self._cannot["kl"] = (
                f"llama.cpp would have to print the probabilities of all {self._width:,} tokens at each position "
                f"(done up to {KL_VOCABULARY:,})"
            )
        self._targets = None if "targets" in self._cannot else _Targets(self._vocabulary, how.vocabulary)
        self._canonical = lru_cache(maxsize=4096)(self._spell)

    @property
    def card(self) -> Card:
        return self._card

    @property
    def cannot(self) -> dict[Ability, str]:
        return self._cannot

    @property
    def dreams(self) -> bool:
        return "dreams" not in self._cannot

    def fits(self, question: Question, dream_tokens: int) -> bool:
        around = len(self._opened(question)) + len(self._closing(question)) if self.dreams else 0
        prompt = max(len(self._asked(question)), around + dream_tokens)
        return prompt + len(self._answer_ids(question)) <= self._engine.context

    def score(self, questions: Sequence[Question], dream: Dreamt, draw: int = 0) -> list[AnswerScore]:
        assert dream == "none" or (dream == "own" and self.dreams), "it said that it can't"
        return [self._score(q, self._dreamt(q, 1.0, draw)[0] if dream == "own" else self._asked(q)) for q in questions]

    def answer(
        self, questions: Sequence[Question], *, think: Thinks, temperature: float, max_tokens: int, draw: int
    ) -> list[Spoken]:
        return [self._speak(question, bool(think), temperature, max_tokens, draw) for question in questions]

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        return None

    def close(self) -> None:
        self._engine.close()

    # Contexts: what stands before an answer.

    def _asked(self, question: Question, think: bool = False) -> list[int]:
        return self._engine.tokenize(self._engine.render(question.prompt, question.system, think), begin=True)

    def _opened(self, question: Question) -> list[int]:
        """The prompt and `<think>`: some templates write it themselves."""
        text = self._engine.render(question.prompt, question.system, think=True)
        text = text if text.rstrip().endswith(THINK) else f"{text}{THINK}\n"
        return self._engine.tokenize(text, begin=True)

    def _closing(self, question: Question) -> list[int]:
        """From the end of a dream to the answer, as the template writes it around no dream."""
        _, tag, after = self._engine.render(question.prompt, question.system).rpartition(END_THINK)
        return self._engine.tokenize("\n" + END_THINK + (after if tag else "\n"))

    def _dreamt(self, question: Question, temperature: float, draw: int) -> tuple[list[int], "_Dream"]:
        """The context with a dream of its own, closed where it didn't close it itself."""
        assert self._tags is not None
        opened = self._opened(question)
        dream = self._continue(opened, self._how.dream_tokens, temperature, question.seed(self._how.seed, draw))
        ids = dream.ids
        if ids and self._vocabulary.bytes_of[ids[-1]].isspace():  # the line break before </think>
            ids = ids[:-1]
        # As it is rendered around no dream, no empty line stands between the tags.
        context = [*opened, *ids, *self._closing(question)] if ids else self._asked(question)
        return context, replace(dream, ids=ids, text=dream.text.strip())

    def _continue(self, prompt: list[int], max_tokens: int, temperature: float, seed: int) -> "_Dream":
        """Up to `</think>`, an end of answer or the limit, whichever comes first; these are left out."""
        assert self._tags is not None
        if max_tokens < 1:
            return _Dream([], "", False, [])
        said = self._engine.complete(
            prompt, max_tokens=max_tokens, temperature=temperature, seed=engine_seed(seed), stop=[END_THINK]
        )
        ids, text, closed = said.ids, said.text, self._tags[1] in said.ids
        written = said.ids
        if closed:
            ids = ids[: ids.index(self._tags[1])]
            written = said.ids[: len(ids) + 1]
            if said.stop_type != "word":  # a control token: it isn't printed, so nothing stopped it
                text = self._vocabulary.decode(ids).decode("utf-8", "ignore")
        while ids and self._vocabulary.is_end(ids[-1]):
            ids = ids[:-1]
        return _Dream(ids, text.rstrip(HALF), closed, written)

    # Likelihoods.

    def _answer_ids(self, question: Question) -> Sequence[int]:
        """The teacher's own tokens where it has them all, as a student learned them; else its own spelling."""
        spelled = self._targets.spelled(question) if self._targets is not None else None
        return self._canonical(question.text) if spelled is None else spelled

    def _spell(self, text: str) -> tuple[int, ...]:
        """The answer's tokens. SentencePiece would put a space before the first word of a text, which an answer inside
        a conversation doesn't have: then it is spelled behind a line break."""
        ids = self._engine.tokenize(text, special=False)
        if self._vocabulary.decode(ids) != text.encode():
            lead = self._engine.tokenize("\n", special=False)
            behind = self._engine.tokenize(f"\n{text}", special=False)
            if behind[: len(lead)] == lead and self._vocabulary.decode(behind[len(lead) :]) == text.encode():
                ids = behind[len(lead) :]
        return tuple(ids)

    def _score(self, question: Question, context: Sequence[int]) -> AnswerScore:
        answer = self._answer_ids(question)
        score = AnswerScore.unknown(len(answer))
        if not answer:
            return score
        target = self._targets.of(question) if self._targets is not None else None
        wants_kl = target is not None and "kl" not in self._cannot
        forced = self._engine.force(context, answer, self._width if wants_kl else min(RIVALS, self._width))
        score.logprobs[:] = forced.logprobs
        score.confidence[:] = np.exp(forced.top_logprobs[:, 0])
        score.correct[:] = forced.top_ids[:, 0] == np.array(answer)
        if target is None:
            return score
        soft = target.soft
        score.agrees[soft] = (forced.top_ids[:, 0] == target.top)[soft]
        score.agrees_5[soft] = (forced.top_ids[:, :5] == target.top[:, None]).any(axis=1)[soft]
        if wants_kl:
            logq = np.empty_like(forced.top_logprobs)
            np.put_along_axis(logq, forced.top_ids, forced.top_logprobs, axis=1)
            named = (torch.from_numpy(array[soft]) for array in (logq, target.ids, target.logprobs))
            score.kl[soft] = bucket_kl(*named)[0].numpy()
        return score

    # Its own answers.

    def _speak(self, question: Question, think: bool, temperature: float, max_tokens: int, draw: int) -> Spoken:
        # The answer is drawn as `draw` + 1: it must not read on in its dream's numbers.
        started = time.perf_counter()
        context, dream = self._asked(question), _Dream([], "", True, [])
        if think and self.dreams:
            context, dream = self._dreamt(question, temperature, draw)
        said = self._engine.complete(
            context,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=engine_seed(question.seed(self._how.seed, draw + 1)),
        )
        ids = [i for i in said.ids if not self._vocabulary.is_end(i)]
        answer = without_thought(said.text.rstrip(HALF))
        form = form_of(
            self._letters(dream.written),
            self._letters(ids),
            dream_text=self._printed(dream.ids),
            answer_text=self._printed(ids),
            closed=dream.closed,
            ended=said.stop_type == "eos",
            steps=self._how.steps,
        )
        tokens, seconds = len(dream.ids) + len(ids), time.perf_counter() - started
        return Spoken(dream.text, answer, dream.closed, tokens, seconds, form)

    def _printed(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids).decode(errors="replace")


@dataclass(frozen=True)
class _Dream:
    """Between the tags. written: all that came after `<think>⏎`, `</think>` too."""

    ids: list[int]
    text: str
    closed: bool
    written: list[int]


class _Targets:
    """Carries soft targets over to the GGUF's tokens, by what they spell; any end of an answer is its EOS."""

    def __init__(self, own: Vocabulary, teacher: TeacherTokenizer | None) -> None:
        assert teacher is not None
        self._own = own
        self._teacher = Vocabulary(teacher)
        ids = (own.id_of(spelled) if spelled else None for spelled in self._teacher.bytes_of)
        self._map = np.array([-1 if i is None else i for i in ids], np.int64)
        self._map[[teacher.eos_id, *teacher.extra_stop_ids]] = own.tokenizer.eos_id

    def spelled(self, question: Question) -> list[int] | None:
        """The answer in the teacher's own tokens; None where they are not known, or one of them is not the GGUF's."""
        said = question.tokens
        if said is None:
            return None
        ids = self._map[said.ids[: len(said) - (question.done_reason == "stop")]]
        known = bool((ids >= 0).all()) and self._own.decode(ids.tolist()) == question.text.encode()
        return ids.tolist() if known else None

    def of(self, question: Question) -> SoftTargets | None:
        """In the GGUF's tokens, where the answer is spelled in the teacher's; None where none is soft."""
        said, answer = question.tokens, self.spelled(question)
        if said is None or answer is None or not said.soft[: len(answer)].any():
            return None
        shape = (len(answer), 1 + said.top_ids.shape[1])
        target = SoftTargets(
            np.full(shape, -1, np.int64),
            np.full(shape, -np.inf),
            np.full(len(answer), -1, np.int64),
            said.soft[: len(answer)],
        )
        for at in np.flatnonzero(target.soft).tolist():
            self._fill(target, at, said, answer[at])
        return target

    def _fill(self, target: SoftTargets, at: int, said: TokenTargets, own: int) -> None:
        named = {own: float(said.logprobs[at])}
        for i, logprob in zip(said.top_ids[at].tolist(), said.top_logprobs[at].tolist(), strict=True):
            # Of several control tokens that become one EOS, the likeliest, which stands first, counts.
            if i >= 0 and np.isfinite(logprob) and self._map[i] >= 0:
                named.setdefault(int(self._map[i]), logprob)
        target.ids[at, : len(named)] = list(named)
        target.logprobs[at, : len(named)] = list(named.values())
        likeliest = int(said.top_ids[at, 0])
        target.top[at] = self._map[likeliest] if likeliest >= 0 else -1


def _no_targets(own: Vocabulary, teacher: TeacherTokenizer | None) -> dict[Ability, str]:
    """Why the teacher's probabilities can't be held against its own: they have to be of the same tokens."""
    if teacher is None:
        return {"targets": "the exam has no soft targets"}
    known = set(Vocabulary(teacher).bytes_of)
    foreign = sum(
        kind == NORMAL and len(spelled) > 1 and spelled not in known
        for kind, spelled in zip(own.tokenizer.types, own.bytes_of, strict=True)
    )
    if foreign:
        return {"targets": f"its tokens are not the teacher's ({foreign:,} of {len(own.bytes_of):,} are others)"}
    return {}


def _tags(tokenizer: TeacherTokenizer) -> tuple[int, int] | None:
    ids = tokenizer.token_to_id
    return (ids[THINK], ids[END_THINK]) if THINK in ids and END_THINK in ids else None


def _letters(vocabulary: Vocabulary) -> Letters:
    words = vocabulary.tokenizer
    kinds = {id: kind for id, kind in enumerate(words.types) if kind in (CONTROL, USER_DEFINED)}
    control = [id for id, kind in kinds.items() if kind == CONTROL]
    breaks = [id for id, spelled in enumerate(vocabulary.bytes_of) if spelled == b"\n"]
    return Letters({id: words.tokens[id] for id in kinds}, control, breaks)


def _card(path: Path, name: str, context: int | None, dreams: bool) -> Card:
    sizes: dict[str, int] = {}
    for tensor in read_gguf(path).tensors:
        stored = GGMLQuantizationType(tensor.kind).name
        sizes[stored] = sizes.get(stored, 0) + prod(tensor.shape)
    most = max(sizes, key=lambda stored: sizes[stored], default="")
    return Card("gguf", name, sum(sizes.values()), path.stat().st_size, context, STORED.get(most, most), dreams)
