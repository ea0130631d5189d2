"""How fast a training step is, beside transformers' own on the same model and shape, in the same run.

Theirs: `LlamaForCausalLM` in float32, hard labels, AdamW, once on full rows of random tokens, which wastes nothing and
which no corpus of short answers is; and once on the documents that ours reads, a row each, padded to the longest, as
its usual collator does: there only their tokens count. Ours: packed documents with 20 alternatives an answer token,
the distillation loss, AdamW, in the precision that a trial chooses. All clip gradients. The precision is chosen before
the rounds, which warms ours up too. Ours looks at each step's loss, and makes the next batch meanwhile, as training
does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.flops import model_flops, peak
from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch, listed, rates, ratio
from distill.backbone import flex
from distill.backbone.device import pick_device
from distill.backbone.model import Backbone, config_for, count_parameters
from distill.config import StudentSettings, TrainSettings
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training import numerics
from distill.training.ahead import Ahead
from distill.training.batches import Batch, Batches, Row
from distill.training.mixture import Mixture
from distill.training.step import forward_backward, make_optimizer, move

DOCUMENTS = 512
ALTERNATIVES = 20
MIB = 2**20
IGNORED = -100
"""The label that transformers' loss passes over."""


def bench_train(
    watch: Stopwatch,
    preset: str = "nano",
    vocab_size: int = 8192,
    rows: int = 8,
    context: int = 512,
    settings: TrainSettings | None = None,
    sizes: Mapping[str, int] | None = None,
    alone: bool = False,
) -> BenchResult:
    """Tokens a second of both steps, and the ratio of each round (ours / theirs); of ours, how much of the device's
    arithmetic it uses, and on a GPU the most memory that it held.

    sizes: `hidden`, `layers` and so on where they are not the preset's. alone: without transformers' steps. Raises
    BadInput for an unknown preset.
    """
    settings = settings or TrainSettings()
    device = pick_device(settings.device, "train.device")
    sizes = {name: size for name, size in (sizes or {}).items() if size}
    config = config_for(StudentSettings(preset=preset, context=context, **sizes), vocab_size, 0, 2)  # pyright: ignore[reportArgumentType]
    ours = Backbone(config).initialize(0).to(device).train()
    ours.recompute = settings.recompute
    batches = Batches(
        synthetic_documents(vocab_size), FixedTokens(vocab_size), context, Mixture(True, 0.25, 0.0), 0, 0.8
    )
    planned = batches.epoch(0)
    optimizer = make_optimizer(ours, settings.lr, (0.9, 0.95), settings.weight_decay)
    place = 0

    def rows_from(start: int, count: int) -> list[Row]:
        return [planned[(start + i) % len(planned)] for i in range(count)]

    def made(chosen: list[Row], unread: float) -> list[Batch]:
        size = settings.micro_rows or len(chosen)
        parts = (batches.assemble(chosen[i : i + size], unread) for i in range(0, len(chosen), size))
        return [move(part, device) for part in parts]

    ahead = Ahead(made, device)

    def backward(candidate: numerics.Numerics, kernel: Any, count: int) -> list[Tensor]:
        nonlocal place
        parts = ahead.take(rows_from(place, count))
        place += count
        for batch in parts:
            batch.targets.scale(1 / len(parts))
        return [forward_backward(ours, batch, candidate.precision, kernel)["loss"] for batch in parts]

    def step(candidate: numerics.Numerics, kernel: Any) -> None:
        losses = backward(candidate, kernel, rows)
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        ahead.prepare(rows_from(place, rows))
        float(torch.stack(losses).sum())
        optimizer.step()
        optimizer.zero_grad()

    def attempt(candidate: numerics.Numerics, kernel: Any, count: int) -> None:
        backward(candidate, kernel, count)

    trial = numerics.Trial(ours, attempt, rows, 1, lambda _: math.inf, lambda seconds: seconds, watch.listen)
    chosen = numerics.choose(settings, trial)
    optimizer.zero_grad()
    kernel = numerics.apply(chosen, ours)
    memory: list[Series] = []
    if device.type == "cuda":  # while nobody else is there, and after what compiling took
        step(chosen, kernel)
        torch.cuda.reset_peak_memory_stats(device)
        step(chosen, kernel)
        memory = [Series("ours, peak memory", "MiB", -1, (torch.cuda.max_memory_allocated(device) / MIB,))]
    steps: dict[str, Callable[[], None]] = {}
    padded, labels = a_document_a_row(batches, rows * context)
    if not alone:
        full = torch.randint(0, vocab_size, (rows, context))
        steps["transformers"] = reference_step(config.to_hf(), full, full, device)
        steps["transformers, padded"] = reference_step(config.to_hf(), padded, labels, device)
    theirs = list(steps)
    steps["ours"] = lambda: step(chosen, kernel)
    seconds = watch.seconds(steps, "bench train", str(device))
    read = {name: int((labels != IGNORED).sum()) if "padded" in name else rows * context for name in steps}
    found = {name: rates(read[name], {name: taken})[name] for name, taken in seconds.items()}
    flops = model_flops(ours, [batches.assemble(planned)]) / len(planned) * rows
    most, told = peak(device, chosen.precision)
    used = tuple(100 * flops / (each * most) for each in seconds["ours"])
    return watch.result(
        "train",
        [
            *listed(found, "tokens/s", 1),
            Series("ours, model FLOPs utilization", "% of peak", 1, used),
            *memory,
            *(ratio(f"ours over {name}", found["ours"], found[name]) for name in theirs),
        ],
        {"preset": preset, **sizes, "vocab_size": vocab_size, "rows": rows, "context": context},
        {
            "parameters": count_parameters(ours),
            "numerics": chosen.label,
            "trial": chosen.trial,
            "why": chosen.why,
            "GFLOP a step": round(flops / 1e9, 3),
            "peak, TFLOP/s": float(f"{most / 1e12:.3g}"),
            "peak from": told,
            "attention": flex.told(device),
        },
        str(device),
    )


def a_document_a_row(batches: Batches, tokens: int) -> tuple[Tensor, Tensor]:
    """(N, T) ids and labels of N documents of about so many tokens in all, each filled up to the longest."""
    pieces = [piece for row in batches.epoch(0) for piece in row if not piece.again]
    lengths = [piece.length for piece in pieces]
    count = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    ids = torch.full((count, max(lengths[:count])), batches.tokenizer.pad_id)
    labels = torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths[:count]):
        ids[row, :length] = labels[row, :length] = torch.randint(batches.tokenizer.vocab_size, (length,))
    return ids, labels


def reference_step(config: dict[str, Any], ids: Tensor, labels: Tensor, device: torch.device) -> Callable[[], None]:
    """transformers' own float32 training step on these (N, T) ids; what has the label `IGNORED` is padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    model: Any = LlamaForCausalLM(LlamaConfig(**known)).to(device).train()  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids, labels = ids.to(device), labels.to(device)
    padding = {"attention_mask": (labels != IGNORED).long()} if (labels == IGNORED).any() else {}

    def step() -> None:
        model(input_ids=ids, labels=labels, **padding).loss.backward()
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
    """Documents of random tokens as long as the demo's: prompts of 28 to 36, dreams of 4 to 24, answers of 5 to 112
    tokens, most of about 56, with 20 alternatives each."""
    random = np.random.default_rng(seed)
    answers = random.normal(56, 26, DOCUMENTS).round().clip(5, 112)
    sizes = {
        "prompt": random.integers(28, 37, DOCUMENTS),
        "dream": random.integers(4, 25, DOCUMENTS),
        "answer": answers,
    }
    ends = {name: np.cumsum(lengths).astype(np.int64) for name, lengths in sizes.items()}
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
