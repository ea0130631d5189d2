"""An Ollama server for tests: real HTTP, answers as recorded from a real one (tests/fixtures/ollama).

    with replay() as server: …                          the recorded exchanges, byte for byte of JSON
    with timed(slots=4, seconds=0.05) as server: …      answers after a fixed time, N at once, the rest queue
    with engine({"smollm2:135m": gguf}) as server: …    a real model behind Ollama's wire format

`server.url` is the host to give a client, `server.requests` what came in, `server.fail(...)` breaks things.
"""

import collections
import contextlib
import json
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    json: Any
    """The parsed body, or None where it is empty or no JSON."""


@dataclass
class Reply:
    """`stream` (JSON values, one a line) takes the place of `body`. `unread`: the quirk of POST /api/blobs."""

    status: int = 200
    content_type: str = ""
    body: bytes = b""
    stream: Iterable[Any] | None = None
    unread: bool = False


def reply(value: Any, status: int = 200, content_type: str = JSON) -> Reply:
    return Reply(status, content_type, dumps(value))


def error(status: int, message: str, content_type: str = JSON) -> Reply:
    return reply({"error": message}, status, content_type)


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Backend(Protocol):
    """Who knows the answers. Called from many threads at once."""

    def answer(self, request: Request) -> Reply: ...

    def knows_blob(self, path: str) -> bool:
        """Whether POST to this path is answered before its body is read."""
        ...

    def close(self) -> None: ...


@dataclass
class Failure:
    kind: str
    times: int
    path: str
    seconds: float = 0.0


@dataclass
class FakeOllama:
    """A running server."""

    url: str
    requests: list[Request] = field(default_factory=list[Request])
    old: bool = False
    """Behave as Ollama 0.12.10, which ignores `logprobs`."""
    afar: bool = False
    """Name files that aren't on this machine."""
    failures: list[Failure] = field(default_factory=list[Failure])
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, kind: str, *, times: int = 1, path: str = "/api/generate", seconds: float = 0.0) -> None:
        """Break the next `times` requests to `path`: "drop" (the connection), "503", "loading", "html", or
        "slow" (an answer `seconds` late)."""
        assert kind in ("drop", "503", "loading", "html", "slow")
        self.failures.append(Failure(kind, times, path, seconds))

    def asked(self, path: str) -> list[Any]:
        """JSON bodies of the requests that came to a path."""
        return [request.json for request in self.requests if request.path == path]

    def next_failure(self, path: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.path == path and failure.times > 0:
                    failure.times -= 1
                    return failure
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up on what it didn't like is no error of the server's to be printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(backend: Backend, state: FakeOllama) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = 1 << 16

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do(self) -> None:
            early = self.command == "POST" and backend.knows_blob(self.path)
            body = b"" if early else self.read_body()
            try:
                parsed = json.loads(body) if body else None
            except ValueError:
                parsed = None
            request = Request(self.command, self.path, body, parsed)
            with state.lock:
                state.requests.append(request)
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
            try:
                self.respond(request, early)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with state.lock:
                    state.in_flight -= 1

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do  # noqa: N815

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def respond(self, request: Request, early: bool) -> None:
            failure = state.next_failure(request.path)
            if failure is None:
                return self.send(backend.answer(request), early)
            match failure.kind:
                case "drop":
                    self.close_connection = True
                case "503":
                    self.send(error(503, "server busy, please try again.  maximum pending requests exceeded"))
                case "loading":
                    self.send(error(500, "llm server loading model"))
                case "html":
                    self.send(Reply(200, "text/html", b"<html>A proxy was here</html>"))
                case _:
                    time.sleep(failure.seconds)
                    self.send(backend.answer(request))

        def send(self, reply: Reply, early: bool = False) -> None:
            self.send_response(reply.status)
            if reply.content_type:
                self.send_header("Content-Type", reply.content_type)
            if early:
                self.send_header("Connection", "close")
                self.close_connection = True
            if reply.stream is None:
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply.body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in reply.stream:
                data = dumps(line) + b"\n"
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    return Handler


@contextlib.contextmanager
def serve(backend: Backend) -> Generator[FakeOllama]:
    """The server around any backend, on a free port of this machine."""
    state = FakeOllama(url="")
    server = _Server(("127.0.0.1", 0), _handler(backend, state))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    if hasattr(backend, "state"):
        backend.state = state  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        backend.close()


@contextlib.contextmanager
def replay(names: Iterable[str] | None = None) -> Generator[FakeOllama]:
    """Recorded exchanges (all, or those named); what was never recorded gets 404."""
    from support.recorded import Replay, recorded

    chosen = None if names is None else set(names)
    with serve(Replay([e for e in recorded() if chosen is None or e["name"] in chosen])) as server:
        yield server


@contextlib.contextmanager
def timed(slots: int, seconds: float) -> Generator[FakeOllama]:
    """/api/generate takes `seconds` of one of `slots`; the answer depends on prompt and seed only."""
    from support.recorded import Timed

    with serve(Timed(slots, seconds)) as server:
        yield server


@contextlib.contextmanager
def engine(models: Mapping[str, Path], *, slots: int = 1, threads: int = 1) -> Generator[FakeOllama]:
    """Models by name, answering through llama.cpp; more can be created through the API."""
    from support.fake_engine import Engine

    with serve(Engine(collections.OrderedDict(models), slots=slots, threads=threads)) as server:
        yield server


@contextlib.contextmanager
def dreaming_ollama(gguf: Path) -> Generator[FakeOllama]:
    """A student as "dreamer", behind its own template, and as "plain", behind one that knows no thinking."""
    import ollama

    from distill.tokens.chat import go_template

    with engine({"plain": gguf}) as server:
        client = ollama.Client(server.url)
        client.create("dreamer", files={"x.gguf": client.create_blob(gguf)}, template=go_template())
        yield server
