"""Reads and speaks a teacher's vocabulary: which bytes each id stands for, whatever the tokenizer's kind."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from distill.errors import CorruptFile
from distill.teacher.gguf_file import read_metadata
from distill.teacher.protocol import TeacherTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of the GGUF specification."""

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|eom_id|>")
"""Control tokens with which models end a turn, beside the one that their file calls EOS."""


def read_tokenizer(path: Path) -> TeacherTokenizer:
    """The vocabulary in a GGUF's metadata. Raises BadInput, or CorruptFile where there is none."""
    fields = read_metadata(path)
    try:
        return tokenizer_from_metadata(fields)
    except KeyError as error:
        raise CorruptFile(f"{path}: its metadata lack {error}; fetch or export the model again") from error


def tokenizer_from_metadata(fields: Mapping[str, Any]) -> TeacherTokenizer:
    """From `tokenizer.ggml.*` keys, as a GGUF and Ollama's verbose /api/show give them. KeyError where one lacks."""
    tokens = cast("list[str]", fields["tokenizer.ggml.tokens"])
    types = cast("list[int] | None", fields.get("tokenizer.ggml.token_type")) or [NORMAL] * len(tokens)
    eos = int(fields["tokenizer.ggml.eos_token_id"])
    bos = fields.get("tokenizer.ggml.bos_token_id")
    named = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    ends = {int(i) for i in named if i is not None}
    ends |= {i for i, kind in enumerate(types) if kind == CONTROL and tokens[i] in TURN_ENDS}
    return TeacherTokenizer(
        model=str(fields["tokenizer.ggml.model"]),
        pre=str(fields.get("tokenizer.ggml.pre") or "default"),
        tokens=tokens,
        merges=cast("list[str] | None", fields.get("tokenizer.ggml.merges")) or [],
        types=[int(kind) for kind in types],
        eos_id=eos,
        bos_id=None if bos is None else int(bos),
        extra_stop_ids=tuple(sorted(ends - {eos})),
    )


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: visible Latin-1 as it is, the rest from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class Vocabulary:
    """Ids ↔ bytes of a TeacherTokenizer.

    A control token prints nothing, so its bytes are b"". In a SentencePiece vocabulary "▁" is a space (the one
    that SentencePiece drops at the very start of a text is kept: servers print it or trim it themselves).
    """

    def __init__(self, tokenizer: TeacherTokenizer) -> None:
        self.tokenizer = tokenizer
        self.bytes_of = [self._spell(i) for i in range(len(tokenizer.tokens))]
        self._ids: dict[bytes, int] = {}
        for i in reversed(range(len(self.bytes_of))):  # of equals, the first id wins…
            self._ids[self.bytes_of[i]] = i
        for i, kind in enumerate(tokenizer.types):  # …and a normal token over the byte token of the same byte
            if kind == NORMAL and tokenizer.types[self._ids[self.bytes_of[i]]] == BYTE:
                self._ids[self.bytes_of[i]] = i
        self._ids.pop(b"", None)
        self._longest = max(map(len, self._ids), default=0)

    def _spell(self, i: int) -> bytes:
        token, kind = self.tokenizer.tokens[i], self.tokenizer.types[i]
        if kind in (CONTROL, UNKNOWN, UNUSED):
            return b""
        if kind == BYTE:  # "<0x0A>"
            return bytes([int(token[3:-1], 16)])
        if kind == USER_DEFINED:
            return token.encode()
        if self.tokenizer.model == "gpt2":
            try:
                return bytes(map(byte_alphabet().__getitem__, token))
            except KeyError:
                return token.encode()
        return token.replace("▁", " ").encode()

    def id_of(self, text: bytes) -> int | None:
        """The id that prints exactly these bytes, or None."""
        return self._ids.get(text)

    def spell(self, text: bytes) -> list[int]:
        """Ids that print a text: from its beginning on, always the longest token that fits (not how the model's own
        tokenizer splits it). Bytes that no token begins with are left out."""
        ids: list[int] = []
        while text:
            longest = next((n for n in range(min(len(text), self._longest), 0, -1) if text[:n] in self._ids), 0)
            if longest:
                ids.append(self._ids[text[:longest]])
            text = text[max(longest, 1) :]
        return ids

    def is_end(self, i: int) -> bool:
        """Whether the id ends an answer."""
        return i == self.tokenizer.eos_id or i in self.tokenizer.extra_stop_ids

    def written(self, ids: Sequence[int]) -> str:
        """The text that llama.cpp reads as these ids, control tokens by their names. Before a text of SentencePiece's,
        and after each control token, it reads a space that isn't there."""
        pieces, blank = list[bytes](), self.tokenizer.model == "llama"
        for i in ids:
            control = self.tokenizer.types[i] == CONTROL
            piece = self.tokenizer.tokens[i].encode() if control else self.bytes_of[i]
            pieces.append(piece.removeprefix(b" ") if blank else piece)
            blank = control and self.tokenizer.model == "llama"
        return b"".join(pieces).decode("utf-8", "replace")

    def decode(self, ids: list[int]) -> bytes:
        """The bytes that a run of ids prints."""
        return b"".join(self.bytes_of[i] for i in ids)
