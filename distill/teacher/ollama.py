"""A teacher in Ollama. What its API leaves out (ids, EOS, parts of characters) is put together again here."""

import difflib
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.address import default_host
from distill.config import TeacherSettings
from distill.errors import ModelNotFound, PromptRefused, RunMismatch, TeacherError
from distill.events import Event, Listener, silent
from distill.run import fingerprint
from distill.teacher.gguf_file import shape_of
from distill.teacher.gguf_tokenizer import Vocabulary, tokenizer_from_metadata
from distill.teacher.licenses import License
from distill.teacher.names import name_key
from distill.teacher.ollama_client import LOGPROBS_SINCE, OllamaClient, blob_of, version_tuple
from distill.teacher.ollama_words import Words, text_of
from distill.teacher.protocol import (
    MAX_TOP_LOGPROBS,
    GenerateOptions,
    Response,
    TeacherInfo,
    TeacherTokenizer,
)
from distill.teacher.targets import apart, respond
from distill.teacher.thinking import LEVELS
from distill.turns import is_conversation, messages

SECOND = 1e9
"""Ollama's durations are nanoseconds."""
PROBE = "Is it warm in summer, or cold?"
"""Asked to see what stands around a question."""
SAME_FOR = 10.0
"""Seconds for which a name is taken for the model that it was: `ollama pull` may put another in its place."""
ALWAYS_THINK = ("gptoss", "gpt-oss")
"""Families that think though they are told not to (`think: false` is ignored): they are told to think little."""


def open_teachers(model: str, settings: TeacherSettings, listen: Listener, context: int) -> list["OllamaTeacher"]:
    """One for each host. How long its context is, Ollama decides, or `teacher.context`."""
    how: dict[str, Any] = {"timeout": settings.timeout, "retries": settings.retries, "context": settings.context}
    how |= {"alone": len(settings.hosts) < 2, "listen": listen, "shared": {}}
    how["thinking_tokens"] = settings.thinking_tokens
    return [OllamaTeacher(model, host=host, **how) for host in settings.hosts or [default_host()]]


class OllamaTeacher:
    """`ollama:NAME` at one host. Thread-safe. Soft targets need Ollama 0.12.11 and a readable vocabulary.

    context: tokens of prompt and answer, 0: the server's choice. alone: nobody else could be asked (`OllamaClient`).
    thinking_tokens: room for a model that thinks though it is told not to. shared: digest → vocabulary, of other hosts'
    too: reading one takes a second.
    """

    slots: int | None = None
    """Unknown: OLLAMA_NUM_PARALLEL is the server's secret. Whoever asks finds out."""

    def __init__(
        self,
        model: str,
        *,
        host: str,
        timeout: float = 300.0,
        retries: int = 5,
        backoff: float = 0.5,
        context: int = 0,
        alone: bool = True,
        thinking_tokens: int = 0,
        shared: dict[str, Words] | None = None,
        listen: Listener = silent,
    ) -> None:
        self.model = model
        self._context = context
        self._thinking_tokens = thinking_tokens
        self._listen = listen
        self._client = OllamaClient(host, timeout=timeout, retries=retries, backoff=backoff, alone=alone)
        self.host = self._client.host
        self._lock = threading.Lock()
        self._info: TeacherInfo | None = None
        self._same_until = 0.0
        self._show: dict[str, Any] | None = None
        self._shared = {} if shared is None else shared
        self._words: Words | None = None
        self._warned: set[str] = set()
        self._levelless = False
        self._framing = threading.Lock()
        self._frames: dict[str, tuple[str, str]] = {}

    def describe(self) -> TeacherInfo:
        """Raises TeacherUnavailable, or ModelNotFound with the nearest installed names."""
        with self._lock:
            if self._info is None:
                with self._client.reading("/api/show"):
                    self._info = self._ask_who()
                self._same_until = time.monotonic() + SAME_FOR
            info = self._info
        if not info.logprobs:
            self._warn(
                f"{self.host}: Ollama {info.version} returns no logprobs; traces get hard labels only (update it)"
            )
        return info

    def forget(self) -> None:
        """Who it is: the model is asked for anew. Who comes in its place is somebody else."""
        with self._lock:
            self._info = self._show = self._words = None
        with self._framing:
            self._frames.clear()

    def _check_same(self) -> None:
        """Raises RunMismatch where another model has taken the place of the one that `describe` told of."""
        with self._lock:
            info, now = self._info, time.monotonic()
            if info is None or now < self._same_until:
                return
            self._same_until = now + SAME_FOR
        try:
            digest = next((each["digest"] for each in self._client.models() if each["name"] == info.name), info.digest)
        except (TeacherError, KeyError):  # another time
            return
        if digest != info.digest:
            self._same_until = 0.0
            raise RunMismatch(
                f"{self.host}: {info.name} isn't the model any more that it was (digest {str(digest)[:12]}, was "
                f"{info.digest[:12]}); put that one back, or use another --name"
            )

    def _ask_who(self) -> TeacherInfo:
        version = self._client.version()
        installed = {str(entry["name"]): entry for entry in self._client.models()}
        entry = next((installed[name] for name in installed if name_key(name) == name_key(self.model)), None)
        if entry is None:
            near = difflib.get_close_matches(self.model, installed, n=3, cutoff=0.4) or sorted(installed)[:5]
            having = f"installed there: {', '.join(near)}" if near else "nothing is installed there"
            raise ModelNotFound(f"{self.host}: has no model {self.model!r}; `ollama pull {self.model}` ({having})")
        show = self._details()
        return TeacherInfo(
            spec=f"ollama:{self.model}",
            name=str(entry["name"]),
            digest=str(entry["digest"]),
            template_digest=fingerprint({"template": show.get("template", ""), "system": show.get("system", "")}),
            version=f"ollama {version}",
            logprobs=(version_tuple(version) or LOGPROBS_SINCE) >= LOGPROBS_SINCE,
            details={
                **entry.get("details", {}),
                **shape_of(show.get("model_info") or {}),
                "capabilities": show.get("capabilities", []),
                "blob": blob_of(show.get("modelfile") or ""),
                "license": License.of_ollama(show).to_json(),
            },
        )

    def _details(self) -> dict[str, Any]:
        if self._show is None:
            self._show = self._client.show(self.model)
        return self._show

    def tokenizer(self) -> TeacherTokenizer | None:
        words = self._vocabulary()
        return None if words.vocabulary is None else words.vocabulary.tokenizer

    def _vocabulary(self) -> Words:
        with self._lock:
            digest = self._info.digest if self._info else ""
            if self._words is None and digest:
                self._words = self._shared.get(digest)
            if self._words is None:
                show = self._client.show(self.model, verbose=True)
                try:
                    with self._client.reading("/api/show"):
                        self._words = Words(Vocabulary(tokenizer_from_metadata(show["model_info"])))
                    if digest:
                        self._shared[digest] = self._words
                except TeacherError:  # a lack, or null where an older server cuts the lists
                    self._words = Words(None)
            words = self._words
        if words.vocabulary is None:
            self._warn(f"{self.model}: its vocabulary can't be read at {self.host}; traces get hard labels only")
        return words

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        return self._said(self._body(prompt, options), options)

    def go_on(self, prompt: str, begun: str, options: GenerateOptions) -> Response:
        """Raises TeacherError where what its template puts around a prompt can't be told, as around several turns."""
        if is_conversation(prompt):
            raise PromptRefused(
                f"{self.host}: doesn't tell how {self.model}'s template writes several turns; --teacher-weights can"
            )
        before, after = self._around(options)
        body = self._body("", replace(options, system=""))
        return self._said({**body, "prompt": f"{before}{prompt}{after}{begun}", "raw": True}, options)

    def _around(self, options: GenerateOptions) -> tuple[str, str]:
        """What the template puts before a prompt and after it: the `context` of an answer are their ids."""
        with self._framing:
            if options.system not in self._frames:
                words = self._vocabulary().vocabulary
                answer = self._ask(self._body(PROBE, replace(options, max_tokens=1)))
                with self._client.reading("/api/generate"):
                    text = words.written(answer.get("context") or []) if words else ""
                    before, found, after = text.partition(PROBE)
                    said = text_of(answer["response"])
                if not found or not after.endswith(said):
                    raise TeacherError(
                        f"{self.host}: doesn't tell what {self.model}'s template puts around a question, so it can't "
                        "be asked to go on with an answer"
                    )
                self._frames[options.system] = before, after.removesuffix(said)
            return self._frames[options.system]

    def _said(self, body: dict[str, Any], options: GenerateOptions) -> Response:
        if options.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": min(options.top_logprobs, MAX_TOP_LOGPROBS)}
        return self.heard(self._ask(body), options)

    def heard(self, answer: dict[str, Any], options: GenerateOptions) -> Response:
        """What /api/generate answered, whoever asked. Raises TeacherError where Ollama wouldn't say so, and RunMismatch
        where it is another model by now."""
        self._check_same()
        words = self._vocabulary()
        with self._client.reading("/api/generate"):
            found = self._heard(answer, words, options)
            (found.text + found.thinking).encode()  # halves of surrogate pairs are no text
        if options.top_logprobs and found.text and not answer.get("logprobs"):
            self._warn(f"{self.host}: answers without logprobs; traces get hard labels only (update Ollama)")
        elif found.text and found.tokens is None and words.vocabulary is not None:
            self._warn(
                f"{self.host}: the tokens that it tells don't spell its answers; those get hard labels only", "spelling"
            )
        return found

    def _heard(self, answer: dict[str, Any], words: Words, options: GenerateOptions) -> Response:
        """The answer without its thinking, which Ollama tells beside the text, but whose tokens stand in `logprobs`."""
        inside, said = apart(text_of(answer["response"]))
        thinking, answer = text_of(answer.get("thinking") or "").strip() or inside, {**answer, "response": said}
        tokens = words.targets(answer, options.top_logprobs)
        seconds = {name: _seconds(answer, f"{name}_duration") for name in ("load", "prompt_eval", "eval", "total")}
        return respond(
            said,
            tokens,
            words.vocabulary,
            "stop" if answer["done_reason"] == "stop" else "length",
            {"service": seconds["load"] + seconds["prompt_eval"] + seconds["eval"], **seconds},
            limit=options.max_tokens,
            thinking=thinking,
            thought=words.thought(answer, thinking, options.top_logprobs),
        )

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        answer = self._ask({**self._body(prompt, options), "format": schema})
        self._check_same()
        with self._client.reading("/api/generate"):
            return text_of(answer["response"])

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Raises what the client does. A level of thinking that isn't taken is left out, for good."""
        if self._levelless and body.get("think") in LEVELS:
            body = {**body, "think": True}
        try:
            if "prompt" in body:
                return self._client.post("/api/generate", body)
            answer = self._client.post("/api/chat", body)
        except ModelNotFound:
            self.forget()
            raise
        except TeacherError as error:
            if body.get("think") not in LEVELS or "think value" not in str(error):
                raise
            self._warn(f"{self.host}: takes no level of thinking for {self.model}; taking true", "level")
            self._levelless = True
            return self._ask(body)
        with self._client.reading("/api/chat"):
            message = answer["message"]
            return {**answer, "response": message["content"], "thinking": message.get("thinking")}

    def _body(self, prompt: str, options: GenerateOptions) -> dict[str, Any]:
        think, room = self._how_to_think(options)
        asked = {"messages": messages(prompt, options.system)} if is_conversation(prompt) else {"prompt": prompt}
        body: dict[str, Any] = {
            "model": self.model,
            **asked,
            "stream": False,
            "options": {
                "num_predict": room,  # unset, a looping model runs on for minutes
                "temperature": options.temperature,
                "top_k": options.top_k,
                "top_p": options.top_p,
                "seed": options.seed,
                "stop": [],  # else tokens that could begin a stop string are merged
            },
        }
        if self._context:
            body["options"]["num_ctx"] = self._context
        if options.system and "prompt" in body:
            body["system"] = options.system
        if think is not None:
            body["think"] = think
        return body

    def _how_to_think(self, options: GenerateOptions) -> tuple[bool | str | None, int]:
        """Ollama's `think`, None where the model can't, and tokens of thinking and answer."""
        with self._lock, self._client.reading("/api/show"):
            show = self._details()
            if "thinking" not in (show.get("capabilities") or []):
                return None, options.max_tokens
            always = (show.get("details") or {}).get("family") in ALWAYS_THINK
        if options.think or not always:
            return {"": False, "true": True}.get(options.think, options.think), options.room
        return "low", options.max_tokens + self._thinking_tokens

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        try:
            answer = self._client.post("/api/embed", {"model": self.model, "input": list(texts)})
        except ModelNotFound:
            raise
        except TeacherError as error:
            if "(501)" not in str(error):
                raise
            raise TeacherError(
                f"{self.model}: can't embed; use an embedding model (`ollama pull all-minilm`, "
                "then tokenize.encoder=ollama:all-minilm)"
            ) from error
        with self._client.reading("/api/embed"):
            vectors = np.asarray(answer["embeddings"], np.float32)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise ValueError("a row for each text")
            return vectors

    def close(self) -> None:
        self._client.close()

    def _warn(self, message: str, about: str = "logprobs") -> None:
        """Once of each."""
        with self._lock:
            if about in self._warned:
                return
            self._warned.add(about)
        self._listen(Event("teacher", "warning", message))


def model_digest(model: str, host: str) -> str:
    """The server's digest of the model, its template and parameters. host "": $OLLAMA_HOST or the default address.

    Raises TeacherUnavailable, or ModelNotFound with the nearest installed names.
    """
    teacher = OllamaTeacher(model, host=host or default_host(), retries=1)
    try:
        return teacher.describe().digest
    finally:
        teacher.close()


def _seconds(answer: dict[str, Any], name: str) -> float:
    """0 where it isn't told, as of an answer out of a cache."""
    value = float(answer.get(name) or 0)
    return value / SECOND if math.isfinite(value) else 0.0
