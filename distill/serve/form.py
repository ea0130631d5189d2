"""Answers held to JSON, or to a JSON schema: a mask over the student's tokens at each step, by llguidance.

The dream is free; the form begins with the answer.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.serve.fields import ApiError
from distill.student.grammar import ANSWER, FIRST_PATH
from distill.teacher.gguf_tokenizer import BYTE, NORMAL
from distill.tokens.bpe import StudentTokenizer

Schema = dict[str, Any]
ANY: Schema = {"type": "object"}
"""What "json" asks for."""
STRAIGHT: Any = {"whitespace_flexible": False}
"""Between the parts of JSON no more white space than one that is fixed: small models would write nothing else."""
MISSING = "needs llguidance: pip install 'dreaming-student[format]'; or leave it out, and ask for it in words"


def schema_of(value: object) -> Schema | None:
    """Ollama's `format`: "json", a schema, or nothing. Raises ApiError 400."""
    if value in (None, "", {}):
        return None
    if value == "json":
        return ANY
    if not isinstance(value, dict):
        raise ApiError(400, 'format: expected "json" or a valid JSON Schema object')
    return value


CHOICES = ("anyOf", "oneOf")
MAPS, LISTS = ("properties", "$defs", "definitions"), (*CHOICES, "prefixItems")
OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "$ref"}


def closed(schema: Any, part: bool = False) -> Any:
    """Objects have the properties that are named and no others, unless it says otherwise: as in Ollama, and unlike the
    letter of JSON Schema, by which a small model would invent them without end. part: the object has properties beside
    these, and stays open, as what names them."""
    if not isinstance(schema, dict):
        return schema
    found: Schema = dict(schema)
    choices = (one for name in CHOICES if isinstance(schema.get(name), list) for one in schema[name])
    part = part or ("properties" in schema and any(isinstance(one, dict) and "properties" in one for one in choices))
    for name, value in schema.items():
        if name in MAPS and isinstance(value, dict):
            found[name] = {key: closed(one) for key, one in value.items()}
        elif name in LISTS and isinstance(value, list):
            found[name] = [closed(one, part and name in CHOICES) for one in value]
        elif name == "items":
            found[name] = closed(value)
    whole = "properties" in found and not part and not OPEN & found.keys()
    return found | {"additionalProperties": False} if whole else found


class Form:
    """Of one answer. error: why it can't be held to it any more, and ended; "" where it can."""

    def __init__(self, words: Any, grammar: str, end: int) -> None:
        """words: llguidance's tokenizer. end: the token that ends an answer. Raises ApiError 400."""
        from llguidance import LLMatcher

        self._matcher, self._end, self._size = LLMatcher(words, grammar, log_level=0), end, words.vocab_size
        self.allowed(None)  # what can never begin, such as a schema that is nothing but itself, shows here
        if self.error:
            raise ApiError(400, f"format: {self.error}")

    @property
    def error(self) -> str:
        return " ".join(self._matcher.get_error().partition("<state>")[0].split())[:200]

    def allowed(self, state: int | None) -> NDArray[np.bool_] | None:
        """(V,): what may be written next; None before the answer. state: of the dream's grammar."""
        if state is not None and not ANSWER <= state < FIRST_PATH:
            return None
        if self._matcher.is_stopped():  # or it can't go on; either way the answer is over
            return np.arange(self._size) == self._end
        return np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[: self._size] > 0

    def advance(self, token: int) -> None:
        if token != self._end:
            self._matcher.consume_token(token)


@dataclass
class Forms:
    """All forms of a student's answers."""

    tokenizer: StudentTokenizer

    def of(self, schema: Schema) -> Form:
        """Raises ApiError 400 for a schema that is none, or says what can't be held to."""
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(closed(schema), overrides=STRAIGHT)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"format: {error}") from error
        return Form(self._words, grammar, self.tokenizer.eos_id)

    @cached_property
    def _words(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Words(self.tokenizer)), n_vocab=self.tokenizer.vocab_size)


class _Words:
    """A student's tokenizer as llguidance wants one: image tokens, lenses and tags are no words."""

    bos_token_id = None

    def __init__(self, tokenizer: StudentTokenizer) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id = tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids = [id for id, kind in enumerate(tokenizer.types) if kind not in (NORMAL, BYTE)]

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
