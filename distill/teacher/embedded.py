"""The embedded teacher: a GGUF that runs in this process, asked as Ollama would ask it."""

import hashlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from distill.config import TeacherSettings
from distill.errors import BadInput, DistillError, TeacherError
from distill.events import Event, Listener, silent
from distill.run import sha256_file
from distill.teacher import weights
from distill.teacher.choice import MeasuredEngine
from distill.teacher.engine import Engine
from distill.teacher.gguf_file import read_metadata, shape_of
from distill.teacher.gguf_tokenizer import Vocabulary, tokenizer_from_metadata
from distill.teacher.licenses import License
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.llama_engine import LlamaEngine
from distill.teacher.protocol import GenerateOptions, Response, Teacher, TeacherInfo, TeacherTokenizer
from distill.teacher.targets import END_THINK
from distill.teacher.thinking import LEVELS
from distill.teacher.torch_engine import TorchEngine

ENGINES = ("auto", "torch", "llama.cpp")


def open_teachers(model: str, settings: TeacherSettings, listen: Listener, context: int) -> list[Teacher]:
    """The one that runs here."""
    how: dict[str, Any] = {"threads": settings.threads, "context": context, "timeout": settings.timeout}
    if settings.think != "false" and not settings.context:
        how["thinking_tokens"] = settings.thinking_tokens
    if settings.think in LEVELS:
        listen(Event("teacher", "warning", f"teacher.think={settings.think}: only Ollama takes levels; true is taken"))
    return [EmbeddedTeacher(model, engine=settings.engine, listen=listen, **how)]


class EmbeddedTeacher:
    """`embedded:smollm2` or `embedded:/path/model.gguf`.

    Prompts are rendered with the GGUF's own chat template, without a default system message. It can think where that
    template knows `</think>`; how much can't be told it.
    engine: `torch`, `llama.cpp`, or `auto`: the faster one, as far as both can run it. slots and exact are
    llama.cpp's (`LlamaCpp`), context and threads both engines'; context is at most what the file says, and more by
    thinking_tokens where it can think.
    Raises BadInput and CorruptFile, as the engine does.
    """

    def __init__(
        self,
        model: str,
        *,
        engine: str = "auto",
        slots: int = 8,
        threads: int = 0,
        context: int = 1024,
        exact: bool = False,
        timeout: float = 300.0,
        thinking_tokens: int = 0,
        listen: Listener = silent,
    ) -> None:
        if engine not in ENGINES:
            raise BadInput(f"teacher.engine={engine}: is none of {', '.join(ENGINES)}")
        self.name = model
        self.path = weights.smollm2(listen) if model == "smollm2" else Path(model).expanduser()
        self._metadata = read_metadata(self.path)
        self._template = str(self._metadata.get("tokenizer.chat_template", ""))
        self._thinks = END_THINK in self._template
        context += thinking_tokens if self._thinks else 0
        self._how: dict[str, Any] = {"threads": threads, "context": self._at_most(context), "timeout": timeout}
        self._slots, self._exact = slots, exact
        self._lock = Lock()
        self._opened: LlamaEngine | None = None
        self._engine = self._open(engine, listen)

    def _open(self, engine: str, listen: Listener) -> Engine:
        if engine == "torch":
            return TorchEngine(self.path, self._metadata, self._vocabulary, **self._how)
        llama = self._llama()
        if engine == "llama.cpp" or self._exact:
            return llama
        try:
            ours = TorchEngine(self.path, self._metadata, self._vocabulary, **self._how)
        except DistillError:  # what only llama.cpp can run
            return llama
        return MeasuredEngine(llama, ours, listen)

    def _at_most(self, context: int) -> int:
        """Beyond what it was trained with a model writes nonsense."""
        trained = self._metadata.get(f"{self._metadata.get('general.architecture')}.context_length")
        return min(context, int(trained)) if trained else context

    def _llama(self) -> LlamaEngine:
        """llama.cpp with the model, opened when it is first needed."""
        with self._lock:
            if self._opened is None:
                model = LlamaCpp(self.path, slots=self._slots, exact=self._exact, **self._how)
                self._opened = LlamaEngine(model, self._vocabulary)
            return self._opened

    @property
    def slots(self) -> int:
        return self._engine.slots

    @cached_property
    def _info(self) -> TeacherInfo:
        architecture = str(self._metadata.get("general.architecture", ""))
        return TeacherInfo(
            spec=f"embedded:{self.name}",
            name=str(self._metadata.get("general.name") or self._metadata.get("general.basename") or self.path.stem),
            digest=sha256_file(self.path),
            template_digest=hashlib.sha256(self._template.encode()).hexdigest(),
            version="",
            logprobs=True,
            details={
                **shape_of(self._metadata),
                "capabilities": ["completion", *(["thinking"] if self._thinks else [])],
                "license": License.of_metadata(self._metadata).to_json(),
                "file": self.path.name,
                "bytes": self.path.stat().st_size,
                "context_length": self._metadata.get(f"{architecture}.context_length"),
            },
        )

    def describe(self) -> TeacherInfo:
        """`version` tells the engine that answers; where it isn't chosen yet, both."""
        return replace(self._info, version=self._engine.version)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        try:
            return Vocabulary(tokenizer_from_metadata(self._metadata))
        except KeyError as error:
            raise TeacherError(f"{self.path}: has no readable tokenizer ({error} lacks); use another model") from error

    def tokenizer(self) -> TeacherTokenizer:
        return self._vocabulary.tokenizer

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        return self._engine.answer(prompt, options)

    def go_on(self, prompt: str, begun: str, options: GenerateOptions) -> Response:
        """By llama.cpp."""
        return self._llama().answer(prompt, options, begun)

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        """By llama.cpp, whose grammars keep to the schema."""
        return self._llama().answer_json(prompt, schema, options)

    def close(self) -> None:
        self._engine.close()
        if self._opened is not None:
            self._opened.close()
