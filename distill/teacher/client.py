"""One server over HTTP: time-outs, retries, and errors said in our words."""

import contextlib
import json
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, ClassVar, Self, cast

import httpx

from distill.address import Address
from distill.errors import ModelNotFound, PromptRefused, TeacherError, TeacherUnavailable
from distill.teacher.connection import open_client, proxy_of

LONGEST_WAIT = 30.0
LONGEST_BUSY = 300.0
"""Seconds that one request waits in all for a server that says when it may be asked again."""
_TOO_LONG = re.compile("context|too long|too large", re.IGNORECASE)
"""What a refusal says that is the prompt's fault."""


class Client(ABC):
    """Calls to one host. What can pass (connection, time-out, 5xx, a model that is loading) is tried again
    `retries` times with exponential backoff and jitter, or when a busy server says, which counts as no try; what can't
    (400, 404, 501) is raised at once: ModelNotFound, PromptRefused, TeacherError; TeacherUnavailable where the host
    stays silent; AnswerBroken where an answer has no end.

    alone: whether nobody else could be asked instead; where somebody could, only a host that says that it is busy or
    loading is waited for. What servers say otherwise, and how it is mended, is a subclass's.
    """

    server: ClassVar[str]
    """What kind it is."""
    key: ClassVar[str]
    """The environment variable of what an `Authorization` header says."""
    start: ClassVar[str]
    """What to do where none answers; installed: where a model isn't there; longer: where a prompt is too long."""
    installed: ClassVar[str]
    longer: ClassVar[str]
    answers: ClassVar[tuple[str, ...]]
    """Where a model is asked."""

    def __init__(
        self, host: str, *, timeout: float = 300.0, retries: int = 5, backoff: float = 0.5, alone: bool = True
    ) -> None:
        """Raises BadInput for what is no address, and for a proxy or a certificate in its way that can't be used."""
        self.host = Address(host)
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.alone = alone
        self._client = open_client(self.host, timeout, self.key)

    def get(self, path: str) -> dict[str, Any]:
        return self._call("GET", path, None, retries=1)

    def post(self, path: str, body: dict[str, Any], *, retries: int | None = None) -> dict[str, Any]:
        """Raises, beside what every call does, AnswerBroken for an answer that isn't whole."""
        answer = self._call(
            "POST", path, self._asking(path, body), retries=self.retries if retries is None else retries
        )
        self._check_end(path, answer)
        return answer

    @contextlib.contextmanager
    def reading(self, path: str) -> Generator[None]:
        """Around what takes a reply apart: where it isn't made as its server's are, TeacherError says so."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise TeacherError(f"{self.host}: answers {path} with something that {self.server} wouldn't say") from error

    def _asking(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What is sent of a request."""
        return body

    def _read(self, content: bytes) -> dict[str, Any]:
        """Raises NO_JSON for what is no object."""
        return as_object(content)

    @abstractmethod
    def _check_end(self, path: str, last: dict[str, Any]) -> None:
        """Raises AnswerBroken where the last of an answer is none."""

    def _call(self, method: str, path: str, body: dict[str, Any] | None, *, retries: int) -> dict[str, Any]:
        problem: TeacherError | None = None
        tries, patience = 0, LONGEST_BUSY
        while tries <= retries:
            tries += 1
            try:
                answer = self._client.request(method, path, json=body)
                if not answer.is_error:
                    return self._read(answer.content)
                if not _can_pass(answer):
                    raise self._refusal(answer, path)
                problem = TeacherError(
                    f"{self.host}: answers {answer.status_code} to {path} ({_reason(answer)}) after {tries} tries; "
                    "see the server's log"
                )
                if not self.alone and not _is_busy(answer):
                    raise problem
                if retries and 0 < (told := _told_to_wait(answer)) <= patience:
                    tries, patience = tries - 1, patience - told
                    time.sleep(told * random.uniform(1.0, 1.1))  # not all at the same moment
                    continue
            except httpx.RequestError as error:
                problem = self._silent(error)
                if not self.alone:
                    raise problem from error
            except NO_JSON as error:
                raise self._no_json(path) from error
            if tries <= retries:
                time.sleep(min(LONGEST_WAIT, self.backoff * 2 ** (tries - 1)) * random.uniform(0.5, 1.0))
        assert problem is not None
        raise problem

    def _no_json(self, path: str) -> TeacherError:
        return TeacherError(f"{self.host}: answers {path} with something that is no JSON; is it {self.server}?")

    def _silent(self, error: Exception) -> TeacherUnavailable:
        proxy = proxy_of(self.host)
        through = f" through {proxy.told}" if proxy else ""
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return TeacherUnavailable(
                f"{self.host}: no answer{through} within {self.timeout:g} s; raise teacher.timeout, or ask for fewer "
                "tokens"
            )
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return TeacherUnavailable(
                f"{self.host}: its certificate isn't believed{through}; name the file of its authority in SSL_CERT_FILE"
            )
        if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return TeacherUnavailable(
                f"{self.host}: the connection broke{through} ({' '.join(str(error).split()) or type(error).__name__}); "
                "see the server's log, and whether its disk is full"
            )
        return TeacherUnavailable(f"{self.host}: no {self.server} answers there{through}; {self.start}")

    def _refusal(self, answer: httpx.Response, path: str) -> TeacherError:
        reason = _reason(answer)
        if answer.status_code == 404 and "not found" in reason:
            return ModelNotFound(f"{self.host}: {reason}; {self.installed}")
        told = f"{self.host}: refuses {path} ({answer.status_code}): {reason}"
        if path in self.answers and (answer.status_code == 413 or _TOO_LONG.search(reason)):
            return PromptRefused(f"{told}; {self.longer}")
        return TeacherError(told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()


def _reason(answer: httpx.Response) -> str:
    """What a refusal says, on one line."""
    try:
        told = answer.json()["error"]
        text = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, RecursionError, KeyError, TypeError):
        text = answer.text
    return " ".join(text.split())[:400] or answer.reason_phrase


def _is_busy(answer: httpx.Response) -> bool:
    return answer.status_code in (429, 503) or "loading" in _reason(answer).lower()


def _told_to_wait(answer: httpx.Response) -> float:
    """Whole seconds; 0 where a server says none."""
    told = answer.headers.get("retry-after", "").strip()
    return float(told) if re.fullmatch("[0-9]{1,9}", told) else 0.0


def _can_pass(answer: httpx.Response) -> bool:
    return _is_busy(answer) or (answer.status_code >= 500 and answer.status_code != 501)


NO_JSON = (ValueError, TypeError, RecursionError)
"""What the reader raises; the last for very deep brackets."""


def as_object(line: str | bytes) -> dict[str, Any]:
    """Raises NO_JSON for anything but a JSON object."""
    value = json.loads(line)
    if not isinstance(value, dict):
        raise TypeError(line)
    return cast("dict[str, Any]", value)
