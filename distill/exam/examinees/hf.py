"""Any causal language model in a transformers folder, as an examinee.

Nothing but the folder is read, no code of its own is run, and no pickle is ever loaded. Weights are read as float32.

Shape legend: B rows, V vocabulary.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.backbone.device import pick_device
from distill.backbone.from_transformers import load_model
from distill.backbone.generate import Sampler
from distill.backbone.model import count_parameters, pad_left
from distill.errors import BadInput
from distill.exam.examinees.common import TOGETHER, TokenExaminee, check_finite
from distill.exam.examinees.hf_words import HfWords
from distill.exam.examinees.protocol import AnswerScore, Card
from distill.exam.metrics.likelihood import SoftTargets
from distill.exam.questions import Question
from distill.exam.scoring import BATCH_TOKENS, score_rows
from distill.exam.targets import How, Target

LOGITS_OF_A_BATCH = 1 << 26
"""Elements: a model makes the logits of a whole batch at once (256 MiB of float32)."""

APART = "answers are tokenized apart from their prompts"
NO_TEMPLATE = "it has no chat template: prompted with the prompt and a line break"


class TransformersExaminee(TokenExaminee):
    """A causal language model and its tokenizer. Raises BadInput where the folder holds something else, or pickled
    weights, and CorruptFile where it can't be loaded whole.

    It dreams where its chat template has a think block and its vocabulary has both tags.
    """

    def __init__(self, target: Target, how: How) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        assert target.path is not None
        folder = target.path
        files = _safetensors(folder)
        remedy = "give a whole folder of a known architecture"
        found = load_model(AutoModelForCausalLM, folder, "a causal language model", remedy)
        self.model: Any = found.to(pick_device(how.device))
        check_finite(self.model, folder)
        config: Any = self.model.config.get_text_config()
        self._width, context = int(config.vocab_size), getattr(config, "max_position_embeddings", None)
        self.context_size = int(context) if context else None
        self.words = HfWords(folder, _ends(self.model))
        self.model.generation_config = GenerationConfig()  # its own would bring penalties and limits
        super().__init__(how, self.words.vocabulary)
        self.cannot["mined"] = "it has no image tokens to write a mined dream in"
        self.end_think = self.words.end_think
        if self.end_think is None:
            self.cannot["dreams"] = "its chat template has no think block"
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.card = Card(
            kind=target.kind,
            name=target.name,
            parameters=count_parameters(self.model),
            bytes=sum(file.stat().st_size for file in files),
            context=self.context_size,
            quantization=str(stored.get("dtype") or stored.get("torch_dtype") or "float32"),
            dreams=self.end_think is not None,
            note=APART if self.words.has_template else f"{APART}; {NO_TEMPLATE}",
        )

    def encode(self, text: str) -> list[int]:
        return self.words.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.words.decode(ids)

    def opened(self, question: Question) -> list[int]:
        return self.words.prompt(question, think=True)

    def context(self, question: Question, dream: Sequence[int]) -> list[int]:
        if not dream:
            return self.words.prompt(question, think=False)
        return [*self.opened(question), *dream, *self.words.closing]

    def score_rows(
        self,
        contexts: Sequence[list[int]],
        answers: Sequence[list[int]],
        targets: Sequence[SoftTargets | None],
    ) -> list[AnswerScore]:
        def logits(ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).logits[..., : self._width]

        size, most = (self._width, self.model.device), min(BATCH_TOKENS, LOGITS_OF_A_BATCH // self._width)
        found = dict(score_rows(logits, Tensor.float, size, contexts, answers, targets, most))
        return [found[i] for i in range(len(contexts))]

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float, max_tokens: int, dream: bool
    ) -> list[list[int]]:
        """By transformers' own loop; each row draws from its own seed."""
        longest = max(map(len, prompts), default=0)
        room = (self.context_size or 1 << 30) - longest
        if room <= 0:
            raise BadInput(f"prompt: {longest} tokens leave no room in a context of {self.context_size}")
        # Where padding can't be told from a prompt's beginning, or would take an answer's place, rows stay alone.
        takes = inspect.signature(self.model.forward).parameters
        size = TOGETHER if "position_ids" in takes and max_tokens <= room else 1
        written: list[list[int]] = []
        for part in (slice(start, start + size) for start in range(0, len(prompts), size)):
            room = (self.context_size or 1 << 30) - max(map(len, prompts[part]))
            written += self._write_together(prompts[part], seeds[part], temperature, min(max_tokens, room), dream)
        return written

    def _write_together(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float, max_tokens: int, dream: bool
    ) -> list[list[int]]:
        from transformers import GenerationConfig

        stops = [*self.words.ends, *([self.end_think] if dream and self.end_think is not None else [])]
        ids, real = (tensor.to(self.model.device) for tensor in pad_left(prompts, 0))
        out = self.model.generate(
            input_ids=ids,
            attention_mask=real.long(),
            generation_config=GenerationConfig(max_new_tokens=max_tokens, eos_token_id=stops, pad_token_id=stops[0]),
            logits_processor=[_drawn(Sampler(temperature, 0, 1.0), seeds, ids.shape[1], max_tokens, self._width)],
        )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        ends = [next((i + 1 for i, id in enumerate(row) if id in stops), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _drawn(sampler: Sampler, seeds: Sequence[int], start: int, steps: int, width: int) -> Any:
    """Leaves of the logits (B, V or more) the drawn token alone. start: tokens before the first that is written."""
    uniforms = sampler.uniforms(seeds, steps)

    def chosen_alone(ids: Tensor, logits: Tensor) -> Tensor:
        step = ids.shape[1] - start
        uniform = None if uniforms is None else uniforms[:, step : step + 1].to(logits.device)
        chosen = sampler.choose(logits[:, :width].float(), uniform)
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    return chosen_alone


def _safetensors(folder: Path) -> list[Path]:
    """Its weight files. Raises BadInput where there are none that are safe to read."""
    files = sorted(folder.glob("model*.safetensors"))
    if (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder}: is an adapter of another model; merge both and give the merged folder")
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        what = "pickled weights alone, which are never loaded" if pickled else "no weights"
        raise BadInput(f"{folder}: holds {what}; give a folder with model.safetensors")
    return files


def _ends(model: Any) -> list[int]:
    """The ids that its configurations say end an answer."""
    found: list[int] = []
    for config in (model.generation_config, model.config.get_text_config()):
        said = getattr(config, "eos_token_id", None)
        found += said if isinstance(said, list) else [] if said is None else [said]
    return found
