"""How fast a training step is, beside transformers' own on the same model and shape, in the same run.

Theirs: `LlamaForCausalLM` in float32, hard labels, one full row a document, AdamW. Ours: packed documents with
20 alternatives an answer token, the distillation loss, AdamW, in the precision that a trial chooses. Both clip
gradients. The precision is chosen before the rounds, which warms ours up too.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from bench.result import BenchResult
from bench.stopwatch import Stopwatch, listed, rates, ratio
from distill.backbone.model import Backbone, config_for, count_parameters
from distill.config import StudentSettings, TrainSettings
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training import numerics
from distill.training.batches import Batches, Mixture
from distill.training.step import forward_backward, make_optimizer, move, pick_device

DOCUMENTS = 512
ALTERNATIVES = 20


def bench_train(
    watch: Stopwatch,
    preset: str = "nano",
    vocab_size: int = 8192,
    rows: int = 8,
    context: int = 512,
    settings: TrainSettings | None = None,
    sizes: Mapping[str, int] | None = None,
) -> BenchResult:
    """Tokens a second of both steps, and the ratio of each round (ours / theirs).

    sizes: `hidden`, `layers` and so on where they are not the preset's. Raises BadInput for an unknown preset.
    """
    settings = settings or TrainSettings()
    device = pick_device(settings.device)
    sizes = {name: size for name, size in (sizes or {}).items() if size}
    config = config_for(StudentSettings(preset=preset, context=context, **sizes), vocab_size, 0, 2)  # pyright: ignore[reportArgumentType]
    ours = Backbone(config).initialize(0).to(device).train()
    batches = Batches(
        synthetic_documents(vocab_size), FixedTokens(vocab_size), context, Mixture(True, 0.25, 0.0), 0, 0.8
    )
    planned = batches.epoch(0)
    optimizer = make_optimizer(ours, settings.lr, (0.9, 0.95), settings.weight_decay)
    place = 0

    def backward(candidate: numerics.Numerics, kernel: Any, count: int) -> None:
        nonlocal place
        chosen = [planned[(place + i) % len(planned)] for i in range(count)]
        place += count
        forward_backward(ours, move(batches.assemble(chosen), device), candidate.precision, kernel)

    def step(candidate: numerics.Numerics, kernel: Any) -> None:
        backward(candidate, kernel, rows)
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    trial = numerics.Trial(ours, backward, rows, 1, lambda _: math.inf, lambda seconds: seconds, watch.listen)
    chosen = numerics.choose(settings, trial)
    optimizer.zero_grad()
    kernel = numerics.apply(chosen, ours)
    steps = {
        "transformers": reference_step(config.to_hf(), rows, context, device),
        "ours": lambda: step(chosen, kernel),
    }
    found = rates(rows * context, watch.seconds(steps, "bench train", str(device)))
    return watch.result(
        "train",
        [*listed(found, "tokens/s", 1), ratio("ours over transformers", found["ours"], found["transformers"])],
        {"preset": preset, **sizes, "vocab_size": vocab_size, "rows": rows, "context": context},
        {"parameters": count_parameters(ours), "numerics": chosen.label, "trial": chosen.trial, "why": chosen.why},
        str(device),
    )


def reference_step(config: dict[str, Any], rows: int, context: int, device: torch.device) -> Callable[[], None]:
    """transformers' own float32 training step on random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    model: Any = LlamaForCausalLM(LlamaConfig(**known)).to(device).train()  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, config["vocab_size"], (rows, context), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class FixedTokens(StudentTokenizer):
    """The few ids of a tokenizer that packing asks for."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = self.base_size = vocab_size
        self.think_id, self.end_think_id, self.eos_id, self.pad_id = 4, 5, 2, 0

    @property
    def newline_id(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 3


def synthetic_documents(vocab_size: int, seed: int = 0) -> Documents:
    """Documents of random tokens in the shapes of a real run: prompts of about 20, dreams of 10 to 64, answers of
    48 to 96 tokens with 20 alternatives each."""
    random = np.random.default_rng(seed)
    sizes = {"prompt": (16, 25), "dream": (10, 65), "answer": (48, 97)}
    ends = {name: np.cumsum(random.integers(*bounds, DOCUMENTS)).astype(np.int64) for name, bounds in sizes.items()}
    ids = {name: random.integers(6, vocab_size, end[-1]).astype(np.uint16) for name, end in ends.items()}
    count = len(ids["answer"])
    steps = np.cumsum(random.integers(1, vocab_size // ALTERNATIVES, (count, ALTERNATIVES)), axis=1)
    slots = (ids["answer"][:, None].astype(np.int64) + steps) % vocab_size
    logits = np.sort(random.normal(0, 2, (count, ALTERNATIVES + 2)), axis=1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return Documents(
        prompt_ids=ids["prompt"],
        prompt_ends=ends["prompt"],
        dream_ids=ids["dream"],
        dream_ends=ends["dream"],
        answer_ids=ids["answer"],
        answer_ends=ends["answer"],
        slot_ids=slots.astype(np.uint16),
        slot_logprobs=logprobs[:, : ALTERNATIVES + 1].astype(np.float16),
        chunk_ids=np.full(count, -1, np.int32),
        chunk_logprobs=np.zeros(0, np.float32),
        answer_bytes=np.diff(ends["answer"], prepend=0) * 4,
    )
