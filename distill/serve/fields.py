"""What a request says, field by field: wrong types and impossible values are the client's to mend, in one line."""

import base64
import json
import math
import re
from typing import Any, NoReturn, cast

from distill.errors import BadInput
from distill.written import repaired


class ApiError(Exception):
    """Goes back to the client: its status, and what it says."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


KINDS: dict[type, str] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}

SYNTAX = {
    "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
    "Illegal trailing comma before end of object": "looking for beginning of object key string",
    "Expecting value": "looking for beginning of value",
    "Illegal trailing comma before end of array": "looking for beginning of value",
    "Expecting ',' delimiter": "after a value",
    "Expecting ':' delimiter": "after object key",
    "Extra data": "after top-level value",
}
"""Python's words for what is wrong with JSON → Go's."""


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def parse(body: bytes) -> "Fields":
    """The object that a body holds. Raises ApiError 400, as far as can be in the words of Ollama."""
    if not body.strip():
        raise ApiError(400, "missing request body")
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()):
            raise ApiError(400, "unexpected EOF") from error
        what = SYNTAX.get(error.msg, f"({error.msg})")
        raise ApiError(400, f"invalid character {text[error.pos]!r} {what}") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body can't be read: {str(error) or 'too deep'}") from error
    return Fields(value, "the body")


class Fields:
    """An object of a request. What is absent and what is null are the same. All raise ApiError 400."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ApiError(400, f"{where}: {KINDS[type(value)]} instead of an object")
        self.values = cast("dict[str, Any]", value)
        self.where = "" if where == "the body" else f"{where}."

    def _get(self, name: str, *kinds: type) -> Any:
        value = self.values.get(name)
        if value is not None and type(value) not in kinds:
            raise ApiError(400, f"{self.where}{name}: {KINDS[type(value)]} instead of {KINDS[kinds[0]]}")
        return value

    def text(self, name: str) -> str:
        return repaired(self._get(name, str) or "")

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, bool)
        return default if value is None else value

    def number(self, name: str) -> float | None:
        value = self._get(name, float, int)
        if value is None:
            return None
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found):
            raise ApiError(400, f"{self.where}{name}: the number is too large")
        return found

    def whole(self, name: str) -> int | None:
        value = self.number(name)
        if value is not None and abs(value) >= 2**63:
            raise ApiError(400, f"{self.where}{name}: the number is too large")
        return None if value is None else int(value)

    def array(self, name: str) -> list[Any]:
        return self._get(name, list) or []

    def section(self, name: str) -> "Fields":
        return Fields(self._get(name, dict) or {}, f"{self.where}{name}")

    def objects(self, name: str) -> "list[Fields]":
        return [Fields(value, f"{self.where}{name}[{i}]") for i, value in enumerate(self.array(name))]

    def texts(self, name: str) -> list[str] | None:
        """A string, or an array of them."""
        value = self._get(name, list, str)
        if value is None:
            return None
        values = [value] if isinstance(value, str) else cast("list[object]", value)
        return [self._text(name, i, text) for i, text in enumerate(values)]

    def _text(self, name: str, i: int, value: object) -> str:
        if not isinstance(value, str):
            raise ApiError(400, f"{self.where}{name}[{i}]: {KINDS[type(value)]} instead of a string")
        return repaired(value)

    def files(self, name: str) -> list[bytes]:
        """An array of files in base64."""
        return [decoded(text, f"{self.where}{name}[{i}]") for i, text in enumerate(self.texts(name) or ())]

    def refuse(self, name: str, why: str) -> None:
        """For what can't be done: anything but nothing is refused."""
        if self.values.get(name) not in (None, "", [], {}, False):
            raise ApiError(400, f"{self.where}{name}: {why}")


def decoded(text: str, where: str) -> bytes:
    """A file's bytes in base64. Raises ApiError 400."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ApiError(400, f"{where}: is no base64 ({error})") from error


UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
FOREVER = math.inf


def seconds(value: object) -> float | None:
    """A keep_alive: seconds, or Go's way of writing a duration ("1h30m"); less than none is for ever. None: not said.

    Raises ApiError 400.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ApiError(400, f"keep_alive: {KINDS[type(value)]} instead of seconds, or a duration such as 5m")
    if isinstance(value, str):
        sign, digits = (-1, value[1:]) if value.startswith("-") else (1, value)
        parts = re.findall(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)", digits)
        if digits != "0" and (not parts or "".join(map("".join, parts)) != digits):
            raise ApiError(400, f'time: invalid duration "{repaired(value)[:80]}"')
        value = sign * sum(float(number) * UNITS[unit] for number, unit in parts)
    return FOREVER if value < 0 or value > 1e9 else float(value)


def keep_alive_of(text: str) -> float:
    """The same, from a command line. Raises BadInput."""
    try:
        plain = text.lstrip("-").replace(".", "", 1).isdigit()
        found = seconds(float(text) if plain else text)
    except (ApiError, ValueError) as error:
        raise BadInput(f"--keep-alive {text}: is seconds, or a duration such as 5m") from error
    return FOREVER if found is None else found
