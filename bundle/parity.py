"""Does a GGUF in llama.cpp compute what the native student computes?

Shape legend: V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from distill.backbone.gguf_names import tensor_name, to_gguf
from distill.backbone.model import Backbone, BackboneConfig
from distill.errors import CorruptFile
from distill.exam.scoring import score_answers
from distill.teacher.gguf_file import dequantized, whole_gguf
from distill.teacher.llama_cpp import LlamaCpp
from distill.tokens.bpe import StudentTokenizer
from distill.turns import messages

NEAR_TIE = 1e-4
"""Two logits closer than this may change places by rounding alone."""

PROBED = (0, 7, 23)
"""Tokens of an answer before which whole distributions are compared."""


@dataclass(frozen=True)
class Agreement:
    """Greedy answers of two engines. `different` are (prompt, first differing token, native top-2 gap there)."""

    prompts: int
    different: list[tuple[int, int, float]]

    @property
    def identical(self) -> int:
        return self.prompts - len(self.different)

    @property
    def near_ties(self) -> int:
        """How many of the different ones part at a near tie."""
        return sum(gap < NEAR_TIE for _, _, gap in self.different)

    def __str__(self) -> str:
        text = f"{self.identical} of {self.prompts} prompts identical"
        return f"{text}, {self.near_ties} part at a near tie" if self.near_ties else text


def engine_answers(engine: LlamaCpp, prompts: Iterable[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy answers of llama.cpp."""
    return [engine.complete(prompt, max_tokens=max_tokens).ids for prompt in prompts]


def compare_answers(
    model: Backbone, prompts: Sequence[list[int]], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> Agreement:
    """Where they differ, how sure was the native student of its token?"""
    different: list[tuple[int, int, float]] = []
    for i, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if mine != other:
            pairs = enumerate(zip(mine, other, strict=False))
            at = next((j for j, (a, b) in pairs if a != b), min(len(mine), len(other)))
            best = log_probabilities(model, [*prompt, *mine[:at]]).topk(2).values
            different.append((i, at, float(best[0] - best[1])))
    return Agreement(len(prompts), different)


@torch.inference_mode()
def log_probabilities(model: Backbone, ids: list[int]) -> Tensor:
    """(V,) float64: natural log-probabilities of the token after `ids`."""
    hidden = model.hidden(torch.tensor([ids], device=model.cos.device))
    return model.lm_head(hidden[0, -1]).double().log_softmax(-1)


def largest_difference(
    model: Backbone, engine: LlamaCpp, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> tuple[float, int]:
    """(max |Δ log-probability| over whole vocabularies, positions compared), before PROBED tokens of each answer."""
    worst, positions = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        for place in (place for place in PROBED if place < len(answer)):
            ids = [*prompt, *answer[:place]]
            theirs = engine_distribution(engine, ids, model.config.vocab_size)
            if theirs is not None:
                ours = log_probabilities(model, ids).cpu().numpy()
                worst, positions = max(worst, float(np.abs(ours - theirs).max())), positions + 1
    return worst, positions


def engine_distribution(engine: LlamaCpp, ids: list[int], vocabulary: int) -> NDArray[np.float64] | None:
    """(V,) log-probabilities by llama.cpp; None where it holds them back, the next token being half a character."""
    entries = engine.complete(ids, max_tokens=1, n_probs=vocabulary).entries
    if not entries:
        return None
    found = np.full(vocabulary, np.nan)
    for alternative in entries[0]["top_logprobs"]:
        found[alternative["id"]] = alternative["logprob"]
    return None if np.isnan(found).any() else found


def native_nats(model: Backbone, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """−Σ ln p of given answers after their contexts, by the native student."""
    scores = score_answers(model, contexts, answers, [None] * len(answers))
    return -sum(float(score.logprobs.sum()) for _, score in scores)


def engine_nats(engine: LlamaCpp, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """The same by llama.cpp."""
    pairs = zip(contexts, answers, strict=True)
    return -sum(float(engine.force(context, answer).logprobs.sum()) for context, answer in pairs)


TOLERANCE = {
    "F32": 0.0,
    "F16": 1e-3,
    "BF16": 4e-3,
    "Q8_0": 2e-2,
    "Q5_1": 6.5e-2,
    "Q5_0": 8e-2,
    "Q4_1": 0.13,
    "Q4_0": 0.15,
}
"""Relative error ‖stored − weight‖ / ‖weight‖ of a matrix that each storage type may have. Of the block formats: a
little above that of Student's t with 2 or 3 degrees of freedom, whose tails are heavier than SmolLM2's (0.104 in Q4_0,
0.085 in Q4_1, 0.052 in Q5_0, 0.053 in Q5_1 at most)."""


def weight_errors(path: Path, weights: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, tuple[str, float]]:
    """Per tensor of the student, how a GGUF stores it and its relative error. Raises CorruptFile where one lacks."""
    stored = {tensor.name: tensor for tensor in whole_gguf(path).tensors}
    errors: dict[str, tuple[str, float]] = {}
    for name, weight in weights.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        tensor = stored.get(tensor_name(name))
        if tensor is None:
            raise CorruptFile(f"{path}: has no {tensor_name(name)}; export the run again")
        wanted = to_gguf(name, weight.detach().float().cpu().numpy(), config)
        values = dequantized(path, tensor)
        if values.shape != wanted.shape:
            raise CorruptFile(f"{path}: {tensor_name(name)} has shape {values.shape}, not {wanted.shape}")
        distance = float(np.linalg.norm(values - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
        errors[name] = (GGMLQuantizationType(tensor.kind).name, distance)
    return errors


Conversation = tuple[str, str, bool]
"""System message ("" for none), question, whether it dreams."""


def transformers_prompt_ids(folder: Path, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Ids by transformers' tokenizer and chat template; none where it doesn't read them back as they were written."""
    from transformers import AutoTokenizer

    tokenizer: Any = cast("Any", AutoTokenizer).from_pretrained(folder, local_files_only=True)
    how = {"tokenize": False, "add_generation_prompt": True}
    found: list[list[int]] = []
    for system, question, think in conversations:
        text = tokenizer.apply_chat_template(messages(question, system), enable_thinking=think, **how)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append(ids if tokenizer.decode(ids).replace("▁", " ") == text.replace("▁", " ") else [])
    return found


def engine_prompt_ids(engine: LlamaCpp, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Ids by llama.cpp's tokenizer and its reading of the chat template."""
    return [
        engine.tokenize(engine.apply_template(messages(question, system), enable_thinking=think))
        for system, question, think in conversations
    ]


def printable(tokenizer: StudentTokenizer, ids: Sequence[int]) -> str:
    """An answer as a server shows it: no control tokens, no half characters, no tags, no outer white space."""
    return plain(tokenizer.decode(ids, skip_special=True))


def plain(text: str) -> str:
    """Text without think tags, replacement characters and runs of white space."""
    for tag in ("<think>", "</think>", "\ufffd"):
        text = text.replace(tag, " ")
    return " ".join(text.split())
