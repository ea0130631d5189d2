"""How fast a student writes and dreams, each beside the other way of doing it, in the same run.

Writing: transformers' own `generate` on the same weights, both greedy, both on a cache. Dreaming: the backbone that
decodes a dream of the same size token by token. Rounds alternate who goes first, so that a machine that changes
its speed changes both; the first round warms up and isn't counted.

Shape legend: B rows, P prompt tokens, N new tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from distill.config import DreamingConfig, StudentSettings
from distill.corpus.triplets import LENSES
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.student.dream_engine import DreamEngine
from distill.student.dreamers import draft
from distill.student.generate import generate
from distill.student.model import Backbone, config_for, count_parameters
from distill.student.output_decoder import Sampling, Speaker
from distill.student.pretrained import Parts
from distill.student.session import Session
from distill.student.starter import starter_codebook, starter_tokenizer
from distill.tokens.chat import Dream, prompt_ids, think_ids

CODES = 512
"""Image tokens of the untrained student: as many as settings ask for by default."""

QUESTION = "What happens when you drop a ball?"


def bench_generate(
    preset: str = "nano",
    tokens: int = 256,
    prompt_tokens: int = 64,
    batches: Sequence[int] = (1, 32),
    rounds: int = 7,
    vocab_size: int = 8192,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Ours and transformers' on random float32 weights: per batch size, over rounds, median, min and max.

    first_token_seconds: to answers of one token. tokens_per_second: B · N over the seconds of whole answers, prompts
    included. ratio: ours over theirs of one round. identical: rows whose tokens are the same in both.
    Raises BadInput for an unknown preset.
    """
    context = prompt_tokens + tokens
    model = Backbone(config_for(StudentSettings(preset=preset, context=context), vocab_size, 0, 2)).initialize(0).eval()
    theirs = _reference(model)
    found: dict[str, Any] = {}
    for batch in batches:
        ids = torch.randint(0, vocab_size, (batch, prompt_tokens), generator=torch.Generator().manual_seed(batch))
        prompts: list[list[int]] = ids.tolist()

        def ours(count: int, prompts: list[list[int]] = prompts) -> list[list[int]]:
            return generate(model, prompts, max_tokens=count, batch_rows=len(prompts))

        def reference(count: int, ids: Tensor = ids) -> list[list[int]]:
            return theirs(ids, count)

        writers = {"ours": ours, "transformers": reference}
        answers = {name: writer(tokens) for name, writer in writers.items()}
        jobs = {f"{name}, first token": partial(writer, 1) for name, writer in writers.items()}
        jobs |= {name: partial(writer, tokens) for name, writer in writers.items()}
        seconds = _alternate(jobs, rounds, f"bench generate, {batch} rows", listen)
        speeds = {name: [batch * tokens / t for t in seconds[name]] for name in writers}
        found[str(batch)] = {
            "first_token_seconds": {name: spread(seconds[f"{name}, first token"], 6) for name in writers},
            "tokens_per_second": {name: spread(speeds[name], 1) for name in writers},
            "ratio": spread([a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)], 3),
            "identical": sum(a == b for a, b in zip(answers["ours"], answers["transformers"], strict=True)),
        }
    return {
        "preset": preset,
        "parameters": count_parameters(model),
        "vocab_size": vocab_size,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "batches": found,
    }


def _reference(model: Backbone) -> Callable[[Tensor, int], list[list[int]]]:
    """Greedy answers by transformers with the same weights: ids (B, P), N → new tokens of each row."""
    from transformers import LlamaConfig, LlamaForCausalLM

    said = model.config.to_hf()
    known = {key: value for key, value in said.items() if key not in ("architectures", "model_type", "torch_dtype")}
    reference: Any = LlamaForCausalLM(LlamaConfig(**known)).eval()  # pyright: ignore[reportArgumentType]
    reference.load_state_dict(model.state_dict())
    reference.generation_config.eos_token_id = None

    def write(ids: Tensor, count: int) -> list[list[int]]:
        mask = torch.ones_like(ids)
        written = reference.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return written[:, ids.shape[1] :].tolist()

    return write


def bench_dreams(
    parts: Parts | None = None, prompt: str = QUESTION, rounds: int = 11, listen: Listener = silent
) -> dict[str, Any]:
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
    jobs = {
        "prompt": lambda: _to_first_token(parts, ids, []),
        "engine": lambda: _to_first_token(parts, ids, [thought], drafting=True),
        "backbone": lambda: _to_first_token(parts, ids, [[token] for token in thought]),
    }
    seconds = _alternate(jobs, rounds, "bench dreams", listen)
    return {
        "parameters": count_parameters(parts.model),
        "engine_parameters": count_parameters(parts.engine),
        "paths": parts.config.num_dream_sequences,
        "steps": parts.config.dream_length,
        "prompt_tokens": len(ids),
        "dream_tokens": len(thought),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "device": str(parts.device),
        "seconds": {name: spread(values, 6) for name, values in seconds.items()},
        "ratio": spread([b / a for a, b in zip(seconds["engine"], seconds["backbone"], strict=True)], 3),
    }


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


def untrained(preset: str = "nano", vocab_size: int = 8192, codes: int = CODES) -> Parts:
    """A student and an engine with random weights, of the sizes that a run has by default.

    Most of its vocabulary is of no text: what it says would mean nothing anyway.
    """
    labels = [f"phrase {code}" for code in range(codes)]
    small = starter_codebook()
    centroids = torch.nn.functional.normalize(
        torch.randn(codes, 512, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    codebook = replace(small, labels=labels, centroids=centroids.numpy(), counts=small.counts[:1].repeat(codes))
    tokenizer, config = starter_tokenizer(labels), DreamingConfig()
    sizes = config_for(StudentSettings(preset=preset), max(vocab_size, tokenizer.vocab_size), 0, 2)
    model = Backbone(sizes).initialize(0).eval()
    engine = DreamEngine.new(config, sizes.hidden, codebook, seed=0).eval()
    return Parts(model, tokenizer, codebook, engine, config)


def _alternate(jobs: dict[str, Callable[[], Any]], rounds: int, task: str, listen: Listener) -> dict[str, list[float]]:
    """Seconds of each job, a round each, in turn forwards and backwards; a round before them isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name in list(jobs) if round_ % 2 else list(reversed(jobs)):
            started = time.perf_counter()
            jobs[name]()  # ends with a token on the host: nothing is still under way on a device
            if round_:
                seconds[name].append(time.perf_counter() - started)
        listen(Event(task, "progress", done=round_, total=rounds, unit="round"))
    return seconds


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, least and most."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}
