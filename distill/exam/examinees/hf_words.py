"""The tokenizer and chat template of any transformers folder, as an exam needs them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.backbone.from_transformers import one_line
from distill.errors import BadInput, CorruptFile
from distill.exam.questions import Question
from distill.teacher.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.bpe import END_THINK, THINK
from distill.turns import SYSTEM, messages


class HfWords:
    """How a transformers model is prompted, and how its text is spelled. Raises CorruptFile for a broken tokenizer."""

    def __init__(self, folder: Path, ends: Sequence[int]) -> None:
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
        self.ends = list(dict.fromkeys([*own, *ends]))
        if not self.ends:
            raise BadInput(f"{folder}: names no end-of-text token; set eos_token_id in its config.json")
        self.has_template = bool(self.hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, nothing put before or after it."""
        return list(self.hf(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def vocabulary(self) -> Vocabulary:
        """As a byte-level BPE. Another kind's tokens are spelled wrongly here, and so are nobody's but its own."""
        spelled: dict[str, int] = self.hf.get_vocab()
        tokens, types = [""] * (1 + max(spelled.values())), [UNUSED] * (1 + max(spelled.values()))
        for token, id in spelled.items():
            tokens[id], types[id] = token, NORMAL
        for id, added in self.hf.added_tokens_decoder.items():
            types[id] = CONTROL if added.special else USER_DEFINED
        return Vocabulary(
            TeacherTokenizer("gpt2", "", tokens, [], types, self.ends[0], extra_stop_ids=tuple(self.ends[1:]))
        )

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

    @cached_property
    def closing(self) -> list[int]:
        """What stands between a dream and the answer."""
        return self.encode(f"\n{END_THINK}{self._after}")

    @cached_property
    def end_think(self) -> int | None:
        """The id of `</think>`; None where its template or its vocabulary has no think tags."""
        ids = [self.encode(tag) for tag in (THINK, END_THINK)]
        if not self.has_template or "think" not in str(self.hf.chat_template) or any(len(one) != 1 for one in ids):
            return None
        return ids[1][0]

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
        asked = messages(question.prompt, question.system)
        try:
            try:
                return self._apply(asked, think)
            except TemplateError:
                if asked[0]["role"] != SYSTEM:
                    raise
                # It knows no system messages.
                system, first, *rest = asked
                return self._apply([{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest], think)
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
