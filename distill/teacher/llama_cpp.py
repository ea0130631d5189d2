"""llama.cpp in this process: a model file behind llama.cpp's own HTTP server on a local port."""

import contextlib
import http.client
import importlib
import json
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from distill.errors import CorruptFile, PromptRefused, TeacherError, TeacherUnavailable
from distill.stopping import Interrupt
from distill.teacher.gguf_file import check_gguf
from distill.teacher.gguf_tokenizer import Vocabulary, read_tokenizer
from distill.teacher.prompt_ids import DEFAULT_SYSTEM
from distill.teacher.protocol import HALF
from distill.turns import SYSTEM, messages

_xllamacpp: Any = importlib.import_module("xllamacpp")  # a Cython module without type stubs


STAT = Path("/proc/stat")

LEAST_LOGPROB = -104.0
"""The engine takes e^x in float32: what is less likely than this it says to be impossible."""


class Alternative(TypedDict):
    """A token at a position. `token` is its text (U+FFFD for half a character), `bytes` its bytes."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class Entry(Alternative):
    """The sampled token with its alternatives, likeliest first.

    Characters made of several tokens come as one entry: `bytes` are the whole character's, `id`, `logprob`
    and `top_logprobs` are those of the last token.
    """

    top_logprobs: list[Alternative]


@dataclass(frozen=True)
class Completion:
    """What the engine wrote. `ids` ends in EOS where `stop_type` is "eos"; others are "limit" and "word".

    `timings` are llama.cpp's: prompt_n, prompt_ms, predicted_n, predicted_ms …
    """

    text: str
    ids: list[int]
    entries: list[Entry]
    stop_type: str
    timings: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Forced:
    """What the model thinks of A given tokens: natural logs of its raw probabilities, float64, whatever the sampling.

    logprobs (A,) of the tokens themselves; top_ids (A, N) int64 the likeliest tokens in their places, likeliest
    first, and top_logprobs (A, N) theirs. None is less than LEAST_LOGPROB.
    """

    logprobs: NDArray[np.float64]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float64]


def free_cores() -> int:
    """How many cores this process may use and nothing else keeps busy just now; 1 at least.

    The engine's threads wait for each other by spinning, many times a token: with one thread more than there are free
    cores it was 5 to 20 times as slow as with one alone. Where the system doesn't tell (no /proc), all cores are free.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        before = _ticks(STAT.read_text(encoding="ascii"), allowed)
        time.sleep(0.1)
        after = _ticks(STAT.read_text(encoding="ascii"), allowed)
    except (OSError, ValueError, IndexError):
        return len(allowed)
    idle, all_ = (now - then for now, then in zip(after, before, strict=True))
    return max(1, round(len(allowed) * idle / all_)) if all_ > 0 else len(allowed)


def _ticks(stat: str, cores: Collection[int]) -> tuple[int, int]:
    """Of these cores since the system's start: idle ones, and all (proc(5): user nice system idle iowait irq softirq
    steal)."""
    idle = all_ = 0
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            ticks = [int(number) for number in numbers[:8]]
            idle, all_ = idle + ticks[3] + ticks[4], all_ + sum(ticks)
    return idle, all_


class LlamaCpp:
    """A GGUF, loaded. Thread-safe: `slots` requests are computed at once, more of them queue.

    `context` is tokens a slot, prompt and answer together. `threads` 0: see `free_cores`. `exact` trades speed for
    repeatability: a float32 KV cache, no flash attention, one slot; then equal prompts give equal logits whatever ran
    before.
    Raises BadInput where there is no such file, CorruptFile where it can't be loaded.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        slots: int = 8,
        context: int = 1024,
        threads: int = 0,
        exact: bool = False,
        timeout: float = 300.0,
    ) -> None:
        self.path = Path(path)
        self.slots = 1 if exact else slots
        self.context = context
        self.timeout = timeout
        self._server: Any = None
        self._answered = self._closing = False
        self._local = threading.local()
        self._connections: set[http.client.HTTPConnection] = set()
        check_gguf(self.path)
        with Interrupt() as stop:  # it must not be dropped while it loads, see `close`
            try:
                self._server = _xllamacpp.Server(self._params(threads, exact))
            except RuntimeError as error:
                raise CorruptFile(
                    f"{self.path}: llama.cpp can't load it (cut short, or an architecture it doesn't know); "
                    "fetch or export the model again"
                ) from error
        self._url = str(self._server.listening_address)
        if stop.asked:
            raise stop.asked

    def _params(self, threads: int, exact: bool) -> Any:
        params: Any = _xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.verbosity = 0  # errors come back in answers; nothing goes to stderr
        params.warmup = False
        params.n_parallel = self.slots
        params.n_ctx = self.context * self.slots
        # A keep-alive connection holds a thread of the HTTP server: have some to spare.
        params.n_threads_http = 4 * self.slots + 8
        params.cache_ram_mib = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or free_cores()
        if exact:
            params.cache_type_k = params.cache_type_v = _xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = _xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free its memory; requests in flight fail.

        Their connections are shut first, and no thread opens another: the engine's handlers only leave a request whose
        client has gone, and its destructor waits for them. It waits for ever where the engine's loop hasn't begun: an
        answer shows that it has.
        """
        self._closing = True
        for connection in list(self._connections):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        if self._server is not None and not self._answered:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._exchange(self._connection(), "/completion", {"prompt": [0], "n_predict": 1})
        self._server = None

    def tokenize(self, text: str, *, special: bool = True, begin: bool = False) -> list[int]:
        """Ids of a text. special: tokens such as `<think>` that are written out are parsed. begin: put BOS in front,
        where the model wants one, as `complete` does with a prompt that is text."""
        answer = self._post("/tokenize", {"content": text, "parse_special": special, "add_special": begin})
        return cast("list[int]", answer["tokens"])

    def apply_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        """The model's own chat template over `messages`; `kwargs` are variables for the template."""
        answer = self._post("/apply-template", {"messages": messages, "chat_template_kwargs": kwargs})
        return str(answer["prompt"])

    def render(self, prompt: str, system: str = "", think: bool = False) -> str:
        """The text that the model continues when it is asked one question.

        Where its template sneaks in a default system message (SmolLM2's does), it is cut off again: Ollama's template
        has none, and a student must not learn from a prompt that it never sees. A template without ChatML's marks is
        left as it is.
        """
        asked = messages(prompt, system)
        text = self.apply_template(asked, enable_thinking=think)
        return text if asked[0]["role"] == SYSTEM else DEFAULT_SYSTEM.sub("", text, count=1)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Which bytes each id stands for. Raises CorruptFile where the file doesn't say."""
        return Vocabulary(read_tokenizer(self.path))

    def complete(
        self,
        prompt: str | list[int] | dict[str, Any],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        n_probs: int = 0,
        json_schema: dict[str, Any] | None = None,
        stop: list[str] | None = None,
    ) -> Completion:
        """Continue a prompt (text, ids as they are, or an object as the server takes it).

        Sampling is top-k, then top-p, then temperature, without penalties; temperature 0 is greedy. With
        `n_probs` each position tells so many alternatives: log-softmax of the raw logits, whatever the sampling.
        """
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": temperature,
            "samplers": ["top_k", "top_p", "temperature"],
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "n_probs": n_probs,
            "return_tokens": True,
            "cache_prompt": False,  # a reused prefix moves logits by up to 1e-5
        }
        if json_schema is not None:
            body["json_schema"] = json_schema
        if stop:
            body["stop"] = stop
        answer = self._post("/completion", body)
        return Completion(
            text=answer["content"],
            ids=answer["tokens"],
            entries=answer.get("completion_probabilities", []),
            stop_type=answer["stop_type"],
            timings=answer["timings"],
        )

    def force(self, prompt: Sequence[int], answer: Sequence[int], n_probs: int = 1) -> Forced:
        """How likely each token of `answer` is after `prompt` and the tokens before it, with its `n_probs` likeliest
        rivals (1 to the whole vocabulary; 25 µs each were measured).

        A grammar that allows these tokens alone, in this order, has a run of them written in one request. llama.cpp's
        grammars stumble over halves of characters and over tokens that end an answer: for such a token another is
        written in its place, and its probability read among those of the whole vocabulary.
        Raises TeacherError where both don't fit the context.
        """
        if len(prompt) + len(answer) > self.context:
            raise TeacherError(
                f"{self.path.name}: {len(prompt)} tokens of prompt and {len(answer)} of answer don't fit its context "
                f"of {self.context}; leave the question out, or load it with a larger context"
            )
        plain = [self._is_plain(i) for i in answer]
        entries: list[Alternative] = []
        rivals: list[list[Alternative]] = []
        while (start := len(entries)) < len(answer):
            end = start
            while end < len(answer) and plain[end]:
                end += 1
            before = [*prompt, *answer[:start]]
            written = self._written(before, answer[start:end], n_probs)
            if end > start and [entry["id"] for entry in written] == list(answer[start:end]):
                entries += written
                rivals += [entry["top_logprobs"] for entry in written]
                continue
            everything = self._written(before, [self._probe], len(self.vocabulary.bytes_of))[0]["top_logprobs"]
            entries.append(next(alternative for alternative in everything if alternative["id"] == answer[start]))
            rivals.append(everything[:n_probs])
        shape = (len(answer), min(n_probs, len(self.vocabulary.bytes_of)))
        ids = np.array([[a["id"] for a in row] for row in rivals], np.int64).reshape(shape)
        tops = np.array([[a["logprob"] for a in row] for row in rivals], np.float64).reshape(shape)
        own = np.array([entry["logprob"] for entry in entries], np.float64)
        return Forced(np.maximum(own, LEAST_LOGPROB), ids, np.maximum(tops, LEAST_LOGPROB))

    def _written(self, prompt: list[int], answer: Sequence[int], n_probs: int) -> list[Entry]:
        if not answer:
            return []
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": len(answer),
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "n_probs": n_probs,
            "grammar": "root ::= " + " ".join(f"<[{i}]>" for i in answer),
            "cache_prompt": False,
        }
        return self._post("/completion", body).get("completion_probabilities", [])

    def _is_plain(self, i: int) -> bool:
        """Whether a grammar can ask for the token: it prints whole characters, and doesn't end the answer."""
        spelled = self.vocabulary.bytes_of[i]
        try:
            text = spelled.decode()
        except UnicodeDecodeError:
            return False
        return bool(text) and "\0" not in text and HALF not in text and not self.vocabulary.is_end(i)

    @cached_property
    def _probe(self) -> int:
        """Some token that a grammar can ask for."""
        return next(i for i, spelled in enumerate(self.vocabulary.bytes_of) if spelled.isalpha() and self._is_plain(i))

    def _post(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        assert self._server is not None, "the engine is closed"
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:  # one a thread
            connection = self._local.connection = self._connection()
            self._connections.add(connection)
        reused = connection.sock is not None
        try:
            try:
                content = self._exchange(self._open(connection), path, body)
            except ConnectionError:
                # The engine closes a connection that nothing came over for five seconds; a fresh one it answers.
                if not reused:
                    raise
                content = self._exchange(self._open(connection), path, body)
        except (OSError, http.client.HTTPException) as error:
            raise TeacherUnavailable(
                f"{self.path.name}: the embedded engine gave no answer within {self.timeout:.0f} s "
                "(fewer teacher.threads, or a longer teacher.timeout)"
            ) from error
        if "error" in content:
            problem: dict[str, Any] = content["error"]
            if problem.get("type") == "exceed_context_size_error":
                raise PromptRefused(f"{self.path.name}: {problem['message']}; shorten it, or raise teacher.context")
            raise TeacherError(f"{self.path.name}: {problem['message']}")
        return content

    def _connection(self) -> http.client.HTTPConnection:
        """http.client knows no proxies: there is none to ourselves."""
        address = urllib.parse.urlsplit(self._url)
        return http.client.HTTPConnection(address.hostname or "", address.port, timeout=self.timeout)

    def _open(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        """Connected, so that `close` can shut it. Raises ConnectionError once that was called."""
        if connection.sock is None:
            connection.connect()
        if self._closing:
            raise ConnectionAbortedError("the engine is closed")
        return connection

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, body: dict[str, Any] | None
    ) -> dict[str, Any]:
        try:
            text = json.dumps(body) if body is not None else None
            connection.request("POST" if text else "GET", path, text, {"Content-Type": "application/json"})
            content = json.loads(connection.getresponse().read())
            self._answered = self._answered or path == "/completion"
            return content
        except (OSError, http.client.HTTPException):
            connection.close()  # the next request opens it again
            raise
