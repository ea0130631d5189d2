"""How fast the models of an Ollama server answer, by its own clock and by ours.

Requests stream. Each asks for something else in words of the same length, so that no answer comes out of the
server's prompt cache; they are greedy, so that sampling costs the same everywhere.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, product
from typing import Any, Literal

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch
from distill.address import default_host
from distill.run import fingerprint
from distill.teacher.names import name_key
from distill.teacher.ollama_client import OllamaClient

_NANO = 1_000_000_000
_WORDS = ["river", "stone", "house", "green", "window", "morning", "paper", "garden", "bread", "summer"]

Reply = dict[str, float | None]
"""What one streamed answer measured: KINDS, None where that can't be known, and the number of WRITTEN."""
KINDS: dict[str, tuple[str, Literal[1, -1]]] = {
    "first token, client": ("s", -1),
    "reading, server": ("tokens/s", 1),
    "writing, server": ("tokens/s", 1),
    "writing, client": ("tokens/s", 1),
}
WRITTEN = "answer_tokens"


def bench_ollama(
    watch: Stopwatch,
    models: Sequence[str],
    host: str = "",
    words: Sequence[int] = (64,),
    at_once: Sequence[int] = (1,),
    tokens: int = 64,
    timeout: float = 300.0,
) -> BenchResult:
    """Every model, one after the other, for every length of prompt (`words`) and number of requests `at_once`.

    A value is one repetition: the median over its requests, or, of "all requests", their tokens over the time from
    the first request to the last answer. host "": $OLLAMA_HOST, else the default. tokens: the most of an answer.
    Raises ModelNotFound and TeacherError, naming the server.
    """
    client = OllamaClient(host or default_host(), timeout=timeout, retries=0)
    numbers = count(random.randrange(100_000, 900_000))
    series: list[Series] = []
    about: dict[str, Any] = {}
    try:
        # Where it ran is the server: results of another one are warned of, which is not named.
        server = fingerprint([client.host.hostname, client.host.port])[:12]
        where: dict[str, Any] = {"ollama": client.version(), "server": server}
        known = {name_key(entry["name"]): entry for entry in client.models()}
        for model in models:
            ask = partial(_ask, client, model, numbers, tokens)
            entry = known.get(name_key(model), {})
            about[model] = {"bytes": entry.get("size"), **(entry.get("details") or {})}
            ask(min(words))  # loads it
            where[model] = str(entry.get("digest", ""))[:12]
            for length, requests in product(words, at_once):
                label = f"{model}, prompt {length} words, {requests} at once"
                rounds = watch.each(partial(_together, partial(ask, length), requests), f"bench ollama, {label}")
                setting = {"model": model, "prompt_words": length, "at_once": requests}
                series += _series(label, setting, rounds)
        result = watch.result("ollama", series, {"tokens": tokens}, about)
    finally:
        client.close()
    result.machine.update(where)
    return result


def _series(label: str, setting: dict[str, Any], rounds: list[tuple[float, list[Reply]]]) -> list[Series]:
    """Of one cell; without what the server's answers don't tell."""
    found: list[Series] = []
    for kind, (unit, better) in KINDS.items():
        values = [[value for reply in replies if (value := reply[kind]) is not None] for _, replies in rounds]
        if all(values):
            found.append(Series(f"{label}: {kind}", unit, better, tuple(map(statistics.median, values)), setting))
    rates = tuple(sum(reply[WRITTEN] or 0 for reply in replies) / took for took, replies in rounds)
    return [*found, Series(f"{label}: all requests, client", "tokens/s", 1, rates, setting)]


def _ask(client: OllamaClient, model: str, numbers: "count[int]", tokens: int, words: int) -> Reply:
    """One request, streamed."""
    body = {
        "model": model,
        "prompt": prompt_of(words, next(numbers)),
        "options": {"num_predict": tokens, "temperature": 0, "seed": 0, "stop": []},
    }
    said: dict[str, Any] = {}
    times: list[float] = []
    started = time.perf_counter()
    for said in client.stream("/api/generate", body):
        if said.get("response") or said.get("thinking"):
            times.append(time.perf_counter() - started)
    times = times or [time.perf_counter() - started]
    written = said.get("eval_count") or 0
    return {
        "first token, client": times[0],
        "reading, server": _rate(said, "prompt_eval"),
        "writing, server": _rate(said, "eval"),
        "writing, client": (written - 1) / (times[-1] - times[0]) if written > 1 and times[-1] > times[0] else None,
        WRITTEN: written,
    }


def _rate(said: dict[str, Any], what: str) -> float | None:
    """Tokens a second by the server's clock; None where it doesn't say (an answer out of its cache)."""
    tokens, nanoseconds = said.get(f"{what}_count"), said.get(f"{what}_duration")
    return tokens * _NANO / nanoseconds if tokens and nanoseconds else None


def prompt_of(words: int, number: int) -> str:
    """A prompt of so many words; another number, another prompt, from the first word on."""
    draw = random.Random(number)
    return " ".join([str(number), *(draw.choice(_WORDS) for _ in range(words - 1))])


def _together(ask: Callable[[], Reply], requests: int) -> tuple[float, list[Reply]]:
    """Seconds of all at once, each in a thread, and their replies. Raises what the first that failed raised."""
    replies: list[Reply] = []
    problems: list[Exception] = []

    def run() -> None:
        try:
            replies.append(ask())
        except Exception as error:
            problems.append(error)

    # Daemons: on Ctrl-C nobody waits for a server that is still at it.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(requests)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return time.perf_counter() - started, replies
