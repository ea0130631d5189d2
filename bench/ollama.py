"""How fast the models of an Ollama server answer, by its own clock and by ours.

Requests stream. Each asks for something else in words of the same length, so that no answer comes out of the
server's prompt cache; they are greedy, so that sampling costs the same everywhere.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, product
from typing import Any, Literal

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch
from distill.address import Address, default_host
from distill.errors import BadInput
from distill.run import fingerprint
from distill.teacher.names import name_key
from distill.teacher.ollama_client import OllamaClient

_NANO = 1_000_000_000
_WORDS = [
    "river",
    "stone",
    "house",
    "green",
    "window",
    "morning",
    "paper",
    "garden",
    "bread",
    "summer",
    "cloud",
    "table",
]


@dataclass(frozen=True)
class Load:
    """What a server is asked. words: lengths of prompts; at_once: requests in flight; tokens: the most of an answer.

    num_ctx: the context to load the model with, 0: the server's own choice. cold: measure loading too, which
    unloads the model first each time.
    """

    words: Sequence[int] = (64,)
    at_once: Sequence[int] = (1,)
    tokens: int = 64
    num_ctx: int = 0
    cold: bool = False


@dataclass(frozen=True)
class Reply:
    """One streamed answer: seconds to its first text, to its last, and to its end, and the server's own numbers."""

    first: float
    last: float
    end: float
    said: dict[str, Any]

    def server_rate(self, what: Literal["eval", "prompt_eval"]) -> float | None:
        """Tokens a second by the server's clock; None where it doesn't say (an answer out of its cache)."""
        tokens, nanoseconds = self.said.get(f"{what}_count"), self.said.get(f"{what}_duration")
        return tokens * _NANO / nanoseconds if tokens and nanoseconds else None

    @property
    def written(self) -> int:
        return int(self.said.get("eval_count") or 0)

    @property
    def client_rate(self) -> float | None:
        """Tokens a second between the first and the last text."""
        return (self.written - 1) / (self.last - self.first) if self.written > 1 and self.last > self.first else None


def bench_ollama(
    watch: Stopwatch, models: Sequence[str], host: str = "", load: Load | None = None, timeout: float = 300.0
) -> BenchResult:
    """Every model, one after the other, for every length of prompt and number of requests at once.

    A value is one repetition: the median over its requests, or, of "all requests", their tokens over the time from
    the first request to the last answer. host "": $OLLAMA_HOST, else the default. Raises BadInput, ModelNotFound and
    TeacherError, naming the server.
    """
    load = load or Load()
    if not models:
        raise BadInput("bench ollama: no model named; `ollama list` shows what is installed")
    client = OllamaClient(host or default_host(), timeout=timeout, retries=0)
    try:
        measured = _Measured(client, load, watch)
        about: dict[str, Any] = {"server": client.version(), "host": _known_again(client.host)}
        known = {name_key(entry["name"]): entry for entry in client.models()}
        running = {name_key(str(entry.get("name"))) for entry in client.get("/api/ps").get("models") or []}
        for model in models:
            key = name_key(model)
            about[model] = _described(known.get(key, {})) | {"was_loaded": key in running}
            about[model] |= measured.model(model)
        return watch.result("ollama", measured.series, {"tokens": load.tokens, "num_ctx": load.num_ctx}, about)
    finally:
        client.close()


def _known_again(host: Address) -> str:
    """Tells whether two results are of one server without naming it."""
    return fingerprint([host.hostname, host.port])[:12]


def _described(entry: dict[str, Any]) -> dict[str, Any]:
    details = entry.get("details") or {}
    found = {
        "digest": str(entry.get("digest", ""))[:12],
        "parameters": details.get("parameter_size"),
        "quantization": details.get("quantization_level"),
        "bytes": entry.get("size"),
    }
    return {key: value for key, value in found.items() if value}


class _Measured:
    """The series so far."""

    def __init__(self, client: OllamaClient, load: Load, watch: Stopwatch) -> None:
        self.client, self.load, self.watch = client, load, watch
        self.series: list[Series] = []
        self.numbers = count(random.randrange(100_000, 900_000))

    def model(self, model: str) -> dict[str, Any]:
        """Measure one; facts about it. A series that the server's answers don't give is left out and named there."""
        first = self.ask(model, min(self.load.words))
        about: dict[str, Any] = {"first_request_loaded_seconds": (first.said.get("load_duration") or 0) / _NANO}
        if self.load.cold:
            self.loading(model)
        missing: list[str] = []
        read: dict[str, float] = {}
        written: dict[str, float] = {}
        for words, at_once in product(self.load.words, self.load.at_once):
            label = f"{model}, prompt {words} words, {at_once} at once"
            rounds = self.watch.each(
                lambda words=words, at_once=at_once: _together([partial(self.ask, model, words)] * at_once),
                f"bench ollama, {label}",
            )
            replies = [reply for _, replies in rounds for reply in replies]
            read[label] = statistics.median(int(reply.said.get("prompt_eval_count") or 0) for reply in replies)
            written[label] = statistics.median(reply.written for reply in replies)
            setting = {"model": model, "prompt_words": words, "at_once": at_once}
            missing += self.add(label, setting, rounds)
        return about | {"prompt_tokens": read, "answer_tokens": written} | ({"missing": missing} if missing else {})

    def add(self, label: str, setting: dict[str, Any], rounds: list[tuple[float, list[Reply]]]) -> list[str]:
        """The series of one cell; names of those that could not be had."""
        kinds: dict[str, tuple[str, Literal[1, -1], Callable[[Reply], float | None]]] = {
            "first token, client": ("s", -1, lambda reply: reply.first),
            "reading, server": ("tokens/s", 1, lambda reply: reply.server_rate("prompt_eval")),
            "writing, server": ("tokens/s", 1, lambda reply: reply.server_rate("eval")),
            "writing, client": ("tokens/s", 1, lambda reply: reply.client_rate),
        }
        missing: list[str] = []
        for kind, (unit, better, of) in kinds.items():
            found = [[value for reply in replies if (value := of(reply)) is not None] for _, replies in rounds]
            if all(found):
                values = tuple(statistics.median(values) for values in found)
                self.series.append(Series(f"{label}: {kind}", unit, better, values, setting))
            else:
                missing.append(f"{label}: {kind}")
        rates = tuple(sum(reply.written for reply in replies) / took for took, replies in rounds)
        self.series.append(Series(f"{label}: all requests, client", "tokens/s", 1, rates, setting))
        return missing

    def loading(self, model: str) -> None:
        """Unload it, then have it write one token: what loading takes."""
        words = min(self.load.words)

        def load() -> Reply:
            self.client.post("/api/generate", {"model": model, "keep_alive": 0, "stream": False})
            return self.ask(model, words, 1)

        replies = replace(self.watch, warmup=0).each(load, f"bench ollama, loading {model}")
        values = {
            "loading, server": [(reply.said.get("load_duration") or 0) / _NANO for reply in replies],
            "first token of an unloaded model, client": [reply.first for reply in replies],
        }
        setting = {"model": model, "prompt_words": words}
        self.series += [Series(f"{model}: {name}", "s", -1, tuple(each), setting) for name, each in values.items()]

    def ask(self, model: str, words: int, tokens: int = 0) -> Reply:
        """One request, streamed."""
        number = next(self.numbers)
        options = {"num_predict": tokens or self.load.tokens, "temperature": 0, "seed": 0, "stop": []}
        if self.load.num_ctx:
            options["num_ctx"] = self.load.num_ctx
        body = {"model": model, "prompt": prompt_of(words, number), "options": options}
        started = time.perf_counter()
        first = last = None
        chunk: dict[str, Any] = {}
        for chunk in self.client.stream("/api/generate", body):
            if chunk.get("response") or chunk.get("thinking"):
                last = time.perf_counter() - started
                first = last if first is None else first
        end = time.perf_counter() - started
        return Reply(end if first is None else first, end if last is None else last, end, chunk)


def prompt_of(words: int, number: int) -> str:
    """A prompt of so many words; another number, another prompt, from the first word on."""
    draw = random.Random(number)
    return " ".join([str(number), *(draw.choice(_WORDS) for _ in range(words - 1))])


def _together(jobs: Sequence[Callable[[], Reply]]) -> tuple[float, list[Reply]]:
    """Seconds of all at once, each in a thread, and their replies. Raises what the first that failed raised."""
    started = time.perf_counter()
    replies: list[Reply | None] = [None] * len(jobs)
    problems: list[Exception] = []

    def run(place: int) -> None:
        try:
            replies[place] = jobs[place]()
        except Exception as error:
            problems.append(error)

    # Daemons: on Ctrl-C nobody waits for a server that is still at it.
    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return time.perf_counter() - started, [reply for reply in replies if reply is not None]
