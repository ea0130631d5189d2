"""Ollama's API, as its own server answers (recorded exchanges: tests/fixtures/ollama)."""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from distill.errors import DistillError
from distill.serve.about import timestamp
from distill.serve.embedding import embed
from distill.serve.fields import FOREVER, ApiError, Fields, seconds
from distill.serve.http import NDJSON, Streamed, answer, body_of, dumps, roles, while_there
from distill.serve.pieces import Piece, said
from distill.serve.reply import Asked, Options, Reply
from distill.serve.shelf import Served, Shelf, tagged
from distill.tokens.chat import Message

VERSION = "0.33.0"
"""Of the API that is spoken: clients ask what they may use."""
LONGEST = 292 * 365.25 * 86400.0
"""Seconds of Go's longest duration: how "for ever" is told."""
NO_PICTURES = "this student reads no pictures"
READ_ONLY = "`dream serve` answers for the students that it was started with, and changes none"


def shelf_of(request: Request) -> Shelf:
    return request.app.state.shelf


def think_of(value: object, served: Served, name: str) -> bool:
    """Whether it shall dream: where it can, unless told not to. Raises ApiError 400."""
    if value is not None and not isinstance(value, bool) and value not in ("low", "medium", "high"):
        raise ApiError(400, 'invalid think value: must be "high", "medium", "low", true, or false')
    if value and not served.offer.dreams:
        raise ApiError(400, f'"{name}" does not support thinking')
    return served.offer.dreams and value is not False


@dataclass(frozen=True)
class Shape:
    """How a reply is told: of /api/chat, or of /api/generate."""

    name: str
    chat: bool

    def head(self, content: str, thinking: str, done: bool) -> dict[str, Any]:
        thought = {"thinking": thinking} if thinking else {}
        message = {"message": {"role": "assistant", "content": content, **thought}}
        told = message if self.chat else {"response": content, **thought}
        return {"model": self.name, "created_at": timestamp(time.time()), **told, "done": done}

    def piece(self, piece: Piece) -> dict[str, Any]:
        content, thinking, logprobs = said([piece])
        return self.head(content, thinking, False) | ({"logprobs": logprobs} if logprobs else {})

    def end(self, reply: Reply, pieces: Sequence[Piece], context: bool) -> dict[str, Any]:
        """pieces: what was not sent yet."""
        content, thinking, logprobs = said(pieces)
        return {
            **self.head(content, thinking, True),
            "done_reason": reply.reason,
            **({"context": reply.context} if context else {}),
            **reply.durations,
            **({"logprobs": logprobs} if logprobs else {}),
            **({"notes": reply.notes} if reply.notes else {}),
        }


async def generate(request: Request) -> Response:
    body = await body_of(request)
    name = body.text("model")
    served = shelf_of(request).find(name)
    refuse(body, name)
    pictures = pictures_of(body, served)
    prompt, raw, system = body.text("prompt"), body.flag("raw", False), body.text("system")
    before = body.array("context")
    if any(type(id) is not int for id in before):
        raise ApiError(400, "context: is an array of tokens")
    body.refuse("template", "another template can't be used; send the whole prompt with raw")
    if raw and (system or before):
        raise ApiError(400, "raw mode does not support template, system, or context")
    if raw and pictures:
        raise ApiError(400, "raw mode does not support images")
    think = think_of(body.values.get("think"), served, name)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    shown = [[]] * (len(messages) - 1) + [pictures]
    asked = Asked(messages, prompt if raw else None, before, think, body.flag("truncate", True), shown)
    return await _reply(request, body, served, Shape(name, chat=False), asked if prompt or pictures else None)


async def chat(request: Request) -> Response:
    body = await body_of(request)
    name = named(body)
    served = shelf_of(request).find(name)
    refuse(body, name)
    body.refuse("images", "belong into a message")
    think = think_of(body.values.get("think"), served, name)
    messages, pictures = turns_of(body, served)
    asked = Asked(messages, think=think, truncate=body.flag("truncate", True), pictures=pictures)
    return await _reply(request, body, served, Shape(name, chat=True), asked if messages else None)


def turns_of(body: Fields, served: Served) -> tuple[list[Message], list[list[bytes]]]:
    """A conversation, and the pictures of each of its turns. Raises ApiError 400."""
    turns = body.objects("messages")
    messages, pictures = list[Message](), list[list[bytes]]()
    for fields, role in zip(turns, roles(turns), strict=True):
        pictures.append(pictures_of(fields, served))
        messages.append({"role": role, "content": fields.text("content"), "thinking": fields.text("thinking")})
    return messages, pictures


def named(body: Fields) -> str:
    """The model asked for; older clients call it `name`."""
    if name := body.text("model") or body.text("name"):
        return name
    raise ApiError(400, "model is required")


def pictures_of(fields: Fields, served: Served) -> list[bytes]:
    """Files of pictures, in base64. Raises ApiError 400."""
    if not served.sees:
        fields.refuse("images", NO_PICTURES)
    return fields.files("images")


def refuse(body: Fields, name: str) -> None:
    """What a student can't do is refused, not passed over."""
    if body.array("tools"):
        raise ApiError(400, f"{name} does not support tools")
    if body.text("suffix"):
        raise ApiError(400, f"{name} does not support insert")


async def _reply(request: Request, body: Fields, served: Served, shape: Shape, asked: Asked | None) -> Response:
    """Without anything asked the student is only loaded, or unloaded."""
    keep, streams = seconds(body.values.get("keep_alive")), body.flag("stream", True)
    options = Options.read(body.section("options"), body, served.offer.temperature)
    if asked is None:
        if keep == 0:
            served.unload()
        else:
            await served.acquire()
            served.release(keep)
        return answer({**shape.head("", "", True), "done_reason": "unload" if keep == 0 else "load"})
    reply = await Reply.begin(served, asked, options)
    context = not shape.chat and asked.raw is None
    if streams:
        return Streamed(_lines(reply, shape, context), NDJSON, lambda: reply.close(keep))
    return answer(shape.end(reply, await reply.whole(request.receive, keep), context))


async def _lines(reply: Reply, shape: Shape, context: bool) -> AsyncGenerator[bytes]:
    try:
        async for pieces in reply.pieces():
            yield b"".join(dumps(shape.piece(piece)) + b"\n" for piece in pieces)
        yield dumps(shape.end(reply, (), context)) + b"\n"
    except (ApiError, DistillError) as error:
        yield dumps({"error": str(error)}) + b"\n"


async def embeddings(request: Request) -> Response:
    """/api/embed, and as it was asked before: /api/embeddings, one `prompt`."""
    body = await body_of(request)
    name, started = named(body), time.monotonic()
    served, old = shelf_of(request).find(name), request.url.path.endswith("embeddings")
    texts = [body.text("prompt")] if old else body.texts("input") or []
    alone = old or not isinstance(body.values.get("input"), list)  # of a list each has its vector, empty or not
    found = await while_there(request.receive, embed(served, [text for text in texts if text or not alone], body))
    if old:
        return answer({"embedding": found.vectors[0] if found.vectors else []})
    durations = {"total_duration": int((time.monotonic() - started) * 1e9), "load_duration": found.load}
    return answer({"model": name, "embeddings": found.vectors, **durations, "prompt_eval_count": found.tokens})


async def show(request: Request) -> Response:
    body = await body_of(request)
    name = named(body)
    served = shelf_of(request).find(tagged(name))
    return answer(served.about.show(served.system, served.words if body.flag("verbose", False) else None))


async def tags(request: Request) -> Response:
    served = sorted(shelf_of(request).students.values(), key=lambda one: -one.about.modified)
    return answer({"models": [one.about.tag(one.name) for one in served]})


async def ps(request: Request) -> Response:
    loaded = [one for one in shelf_of(request).students.values() if one.is_loaded]
    ends = [time.time() + LONGEST if one.expires == FOREVER else one.expires for one in loaded]
    return answer(
        {"models": [one.about.running(one.name, timestamp(end)) for one, end in zip(loaded, ends, strict=True)]}
    )


async def version(_: Request) -> Response:
    return answer({"version": VERSION})


async def unchangeable(request: Request) -> Response:
    """Creating, copying, pulling, pushing and deleting."""
    body = await body_of(request)
    if request.method == "DELETE":
        shelf_of(request).find(named(body))
    raise ApiError(501, READ_ONLY)
