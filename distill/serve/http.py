"""What both APIs have in common: bodies read with patience that ends, replies as long as somebody listens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distill.serve.fields import ApiError, Fields, parse

T = TypeVar("T")
LARGEST = 32 << 20
"""Bytes of a request's body."""
PATIENCE = 30.0
"""Seconds that the next part of a request, or of a reply's way to the client, may take."""
ENDINGS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Characters that readers of lines, such as httpx, take for a line's end."""
NDJSON, JSON, SSE = "application/x-ndjson", "application/json; charset=utf-8", "text/event-stream"


class Gone(Exception):
    """The client went."""


def dumps(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(ENDINGS).encode()


def answer(value: object, status: int = 200, kind: str = JSON) -> Response:
    return Response(dumps(value), status, {"content-type": kind})


async def body_of(request: Request) -> Fields:
    """Raises ApiError: as `bytes_of`, and 400 for no object in JSON; Gone."""
    return parse(await bytes_of(request))


async def bytes_of(request: Request) -> bytes:
    """A request's body. Raises ApiError: 413 where it is too large, 408 where it doesn't come; Gone."""
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > LARGEST:
        raise ApiError(413, "http: request body too large")
    parts, size, more = list[bytes](), 0, True
    while more:
        try:
            async with asyncio.timeout(PATIENCE):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(408, "the request's body didn't come") from None
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), bool(message.get("more_body"))
        if size > LARGEST:
            raise ApiError(413, "http: request body too large")
    return b"".join(parts)


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """What the work gives. Where the client goes before, the work is cancelled; raises Gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


class Streamed(Response):
    """Lines as they come, until they end or the client goes; then `close` is called, whatever happened."""

    def __init__(self, lines: AsyncGenerator[bytes], kind: str, close: Callable[[], None]) -> None:
        super().__init__(media_type=kind)
        del self.headers["content-length"]
        self.headers["content-type"] = kind
        self._lines, self._close = lines, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_there(receive, self._send(send))
        except (Gone, TimeoutError):
            pass
        finally:
            await self._lines.aclose()
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            async with asyncio.timeout(PATIENCE):
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def roles(messages: list[Fields]) -> list[Any]:
    """Turns, each of a role that there is. Raises ApiError 400."""
    found: list[Any] = []
    for fields in messages:
        role = {"developer": "system"}.get(fields.text("role"), fields.text("role"))
        if role not in ("system", "user", "assistant", "tool"):
            raise ApiError(400, f"{fields.where}role: is one of system, user, assistant and tool")
        found.append(role)
    return found
