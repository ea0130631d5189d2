"""How much time capture loses, against a server that answers in a fixed time, so many requests at once.

The server is another process that speaks Ollama's wire format over HTTP, with 20 alternatives a token, so the
whole path is measured: client, JSON, alignment, packing, storing, and finding out how much the server takes.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Generator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch, seconds_of
from distill.address import Address
from distill.config import Settings
from distill.corpus.capture import capture
from distill.errors import DistillError
from distill.events import Listener
from distill.run import Run

MODEL = "clockwork"
TOKENS = 24
"""Tokens an answer: small, so that a request's cost is mostly that of being one."""
_WORDS = [f"Ġw{i}" for i in range(500)]
_NANO = 1_000_000_000


def bench_capture(watch: Stopwatch, slots: int, seconds: float, requests: int) -> BenchResult:
    """Capture `requests` prompts from a server with `slots` slots that takes `seconds` for each.

    Series: the whole stage's seconds, their ratio to the ideal (requests / slots, rounded up, · seconds), tokens a
    second and bytes a token. about: ideal_seconds, and the last repetition's slots and requests in flight as found.
    """
    ideal = math.ceil(requests / slots) * seconds
    importlib.import_module("distill.teacher.ollama")  # Python's start-up is no part of a capture
    found = watch.each(partial(_captured, slots, seconds, requests, watch.listen), "bench capture")
    last, taken = found[-1], tuple(one["seconds"] for one in found)
    return watch.result(
        "capture",
        [
            Series("over the ideal time", "ratio", -1, tuple(took / ideal for took in taken)),
            Series("the whole stage", "s", -1, taken),
            Series("captured", "tokens/s", 1, tuple(one["tokens_per_second"] for one in found)),
            Series("on disk", "bytes a token", -1, tuple(one["bytes_per_token"] for one in found)),
        ],
        {"slots": slots, "seconds_each": seconds, "requests": requests},
        {
            "ideal_seconds": round(ideal, 6),
            "answered": last["responses"],
            "slots_found": last["slots"][0],
            "in_flight": last["in_flight"][0],
        },
    )


def _captured(slots: int, seconds: float, requests: int, listen: Listener) -> dict[str, Any]:
    """The summary of one capture into an empty run, and its seconds. The server is a new one: its start isn't timed."""
    with tempfile.TemporaryDirectory() as folder, clockwork_server(slots, seconds) as url:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(f"Question number {i}?\n" for i in range(requests)), encoding="utf-8")
        settings = Settings()
        settings.teacher.model, settings.teacher.hosts = f"ollama:{MODEL}", [Address(url)]
        settings.capture.prompts = [str(prompts)]
        run = Run.create(Path(folder) / "run", settings)
        summary: dict[str, Any] = {}
        took = seconds_of(lambda: summary.update(capture(run, listen)))
        return {**summary, "seconds": took}


@contextlib.contextmanager
def clockwork_server(slots: int, seconds: float) -> Generator[str]:
    """The server, in a process of its own that ends when it is left; yields its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, slots, seconds), daemon=True)
    process.start()
    try:
        if not ours.poll(60):
            raise DistillError("the benchmark's server did not start within 60 s; try again on a quieter machine")
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        ours.close()
        process.join(10)


def _serve(pipe: Connection, slots: int, seconds: float) -> None:
    gate = threading.Semaphore(slots)
    known = {path: json.dumps(value).encode() for path, value in METADATA.items()}
    answer = json.dumps(told(seconds)).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body leave together

        def do_GET(self) -> None:
            self._reply(known[self.path])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path in known:
                self._reply(known[self.path])
                return
            with gate:
                time.sleep(seconds)
            self._reply(answer)

        def _reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        request_queue_size = 512

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_address[1])
    pipe.poll(None)  # until the other end is closed, or its process has gone


VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<eos>", *_WORDS],
    "tokenizer.ggml.token_type": [3, *[1] * len(_WORDS)],
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.eos_token_id": 0,
}
METADATA: dict[str, Any] = {
    "/api/version": {"version": "0.33.0"},
    "/api/tags": {"models": [{"name": f"{MODEL}:latest", "model": f"{MODEL}:latest", "digest": "c" * 64}]},
    "/api/show": {"template": "{{ .Prompt }}", "capabilities": ["completion"], "model_info": VOCABULARY},
}
"""Path → what the server says there."""


def told(seconds: float) -> dict[str, Any]:
    """To /api/generate, with 20 alternatives a token."""
    entries: list[dict[str, Any]] = []
    for position in range(TOKENS):
        words = [_WORDS[(7 * position + 13 * i) % len(_WORDS)].replace("Ġ", " ") for i in range(20)]
        top = [
            {"token": word, "logprob": -0.7 - 0.71 * i - 0.01 * position, "bytes": list(word.encode())}
            for i, word in enumerate(words)
        ]
        entries.append({**top[0], "top_logprobs": top})
    text, nanoseconds = "".join(entry["token"] for entry in entries), round(seconds * _NANO)
    counts = {"prompt_eval_count": 4, "eval_count": TOKENS, "total_duration": nanoseconds, "eval_duration": nanoseconds}
    return {"model": MODEL, "response": text, "done": True, "done_reason": "length", **counts, "logprobs": entries}
