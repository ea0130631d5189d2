"""Students that are served: asked within the process, or over a socket, and one that sees."""

import asyncio
import base64
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette

from bundle.load import Student
from distill.backbone.model import Backbone
from distill.config import ImageTokenizerConfig
from distill.mining.triplets import Triplet
from distill.serve.listen import bind, url_of
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import build_codebook
from distill.vision.codebook import PictureCodebook
from distill.vision.image_tokenizer import ImageTokenizer
from distill.vision.pictures import png
from distill.vision.seeing import looked_at

T = TypeVar("T")


@asynccontextmanager
async def client(app: Starlette, **how: Any) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:11435", timeout=60, **how) as asked:
        yield asked


def asking(app: Starlette, ask: Callable[[httpx.AsyncClient], Awaitable[T]], **how: Any) -> T:
    async def run() -> T:
        async with client(app, **how) as asked:
            return await ask(asked)

    return asyncio.run(run())


def post(app: Starlette, path: str, body: object, **how: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    return asking(app, lambda asked: asked.post(path, content=content), **how)


@contextmanager
def listening(app: Starlette) -> Iterator[str]:
    """Its address; it ends with the block, and waits for nobody."""
    place = bind("127.0.0.1", 0, False)
    config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    yield url_of(place)
    server.should_exit = True
    thread.join()


def seeing(model: Backbone, tokenizer: StudentTokenizer, folder: Path) -> Student:
    """A student with eyes: it knows a red ball from a blue street."""
    vision = ImageTokenizerConfig("lite", embedding_dim=0, image_size=16)
    triplet = Triplet("a ball", "release", "the street", "causal", 0, "0", 0, "dream")
    codebook, _ = build_codebook([triplet], size=8)
    codebook.save(folder)
    views = [view for colour in ("red", "blue", "white") for view in looked_at(Image.new("RGB", (32, 32), colour))]
    labels = [["a ball"]] * 5 + [["the street"]] * 5 + [list[str]()] * 5
    embedded = np.stack([one.numpy() for one in ImageTokenizer(vision).stream(views) if one is not None])
    PictureCodebook.learn(codebook, vision, embedded, labels).save(folder)
    return Student("seer", model, tokenizer, folder=folder)


def coloured(colour: str) -> str:
    """A picture in base64."""
    return base64.b64encode(png(Image.new("RGB", (32, 32), colour))).decode()
