"""How fast a student writes and dreams, each beside the other way of doing it, in the same run.

Writing: transformers' own `generate` on the same weights, both greedy, both on a cache. Dreaming: the backbone that
decodes its dream token by token.

Shape legend: B rows, P prompt tokens, N new tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch, listed, rates, ratio
from distill.backbone.generate import generate
from distill.backbone.model import Backbone, config_for, count_parameters
from distill.config import StudentSettings
from distill.dream.model import DreamingReasoningLLM
from distill.errors import BadInput

QUESTION = "What happens when you drop a ball?"


def bench_generate(
    watch: Stopwatch,
    model: Backbone | None = None,
    preset: str = "nano",
    tokens: int = 256,
    prompt_tokens: Sequence[int] = (64,),
    batches: Sequence[int] = (1, 32),
    vocab_size: int = 8192,
) -> BenchResult:
    """Ours and transformers' on the same float32 weights, for every batch size B and length P of a prompt.

    "first token": seconds to answers of one token. "writing": B · N tokens over the seconds of whole answers, prompts
    included, and the ratio of each round. about.identical_rows: rows whose tokens are the same in both.
    model: whose weights, `preset` is then what it is called; None: random ones of a preset. Raises BadInput for an
    unknown preset, and where prompt and answer don't fit the model's context.
    """
    longest = max(prompt_tokens) + tokens
    if model is None:
        sizes = config_for(StudentSettings(preset=preset, context=longest), vocab_size, 0, 2)
        model = Backbone(sizes).initialize(0)
    if longest > (room := model.config.context):
        raise BadInput(f"a prompt of {max(prompt_tokens)} and {tokens} new tokens don't fit a context of {room}")
    model, series, identical = model.eval(), list[Series](), dict[str, int]()
    writers = {"ours": partial(_ours, model), "transformers": _reference(model)}
    for length, batch in product(prompt_tokens, batches):
        label, setting = f"batch {batch}, prompt {length}", {"batch": batch, "prompt_tokens": length}
        seed = torch.Generator().manual_seed(batch)
        ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=seed)
        ours, theirs = (write(ids, tokens) for write in writers.values())
        identical[label] = sum(a == b for a, b in zip(ours, theirs, strict=True))
        jobs = {f"{name}, first token": partial(write, ids, 1) for name, write in writers.items()}
        jobs |= {f"{name}, writing": partial(write, ids, tokens) for name, write in writers.items()}
        seconds = watch.seconds(jobs, f"bench generate, {label}")
        found = rates(batch * tokens, seconds)
        for name in jobs:
            first = name.endswith("first token")
            unit, better, values = ("s", -1, seconds[name]) if first else ("tokens/s", 1, found[name])
            series.append(Series(f"{name}, {label}", unit, better, tuple(values), setting))
        both = found["ours, writing"], found["transformers, writing"]
        series.append(ratio(f"ours over transformers, {label}", *both, setting))
    sizes = {"parameters": count_parameters(model), "vocab_size": model.config.vocab_size}
    settings = {"student": preset, **sizes, "tokens": tokens}
    return watch.result("generate", series, settings, {"identical_rows": identical})


def _ours(model: Backbone, ids: Tensor, count: int) -> list[list[int]]:
    return generate(model, ids.tolist(), max_tokens=count, batch_rows=len(ids))


def _reference(model: Backbone) -> Callable[[Tensor, int], list[list[int]]]:
    """Greedy answers by transformers with the same weights: ids (B, P), N → new tokens of each row."""
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    reference: Any = loader.from_config(AutoConfig.for_model(**model.config.to_hf()), dtype=torch.float32).eval()
    reference.load_state_dict(model.state_dict())
    reference.generation_config.eos_token_id = None

    def write(ids: Tensor, count: int) -> list[list[int]]:
        mask = torch.ones_like(ids)
        written = reference.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return written[:, ids.shape[1] :].tolist()

    return write


def bench_dreams(watch: Stopwatch, model: DreamingReasoningLLM, prompts: Sequence[str] = (QUESTION,)) -> BenchResult:
    """Seconds from a prompt to the answer's first token, greedily, mean of the prompts: with no dream, an engine's, the
    backbone's own, and that drafted by the engine, each as long as its weights make it. Raises BadInput where it has no
    engine, or a prompt doesn't fit its context."""
    parts = model.parts
    if parts.engine is None:
        raise BadInput("bench: this student has no dream engine; train one (`dream train --phase all`)")
    names = {
        "no dream": "none",
        "the engine's dream": "engine",
        "the backbone's dream, drafted by the engine": "checked",
        "the backbone's dream": "backbone",
    }

    def first(dreamer: str) -> None:
        for prompt in prompts:
            next(model.generate(prompt, stream=True, max_length=1, temperature=0.0, dreamer=dreamer), None)

    jobs = {f"first token, {name}": partial(first, dreamer) for name, dreamer in names.items()}
    taken = watch.seconds(jobs, "bench dreams", str(parts.device))
    seconds = {name: [each / len(prompts) for each in rounds] for name, rounds in taken.items()}
    settings = {
        "prompts": len(prompts),
        "parameters": count_parameters(parts.model),
        "engine_parameters": count_parameters(parts.engine),
        "paths": parts.config.num_dream_sequences,
        "steps": parts.config.dream_length,
    }
    _, engine, drafted, backbone = seconds.values()
    ratios = [ratio("backbone over engine", backbone, engine), ratio("backbone over drafted", backbone, drafted)]
    series = [*listed(seconds), *ratios]
    return watch.result("dreams", series, settings, device=str(parts.device))
