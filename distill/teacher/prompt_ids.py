"""From a question to the ids that a model reads, as llama.cpp has it: the file's chat template, then its tokenizer."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from distill.errors import BadInput, TeacherError
from distill.teacher.gguf_tokenizer import CONTROL, UNKNOWN, USER_DEFINED
from distill.teacher.pre_tokenizers import PRE_TOKENIZATIONS, byte_level_bpe, why_unknown
from distill.teacher.protocol import TeacherTokenizer
from distill.turns import SYSTEM, messages

DEFAULT_SYSTEM = re.compile(r"\A<\|im_start\|>system\n.*?<\|im_end\|>\n", re.DOTALL)
"""What ChatML templates put in front when no system message is given."""

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""What llama.cpp takes where a file has no template."""


class PromptIds:
    """Renders and tokenizes for one model file. Thread-safe.

    metadata: the GGUF's. remedy: what helps where its template fails. Raises BadInput, beginning with `where`, for a
    tokenizer that can't be reproduced exactly or a template that is none.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tokenizer: TeacherTokenizer,
        where: str,
        remedy: str = "use teacher.engine=llama.cpp",
    ) -> None:
        if reason := why_unknown(tokenizer):
            raise BadInput(f"{where}: {reason}")
        if metadata.get("tokenizer.ggml.add_eos_token"):
            raise BadInput(f"{where}: its tokenizer ends every prompt, which only llama.cpp does")
        self._teacher = tokenizer
        self._where, self._remedy = where, remedy
        # llama.cpp's own default: with the tokenizers of Llama 3's kind, prompts begin with BOS.
        begins = metadata.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZATIONS[tokenizer.pre].ignore_merges)
        self._begin = tokenizer.bos_id if begins else None
        self._template = _compile(str(metadata.get("tokenizer.chat_template") or CHATML), where, remedy)

    def render(self, prompt: str, system: str = "", think: bool = False, bare: bool = True) -> str:
        """The text that the model continues when it is asked one question.

        bare: a default system message that the template sneaks in is cut off again, as `LlamaCpp.render` does.
        """
        asked = messages(prompt, system)
        begin = self._spelled(self._teacher.bos_id)
        try:
            text = self._template(
                messages=asked,
                add_generation_prompt=True,
                enable_thinking=think,
                bos_token=begin,
                eos_token=self._spelled(self._teacher.eos_id),
            )
        except Exception as error:  # whatever a template's own code may raise
            raise TeacherError(f"{self._where}: its chat template fails ({error}); {self._remedy}") from error
        if self._begin is not None and begin:
            text = text.removeprefix(begin)  # `encode` puts it in front
        return text if asked[0]["role"] == SYSTEM or not bare else DEFAULT_SYSTEM.sub("", text, count=1)

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids of a text, BOS in front where the model wants one; control tokens that are written out are parsed.
        begin: false for what goes on."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._begin, *ids] if begin and self._begin is not None else ids

    def _spelled(self, i: int | None) -> str:
        return "" if i is None else self._teacher.tokens[i]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        teacher = self._teacher
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in teacher.merges)]
        tokenizer = byte_level_bpe(teacher.token_to_id, merges, teacher.pre)
        parsed = [i for i, kind in enumerate(teacher.types) if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
        tokenizer.add_special_tokens([AddedToken(teacher.tokens[i], normalized=False) for i in parsed])
        return tokenizer


def _compile(source: str, where: str, remedy: str) -> Callable[..., str]:
    """A chat template with what transformers and llama.cpp give it to work with."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source).render
    except TemplateError as error:
        raise BadInput(f"{where}: its chat template can't be read ({error}); {remedy}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _raise(message: str) -> None:
    raise ValueError(message)
