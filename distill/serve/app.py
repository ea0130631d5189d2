"""The server as an ASGI application: which path is answered by what, and how errors are told."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from distill.errors import DistillError
from distill.serve import ollama_api, openai_api, page
from distill.serve.fields import ApiError
from distill.serve.guard import Allowed, Guard
from distill.serve.http import Gone, answer
from distill.serve.shelf import Shelf

Endpoint = Callable[[Request], Awaitable[Response]]
GET: dict[str, Endpoint] = {
    **dict.fromkeys(page.FILES, page.file),
    "/api/tags": ollama_api.tags,
    "/api/ps": ollama_api.ps,
    "/api/version": ollama_api.version,
    "/v1/models": openai_api.models,
    "/v1/models/{name:path}": openai_api.model,
}
POST: dict[str, Endpoint] = {
    "/feedback": page.feedback,
    "/api/generate": ollama_api.generate,
    "/api/chat": ollama_api.chat,
    "/api/show": ollama_api.show,
    "/api/embed": ollama_api.embeddings,
    "/api/embeddings": ollama_api.embeddings,
    "/v1/chat/completions": openai_api.chat,
    "/v1/completions": openai_api.completions,
    "/v1/embeddings": openai_api.embeddings,
    **dict.fromkeys(("/api/create", "/api/copy", "/api/pull", "/api/push"), ollama_api.unchangeable),
}
SAID = {404: "404 page not found", 405: "405 method not allowed"}


async def _told(request: Request, error: Exception) -> Response:
    """Every error in the words of the API that was asked."""
    status, message = 500, "something went wrong; the server's log tells more"
    if isinstance(error, Gone):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        return PlainTextResponse(SAID.get(error.status_code, error.detail), error.status_code)
    if isinstance(error, ApiError | DistillError):
        status, message = getattr(error, "status", 500), str(error)
    return (
        openai_api.fault(status, message) if request.url.path.startswith("/v1") else answer({"error": message}, status)
    )


def create_app(shelf: Shelf, allowed: Allowed | None = None) -> Starlette:
    """Serves what is on the shelf, and closes it in the end."""
    allowed = allowed or Allowed()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        for served in shelf.students.values():
            served.begin()
        yield
        shelf.close()

    routes = [
        *(Route(path, endpoint, methods=["GET"]) for path, endpoint in GET.items()),
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in POST.items()),
        Route("/api/delete", ollama_api.unchangeable, methods=["DELETE"]),
    ]
    middleware = [Middleware(Guard, allowed, page.FILES)]
    if allowed.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=allowed.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    kinds = (ApiError, DistillError, Gone, HTTPException, Exception)
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=dict.fromkeys(kinds, _told)
    )
    app.state.shelf = shelf
    return app
