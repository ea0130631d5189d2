"""A teacher that answers after a fixed time, N requests at once, with an answer that the prompt alone decides."""

import hashlib
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo, TeacherTokenizer, TokenTargets

VOCABULARY = ["<eos>", *(f"Ġw{i}" for i in range(1, 400))]


@lru_cache(maxsize=256)
def make_targets(n: int, k: int, vocabulary: int, seed: int) -> TokenTargets:
    """Targets shaped like a language model's: Zipf-like ids, falling logprobs, the last position hard-only."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocabulary + 1)
    spread = np.random.default_rng(0).permutation(vocabulary)
    pool = spread[rng.choice(vocabulary, size=(n, 8 * k), p=weights / weights.sum())]
    top_ids = np.stack([rng.permutation(np.unique(np.r_[row, spread[: 2 * k]]))[:k] for row in pool]).astype(np.int32)
    top_logprobs = -np.sort(rng.gamma(4, 2, size=(n, k)), axis=1).astype(np.float16).astype(np.float32)
    rank = np.minimum(rng.geometric(0.6, n) - 1, k - 1)
    rows = np.arange(n)
    ids, logprobs = top_ids[rows, rank], top_logprobs[rows, rank]
    soft = rows < n - 1
    ids[-1], logprobs[-1], top_ids[-1], top_logprobs[-1] = 0, np.nan, -1, -np.inf
    return TokenTargets(ids, logprobs, top_ids, top_logprobs, soft)


class StubTeacher:
    """`fail` decides by prompt which error to raise, if any. `known` says whether `slots` is told."""

    def __init__(
        self,
        slots: int = 4,
        seconds: float = 0.0,
        *,
        known: bool = False,
        digest: str = "d" * 64,
        fail: Callable[[str], Exception | None] = lambda prompt: None,
        logprobs: bool = True,
    ) -> None:
        self._semaphore = threading.BoundedSemaphore(slots)
        self._slots = slots if known else None
        self._lock = threading.Lock()
        self.seconds = seconds
        self.digest = digest
        self.fail = fail
        self.logprobs = logprobs
        self.asked: list[str] = []
        self.answered: list[tuple[str, float]] = []
        """Prompts, and when."""
        self.waiting = self.most_waiting = 0

    @property
    def slots(self) -> int | None:
        return self._slots

    def describe(self) -> TeacherInfo:
        return TeacherInfo(f"stub:{self.digest[:4]}", "stub", self.digest, "t" * 64, "1", self.logprobs)

    def tokenizer(self) -> TeacherTokenizer | None:
        return TeacherTokenizer("gpt2", "gpt-2", VOCABULARY, ["a b"], [3, *[1] * (len(VOCABULARY) - 1)], 0)

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        with self._lock:
            self.asked.append(prompt)
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            with self._semaphore:
                started = time.monotonic()
                time.sleep(self.seconds)
                service = time.monotonic() - started
        finally:
            with self._lock:
                self.waiting -= 1
        if error := self.fail(prompt):
            raise error
        with self._lock:
            self.answered.append((prompt, time.monotonic()))
        seed = int.from_bytes(hashlib.sha256(f"{prompt} {options.seed}".encode()).digest()[:4], "big")
        tokens = make_targets(6 + seed % 8, 20, len(VOCABULARY), seed % 64) if self.logprobs else None
        return Response(f"Answer {seed} to {prompt}", tokens, "stop", {"service": service})

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        raise NotImplementedError

    def close(self) -> None: ...
