"""One Ollama server over HTTP."""

import contextlib
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import httpx

from distill.errors import AnswerBroken, TeacherError
from distill.teacher.client import NO_JSON, Client, as_object

LOGPROBS_SINCE = (0, 12, 11)
"""The first Ollama that returns logprobs; older ones ignore the option."""

WHOLE = {"truncate": False, "shift": False}
"""Unset, Ollama drops the beginning of what is longer than the context, before and while it answers, without a word:
so a prompt that is too long is refused, and an answer ends (done_reason "length") where the context does."""

BYTES_FIELD = re.compile(rb',\s*"bytes":\s*\[[0-9,\s]*\]')
"""Repeats `token` in numbers, half of an answer's size. Inside a JSON string its quotes would be escaped."""


def version_tuple(version: str) -> tuple[int, ...]:
    """(0, 33, 0) of "0.33.0-rc2"; empty where it is no version."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(int(part) for part in found.groups()) if found else ()


class OllamaClient(Client):
    """Calls to one Ollama."""

    server = "Ollama"
    key = "OLLAMA_API_KEY"
    start = "start it with `ollama serve`, or give its address with --host"
    installed = "`ollama list` shows what is installed"
    longer = "shorten it, or raise teacher.context"
    answers = ("/api/generate", "/api/chat")

    def version(self) -> str:
        with self.reading("/api/version"):
            return str(self.get("/api/version")["version"])

    def models(self) -> list[dict[str, Any]]:
        """Installed models, as /api/tags lists them: each has a "name"."""
        with self.reading("/api/tags"):
            return [{**entry, "name": str(entry["name"])} for entry in self.get("/api/tags").get("models") or []]

    def show(self, model: str, *, verbose: bool = False) -> dict[str, Any]:
        return self.post("/api/show", {"model": model, "verbose": verbose}, retries=1)

    def _check_end(self, path: str, last: dict[str, Any]) -> None:
        """It breaks off where the model writes bytes that are no UTF-8, or its runner dies."""
        if path in self.answers and not (last.get("done") is True and last.get("done_reason")):
            raise AnswerBroken(f"{self.host}: breaks off {path} before its end; see the server's log")

    def _asking(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return {**WHOLE, **body} if path in self.answers else body

    def _read(self, content: bytes) -> dict[str, Any]:
        """Raises NO_JSON for what is no object."""
        return as_object(BYTES_FIELD.sub(b"", content))

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The values of a streamed answer, each as it comes. Raises as `lines` does, and where it breaks off."""
        last: dict[str, Any] = {}
        with contextlib.closing(self.lines(path, {**self._asking(path, body), "stream": True})) as lines:
            for last in lines:
                yield last
        self._check_end(path, last)

    def lines(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """JSON objects, one a line, each as it comes. Tried once: whoever measures must not count a wait.

        The time-out holds between two of them. Raises as `post` does.
        """
        try:
            with self._client.stream("POST", path, json=body) as answer:
                if answer.is_error:
                    answer.read()
                    raise self._refusal(answer, path)
                for line in filter(bytes.strip, _lines(answer.iter_bytes())):
                    value = as_object(line)
                    if "error" in value:
                        raise TeacherError(f"{self.host}: breaks off {path}: {value['error']}; see the server's log")
                    yield value
        except httpx.RequestError as error:
            raise self._silent(error) from error
        except NO_JSON as error:
            raise self._no_json(path) from error

    def send_blob(self, digest: str, file: Path) -> None:
        """Have the server hold a file, named by its SHA-256, if it doesn't already. Raises as `post` does.

        Asked first: posting what is there makes Ollama drop the connection.
        """
        path = f"/api/blobs/{digest}"
        try:
            answer = self._client.head(path)
            if answer.is_success:
                return
            with file.open("rb") as content:
                answer = self._client.post(path, content=content)
        except httpx.RequestError as error:
            raise self._silent(error) from error
        if answer.is_error:
            raise self._refusal(answer, path)


def _lines(parts: Iterable[bytes]) -> Generator[bytes]:
    """What stands between line feeds: for httpx U+2028, which JSON may hold, ends a line, too."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    yield rest


def blob_of(modelfile: str) -> str:
    """The weights' file in the Modelfile that /api/show tells: its first FROM that is no comment; a second one is the
    projector of a model that sees. "" where there is none, or an adapter lies over it."""
    lines = modelfile.splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith("FROM ")), None)
    if at is None or "".join(lines[at + 1 : at + 2]).startswith("ADAPTER "):
        return ""
    return lines[at].removeprefix("FROM ").strip().strip('"')
