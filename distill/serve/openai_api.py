"""OpenAI's API, as Ollama's own server speaks it: the dream is a message's `reasoning`."""

import base64
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from distill.errors import DistillError
from distill.serve.embedding import embed
from distill.serve.fields import ApiError, Fields, decoded
from distill.serve.form import ANY, Schema
from distill.serve.http import SSE, Streamed, answer, body_of, dumps, roles, while_there
from distill.serve.ollama_api import NO_PICTURES, named, shelf_of, think_of
from distill.serve.pieces import Entry, Piece, said
from distill.serve.reply import Asked, Options, Reply, logprobs_of, seed_of
from distill.serve.shelf import Served
from distill.teacher.protocol import MAX_TOP_LOGPROBS
from distill.tokens.chat import STOP, Message

KIND = "application/json"
TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_numbers = itertools.count(1)


def fault(status: int, message: str) -> Response:
    error = {"message": message, "type": TYPES.get(status, "api_error"), "param": None, "code": None}
    return answer({"error": error}, status, KIND)


def options_of(body: Fields, served: Served) -> Options:
    """Raises ApiError 400."""
    limit, stop = body.whole("max_completion_tokens"), body.texts("stop")
    limit = body.whole("max_tokens") if limit is None else limit
    if (body.whole("n") or 1) != 1:
        raise ApiError(400, "n: one answer a request; ask several times, each with a seed of its own")
    for name in ("frequency_penalty", "presence_penalty"):
        if body.number(name):
            raise ApiError(400, f"{name}: answers are drawn without penalties; leave it out, or send 0")
    warm, top_p = body.number("temperature"), body.number("top_p")
    return Options(
        min(max(served.offer.temperature if warm is None else warm, 0.0), 100.0),
        top_p=1.0 if top_p is None else min(max(top_p, 0.0), 1.0),
        seed=seed_of(body),
        limit=None if limit is None or limit < 0 else limit,
        stop=STOP if stop is None else (*STOP, *stop),
    )


def schema_in(wanted: Fields) -> Schema | None:
    """Of a `response_format`. Raises ApiError 400."""
    kind = wanted.text("type") or "text"
    if kind == "json_schema":
        return wanted.section("json_schema").section("schema").values or ANY
    if kind not in ("text", "json_object"):
        raise ApiError(400, "response_format.type: is text, json_object or json_schema")
    return ANY if kind == "json_object" else None


def content_of(fields: Fields, served: Served) -> tuple[str, list[bytes]]:
    """A string, or a list of parts that are text, or pictures for who sees: text and pictures. Raises ApiError 400."""
    if not isinstance(fields.values.get("content"), list):
        return fields.text("content"), []
    texts, pictures = list[str](), list[bytes]()
    for part in fields.objects("content"):
        kind = part.text("type")
        if "image" in kind and not served.sees:
            raise ApiError(400, NO_PICTURES)
        if kind == "text":
            texts.append(part.text("text"))
        elif kind == "image_url":
            pictures.append(picture_of(part))
        else:
            raise ApiError(400, f"{part.where}type: is text{' or image_url' * served.sees}")
    return "\n".join(texts), pictures


def picture_of(part: Fields) -> bytes:
    """The picture in a data: URL; nothing is fetched. Raises ApiError 400."""
    plain = isinstance(part.values.get("image_url"), str)
    url = part.text("image_url") if plain else part.section("image_url").text("url")
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ApiError(400, f"{part.where}image_url: is a picture's data:image/…;base64, URL; others aren't fetched")
    return decoded(data, f"{part.where}image_url")


@dataclass(frozen=True)
class Shape:
    """How a reply is told: of /v1/chat/completions, or of /v1/completions."""

    name: str
    chat: bool
    id: str
    created: int

    @classmethod
    def new(cls, name: str, chat: bool) -> "Shape":
        return cls(name, chat, f"{'chatcmpl' if chat else 'cmpl'}-{next(_numbers)}", int(time.time()))

    def told(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.name}
        return {**head, "system_fingerprint": "fp_dream", "choices": choices}

    def choice(self, pieces: Sequence[Piece], reason: str | None, chunk: bool, sent: int = 0) -> dict[str, Any]:
        """sent: characters of the text that came before."""
        content, thinking, entries = said(pieces)
        if self.chat:
            message = {"role": "assistant", "content": content, **({"reasoning": thinking} if thinking else {})}
            told: dict[str, Any] = {"delta" if chunk else "message": message}
            logprobs: dict[str, Any] = {"content": entries}
        else:
            told, logprobs = {"text": content}, completion_logprobs(entries, sent)
        return {"index": 0, **told, "finish_reason": reason, **({"logprobs": logprobs} if entries else {})}


def completion_logprobs(entries: Sequence[Entry], sent: int) -> dict[str, Any]:
    """As completions have always told them: lists side by side. sent: characters that came before."""
    texts = [entry["token"] for entry in entries]
    return {
        "tokens": texts,
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in entry.get("top_logprobs", ())} for entry in entries
        ],
        "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=sent)),
    }


def usage(reply: Reply) -> dict[str, int]:
    read, written = len(reply.prompt), len(reply.tokens)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def chat(request: Request) -> Response:
    body = await body_of(request)
    name = named(body)
    served = shelf_of(request).find(name)
    if body.array("tools") or body.array("functions"):
        raise ApiError(400, f"{name} does not support tools")
    turns = body.objects("messages")
    if not turns:
        raise ApiError(400, "messages: is empty; say something")
    said = [content_of(fields, served) for fields in turns]
    messages: list[Message] = [
        {"role": role, "content": text, "thinking": fields.text("reasoning")}
        for fields, role, (text, _) in zip(turns, roles(turns), said, strict=True)
    ]
    asked = Asked(messages, pictures=[pictures for _, pictures in said])
    effort = body.text("reasoning_effort") or body.section("reasoning").text("effort")
    think = think_of({"": None, "none": False}.get(effort, True), served, name)
    logprobs, top = logprobs_of(body)
    schema = schema_in(body.section("response_format"))
    options = replace(options_of(body, served), logprobs=logprobs, top_logprobs=top, schema=schema)
    return await _reply(request, body, served, Shape.new(name, chat=True), replace(asked, think=think), options)


async def completions(request: Request) -> Response:
    """As in Ollama, the prompt is a question: what comes is its answer, and the dream before it isn't told."""
    body = await body_of(request)
    name = named(body)
    served = shelf_of(request).find(name)
    prompts = body.texts("prompt") or []
    if len(prompts) != 1 or not prompts[0]:
        raise ApiError(400, "prompt: is one text that isn't empty")
    body.refuse("suffix", f"{name} does not support insert")
    top = body.whole("logprobs")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise ApiError(400, f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    options = replace(options_of(body, served), logprobs=top is not None, top_logprobs=top or 0)
    asked = Asked([{"role": "user", "content": prompts[0]}], think=think_of(None, served, name))
    return await _reply(request, body, served, Shape.new(name, chat=False), asked, options)


async def _reply(
    request: Request, body: Fields, served: Served, shape: Shape, asked: Asked, options: Options
) -> Response:
    streams, counts = body.flag("stream", False), body.section("stream_options").flag("include_usage", False)
    reply = await Reply.begin(served, asked, options)
    if streams:
        return Streamed(_events(reply, shape, counts), SSE, reply.close)
    pieces = shown(await reply.whole(request.receive), shape)
    choice = shape.choice(pieces, reply.reason, chunk=False)
    return answer({**shape.told([choice], chunk=False), "usage": usage(reply)}, kind=KIND)


def shown(pieces: list[Piece], shape: Shape) -> list[Piece]:
    return [piece for piece in pieces if shape.chat or piece.part == "content"]


async def _events(reply: Reply, shape: Shape, counts: bool) -> AsyncGenerator[bytes]:
    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + dumps({**shape.told(choices, chunk=True), **more}) + b"\n\n"

    sent = 0
    try:
        async for pieces in reply.pieces():
            events = list[bytes]()
            for piece in shown(pieces, shape):
                events.append(event([shape.choice([piece], None, chunk=True, sent=sent)]))
                sent += len(piece.text)
            if events:
                yield b"".join(events)
        yield event([shape.choice((), reply.reason, chunk=True)])
        if counts:
            yield event([], usage=usage(reply))
    except (ApiError, DistillError) as error:
        yield b"data: " + fault(500, str(error)).body + b"\n\n"
    yield b"data: [DONE]\n\n"


async def models(request: Request) -> Response:
    return answer({"object": "list", "data": [_model(one) for one in shelf_of(request).students.values()]}, kind=KIND)


async def model(request: Request) -> Response:
    return answer(_model(shelf_of(request).find(request.path_params["name"])), kind=KIND)


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": int(served.about.modified), "owned_by": "library"}


async def embeddings(request: Request) -> Response:
    body = await body_of(request)
    name, encoding = named(body), body.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise ApiError(400, "encoding_format: is float or base64")
    texts = body.texts("input")
    if not texts:
        raise ApiError(400, "invalid input")
    found = await while_there(request.receive, embed(shelf_of(request).find(name), texts, body))
    vectors = [
        vector if encoding == "float" else base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
        for vector in found.vectors
    ]
    data = [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(vectors)]
    counts = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return answer({"object": "list", "data": data, "model": name, "usage": counts}, kind=KIND)
