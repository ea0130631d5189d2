"""A GGUF sits the exam: llama.cpp computes, whoever made the file.

Shape legend: A answer tokens of one answer, in the GGUF's own tokens; V vocabulary.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from distill.exam.examinees.common import STORED, TokenExaminee, engine_seed
from distill.exam.examinees.protocol import AnswerScore, Card
from distill.exam.metrics.likelihood import SoftTargets
from distill.exam.questions import Question
from distill.exam.targets import How, Target
from distill.teacher.gguf_file import read_gguf, read_metadata
from distill.teacher.llama_cpp import LlamaCpp
from distill.tokens.chat import END_THINK, THINK

CONTEXT = 4096
"""Tokens of context that the engine makes room for, at most: its float32 cache takes 46 kB a token in SmolLM2-135M."""

TOO_MANY = "llama.cpp would have to print the probabilities of all tokens at each position"
RIVALS = 5
"""Alternatives asked for: enough for agreement."""


class GgufExaminee(TokenExaminee):
    """A .gguf behind llama.cpp's server, one request at a time, so that equal questions give equal numbers.

    It dreams where its vocabulary has `<think>` and `</think>` and its template knows how not to.
    """

    def __init__(self, target: Target, how: How) -> None:
        """Raises BadInput, CorruptFile; what LlamaCpp raises."""
        assert target.path is not None
        metadata = read_metadata(target.path)
        trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        self.context_size = min(int(trained or CONTEXT), CONTEXT)
        # As many threads as all other computing here: on a machine that is shared, more would wait for one another.
        threads = torch.get_num_threads()
        self._engine = LlamaCpp(
            target.path, context=self.context_size, threads=threads, exact=True, timeout=how.timeout
        )
        super().__init__(how, self._engine.vocabulary)
        self.cannot["mined"] = "a GGUF doesn't say which image tokens stand for a triplet"
        ids = self.vocabulary.tokenizer.token_to_id
        self.end_think = ids.get(END_THINK)
        if THINK not in ids or self.end_think is None:
            self.cannot["dreams"] = f"its vocabulary has no {THINK} and {END_THINK}"
        elif self._engine.render("?") == self._engine.render("?", think=True):
            self.cannot["dreams"] = "its chat template can't tell it not to dream"
        self.cannot["kl"] = TOO_MANY
        dreams = "dreams" not in self.cannot
        self.card = _card(target.path, target.name, int(trained) if trained else None, dreams)

    def close(self) -> None:
        self._engine.close()

    def encode(self, text: str) -> list[int]:
        """Behind a line break, where SentencePiece would put a space before the first word, which an answer inside a
        conversation doesn't have."""
        ids = self._engine.tokenize(text, special=False)
        if self.vocabulary.decode(ids) != text.encode():
            lead = self._engine.tokenize("\n", special=False)
            behind = self._engine.tokenize(f"\n{text}", special=False)
            if behind[: len(lead)] == lead and self.vocabulary.decode(behind[len(lead) :]) == text.encode():
                ids = behind[len(lead) :]
        return ids

    def opened(self, question: Question) -> list[int]:
        text = self._engine.render(question.prompt, question.system, think=True)
        # Some templates write it themselves.
        text = text if text.rstrip().endswith(THINK) else f"{text}{THINK}\n"
        return self._engine.tokenize(text, begin=True)

    def context(self, question: Question, dream: Sequence[int]) -> list[int]:
        silent = self._engine.render(question.prompt, question.system)
        if not dream:
            return self._engine.tokenize(silent, begin=True)
        # From the end of a dream to the answer, as the template writes it around no dream.
        _, tag, after = silent.rpartition(END_THINK)
        return [*self.opened(question), *dream, *self._engine.tokenize("\n" + END_THINK + (after if tag else "\n"))]

    def write(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float, max_tokens: int, dream: bool
    ) -> list[list[int]]:
        written: list[list[int]] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            ids = self._engine.complete(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=engine_seed(seed),
                stop=[END_THINK] if dream else None,
            ).ids
            # A tag that is a control token isn't printed, so nothing stopped it.
            written.append(ids[: ids.index(self.end_think) + 1] if dream and self.end_think in ids else ids)
        return written

    def score_rows(
        self,
        contexts: Sequence[list[int]],
        answers: Sequence[list[int]],
        targets: Sequence[SoftTargets | None],
    ) -> list[AnswerScore]:
        return [self._score(*row) for row in zip(contexts, answers, targets, strict=True)]

    def _score(self, context: list[int], answer: list[int], target: SoftTargets | None) -> AnswerScore:
        score = AnswerScore.unknown(len(answer))
        if not answer:
            return score
        forced = self._engine.force(context, answer, min(RIVALS, len(self.vocabulary.bytes_of)))
        score.logprobs[:] = forced.logprobs
        if target is not None:
            hits = forced.top_ids[target.soft, :RIVALS] == target.top[target.soft, None]
            score.agrees[target.soft], score.agrees_5[target.soft] = hits[:, 0], hits.any(axis=1)
        return score


def _card(path: Path, name: str, context: int | None, dreams: bool) -> Card:
    sizes: dict[str, int] = {}
    for tensor in read_gguf(path).tensors:
        stored = GGMLQuantizationType(tensor.kind).name
        sizes[stored] = sizes.get(stored, 0) + prod(tensor.shape)
    most = max(sizes, key=lambda stored: sizes[stored], default="")
    return Card("gguf", name, sum(sizes.values()), path.stat().st_size, context, STORED.get(most, most), dreams)
