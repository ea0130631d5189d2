"""A proxy before an Ollama: what programs ask goes there and back, and what can be learned of it is kept.

Nothing that goes wrong here is the program's: it gets what Ollama answers.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from distill.address import Address
from distill.serve.exchange import ASKED, OPENAI, PATHS, Answer, Passed, Question, question_of
from distill.serve.fields import ApiError, Fields, parse
from distill.serve.gathering import Keeper
from distill.serve.guard import Allowed, Guard
from distill.serve.http import LARGEST, Gone, Streamed, answer, bytes_of, while_there
from distill.teacher.connection import way_to

if TYPE_CHECKING:
    from distill.serve.cascade import Cascade

OFF, SWITCH = "/off", "x-dream-gather"
"""A path's beginning, and a header (`off`), by which a program says that nothing of it is to be kept."""
PATIENCE = 3600.0
"""Seconds that Ollama may say nothing: the programs before it have patience of their own."""
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "content-length",
    "date",
    "server",
}
"""Headers that hold for one connection, or that each server writes itself."""


class Relay:
    """upstream: the Ollama. allowed: who may ask here. cascade: who answers first, if anybody."""

    def __init__(self, upstream: Address, keeper: Keeper, allowed: Allowed, cascade: "Cascade | None" = None) -> None:
        self.upstream, self.keeper, self.allowed, self.cascade = upstream, keeper, allowed, cascade
        self._client = httpx.AsyncClient(**way_to(upstream, PATIENCE, "OLLAMA_API_KEY"))

    def app(self) -> Starlette:
        middleware = [Middleware(Guard, self.allowed, ())]
        if self.allowed.origins:
            cors = Middleware(
                CORSMiddleware, allow_origins=self.allowed.origins, allow_methods=METHODS, allow_headers=["*"]
            )
            middleware.insert(0, cors)

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncGenerator[None]:
            async with self._client:
                yield

        async def told(_: Request, error: Exception) -> Response:
            if isinstance(error, Gone):
                return Response(status_code=499)
            status = getattr(error, "status", 502)
            why = str(error) if isinstance(error, ApiError) else f"no Ollama answers at {self.upstream}: {error}"
            return answer({"error": why}, status)

        handlers: dict[Any, Any] = dict.fromkeys((ApiError, Gone, httpx.RequestError), told)
        route = Route("/{path:path}", self._relay, methods=METHODS)
        return Starlette(routes=[route], middleware=middleware, lifespan=lifespan, exception_handlers=handlers)

    async def _relay(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        off = request.headers.get(SWITCH, "").strip().lower() == "off" or path.startswith(f"{OFF}/")
        path = path.removeprefix(OFF) if path.startswith(f"{OFF}/") else path
        told = request.headers.get("content-length", "")
        if path.startswith("/api/blobs/") or (told.isdigit() and int(told) > LARGEST):
            return self._streamed(await self._ask(request, path, request.stream()), b"")
        body = await bytes_of(request)
        question = asks = None
        if path in PATHS and request.method == "POST":
            question, asks = self._read(path, body, off)
        if question and asks and self.cascade and path != OPENAI:
            try:
                if found := await while_there(request.receive, self.cascade.answer(path, parse(body), question)):
                    self.keeper.passed["answered by the student"] += 1
                    found.headers[SWITCH] = "student"
                    return found
            except Gone:
                raise
            except Exception as error:
                self.keeper.lose(error)
        sent = body.rstrip()[:-1] + ASKED if asks else body
        response = await while_there(request.receive, self._ask(request, path, sent, plain=question is not None))
        if asks and response.is_error:  # it may be what we asked for besides
            await response.aclose()
            asks = False
            response = await while_there(request.receive, self._ask(request, path, body))
        if question is None or response.is_error:
            return self._streamed(response, b"off" if off else b"")
        return self._streamed(response, b"on", self._lines(response, Answer(path, bool(asks)), question))

    def _read(self, path: str, body: bytes, off: bool) -> tuple[Question | None, bool]:
        """What is to be kept, if anything; whether soft targets have to be asked for."""
        try:
            if off:
                raise Passed("switched off by the program")
            fields: Fields = parse(body)
            question = question_of(path, fields, self.keeper.model)
            return question, not fields.values.get("logprobs")
        except (Passed, ApiError) as error:
            why = str(error) if isinstance(error, Passed) else "not to be read"
        except Exception as error:
            return self.keeper.lose(error), False
        self.keeper.passed[why] += 1
        return None, False

    async def _ask(self, request: Request, path: str, content: Any, plain: bool = False) -> httpx.Response:
        """plain: the answer is to be read here, so that it mustn't be compressed."""
        left_out = HOP | {SWITCH, "origin"} | ({"authorization"} if self.allowed.token else set())
        headers = {"accept-encoding": "identity"}
        headers |= {name: value for name, value in request.headers.items() if name not in left_out}
        if plain:
            headers["accept-encoding"] = "identity"
        if not isinstance(content, bytes) and (size := request.headers.get("content-length")):
            headers["content-length"] = size
        query = request.url.query
        asked = self._client.build_request(
            request.method, f"{self.upstream.url}{path}{query and f'?{query}'}", headers=headers, content=content
        )
        return await self._client.send(asked, stream=True, follow_redirects=False)

    def _streamed(self, response: httpx.Response, kept: bytes, lines: AsyncGenerator[bytes] | None = None) -> Response:
        found = Streamed(lines or _raw(response), "", lambda: None)
        found.status_code = response.status_code
        left_out = HOP - {"content-length"} if lines is None else HOP
        headers = [
            (name.lower(), value) for name, value in response.headers.raw if name.lower().decode() not in left_out
        ]
        found.raw_headers = headers + ([(SWITCH.encode(), kept)] if kept else [])
        return found

    async def _lines(self, response: httpx.Response, heard: Answer, question: Question) -> AsyncGenerator[bytes]:
        """The answer, whose end waits until it is kept."""
        whole = "json" in (kind := response.headers.get("content-type", "")) and "ndjson" not in kind
        rest = b""
        async with aclosing(_raw(response)) as parts:
            async for part in parts:
                *lines, rest = [rest + part] if whole else (rest + part).split(b"\n")
                shown = [await self._shown(line + b"\n", heard, question) for line in lines]
                if any(shown):
                    yield b"".join(shown)
        if rest:
            yield await self._shown(rest, heard, question)

    async def _shown(self, line: bytes, heard: Answer, question: Question) -> bytes:
        was = heard.done
        try:
            line = heard.line(line)
        except Exception as error:
            self.keeper.lose(error)
        if heard.done and not was:
            await self.keeper.keep(question, heard.told)
        return line


async def _raw(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Its bytes as they come. Raises Gone where it breaks off: so does what the program gets."""
    try:
        async for part in response.aiter_raw():
            yield part
    except httpx.HTTPError as error:
        raise Gone from error
    finally:
        await asyncio.shield(response.aclose())
