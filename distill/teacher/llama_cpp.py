"""llama.cpp in this process: a model file behind llama.cpp's own HTTP server on a local port."""

import contextlib
import http.client
import importlib
import json
import os
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, cast

from distill.errors import CorruptFile, TeacherError, TeacherUnavailable
from distill.teacher.gguf_tokenizer import check_gguf

_xllamacpp: Any = importlib.import_module("xllamacpp")  # a Cython module without type stubs


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
    prompt_tokens: int
    timings: dict[str, float] = field(default_factory=dict[str, float])


class LlamaCpp:
    """A GGUF, loaded. Thread-safe: `slots` requests are computed at once, more of them queue.

    `context` is tokens a slot, prompt and answer together. `threads` 0 is all cores that this process may
    use. `exact` trades speed for repeatability: a float32 KV cache, no flash attention, one slot; then equal
    prompts give equal logits whatever ran before.
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
        check_gguf(self.path)
        try:
            self._server: Any = _xllamacpp.Server(self._params(threads, exact))
        except RuntimeError as error:
            raise CorruptFile(
                f"{self.path}: llama.cpp can't load it (cut short, or an architecture it doesn't know); "
                "fetch or export the model again"
            ) from error
        self._url = str(self._server.listening_address)
        self._local = threading.local()
        self._connections: set[http.client.HTTPConnection] = set()

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
        # On macOS and Windows a process may use every core.
        affinity = getattr(os, "sched_getaffinity", None)
        cores = threads or (len(affinity(0)) if affinity else os.cpu_count() or 1)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
        if exact:
            params.cache_type_k = params.cache_type_v = _xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = _xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free its memory; requests in flight fail.

        Their connections are shut first: the engine's handlers only leave a request whose client has gone, and
        its destructor waits for them.
        """
        for connection in list(self._connections):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self._server = None

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; special tokens written out are parsed. No BOS is put in front."""
        answer = self._post("/tokenize", {"content": text, "parse_special": True, "add_special": False})
        return cast("list[int]", answer["tokens"])

    def apply_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        """The model's own chat template over `messages`; `kwargs` are variables for the template."""
        answer = self._post("/apply-template", {"messages": messages, "chat_template_kwargs": kwargs})
        return str(answer["prompt"])

    def complete(
        self,
        prompt: str | list[int],
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
        """Continue a prompt (text, or ids as they are).

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
            prompt_tokens=answer["tokens_evaluated"],
            timings=answer["timings"],
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self._server is not None, "the engine is closed"
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:  # one a thread; http.client knows no proxies, there is none to ourselves
            address = urllib.parse.urlsplit(self._url)
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=self.timeout)
            self._local.connection = connection
            self._connections.add(connection)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            content: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise TeacherUnavailable(
                f"{self.path.name}: the embedded engine gave no answer within {self.timeout:.0f} s "
                "(fewer teacher.threads, or a longer teacher.timeout)"
            ) from error
        if "error" in content:
            raise TeacherError(f"{self.path.name}: {content['error']['message']}")
        return content
