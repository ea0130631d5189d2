"""A teacher behind OpenAI's API: vLLM, llama-server, LM Studio, `dream serve`, or the public one.

Its answers carry logprobs by text and bytes, and no ids: a vocabulary, of `teacher.weights`, gives each its id.
"""

import difflib
import os
import re
import threading
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from distill.address import Address
from distill.config import TeacherSettings
from distill.errors import AnswerBroken, BadInput, ModelNotFound, TeacherError
from distill.events import Event, Listener, silent
from distill.run import fingerprint
from distill.teacher.client import Client
from distill.teacher.find_weights import open_given
from distill.teacher.gguf_file import read_metadata
from distill.teacher.gguf_tokenizer import CONTROL, Vocabulary
from distill.teacher.names import name_key
from distill.teacher.ollama_words import is_distribution, text_of
from distill.teacher.prompt_ids import PromptIds
from distill.teacher.protocol import (
    MAX_TOP_LOGPROBS,
    UNKNOWN_ID,
    GenerateOptions,
    Response,
    Teacher,
    TeacherInfo,
    TeacherTokenizer,
    TokenTargets,
)
from distill.teacher.targets import Position, apart, assemble, first_of, hard, respond
from distill.turns import messages

PUBLIC = "https://api.openai.com/v1"
CHAT, PLAIN = "/chat/completions", "/completions"
LOGPROBS = {"logprobs", "top_logprobs"}
OPTIONAL = ("top_logprobs", "logprobs", "seed", "temperature", "top_p")
"""What some servers refuse to be told: left out then, and said."""


class OpenAIClient(Client):
    """Calls to one server that speaks OpenAI's API."""

    server = "OpenAI-compatible server"
    key = "OPENAI_API_KEY"
    start = "start it, or give its address with --host (http://NAME:PORT/v1)"
    installed = "--teacher openai:MODEL names one that /v1/models lists"
    longer = "shorten it, or serve the model with more context"
    answers = (CHAT, PLAIN)

    def __init__(self, host: str, **how: Any) -> None:
        """An address without a path means its /v1. Raises as `Client` does."""
        super().__init__(host, **how)
        if self.host.url.count("/") == 2:
            self._client.base_url = f"{self.host.url}/v1"

    def names(self) -> list[str]:
        with self.reading("/models"):
            return [str(entry["id"]) for entry in self.get("/models")["data"]]

    def _check_end(self, path: str, last: dict[str, Any]) -> None:
        with self.reading(path):
            if path in self.answers and not last["choices"][0].get("finish_reason"):
                raise AnswerBroken(f"{self.host}: breaks off {path} before its end; see the server's log")


def open_teachers(model: str, settings: TeacherSettings, listen: Listener, context: int) -> list[Teacher]:
    """One for each host; without any $OPENAI_BASE_URL, else the public one. Raises what the weights' reader raises."""
    vocabulary = None
    if settings.weights:
        vocabulary = Vocabulary(open_given(settings.weights).tokenizer)
    weights = Path(settings.weights).expanduser()
    hosts = [_address(host) for host in settings.hosts or [os.environ.get("OPENAI_BASE_URL") or PUBLIC]]
    how: dict[str, Any] = {"timeout": settings.timeout, "retries": settings.retries, "alone": len(hosts) < 2}
    return [OpenAITeacher(model, OpenAIClient(host, **how), vocabulary, listen, weights) for host in hosts]


def _address(host: str) -> Address:
    """Ollama's port is meant nowhere here: raises BadInput where http:// or https:// is left out."""
    if "://" not in host:
        raise BadInput(f"{host!r}: write the whole address of a server that speaks OpenAI's API, http://NAME:PORT/v1")
    return Address(host)


class OpenAITeacher:
    """`openai:MODEL` at one host. Thread-safe. Soft targets need a server that tells logprobs, and a vocabulary."""

    slots: int | None = None

    def __init__(
        self,
        model: str,
        client: OpenAIClient,
        vocabulary: Vocabulary | None,
        listen: Listener = silent,
        weights: Path = Path(),
    ) -> None:
        self.model, self.host, self._weights = model, client.host, weights
        self._client, self._vocabulary, self._listen = client, vocabulary, listen
        self._lock = threading.Lock()
        self._info: TeacherInfo | None = None
        self._name = model
        self._most = MAX_TOP_LOGPROBS
        self._left_out: set[str] = set()
        self._room = "max_tokens"
        self._warned: set[str] = set()

    def describe(self) -> TeacherInfo:
        """Raises TeacherUnavailable, or ModelNotFound with the nearest names that the server lists.

        No digest tells which weights answer: the name stands for them.
        """
        with self._lock:
            if self._info is None:
                self._info = self._ask_who()
            info = self._info
        if self._vocabulary is None:
            self._warn(
                "vocabulary", "no vocabulary is known; traces get hard labels only (--teacher-weights names one)"
            )
        return info

    def _ask_who(self) -> TeacherInfo:
        names = self._client.names()
        listed = next((name for name in names if name_key(name) == name_key(self.model)), "")
        if not listed:
            near = difflib.get_close_matches(self.model, names, n=3, cutoff=0.4) or names[:5]
            raise ModelNotFound(f"{self.host}: has no model {self.model!r} (it lists: {', '.join(near) or 'none'})")
        self._name = listed
        who = fingerprint({"model": listed, "api": "openai"})
        return TeacherInfo(f"openai:{self.model}", listed, who, who, "openai", logprobs=True)

    def tokenizer(self) -> TeacherTokenizer | None:
        return None if self._vocabulary is None else self._vocabulary.tokenizer

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        top = self._top(options)
        answer = self._ask(prompt, options, {"logprobs": True, "top_logprobs": top} if top else {})
        with self._client.reading(CHAT):
            message = answer["choices"][0]["message"]
            inside, said = apart(text_of(message.get("content") or ""))
            thinking = text_of(message.get("reasoning") or message.get("reasoning_content") or "").strip() or inside
            return self._heard(answer["choices"][0], said, thinking, options)

    def go_on(self, prompt: str, begun: str, options: GenerateOptions) -> Response:
        """By /completions, after the chat template of the weights that `teacher.weights` names, a GGUF. Raises BadInput
        without."""
        top = self._top(options)
        answer = self._ask(
            self._render(prompt, options.system) + begun, options, {"logprobs": top} if top else {}, PLAIN
        )
        with self._client.reading(PLAIN):
            return self._heard(answer["choices"][0], text_of(answer["choices"][0]["text"]), "", options)

    @cached_property
    def _render(self) -> Callable[[str, str], str]:
        if self._vocabulary is None or not self._weights.is_file():
            text = f"openai:{self.model}: nobody knows its chat template; name its GGUF with --teacher-weights"
            raise BadInput(text)
        remedy = "name another GGUF of it with --teacher-weights"
        words = PromptIds(read_metadata(self._weights), self._vocabulary.tokenizer, str(self._weights), remedy)
        return partial(words.render, bare=False)

    def _top(self, options: GenerateOptions) -> int:
        return min(options.top_logprobs, MAX_TOP_LOGPROBS) if self._vocabulary else 0

    def _heard(self, choice: dict[str, Any], said: str, thinking: str, options: GenerateOptions) -> Response:
        top, stopped = self._top(options), choice["finish_reason"] == "stop"
        entries = _entries(choice.get("logprobs") or {})
        (said + thinking).encode()  # halves of surrogate pairs are no text
        tokens = self._targets(entries, said, stopped, top) if entries else None
        if top and said and tokens is None:
            lack = "its answers come without logprobs, or with some that don't spell them"
            self._warn("spelling", f"{lack}; those get hard labels only")
        reason = "stop" if stopped else "length"
        return respond(said, tokens, self._vocabulary, reason, {}, limit=options.max_tokens, thinking=thinking)

    def _targets(self, entries: list[dict[str, Any]], text: str, stopped: bool, width: int) -> TokenTargets | None:
        """What is told of the tokens that spell the answer, the last ones; EOS, which some don't tell, is put back."""
        assert self._vocabulary is not None
        spelled, sought = [self._printed(entry) for entry in entries], text.encode()
        start = first_of(spelled, len(sought))
        told = b"".join(spelled[start:])
        if not told.endswith(sought) or told.removesuffix(sought).strip():
            return None
        positions = list[Position]()
        for entry, printed in zip(entries[start:], spelled[start:], strict=True):
            i = self._id(entry)
            if i == UNKNOWN_ID and not printed:
                if not stopped or entry is not entries[-1]:
                    continue  # half of a character that another entry spells
                i = self._vocabulary.tokenizer.eos_id
            top = entry.get("top_logprobs") or []
            logprobs = [float(other["logprob"]) for other in top]
            if i == UNKNOWN_ID:
                positions += [hard(part) for part in self._vocabulary.spell(printed)]
            elif is_distribution([float(entry["logprob"])]) and is_distribution(logprobs):
                positions.append(Position(i, float(entry["logprob"]), self._ids(top), logprobs))
            else:
                positions.append(hard(i))
        if stopped and not (positions and self._vocabulary.is_end(positions[-1].id)):
            positions.append(hard(self._vocabulary.tokenizer.eos_id))
        return assemble(positions, width)

    def _ids(self, entries: list[dict[str, Any]]) -> list[int]:
        """Of alternatives; of several that print nothing the likeliest is taken for EOS, the others have no name."""
        assert self._vocabulary is not None
        ids, eos = [self._id(entry) for entry in entries], self._vocabulary.tokenizer.eos_id
        blank = next(
            (place for place, entry in enumerate(entries) if ids[place] < 0 and not self._printed(entry)), None
        )
        if blank is not None and eos not in ids:
            ids[blank] = eos
        return ids

    def _id(self, entry: dict[str, Any]) -> int:
        """Of the control token of that name, or of what prints these bytes; UNKNOWN_ID where there is none."""
        assert self._vocabulary is not None
        control = self._control(entry)
        found = self._vocabulary.id_of(self._printed(entry)) if control is None else control
        return UNKNOWN_ID if found is None else found

    def _control(self, entry: dict[str, Any]) -> int | None:
        assert self._vocabulary is not None
        tokenizer = self._vocabulary.tokenizer
        found = tokenizer.token_to_id.get(entry["token"])
        return found if found is not None and tokenizer.types[found] == CONTROL else None

    def _printed(self, entry: dict[str, Any]) -> bytes:
        """Of a token; a control token's name isn't."""
        if self._control(entry) is not None:
            return b""
        told = entry.get("bytes")
        return text_of(entry["token"]).encode() if told is None else bytes(told)

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        answer = self._ask(prompt, options, {"response_format": shape})
        with self._client.reading(CHAT):
            return text_of(answer["choices"][0]["message"]["content"])

    def _ask(self, prompt: str, options: GenerateOptions, more: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
        """Raises what the client does. What the server won't be told is left out, for good; of too many alternatives
        half are asked for."""
        count = "top_logprobs" if path == CHAT else "logprobs"
        body: dict[str, Any] = {
            "model": self._name,
            **({"messages": messages(prompt, options.system)} if path == CHAT else {"prompt": prompt}),
            self._room: options.room,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
            **more,
        }
        if count in more:
            body[count] = min(more[count], self._most)
        sent = {key: value for key, value in body.items() if key not in self._left_out}
        try:
            return self._client.post(path, sent)
        except TeacherError as error:
            head, _, reason = str(error).partition("): ")
            refused = next((key for key in OPTIONAL if key in sent and re.search(rf"\b{key}\b", reason)), "")
            if not head.endswith(("(400", "(422")):
                raise
            if "max_tokens" in sent and "max_completion_tokens" in reason:
                self._room = "max_completion_tokens"
            elif refused in LOGPROBS and sent[count] > 1:
                self._most = min(self._most, sent[count] // 2)
            elif refused:
                self._left_out |= LOGPROBS if refused in LOGPROBS else {refused}
                self._warn(refused, f"takes no {refused} for {self.model}; going on without ({reason})")
            else:
                raise
            return self._ask(prompt, options, more, path)

    def close(self) -> None:
        self._client.close()

    def _warn(self, about: str, message: str) -> None:
        """Once of each."""
        with self._lock:
            if about in self._warned:
                return
            self._warned.add(about)
        self._listen(Event("teacher", "warning", f"{self.host}: {message}"))


def _entries(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each token, as chats tell it; completions tell lists side by side."""
    if "tokens" not in logprobs:
        return logprobs.get("content") or []
    names, values = logprobs["tokens"], logprobs["token_logprobs"]
    tops: list[dict[str, float] | None] = logprobs.get("top_logprobs") or [None] * len(names)
    ordered = [sorted(((p, other) for other, p in (top or {}).items()), reverse=True) for top in tops]
    return [
        {"token": name, "logprob": value, "top_logprobs": [{"token": other, "logprob": p} for p, other in top]}
        for name, value, top in zip(names, values, ordered, strict=True)
    ]
