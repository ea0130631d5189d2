"""How fast a student writes and dreams, each beside the other way of doing it, in the same run.

Writing: transformers' own `generate` on the same weights, both greedy, both on a cache. Dreaming: the backbone that
decodes a dream of the same size token by token.

Shape legend: B rows, P prompt tokens, N new tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch, listed, rates, ratio
from distill.backbone.generate import generate
from distill.backbone.model import Backbone, config_for, count_parameters
from distill.backbone.session import Session
from distill.config import DreamingConfig, StudentSettings
from distill.dream.dreamers import draft
from distill.dream.engine import DreamEngine
from distill.dream.output_decoder import Sampling, Speaker
from distill.dream.pretrained import Parts
from distill.dream.starter import starter_codebook, starter_tokenizer
from distill.errors import BadInput
from distill.mining.triplets import LENSES
from distill.tokens.chat import Dream, prompt_ids, think_ids

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


def bench_dreams(watch: Stopwatch, parts: Parts | None = None, prompt: str = QUESTION) -> BenchResult:
    """Seconds from a prompt to the first token of its answer, with an engine's dream and with the backbone's own.

    Both dreams are full: every step of every lens. The engine drafts and judges its own, which the backbone then
    reads; the backbone decodes as many tokens one by one, tags and line breaks included, each of them chosen and
    then replaced, so that the count is the same for any weights.
    parts: a student with an engine; None: an untrained nano one. Raises BadInput where it has no engine, or where
    prompt and dream don't fit its context.
    """
    parts = parts or untrained()
    if parts.engine is None:
        raise BadInput("bench: this student has no dream engine; train one (`dream train --phase all`)")
    ids, thought = prompt_ids(parts.tokenizer, prompt, None, parts.system), think_ids(parts.tokenizer, _full(parts))
    if (length := len(ids) + len(thought) + 1) > (context := parts.model.config.context):
        raise BadInput(f"prompt: with a full dream it takes {length} tokens of a context of {context}; shorten it")
    engine, backbone = "first token, the engine's dream", "first token, the backbone's dream"
    jobs = {
        "first token, no dream": lambda: _to_first_token(parts, ids, []),
        engine: lambda: _to_first_token(parts, ids, [thought], drafting=True),
        backbone: lambda: _to_first_token(parts, ids, [[token] for token in thought]),
    }
    seconds = watch.seconds(jobs, "bench dreams")
    settings = {
        "parameters": count_parameters(parts.model),
        "engine_parameters": count_parameters(parts.engine),
        "paths": parts.config.num_dream_sequences,
        "steps": parts.config.dream_length,
        "prompt_tokens": len(ids),
        "dream_tokens": len(thought),
    }
    series = [*listed(seconds), ratio("backbone over engine", seconds[backbone], seconds[engine])]
    return watch.result("dreams", series, settings, device=str(parts.device))


def _to_first_token(parts: Parts, ids: list[int], read: list[list[int]], drafting: bool = False) -> int:
    """Read a prompt, dream of it if `drafting`, read on piece by piece; the token that comes then."""
    pieces = sum(map(len, read))
    speaker = Speaker(Session(parts.model, 1, len(ids) + pieces), Sampling(temperature=0.0))
    states = speaker.read(ids)
    if drafting:
        draft(parts, states, ())
    for piece in read:
        speaker.peek()
        speaker.read(piece, last=True)
    return speaker.peek()


def _full(parts: Parts) -> Dream:
    """A dream of all steps of all lenses, of codes that differ."""
    codes = cycle(range(len(parts.labels)))
    steps = range(parts.config.dream_length)
    return {lens: [(next(codes), next(codes), next(codes)) for _ in steps] for lens in LENSES}


def untrained(vocab_size: int = 8192, codes: int = 512) -> Parts:
    """A nano student and an engine with random weights, of the sizes that a run has by default. Most of its vocabulary
    is of no text."""
    labels, small = [f"phrase {code}" for code in range(codes)], starter_codebook()
    centroids = torch.randn(codes, 512, generator=torch.Generator().manual_seed(0))
    centroids = torch.nn.functional.normalize(centroids, dim=-1).numpy()
    codebook = replace(small, labels=labels, centroids=centroids, counts=small.counts[:1].repeat(codes))
    tokenizer, config = starter_tokenizer(labels), DreamingConfig()
    sizes = config_for(StudentSettings(), max(vocab_size, tokenizer.vocab_size), 0, 2)
    engine = DreamEngine.new(config, sizes.hidden, codebook, seed=0).eval()
    return Parts(Backbone(sizes).initialize(0).eval(), tokenizer, codebook, engine, config)
