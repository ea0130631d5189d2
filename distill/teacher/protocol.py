"""What every teacher can do, and what it answers.

Shape legend: N answer tokens, K = 20 alternatives a position.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_TOP_LOGPROBS = 20
"""Alternatives a position that Ollama returns at most (it answers 21 with HTTP 400)."""

UNKNOWN_ID = -1
"""Stands where an alternative could not be named (half a character, a control token of many)."""

GIVEN = "given"
"""Stands for whoever gave answers that stood beside their prompts."""

HALF = "\ufffd"
"""How servers spell what is no whole character. A `Response` never ends in it."""


@dataclass(frozen=True)
class GenerateOptions:
    """How the teacher samples. Its logprobs do not depend on any of these: they are at T = 1."""

    max_tokens: int = 96
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    seed: int = 0
    top_logprobs: int = MAX_TOP_LOGPROBS
    system: str = ""
    think: str = ""
    """Whether it thinks before it answers: "" (no), "true", or how much: "low", "medium", "high"."""
    thinking_tokens: int = 0
    """Tokens that it may think, besides `max_tokens`."""

    @property
    def room(self) -> int:
        """Tokens that it may write in all."""
        return self.max_tokens + (self.thinking_tokens if self.think else 0)

    def spelled(self) -> dict[str, Any]:
        """By name, and nothing of thinking where there is none: what was asked before it could be is asked alike."""
        off = () if self.think else ("think", "thinking_tokens")
        return {name: value for name, value in asdict(self).items() if name not in off}


@dataclass(frozen=True)
class TeacherTokenizer:
    """A teacher's vocabulary as GGUF spells it (`tokenizer.ggml.*`).

    `model` is "gpt2" (byte-level BPE, tokens in the GPT-2 byte alphabet) or "llama" (SentencePiece, "▁" for
    space, "<0x0A>" for bytes). `merges` holds "left right" in order of rank. `types` are GGUF token types
    (1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte).
    """

    model: str
    pre: str
    tokens: list[str]
    merges: list[str]
    types: list[int]
    eos_id: int
    bos_id: int | None = None
    extra_stop_ids: tuple[int, ...] = ()

    @cached_property
    def token_to_id(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


@dataclass(frozen=True)
class TokenTargets:
    """What the teacher said of each answer token.

    ids           (N,) int32     teacher token ids; the last is EOS where the answer ended by itself
    logprobs      (N,) float32   of the sampled token, natural log, T = 1; NaN where hard-only
    top_ids       (N, K) int32   alternatives, likeliest first; UNKNOWN_ID where unnamed or absent
    top_logprobs  (N, K) float32 theirs; -inf where absent
    soft          (N,) bool      False: the position has a hard label only
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    soft: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, end: int | None = None) -> "TokenTargets":
        """Those from `start` to before `end`."""
        those = slice(start, end)
        return TokenTargets(
            self.ids[those],
            self.logprobs[those],
            self.top_ids[those],
            self.top_logprobs[those],
            self.soft[those],
        )


@dataclass(frozen=True)
class Response:
    """One answer. `tokens` is None where the teacher gives neither ids nor logprobs (hard labels only).

    `done_reason` is "stop" (it ended by itself) or "length". `timings` are seconds: "service" is the time a
    server slot was busy with it, without queueing; others are for information. `thinking` is what it thought before, as
    it was told to or though it was told not to: neither text nor tokens hold any of it. `thought` are its tokens, None
    where they aren't known to be.
    """

    text: str
    tokens: TokenTargets | None
    done_reason: str
    timings: dict[str, float] = field(default_factory=dict[str, float])
    thinking: str = ""
    thought: TokenTargets | None = None
    model: str = ""
    """Which model answered, of a teacher that has several."""


@dataclass(frozen=True)
class TeacherInfo:
    """Who answered: enough to know later whether two traces are comparable."""

    spec: str
    name: str
    digest: str
    template_digest: str
    version: str
    logprobs: bool
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def is_dataset(self) -> bool:
        """Whether a simulation gave the answers, and no model."""
        return self.spec.startswith("dataset:")

    @property
    def is_given(self) -> bool:
        """Whether the answers stood beside their prompts, and nobody was asked."""
        return self.spec == GIVEN

    @property
    def can_think(self) -> bool:
        return "thinking" in (self.details.get("capabilities") or [])


class Teacher(Protocol):
    """Thread-safe: `generate` is called from several threads at once."""

    @property
    def slots(self) -> int | None:
        """Requests served at once, where known; None: to be found out by whoever asks."""
        ...

    def describe(self) -> TeacherInfo: ...

    def tokenizer(self) -> TeacherTokenizer | None:
        """The vocabulary, or None where it can't be read (then soft targets can't be aligned)."""
        ...

    def generate(self, prompt: str, options: GenerateOptions) -> Response: ...

    def go_on(self, prompt: str, begun: str, options: GenerateOptions) -> Response:
        """What comes after an answer to the prompt that begins so, whoever began it. Raises TeacherError where it can't
        be told how its answer begins."""
        ...

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        """An answer constrained to a JSON schema, as text."""
        ...

    def close(self) -> None: ...
