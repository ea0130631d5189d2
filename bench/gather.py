"""What `dream gather` costs the programs before it, and what of their answers is lost where it is killed.

An Ollama of known speed, the proxy and those who ask are processes of their own, on this machine. The proxy is killed
(SIGKILL) in the middle of its work, and started again; who asks asks again what wasn't answered whole.
"""

import asyncio
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.capture import METADATA, MODEL, told
from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch
from distill.address import Address
from distill.config import Settings
from distill.corpus.traces import TraceStore
from distill.errors import DistillError
from distill.events import silent
from distill.run import Run
from distill.serve.gathering import Keeper
from distill.serve.guard import Allowed
from distill.serve.listen import bind, serve, url_of
from distill.serve.relay import Relay
from distill.teacher.ollama import OllamaTeacher

FIRST = 0.005
"""Seconds until the Ollama of known speed says a first token; the others follow at once."""
SHORT = 4
"""Tokens of an answer where many are asked for: they are about the number of answers."""
ASKED = 200
"""Questions by which the first token is timed, each way in turn, after WARM that don't count."""
WARM = 20


def bench_gather(watch: Stopwatch, requests: int, kills: int, clients: int) -> BenchResult:
    """Series: milliseconds to the first token straight from Ollama, through the proxy, and what that adds (medians of
    ASKED each, one at a time); answers that somebody got whole and that are in no trace, of `requests` asked by
    `clients` at once with `kills` in between; answers a second then."""
    found = watch.each(lambda: _measured(requests, kills, clients), "bench gather")
    return watch.result(
        "gather",
        [
            Series("first token, from Ollama", "ms", -1, tuple(one["straight"] for one in found)),
            Series("through the proxy", "ms", -1, tuple(one["through"] for one in found)),
            Series("added", "ms", -1, tuple(one["added"] for one in found)),
            Series("answers lost", "", -1, tuple(one["lost"] for one in found)),
            Series("answers", "1/s", 1, tuple(one["rate"] for one in found)),
        ],
        {"requests": requests, "kills": kills, "clients": clients},
        {"killed": sum(one["killed"] for one in found), "asked_again": sum(one["again"] for one in found)},
    )


def _measured(requests: int, kills: int, clients: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, _process(_ollama) as (straight, _):
        settings = Settings()
        settings.teacher.model, settings.capture.gathered = f"ollama:{MODEL}", True
        run = Run.create(Path(folder) / "run", settings)
        with _process(_proxy, run.path, straight, 0) as (through, _), httpx.Client(timeout=60) as client:
            pairs = [
                [1000 * _first_token(client, url, f"Warm {i}?") for url in (straight, through)]
                for i in range(WARM + ASKED)
            ][WARM:]
        port, started, killed = httpx.URL(through).port or 0, time.perf_counter(), 0
        crowd = _Crowd(through, requests, clients)
        while not crowd.done:
            with _process(_proxy, run.path, straight, port) as (_, process):
                crowd.wait((killed + 1) * requests / (kills + 1) if killed < kills else requests)
                if not crowd.done:
                    process.kill()
                    killed += 1
        taken = time.perf_counter() - started
        with TraceStore(run.traces, readonly=True) as store:
            kept = {prompt for _, prompt, _ in store.asked()}
        return {
            "straight": statistics.median(one for one, _ in pairs),
            "through": statistics.median(other for _, other in pairs),
            "added": statistics.median(other - one for one, other in pairs),
            "lost": len(crowd.given - kept),
            "rate": requests / taken,
            "killed": killed,
            "again": crowd.again,
        }


def _first_token(client: httpx.Client, url: str, prompt: str) -> float:
    """Seconds until the first line of an answer that is then read to its end."""
    started = time.perf_counter()
    with client.stream("POST", f"{url}/api/generate", json={"model": MODEL, "prompt": prompt}) as answer:
        lines = answer.iter_lines()
        next(lines)
        taken = time.perf_counter() - started
        for _ in lines:
            pass
    return taken


class _Crowd:
    """Several who ask at once, each question until it is answered whole. given: prompts that were."""

    def __init__(self, url: str, requests: int, clients: int) -> None:
        self.url, self.requests, self.given, self.again = url, requests, set[str](), 0
        self._left, self._lock = iter(range(requests)), threading.Lock()
        self._pool = ThreadPoolExecutor(clients)
        self._asking = [self._pool.submit(self._ask) for _ in range(clients)]

    @property
    def done(self) -> bool:
        return len(self.given) == self.requests

    def wait(self, count: float) -> None:
        """Until so many have been given."""
        while len(self.given) < count:
            if any(one.done() and one.exception() for one in self._asking):
                raise DistillError("the benchmark's clients failed") from next(filter(None, map(_why, self._asking)))
            time.sleep(0.001)

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while True:
                with self._lock:
                    number = next(self._left, None)
                if number is None:
                    return
                while not self._answered(client, f"Question number {number}?"):
                    time.sleep(0.02)

    def _answered(self, client: httpx.Client, prompt: str) -> bool:
        try:
            body = {"model": MODEL, "prompt": prompt, "options": {"num_predict": SHORT}}
            answer = client.post(f"{self.url}/api/generate", json=body)
            whole = answer.is_success and json.loads(answer.text.splitlines()[-1])["done"]
        except (httpx.HTTPError, ValueError, IndexError, KeyError):
            whole = False
        with self._lock:
            if whole:
                self.given.add(prompt)
            else:
                self.again += 1
        return bool(whole)


def _why(one: Any) -> BaseException | None:
    return one.exception() if one.done() else None


@contextlib.contextmanager
def _process(work: Callable[..., None], *args: Any) -> Generator[tuple[str, BaseProcess]]:
    """A server in a process of its own, killed when it is left; yields its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args), daemon=True)
    process.start()
    try:
        if not ours.poll(60):
            raise DistillError("the benchmark's server did not start within 60 s; try again on a quieter machine")
        yield ours.recv(), process
    finally:
        process.kill()
        process.join(10)


def _proxy(pipe: Connection, path: Path, upstream: str, port: int) -> None:
    run = Run.open(path)
    with (
        bind("127.0.0.1", port, False) as listening,
        Keeper(run, OllamaTeacher(MODEL, host=upstream), silent) as keeper,
    ):
        pipe.send(url_of(listening))
        serve(Relay(Address(upstream), keeper, Allowed()).app(), listening)


def _ollama(pipe: Connection) -> None:
    """Streams, a line a token; with 20 alternatives each where they are asked for."""
    answer = told(0.0)
    entries = answer.pop("logprobs")
    head = {"model": MODEL, "created_at": "2026-01-01T00:00:00Z"}
    plain = [{**head, "response": entry["token"], "done": False} for entry in entries]
    soft = [{**line, "logprobs": [entry]} for line, entry in zip(plain, entries, strict=True)]
    lines = {want: [json.dumps(line).encode() + b"\n" for line in those] for want, those in ((0, plain), (1, soft))}
    end = json.dumps({**head, **answer, "response": ""}).encode() + b"\n"

    async def say(wanted: bool, most: int | None) -> AsyncGenerator[bytes]:
        await asyncio.sleep(FIRST)
        for line in lines[wanted][:most]:
            yield line
        yield end

    async def generate(request: Request) -> Response:
        with contextlib.suppress(ClientDisconnect):  # the proxy was killed
            body = await request.json()
            said = say(bool(body.get("logprobs")), body.get("options", {}).get("num_predict"))
            return StreamingResponse(said, media_type="application/x-ndjson")
        return Response()

    async def known(request: Request) -> Response:
        return JSONResponse(METADATA[request.url.path])

    routes = [Route(path, known, methods=["GET", "POST"]) for path in METADATA]
    with bind("127.0.0.1", 0, False) as listening:
        pipe.send(url_of(listening))
        serve(Starlette(routes=[*routes, Route("/api/generate", generate, methods=["POST"])]), listening)
