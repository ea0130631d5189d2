"""The page at the server's address: what it is made of, and what its users say of answers.

All else that it shows it asks of Ollama's API, as any client would.
"""

import asyncio
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from distill.dream import view
from distill.errors import BadInput
from distill.serve.fields import ApiError
from distill.serve.http import answer, body_of
from distill.serve.ollama_api import named, shelf_of, turns_of
from distill.serve.reply import as_read
from distill.tokens.chat import Message

HERE = Path(__file__).parent
FILES = {
    "/": (HERE / "page.html", "text/html"),
    "/page.js": (HERE / "page.js", "text/javascript"),
    "/page.css": (HERE / "page.css", "text/css"),
    "/dreams.css": (Path(view.__file__).parent / "page.css", "text/css"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


async def file(request: Request) -> Response:
    """The page for who reads pages; programs are told what Ollama tells them."""
    path = request.url.path
    if path == "/" and "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running", headers={"vary": "accept"})
    place, kind = FILES[path]
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Response(place.read_bytes(), headers=headers | {"vary": "accept"}, media_type=kind)


async def feedback(request: Request) -> Response:
    """What is thought of an answer: the body of /api/chat up to it, `thinking`, `content` and `done_reason` of what was
    said, a `verdict`, and with "better" what should have been said."""
    body = await body_of(request)
    served = shelf_of(request).find(named(body))
    if served.offer.keep is None:
        raise ApiError(400, f"{served.name}: only a run keeps feedback, and a bundle is none")
    loaded = await served.acquire()
    try:
        messages, pictures = turns_of(body, served)
        read = await asyncio.to_thread(as_read, loaded.student, messages, pictures)
        turns: list[Message] = [{"role": turn["role"], "content": turn["content"]} for turn in read]
        if served.system and not any(turn["role"] == "system" for turn in turns[:1]):
            turns.insert(0, {"role": "system", "content": served.system})
        thinking, content, verdict, better = map(body.text, ("thinking", "content", "verdict", "better"))
        cut = body.text("done_reason") == "length"
        await asyncio.to_thread(served.offer.keep, turns, thinking, content, verdict, better, cut)
    except BadInput as error:
        raise ApiError(400, str(error)) from error
    finally:
        served.release(None)
    return answer({"status": "success"})
