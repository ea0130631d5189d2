"""Any causal language model in a transformers folder, as an examinee.

Nothing but the folder is read, no code of its own is run, and no pickle is ever loaded. The teacher's answer is
tokenized by itself and put after the prompt, in the model's own tokens. Weights are read as float32.

Shape legend: B rows, T positions, V vocabulary.
"""

import inspect
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.backbone.device import pick_device
from distill.backbone.from_transformers import load_model
from distill.backbone.generate import Sampler, batches
from distill.backbone.model import count_parameters, pad_left
from distill.errors import BadInput
from distill.exam.examinees.common import check_finite
from distill.exam.examinees.hf_words import HfWords
from distill.exam.examinees.native import TOGETHER
from distill.exam.examinees.protocol import Ability, AnswerScore, Card, Dreamt, Spoken, Thinks
from distill.exam.metrics.likelihood import SoftTargets, soft_targets
from distill.exam.questions import Question
from distill.exam.scoring import BATCH_TOKENS, OwnDream, batched, score_logits, spoken_of
from distill.exam.targets import How, Target
from distill.mining.triplets import Triplet
from distill.tokens.packing import Aligner

LOGITS_OF_A_BATCH = 1 << 26
"""Elements: a model makes the logits of a whole batch at once (256 MiB of float32)."""

APART = "answers are tokenized apart from their prompts"
NO_TEMPLATE = "it has no chat template: prompted with the prompt and a line break"


class TransformersExaminee:
    """A causal language model and its tokenizer. Raises BadInput where the folder holds something else, or pickled
    weights, and CorruptFile where it can't be loaded whole.

    It dreams where its chat template has a think block and its vocabulary has both tags.
    """

    def __init__(self, target: Target, how: How) -> None:
        assert target.path is not None
        self.how, folder = how, target.path
        files = _safetensors(folder)
        self.model: Any = _load(folder).to(pick_device(how.device))
        check_finite(self.model, folder)
        config: Any = self.model.config.get_text_config()
        self.vocabulary, context = int(config.vocab_size), getattr(config, "max_position_embeddings", None)
        self.words = HfWords(folder, how.vocabulary, _ends(self.model))
        self.letters = self.words.letters()
        self.aligner = Aligner(self.words, None)
        self.takes = inspect.signature(self.model.forward).parameters
        thinks = self.words.think_ids is not None
        self.cannot: dict[Ability, str] = {"mined": "it has no image tokens to write a mined dream in"}
        if not thinks:
            self.cannot["dreams"] = "its chat template has no think block"
        if self.words.why_no_map:
            self.cannot["targets"] = self.words.why_no_map
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.card = Card(
            kind=target.kind,
            name=target.name,
            parameters=count_parameters(self.model),
            bytes=sum(file.stat().st_size for file in files),
            context=int(context) if context else None,
            quantization=str(stored.get("dtype") or stored.get("torch_dtype") or "float32"),
            dreams=thinks,
            note=APART if self.words.has_template else f"{APART}; {NO_TEMPLATE}",
        )

    # What is known of a question.

    def fits(self, question: Question, dream_tokens: int) -> bool:
        if self.card.context is None:
            return True
        header, around = self.words.prompt(question, self.card.dreams), len(self.words.closing([0]))
        answer = max(1, len(self.words.encode(question.text)))
        return len(header) + dream_tokens + around + answer <= self.card.context

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        return None

    def _aligned(self, question: Question) -> tuple[list[int], SoftTargets | None]:
        """The answer as its own tokenizer cuts it, with soft targets where the teacher cut it just so."""
        answer, tokens, teacher_map = self.words.encode(question.text), question.tokens, self.words.teacher_map
        if tokens is None or teacher_map is None or not answer:
            return answer, None
        spoken = tokens.ids[: len(tokens) - (question.done_reason == "stop")]
        if teacher_map[spoken].tolist() != answer or (teacher_map[tokens.ids] < 0).any():
            return answer, None
        aligned = self.aligner.align(question.text, tokens, question.done_reason)
        return answer, soft_targets(aligned, tokens, teacher_map, len(answer))

    # The exam.

    def score(self, questions: Sequence[Question], dream: Dreamt, draw: int = 0) -> list[AnswerScore]:
        if dream == "own":
            contexts = self._after_dreams(questions, self._dreamed(questions, 1.0, draw))
        else:
            contexts = [self.words.prompt(question, think=False) for question in questions]
        aligned = [self._aligned(question) for question in questions]
        rows = [[*context, *answer] for context, (answer, _) in zip(contexts, aligned, strict=True)]
        found: dict[int, AnswerScore] = {}
        most = min(BATCH_TOKENS, LOGITS_OF_A_BATCH // self.vocabulary)
        for batch in batches({i: len(row) for i, row in enumerate(rows)}, most):
            starts = [len(contexts[i]) - 1 for i in batch]
            answers = [aligned[i][0] for i in batch]
            logits, first = self._predict([rows[i][:-1] for i in batch], min(starts))
            # Where each answer's tokens are predicted: row and column.
            places = torch.tensor(
                [
                    (row, start - first + t)
                    for row, (start, answer) in enumerate(zip(starts, answers, strict=True))
                    for t in range(len(answer))
                ],
                dtype=torch.long,
                device=logits.device,
            ).view(-1, 2)

            def block(part: slice, logits: Tensor = logits, places: Tensor = places) -> Tensor:
                return logits[places[part, 0], places[part, 1], : self.vocabulary].float()

            scores = score_logits(block, self.vocabulary, answers, [aligned[i][1] for i in batch])
            found |= dict(zip(batch, scores, strict=True))
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _predict(self, rows: Sequence[Sequence[int]], start: int) -> tuple[Tensor, int]:
        """Logits (B, T − first, V) of rows, and `first`, the position of the first: `start`, or 0 where the model
        only gives all."""
        longest = max(map(len, rows))
        # Padded on the right: a causal model never sees it.
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        real = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], real[i, : len(row)] = torch.tensor(row, dtype=torch.long), 1
        some: dict[str, Any] = {"logits_to_keep": longest - start} if "logits_to_keep" in self.takes else {}
        device = self.model.device
        out = self.model(input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False, **some)
        return out.logits, longest - out.logits.shape[1]

    def answer(
        self, questions: Sequence[Question], *, think: Thinks, temperature: float, max_tokens: int, draw: int
    ) -> list[Spoken]:
        """The dream is drawn as `draw`, the answer as `draw` + 1: it must not read on in its dream's numbers."""
        spoken: list[Spoken] = []
        for group in batched(questions, TOGETHER):
            started = time.perf_counter()
            dreams = [OwnDream([], True)] * len(group)
            if think and self.card.dreams:
                dreams = self._dreamed(group, temperature, draw)
                contexts = self._after_dreams(group, dreams)
            else:
                contexts = [self.words.prompt(question, think=False) for question in group]
            written = self._write(contexts, self._seeds(group, draw + 1), temperature, max_tokens, self.words.ends)
            share = (time.perf_counter() - started) / len(group)
            spoken += [self._spoken(dream, ids, share) for dream, ids in zip(dreams, written, strict=True)]
        return spoken

    def _spoken(self, dream: OwnDream, answer: list[int], seconds: float) -> Spoken:
        ended = bool(answer) and answer[-1] in self.words.ends
        answer = answer[:-1] if ended else answer
        thought, said = self.words.decode(dream.ids, False), self.words.decode(answer)
        return spoken_of(dream, answer, thought, said, self.letters, ended=ended, steps=self.how.steps, seconds=seconds)

    def _seeds(self, questions: Sequence[Question], draw: int) -> list[int]:
        return [question.seed(self.how.seed, draw) for question in questions]

    def _after_dreams(self, questions: Sequence[Question], dreams: Sequence[OwnDream]) -> list[list[int]]:
        return [
            [*self.words.prompt(question, think=True), *dream.ids, *self.words.closing(dream.ids)]
            for question, dream in zip(questions, dreams, strict=True)
        ]

    def _dreamed(self, questions: Sequence[Question], temperature: float, draw: int) -> list[OwnDream]:
        """What stands between its tags; what doesn't close within `dream_tokens` is closed."""
        assert self.words.think_ids is not None
        end = self.words.think_ids[1]
        stops = [end, *self.words.ends]
        headers = [self.words.prompt(question, think=True) for question in questions]
        dreams: list[OwnDream] = []
        for written in self._write(headers, self._seeds(questions, draw), temperature, self.how.dream_tokens, stops):
            closed = bool(written) and written[-1] == end
            ids = written[:-1] if written and written[-1] in stops else written
            ids = ids[:-1] if ids and self.words.decode(ids[-1:]) == "\n" else ids
            dreams.append(OwnDream(ids, closed, written))
        return dreams

    @torch.inference_mode()
    def _write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        temperature: float,
        max_tokens: int,
        stops: Sequence[int],
    ) -> list[list[int]]:
        """What it goes on with, up to a stop id and with it. Each row draws from its own seed."""
        # Where padding can't be told from a prompt's beginning, rows stay alone.
        size = TOGETHER if "position_ids" in self.takes else 1
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        written: list[list[int]] = [[] for _ in prompts]
        sampler = Sampler(temperature, 0, 1.0)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            together = [prompts[row] for row in rows]
            found = self._write_batch(together, [seeds[row] for row in rows], sampler, max_tokens, set(stops))
            for row, ids in zip(rows, found, strict=True):
                written[row] = ids
        return written

    def _write_batch(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        stops: set[int],
    ) -> list[list[int]]:
        context = self.card.context or 1 << 30
        rooms = [min(max_tokens, context - len(prompt)) for prompt in prompts]
        if min(rooms) <= 0 < max_tokens:
            raise BadInput(f"prompt: {max(map(len, prompts))} tokens leave no room in a context of {context}")
        written: list[list[int]] = [[] for _ in prompts]
        going, device = set(range(len(prompts))), self.model.device
        uniforms = sampler.uniforms(seeds, max(rooms))
        ids, real = (tensor.to(device) for tensor in pad_left(prompts, 0))
        new, real, cache = ids, real.long(), None
        for step in range(max(rooms)):
            places = (real.cumsum(1) - 1).clamp(0, context - 1)
            some: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
            if "position_ids" in self.takes:
                some["position_ids"] = places[:, -new.shape[1] :]
            if cache is not None:
                some["past_key_values"] = cache
            out = self.model(input_ids=new, attention_mask=real, use_cache=True, **some)
            uniform = None if uniforms is None else uniforms[:, step : step + 1].to(device)
            chosen = sampler.choose(out.logits[:, -1, : self.vocabulary].float(), uniform)
            for row in sorted(going):
                token = int(chosen[row])
                written[row].append(token)
                if token in stops or step + 1 >= rooms[row]:
                    going.remove(row)
            if not going:
                break
            cache = getattr(out, "past_key_values", None)
            ids = torch.cat((ids, chosen[:, None]), dim=1)
            real = torch.cat((real, real.new_ones(len(prompts), 1)), dim=1)
            # Without a cache of keys and values, all is read again.
            new = ids if cache is None else chosen[:, None]
        return written

    def close(self) -> None:
        """Nothing runs beside it: its memory goes with it."""


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


def _load(folder: Path) -> Any:
    """The model, in float32. Raises CorruptFile."""
    from transformers import AutoModelForCausalLM

    remedy = "give a whole folder of a known architecture"
    return load_model(AutoModelForCausalLM, folder, "a causal language model", remedy)


def _ends(model: Any) -> list[int]:
    """The ids that its configurations say end an answer."""
    found: list[int] = []
    for config in (model.generation_config, model.config.get_text_config()):
        said = getattr(config, "eos_token_id", None)
        found += said if isinstance(said, list) else [] if said is None else [said]
    return found
