"""The embedded teacher: a GGUF that llama.cpp runs in this process, asked as Ollama would ask it."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import TeacherError
from distill.events import Listener, silent
from distill.run import sha256_file
from distill.teacher import weights
from distill.teacher.gguf_file import read_metadata
from distill.teacher.gguf_tokenizer import Vocabulary, tokenizer_from_metadata
from distill.teacher.llama_cpp import Completion, Entry, LlamaCpp
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo, TeacherTokenizer, TokenTargets
from distill.teacher.targets import Position, assemble, hard, whole_text


class EmbeddedTeacher:
    """`embedded:smollm2` or `embedded:/path/model.gguf`.

    Prompts are rendered with the GGUF's own chat template, thinking off, and without a default system message.
    """

    def __init__(
        self,
        model: str,
        *,
        slots: int = 8,
        threads: int = 0,
        context: int = 1024,
        exact: bool = False,
        timeout: float = 300.0,
        listen: Listener = silent,
    ) -> None:
        self.name = model
        self.path = weights.smollm2(listen) if model == "smollm2" else Path(model).expanduser()
        self._metadata = read_metadata(self.path)
        self._engine = LlamaCpp(self.path, slots=slots, context=context, threads=threads, exact=exact, timeout=timeout)

    @property
    def slots(self) -> int:
        return self._engine.slots

    @cached_property
    def _info(self) -> TeacherInfo:
        template = str(self._metadata.get("tokenizer.chat_template", ""))
        architecture = str(self._metadata.get("general.architecture", ""))
        return TeacherInfo(
            spec=f"embedded:{self.name}",
            name=str(self._metadata.get("general.name") or self._metadata.get("general.basename") or self.path.stem),
            digest=sha256_file(self.path),
            template_digest=hashlib.sha256(template.encode()).hexdigest(),
            version=f"xllamacpp {importlib.metadata.version('xllamacpp')}",
            logprobs=True,
            details={
                "architecture": architecture,
                "file": self.path.name,
                "bytes": self.path.stat().st_size,
                "context_length": self._metadata.get(f"{architecture}.context_length"),
            },
        )

    def describe(self) -> TeacherInfo:
        return self._info

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        try:
            return Vocabulary(tokenizer_from_metadata(self._metadata))
        except KeyError as error:
            raise TeacherError(f"{self.path}: has no readable tokenizer ({error} lacks); use another model") from error

    def tokenizer(self) -> TeacherTokenizer:
        return self._vocabulary.tokenizer

    def render(self, prompt: str, system: str = "") -> str:
        """The text that the model continues."""
        return self._engine.render(prompt, system)

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        answer = self._complete(prompt, options, n_probs=options.top_logprobs)
        tokens = self._targets(answer, options.top_logprobs)
        return Response(
            text=whole_text(answer.text, tokens, self._vocabulary),
            tokens=tokens,
            done_reason="stop" if answer.stop_type == "eos" else "length",
            timings={
                "service": (answer.timings["prompt_ms"] + answer.timings["predicted_ms"]) / 1000,
                "prompt": answer.timings["prompt_ms"] / 1000,
                "answer": answer.timings["predicted_ms"] / 1000,
            },
        )

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        return self._complete(prompt, options, json_schema=schema).text

    def _complete(self, prompt: str, options: GenerateOptions, **more: Any) -> Completion:
        return self._engine.complete(
            self.render(prompt, options.system),
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            **more,
        )

    def _targets(self, answer: Completion, width: int) -> TokenTargets:
        """Entries and ids one to one. A merged character is soft in its last token, which its entry describes."""
        vocabulary, positions, at = self._vocabulary, list[Position](), 0
        for entry in answer.entries:
            size = 1
            while entry["id"] != answer.ids[at + size - 1] or vocabulary.decode(answer.ids[at : at + size]) != bytes(
                entry["bytes"]
            ):
                size += 1
                if at + size > len(answer.ids):  # the engine spells a token in its own way: trust the order
                    size = 1
                    break
            positions += [hard(i) for i in answer.ids[at : at + size - 1]]
            positions.append(_position(answer.ids[at + size - 1], entry))
            at += size
        positions += [hard(i) for i in answer.ids[at:]]
        while positions and _is_cut(vocabulary.decode([position.id for position in positions])):
            positions.pop()
        return assemble(positions, width)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise TeacherError(
            f"embedded:{self.name}: a chat model can't embed; use tokenize.encoder=local or ollama:all-minilm"
        )

    def close(self) -> None:
        self._engine.close()


def _is_cut(text: bytes) -> bool:
    """Whether it ends inside a character."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _position(i: int, entry: Entry) -> Position:
    top = entry["top_logprobs"]
    return Position(i, entry["logprob"], [a["id"] for a in top], [a["logprob"] for a in top])
