"""A teacher in Ollama. What its API leaves out (ids, EOS, parts of characters) is put together again here."""

import difflib
import math
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from distill.address import default_host
from distill.config import TeacherSettings
from distill.errors import ModelNotFound, TeacherError
from distill.events import Event, Listener, silent
from distill.run import fingerprint
from distill.teacher.gguf_file import shape_of
from distill.teacher.gguf_tokenizer import Vocabulary, tokenizer_from_metadata
from distill.teacher.licenses import License
from distill.teacher.names import name_key
from distill.teacher.ollama_client import LOGPROBS_SINCE, OllamaClient, blob_of, version_tuple
from distill.teacher.protocol import (
    HALF,
    MAX_TOP_LOGPROBS,
    UNKNOWN_ID,
    GenerateOptions,
    Response,
    Teacher,
    TeacherInfo,
    TeacherTokenizer,
    TokenTargets,
)
from distill.teacher.targets import Position, apart, assemble, ends_in, first_of, hard, respond

ROUNDING = 1e-3
"""By so much a logprob may be above 0."""
SECOND = 1e9
"""Ollama's durations are nanoseconds."""


def open_teachers(model: str, settings: TeacherSettings, listen: Listener, context: int) -> list[Teacher]:
    """One for each host. How long its context is, Ollama decides, or `teacher.context`."""
    how: dict[str, Any] = {"timeout": settings.timeout, "retries": settings.retries, "context": settings.context}
    how |= {"alone": len(settings.hosts) < 2, "listen": listen, "shared": {}}
    return [OllamaTeacher(model, host=host, **how) for host in settings.hosts or [default_host()]]


class OllamaTeacher:
    """`ollama:NAME` at one host. Thread-safe. Soft targets need Ollama 0.12.11 and a readable vocabulary.

    context: tokens of prompt and answer, 0: the server's choice. alone: nobody else could be asked (`OllamaClient`).
    shared: digest → vocabulary, of other hosts' too: reading one takes a second.
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
        shared: "dict[str, _Words] | None" = None,
        listen: Listener = silent,
    ) -> None:
        self.model = model
        self._context = context
        self._listen = listen
        self._client = OllamaClient(host, timeout=timeout, retries=retries, backoff=backoff, alone=alone)
        self.host = self._client.host
        self._lock = threading.Lock()
        self._info: TeacherInfo | None = None
        self._show: dict[str, Any] | None = None
        self._shared = {} if shared is None else shared
        self._words: _Words | None = None
        self._warned: set[str] = set()

    def describe(self) -> TeacherInfo:
        """Raises TeacherUnavailable, or ModelNotFound with the nearest installed names."""
        with self._lock:
            if self._info is None:
                with self._client.reading("/api/show"):
                    self._info = self._ask_who()
            info = self._info
        if not info.logprobs:
            self._warn(
                f"{self.host}: Ollama {info.version} returns no logprobs; traces get hard labels only (update it)"
            )
        return info

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

    def _vocabulary(self) -> "_Words":
        with self._lock:
            digest = self._info.digest if self._info else ""
            if self._words is None and digest:
                self._words = self._shared.get(digest)
            if self._words is None:
                show = self._client.show(self.model, verbose=True)
                try:
                    with self._client.reading("/api/show"):
                        self._words = _Words(Vocabulary(tokenizer_from_metadata(show["model_info"])))
                    if digest:
                        self._shared[digest] = self._words
                except TeacherError:  # a lack, or null where an older server cuts the lists
                    self._words = _Words(None)
            words = self._words
        if words.vocabulary is None:
            self._warn(f"{self.model}: its vocabulary can't be read at {self.host}; traces get hard labels only")
        return words

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        body = self._body(prompt, options)
        if options.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": min(options.top_logprobs, MAX_TOP_LOGPROBS)}
        answer = self._client.post("/api/generate", body)
        words = self._vocabulary()
        with self._client.reading("/api/generate"):
            found = self._heard(answer, words, options.top_logprobs)
            found.text.encode()  # halves of surrogate pairs are no text
        if options.top_logprobs and found.text and not answer.get("logprobs"):
            self._warn(f"{self.host}: answers without logprobs; traces get hard labels only (update Ollama)")
        elif found.text and found.tokens is None and words.vocabulary is not None:
            self._warn(
                f"{self.host}: the tokens that it tells don't spell its answers; those get hard labels only", "spelling"
            )
        return found

    def _heard(self, answer: dict[str, Any], words: "_Words", width: int) -> Response:
        """The answer without its thinking, which Ollama tells beside the text, but whose tokens stand in `logprobs`."""
        thinking, said = apart(_text(answer["response"]))
        tokens = words.targets({**answer, "response": said}, width)
        seconds = {name: _seconds(answer, f"{name}_duration") for name in ("load", "prompt_eval", "eval", "total")}
        return respond(
            said,
            tokens,
            words.vocabulary,
            "stop" if answer["done_reason"] == "stop" else "length",
            {"service": seconds["load"] + seconds["prompt_eval"] + seconds["eval"], **seconds},
            _text(answer.get("thinking") or "") or thinking,
        )

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        answer = self._client.post("/api/generate", {**self._body(prompt, options), "format": schema})
        with self._client.reading("/api/generate"):
            return _text(answer["response"])

    def _body(self, prompt: str, options: GenerateOptions) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "stream": False,
            "options": {
                "num_predict": options.max_tokens,  # unset, a looping model runs on for minutes
                "temperature": options.temperature,
                "top_k": options.top_k,
                "top_p": options.top_p,
                "seed": options.seed,
                "stop": [],  # else tokens that could begin a stop string are merged
            },
        }
        if self._context:
            body["options"]["num_ctx"] = self._context
        if options.system:
            body["system"] = options.system
        with self._lock, self._client.reading("/api/show"):
            thinks = "thinking" in (self._details().get("capabilities") or [])
        if thinks:
            body["think"] = False
        return body

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


def _last_entries(entries: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Of entries of `logprobs`, the last that spell the answer, blanks before it aside: thinking stands before them.
    None where they spell something else."""
    tokens = [_text(entry["token"]) for entry in entries]
    start = first_of(tokens, len(text))
    return entries[start:] if ends_in("".join(tokens[start:]), text) else []


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _seconds(answer: dict[str, Any], name: str) -> float:
    """0 where it isn't told, as of an answer out of a cache."""
    value = float(answer.get(name) or 0)
    return value / SECOND if math.isfinite(value) else 0.0


def _is_part(logprobs: Sequence[float]) -> bool:
    """Whether they can be of one distribution: none a NaN, and no more than 1 together."""
    return all(value <= ROUNDING for value in logprobs) and sum(map(math.exp, logprobs)) <= 1 + len(logprobs) * ROUNDING


class _Words:
    """From the token texts of an answer to ids."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self.vocabulary = vocabulary
        self._ids: dict[str, int] = {}

    def targets(self, answer: dict[str, Any], width: int) -> TokenTargets | None:
        """Of one answer of /api/generate, or None where ids can't be had.

        An entry's text names its token: byte-level and SentencePiece vocabularies spell no two tokens alike.
        Only a character of several tokens has no name; its ids come from `context` and are hard-only, as the
        entry carries the last one's values with half characters for alternatives. (`context` is the answer
        tokenized again, so it is not used where an entry knows better.) EOS has no entry: it is put back.
        """
        vocabulary = self.vocabulary
        if vocabulary is None:
            return None
        entries = _last_entries(cast("list[dict[str, Any]]", answer.get("logprobs") or []), answer["response"])
        tail = self._tail(answer.get("context") or [], answer["response"].encode())
        if entries:
            positions = self._positions(entries, tail)
        elif tail:
            while tail and HALF.encode() in vocabulary.bytes_of[tail[-1]]:
                tail.pop()
            positions = [hard(i) for i in tail]
        else:
            return None
        if answer.get("done_reason") == "stop":
            positions.append(hard(vocabulary.tokenizer.eos_id))
        return assemble(positions, width)

    def _positions(self, entries: list[dict[str, Any]], tail: list[int]) -> list[Position]:
        assert self.vocabulary is not None
        starts: dict[int, int] = {}  # byte offset in the answer → index in tail
        offset = 0
        for index, i in enumerate(tail):
            starts.setdefault(offset, index)
            offset += len(self.vocabulary.bytes_of[i])
        starts.setdefault(offset, len(tail))
        positions: list[Position] = []
        offset = 0
        for entry in entries:
            text = str(entry["token"])
            i = self._id(text)
            size = len(text.encode())
            if i != UNKNOWN_ID:
                positions.append(self._soft(i, entry))
            elif HALF in text:
                pass  # a character that the token limit cut
            elif offset in starts and offset + size in starts:
                positions += [hard(i) for i in tail[starts[offset] : starts[offset + size]]]
            else:
                positions += [hard(i) for i in self._spell(text.encode())]
            offset += size
        return positions

    def _soft(self, i: int, entry: dict[str, Any]) -> Position:
        """Hard where the values are no logprobs of one distribution."""
        top = cast("list[dict[str, Any]]", entry.get("top_logprobs") or [])
        logprobs = [float(alternative["logprob"]) for alternative in top]
        if not (float(entry["logprob"]) <= ROUNDING and _is_part(logprobs)):
            return hard(i)
        ids = [self._id(alternative["token"]) for alternative in top]
        # A control token prints nothing. The likeliest such is taken for EOS; a second one has no name.
        for place, alternative in enumerate(top):
            if alternative["token"] == "":
                assert self.vocabulary is not None
                ids[place] = self.vocabulary.tokenizer.eos_id
                break
        return Position(i, float(entry["logprob"]), ids, logprobs)

    def _id(self, text: str) -> int:
        """UNKNOWN_ID for "", half characters and what no single token spells."""
        known = self._ids.get(text)
        if known is None:
            assert self.vocabulary is not None
            found = None if HALF in text else self.vocabulary.id_of(text.encode())
            known = self._ids[text] = UNKNOWN_ID if found is None else found
        return known

    def _tail(self, context: list[int], text: bytes) -> list[int]:
        """The end of `context` that prints the answer; empty where none does."""
        assert self.vocabulary is not None
        size, start = 0, len(context)
        while start and size < len(text) and 0 <= context[start - 1] < len(self.vocabulary.bytes_of):
            start -= 1
            size += len(self.vocabulary.bytes_of[context[start]])
        tail = context[start:]
        return tail if self.vocabulary.decode(tail) == text else []

    def _spell(self, text: bytes) -> list[int]:
        """Ids that print these bytes, the longest first: for a character of several tokens without `context`."""
        assert self.vocabulary is not None
        ids: list[int] = []
        while text:
            size = next((n for n in range(len(text), 0, -1) if self.vocabulary.id_of(text[:n]) is not None), 0)
            if not size:
                return ids
            ids.append(cast(int, self.vocabulary.id_of(text[:size])))
            text = text[size:]
        return ids
