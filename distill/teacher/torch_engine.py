"""Our own engine of the embedded teacher: the file's weights in torch, many prompts at once."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.backbone.likeliest import likeliest
from distill.backbone.prepared import Prepared, prepare
from distill.backbone.products import product_seconds
from distill.backbone.rows import Rows
from distill.errors import BadInput, TeacherError, TeacherUnavailable
from distill.teacher.batching import Batcher, Written
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.memory import available_memory
from distill.teacher.open_source import open_source
from distill.teacher.prompt_ids import PromptIds
from distill.teacher.protocol import GenerateOptions, Response, TokenTargets
from distill.teacher.source import Source
from distill.teacher.targets import is_cut, opens, respond

SLOTS = 256
"""Rows at once: measured for SmolLM2 on two busy cores, 64, 128, 192, 256 and 384 of them wrote 63, 77, 94, 101 and
115 tokens/s; more would need more memory and come later."""
USUAL_COLUMNS = 192
"""Tokens of a prompt and its answer for which memory is counted before any is known."""
SHARE = 0.4
"""Of the memory that is free once the weights are there, for the past of all rows."""
TRIAL_STEPS = 2
TRIAL_COLUMNS = 64


@dataclass(frozen=True)
class Placement:
    """Where it runs: device, dtype of the matrices, memory for the rows' past in bytes, and how many rows."""

    device: torch.device
    dtype: torch.dtype
    memory: int
    slots: int


class TorchEngine:
    """The model, ready to be loaded: what is wrong with the file is found at once, its weights are read by `load`.

    context: tokens of a prompt and its answer at most. timeout: seconds that a single step may take.
    Raises BadInput, naming the file and what to do, where weights, tokenizer or template are none that we can read or
    memory is too small; CorruptFile for a broken file.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        vocabulary: Vocabulary,
        *,
        context: int,
        threads: int,
        timeout: float,
    ) -> None:
        self.path = path
        self._vocabulary = vocabulary
        self._source = open_source(path)
        self._prompts = PromptIds(metadata, vocabulary.tokenizer, str(path))
        self._context = min(context, self._source.config.context)
        self._placement = _place(self._source)
        self._threads, self._timeout = threads, timeout
        self._weights: Prepared | None = None
        self._batcher: Batcher | None = None
        self._loading = threading.Lock()
        self._closed = False

    @property
    def slots(self) -> int:
        return self._placement.slots

    @property
    def version(self) -> str:
        return f"torch {torch.__version__}"

    def load(self) -> Batcher:
        """Read the weights, where that is still to be done, and wait for requests."""
        with self._loading:
            if self._closed:
                raise TeacherUnavailable("our engine is closed")
            if self._batcher is None:
                self._batcher = Batcher(
                    self._read(),
                    slots=self.slots,
                    context=self._context,
                    stop_ids=frozenset(i for i in range(len(self._vocabulary.bytes_of)) if self._vocabulary.is_end(i)),
                    memory=self._placement.memory,
                    threads=self._threads,
                )
            return self._batcher

    def _read(self) -> Prepared:
        if self._weights is None:
            model = self._source.backbone(self._context).to(self._placement.device)
            self._weights = prepare(model, self._placement.dtype, consume=True)
        return self._weights

    def speed(self, rows: int, options: GenerateOptions) -> float:
        """Tokens a second that it writes with so many rows, from a few steps."""
        weights = self._read()
        batch = Rows(weights)
        batch.reserve(rows, TRIAL_COLUMNS)
        batch.lengths = [TRIAL_COLUMNS - TRIAL_STEPS - 1] * rows
        tokens = torch.zeros(rows, dtype=torch.long, device=weights.embed.device)
        best = float("inf")
        for _ in range(TRIAL_STEPS):
            started = time.perf_counter()
            found = likeliest(weights, batch.advance(tokens), max(options.top_logprobs, options.top_k, 1))
            tokens = found.top_ids[:, 0]
            tokens.tolist()  # waits for a device
            best = min(best, time.perf_counter() - started)
        return rows / best

    def answer(self, prompt: str, options: GenerateOptions) -> Response:
        rendered = self._prompts.render(prompt, options.system, bool(options.think))
        ids = self._prompts.encode(rendered)
        try:
            written = self._wait(self.load(), ids, options)
        except TeacherError as error:
            raise type(error)(f"{self.path.name}: {error}") from error
        tokens = self._targets(written)
        text = self._vocabulary.decode(tokens.ids.tolist()).decode("utf-8", "replace")
        return respond(
            text,
            tokens,
            self._vocabulary,
            "stop" if written.ended else "length",
            {"service": written.reading + written.writing, "prompt": written.reading, "answer": written.writing},
            limit=options.max_tokens,
            opened=opens(rendered),
        )

    def _wait(self, batcher: Batcher, ids: list[int], options: GenerateOptions) -> Written:
        """However long it takes, as long as the engine moves: many rows together are slow, each by itself."""
        future = batcher.submit(ids, options)
        while True:
            try:
                return future.result(self._timeout)
            except TimeoutError as error:
                if not future.done() and time.monotonic() - batcher.moved > self._timeout:
                    raise TeacherUnavailable(
                        f"our engine took no step within {self._timeout:.0f} s (fewer requests in flight: "
                        "teacher.in_flight, or a longer teacher.timeout)"
                    ) from error

    def _targets(self, written: Written) -> TokenTargets:
        """All positions are soft. Tokens of a character that the limit cut are left out."""
        count = len(written.ids)
        while count and is_cut(self._vocabulary.decode(written.ids[:count].tolist())):
            count -= 1
        return TokenTargets(
            ids=written.ids[:count],
            logprobs=written.logprobs[:count],
            top_ids=written.top_ids[:count],
            top_logprobs=written.top_logprobs[:count],
            soft=np.ones(count, np.bool_),
        )

    def close(self) -> None:
        with self._loading:
            self._closed = True
            if self._batcher is not None:
                self._batcher.close()
            self._weights = self._batcher = None


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32: on a GPU that has it they are. A processor with units
    for them is tried: without AMX it may be slower by them. Elsewhere they are emulated."""
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    told: Any = torch.cpu
    if not any(bool(getattr(told, name, bool)()) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")):
        return False

    single, half = (product_seconds(SLOTS, 576, 1536, dtype, device) for dtype in (torch.float32, torch.bfloat16))
    return half < single


def _place(source: Source) -> Placement:
    """Raises BadInput where memory is too small for the weights and eight rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()
    config, size = source.config, dtype.itemsize
    weights = source.parameters * size
    row = 2 * config.layers * config.kv_heads * config.head_dim * USUAL_COLUMNS * size + 8 * config.vocab_size
    if free is None:
        return Placement(device, dtype, SLOTS * row, SLOTS)
    memory = int(SHARE * (free - weights))
    slots = min(SLOTS, memory // row)
    if slots < 8:
        raise BadInput(
            f"{source.path}: our engine needs {(weights + 8 * row / SHARE) / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free; close other programs, or use teacher.engine=llama.cpp"
        )
    return Placement(device, dtype, memory, slots)
