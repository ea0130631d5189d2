"""One exchange of a program with Ollama: what of it can be learned, and what the program sees of the answer.

Soft targets are asked for where the program didn't ask: `ASKED` is put at the end of its request, and what comes of it
is cut out of the answer, whose other bytes stay as they are.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from distill.serve.fields import Fields
from distill.serve.http import dumps
from distill.teacher.names import name_key
from distill.teacher.protocol import MAX_TOP_LOGPROBS, GenerateOptions
from distill.turns import ASSISTANT, MARKS, SYSTEM, USER, joined

GENERATE, CHAT, OPENAI = "/api/generate", "/api/chat", "/v1/chat/completions"
PATHS = (GENERATE, CHAT, OPENAI)
ASKED = b',"logprobs":true,"top_logprobs":%d}' % MAX_TOP_LOGPROBS
OTHERS = {"developer": SYSTEM}
ANY = 1 << 20
"""Stands for `num_predict` where no limit is said."""
_FIELD = re.compile(r',\s*"logprobs"\s*:\s*')
_READER = json.JSONDecoder()


class Passed(Exception):
    """This exchange isn't kept; says why, in a few words."""


@dataclass(frozen=True)
class Question:
    """options: as far as the program says, else Ollama's own. seeded: whether it says a seed."""

    prompt: str
    options: GenerateOptions
    seeded: bool


def question_of(path: str, body: Fields, model: str) -> Question:
    """What was asked of the model. Raises Passed, or ApiError for fields that are of the wrong kind."""
    if name_key(body.text("model")) != name_key(model):
        raise Passed("another model")
    if body.array("tools"):
        raise Passed("with tools")
    if body.values.get("format") or (body.values.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise Passed("held to a format")
    if path == GENERATE:
        if any(body.values.get(name) for name in ("raw", "suffix", "template", "context")):
            raise Passed("raw, or going on with something")
        spoken, pictures = [(SYSTEM, body.text("system")), (USER, body.text("prompt"))], body.array("images")
    else:
        turns = body.objects("messages")
        if any(isinstance(turn.values.get("content"), list) for turn in turns):
            raise Passed("in parts")
        pictures = [file for turn in turns for file in turn.array("images")]
        spoken = [(OTHERS.get(turn.text("role"), turn.text("role")), turn.text("content")) for turn in turns]
    if pictures:
        raise Passed("with pictures")
    system, prompt = _prompt(spoken)
    said = body if path == OPENAI else body.section("options")
    if said.values.get("stop"):  # where it ends isn't where the model would have
        raise Passed("with ends of the program's own")
    limit = (said.whole("max_completion_tokens") or said.whole("max_tokens")) if path == OPENAI else None
    limit, seed, think = limit or said.whole("num_predict"), said.whole("seed"), body.values.get("think")
    warm, top_p, top_k = said.number("temperature"), said.number("top_p"), said.whole("top_k")
    options = GenerateOptions(
        max_tokens=limit if limit and limit > 0 else ANY,
        temperature=0.8 if warm is None else warm,
        top_k=40 if top_k is None else top_k,
        top_p=0.9 if top_p is None else top_p,
        seed=seed or 0,
        system=system,
        think=("true" if think is True else str(think)) if think else "",
    )
    return Question(prompt, options, seed is not None)


def _prompt(spoken: list[tuple[str, str]]) -> tuple[str, str]:
    """System message and prompt of (role, text) turns. Raises Passed."""
    system, turns = (spoken[0][1], spoken[1:]) if spoken and spoken[0][0] == SYSTEM else ("", spoken)
    if [role for role, _ in turns] != [USER, *[ASSISTANT, USER] * (len(turns) // 2)]:
        raise Passed("turns out of order")
    if not turns[-1][1].strip():
        raise Passed("without a prompt")
    if any(mark in text for mark in MARKS for _, text in turns):
        raise Passed("holding marks of turns")
    return system, joined(turns)


class Answer:
    """What comes back, line by line. hide: what was told of tokens is not for the program to see.

    done: its end is there. told: all that is known of it, as /api/generate would tell it whole.
    """

    def __init__(self, path: str, hide: bool) -> None:
        self._path, self._hide, self._sse, self._dropped = path, hide, False, False
        self.done = False
        self.told: dict[str, Any] = {"response": "", "thinking": "", "logprobs": []}

    def line(self, raw: bytes) -> bytes:
        """A line, with its end, as the program shall see it; nothing where only we asked for it."""
        data = raw.removeprefix(b"data: ")
        self._sse = self._sse or len(data) < len(raw)
        if not data.strip() or data.startswith(b"[DONE]"):
            dropped, self._dropped = self._dropped and not data.strip(), False
            return b"" if dropped else raw
        value = json.loads(data)
        said = self._take(value)
        if not self._hide:
            return raw
        if not said:
            self._dropped = self._sse
            return b""
        return raw[: len(raw) - len(data)] + without_logprobs(data.decode(), value, self._path)

    def _take(self, value: dict[str, Any]) -> bool:
        """Whether it says anything besides."""
        if self._path == OPENAI:
            choice = next(iter(value.get("choices") or []), None)
            if choice is None:
                return True  # usage, at the end
            message = choice.get("delta") or choice.get("message") or {}
            thinking, text = message.get("reasoning") or "", message.get("content") or ""
            entries, reason = (choice.get("logprobs") or {}).get("content"), choice.get("finish_reason")
        else:
            message = value.get("message") or {} if self._path == CHAT else value
            thinking, text = message.get("thinking") or "", message.get("content" if self._path == CHAT else "response")
            entries, reason = value.get("logprobs"), value.get("done_reason")
            self.told |= {name: value[name] for name in value if name == "context" or name.endswith("_duration")}
        self.told["response"] += text or ""
        self.told["thinking"] += thinking
        self.told["logprobs"] += entries or []
        if reason:
            self.done, self.told["done_reason"] = True, reason
        if message.get("tool_calls"):
            self.told["done_reason"] = "tools"
        return bool(text or thinking or reason or message.get("tool_calls") or "error" in value or entries is None)


def without_logprobs(text: str, value: dict[str, Any], path: str) -> bytes:
    """JSON, less what it tells of tokens: those bytes alone are cut out, where that can be done."""
    wanted = {name: each for name, each in value.items() if name != "logprobs"}
    if path == OPENAI:
        choices = cast("list[dict[str, Any]]", value.get("choices") or [])
        wanted["choices"] = [{name: each for name, each in one.items() if name != "logprobs"} for one in choices]
    if wanted == value:
        return text.encode()
    for field in _FIELD.finditer(text):
        cut = text[: field.start()] + text[_READER.raw_decode(text, field.end())[1] :]
        if json.loads(cut) == wanted:
            return cut.encode()
    return dumps(wanted) + b"\n" * text.endswith("\n")
