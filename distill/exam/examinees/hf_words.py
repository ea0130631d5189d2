"""The tokenizer and chat template of any transformers folder, as an exam needs them."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.backbone.from_transformers import one_line
from distill.errors import BadInput, CorruptFile
from distill.exam.metrics.speech import Letters
from distill.exam.questions import Question
from distill.teacher.gguf_tokenizer import NORMAL, Vocabulary, byte_alphabet
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.bpe import END_THINK, THINK


class HfWords:
    """How a transformers model is prompted, and how its text is spelled.

    teacher_map (teacher vocabulary,) int32: teacher's id → the id that spells the same bytes, −1 for none; None where
    there is nothing to map (`why_no_map` says why). Raises CorruptFile where the folder's tokenizer can't be loaded.
    """

    def __init__(self, folder: Path, vocabulary: TeacherTokenizer | None, ends: Sequence[int]) -> None:
        """ends: ids that end an answer, by the model's own configuration."""
        from transformers import AutoTokenizer

        self.folder = folder
        try:
            loader: Any = AutoTokenizer
            self.hf: Any = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the many readers of files there raise
            raise CorruptFile(
                f"{folder}: transformers can't load its tokenizer ({one_line(error)}); download the model again"
            ) from error
        own = [self.hf.eos_token_id] if self.hf.eos_token_id is not None else []
        self.ends = sorted({*own, *ends})
        if not self.ends:
            raise BadInput(f"{folder}: names no end-of-text token; set eos_token_id in its config.json")
        self.eos_id: int = own[0] if own else self.ends[0]
        self.has_template = bool(self.hf.chat_template)
        self.why_no_map = self._why_no_map(vocabulary)
        self.teacher_map = None if vocabulary is None or self.why_no_map else self._map_of(vocabulary)

    # Text and ids.

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, nothing put before or after it."""
        return list(self.hf(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int], plain: bool = True) -> str:
        """plain: without control tokens."""
        return str(self.hf.decode(list(ids), skip_special_tokens=plain, clean_up_tokenization_spaces=False))

    def token_bytes(self, id: int) -> bytes:
        """Of a byte-level token."""
        return self._bytes.get(id, b"")

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        alphabet = byte_alphabet()
        added: dict[int, Any] = self.hf.added_tokens_decoder
        vocabulary: dict[str, int] = self.hf.get_vocab()
        return {
            id: token.encode()
            if id in added or not all(character in alphabet for character in token)
            else bytes(alphabet[character] for character in token)
            for token, id in vocabulary.items()
        }

    def letters(self) -> Letters:
        """What each id is in a reply."""
        added: dict[int, Any] = self.hf.added_tokens_decoder
        texts = {id: str(token.content) for id, token in added.items()}
        newline = self.encode("\n")
        return Letters(texts, [id for id in added if added[id].special], newline if len(newline) == 1 else [])

    # The teacher's ids.

    def _why_no_map(self, vocabulary: TeacherTokenizer | None) -> str:
        if vocabulary is None:
            return "the exam doesn't tell its teacher's vocabulary"
        if vocabulary.model != "gpt2":
            return f"the teacher's tokenizer is of the kind {vocabulary.model!r}, not a byte-level BPE"
        try:
            spelled: dict[str, Any] = json.loads(self.hf.backend_tokenizer.to_str())
        except AttributeError:
            spelled = {"model": {}, "decoder": None}
        if spelled["model"].get("type") != "BPE" or '"ByteLevel"' not in json.dumps(spelled["decoder"]):
            return "its tokenizer is no byte-level BPE, as the teacher's is"
        return ""

    def _map_of(self, vocabulary: TeacherTokenizer) -> NDArray[np.int32]:
        added: dict[int, Any] = self.hf.added_tokens_decoder
        ids = {spelled: id for id, spelled in self._bytes.items() if id not in added}
        spelled = Vocabulary(vocabulary).bytes_of
        found = np.full(len(vocabulary.tokens), -1, dtype=np.int32)
        for i, kind in enumerate(vocabulary.types):
            if kind == NORMAL:
                found[i] = ids.get(spelled[i], -1)
        # All ends of the teacher's are one here, as training takes them.
        found[[vocabulary.eos_id, *vocabulary.extra_stop_ids]] = self.eos_id
        return found

    # Prompts.

    def prompt(self, question: Question, think: bool) -> list[int]:
        """Ids up to where the model goes on: with its answer, or where it shall think, in its think block."""
        text = self._render(question, think)
        if not self.has_template:
            return list(self.hf(text)["input_ids"])
        if think and not text.rstrip().endswith(THINK):
            text += f"{THINK}\n"
        elif not think and text.rstrip().endswith(THINK):  # a template that opens the block whatever it is told
            text += END_THINK + self._after
        return self.encode(text)

    def closing(self, dream: Sequence[int]) -> list[int]:
        """What stands between a dream and the answer."""
        return self.encode(("\n" if dream else "") + END_THINK + self._after)

    @cached_property
    def think_ids(self) -> tuple[int, int] | None:
        """Of the two think tags; None where its template or its vocabulary has none."""
        ids = [self.encode(tag) for tag in (THINK, END_THINK)]
        if not self.has_template or "think" not in str(self.hf.chat_template) or any(len(one) != 1 for one in ids):
            return None
        return ids[0][0], ids[1][0]

    @cached_property
    def _after(self) -> str:
        """Between a closed think block and the answer, as its template writes it after an empty one."""
        probe = Question("", "?")
        block = self._render(probe, False).removeprefix(self._render(probe, True))
        _, closed, after = block.rpartition(END_THINK)
        return after if closed and not after.strip() else "\n\n"

    def _render(self, question: Question, think: bool) -> str:
        from jinja2 import TemplateError

        if not self.has_template:
            return "".join(f"{part}\n" for part in (question.system, question.prompt) if part)
        user = {"role": "user", "content": question.prompt}
        try:
            if not question.system:
                return self._apply([user], think)
            try:
                return self._apply([{"role": "system", "content": question.system}, user], think)
            except TemplateError:  # it knows no system messages
                return self._apply([{**user, "content": f"{question.system}\n\n{question.prompt}"}], think)
        except (TemplateError, TypeError, ValueError) as error:
            raise BadInput(
                f"{self.folder}: its chat template can't be used ({one_line(error)}); mend chat_template.jinja or "
                "tokenizer_config.json"
            ) from error

    def _apply(self, messages: list[dict[str, str]], think: bool) -> str:
        rendered = self.hf.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=think
        )
        return str(rendered)
