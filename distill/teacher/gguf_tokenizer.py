"""Reads and speaks a teacher's vocabulary: which bytes each id stands for, whatever the tokenizer's kind."""

import contextlib
import mmap
import struct
from collections.abc import Generator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

from distill.errors import BadInput, CorruptFile
from distill.teacher.protocol import TeacherTokenizer

MAGIC = b"GGUF"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of the GGUF specification."""

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|eom_id|>")
"""Control tokens with which models end a turn, beside the one that their file calls EOS."""


def check_gguf(path: Path) -> None:
    """Raises BadInput where there is no file, CorruptFile where it is no GGUF."""
    if not path.is_file():
        raise BadInput(f"{path}: no such model file; give the path of a .gguf")
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CorruptFile(f"{path}: is not a GGUF (its first bytes are not GGUF); give a model in GGUF format")


class _Reader:
    """Key-value part of a GGUF, version 2 or 3, little-endian, by its specification.

    The gguf library makes several arrays for each string: 10 s for a vocabulary of 49,152 that this reads in 0.1 s.
    """

    SCALARS: ClassVar[dict[int, str]] = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {
        10: "Q",
        11: "q",
        12: "d",
    }
    STRING, ARRAY = 8, 9

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = len(MAGIC)
        self.tensor_count = 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it is cut short")
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            return self.scalar(self.SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element in (self.STRING, self.ARRAY):
            return [self.value(element) for _ in range(count)]
        layout = f"<{count}{self.SCALARS[element]}"
        values = list(struct.unpack_from(layout, self.data, self.at))
        self.at += struct.calcsize(layout)
        return values

    def fields(self) -> dict[str, Any]:
        version, self.tensor_count, count = self.scalar("I"), self.scalar("Q"), self.scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}, not 2 or 3")
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = self.string()
            fields[name] = self.value(self.scalar("I"))
        return fields

    def tensors(self) -> list[tuple[str, list[int], int]]:
        found: list[tuple[str, list[int], int]] = []
        for _ in range(self.tensor_count):
            name, rank = self.string(), self.scalar("I")
            shape = [self.scalar("Q") for _ in range(rank)]
            found.append((name, shape, self.scalar("I")))
            self.scalar("Q")  # offset
        return found


@contextlib.contextmanager
def _reading(path: Path) -> Generator[_Reader]:
    check_gguf(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Reader(data)
    except (struct.error, ValueError, KeyError, MemoryError) as error:
        raise CorruptFile(f"{path}: its metadata can't be read ({error}); fetch or export the model again") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """All of a GGUF's key-value pairs. Raises BadInput, or CorruptFile where it is cut short."""
    with _reading(path) as reader:
        return reader.fields()


def read_tensors(path: Path) -> list[tuple[str, list[int], int]]:
    """(name, shape in GGUF's order, ggml type) of each tensor. Raises as read_metadata does."""
    with _reading(path) as reader:
        reader.fields()
        return reader.tensors()


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

    def _spell(self, i: int) -> bytes:
        token, kind = self.tokenizer.tokens[i], self.tokenizer.types[i]
        if kind in (CONTROL, UNKNOWN, UNUSED):
            return b""
        if kind == BYTE:  # "<0x0A>"
            return bytes([int(token[3:-1], 16)])
        if kind == USER_DEFINED:
            return token.encode()
        if self.tokenizer.model == "gpt2":
            alphabet = byte_alphabet()
            if all(char in alphabet for char in token):
                return bytes(alphabet[char] for char in token)
            return token.encode()
        return token.replace("▁", " ").encode()

    def id_of(self, text: bytes) -> int | None:
        """The id that prints exactly these bytes, or None."""
        return self._ids.get(text)

    def is_end(self, i: int) -> bool:
        """Whether the id ends an answer."""
        return i == self.tokenizer.eos_id or i in self.tokenizer.extra_stop_ids

    def decode(self, ids: list[int]) -> bytes:
        """The bytes that a run of ids prints."""
        return b"".join(self.bytes_of[i] for i in ids)
