"""Reads a GGUF, version 2 or 3, little-endian, by its specification: its key-value pairs, and its tensors.

The gguf library makes several arrays for each string: 10 s for a vocabulary of 49,152 that this reads in 0.2 s. Of the
library only the arithmetic of quantized blocks is used.
"""

import contextlib
import math
import mmap
import os
import re
import struct
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from distill.errors import BadInput, CorruptFile, unwritable

MAGIC = b"GGUF"
ALIGNMENT = 32
"""Of the tensors' data, where the file says nothing else."""

PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
"""How llama.cpp names the parts of a model that was split."""

AT_ONCE = 1 << 17
"""Elements dequantized at a time: what the library makes of them on the way stays in a core's cache."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. shape: rows first, as numpy has it. kind: GGML's number of how it is stored. start: where in
    the file its data begin."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Gguf:
    """A file's header."""

    path: Path
    fields: dict[str, Any]
    tensors: list[GgufTensor]


def check_gguf(path: Path) -> None:
    """Raises BadInput where there is no file, CorruptFile where it is no GGUF."""
    if not path.is_file():
        raise BadInput(f"{path}: no such model file; give the path of a .gguf")
    try:
        with path.open("rb") as file:
            found = file.read(4)
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}); allow it, or give a copy") from error
    if found != MAGIC:
        raise CorruptFile(f"{path}: is not a GGUF (its first bytes are not GGUF); give a model in GGUF format")


class _Reader:
    SCALARS: ClassVar[dict[int, str]] = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {
        10: "Q",
        11: "q",
        12: "d",
    }
    STRING, ARRAY = 8, 9
    LENGTH = struct.Struct("<Q")

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = len(MAGIC)
        self.tensor_count = 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def strings(self, count: int) -> list[str]:
        """In one loop: a vocabulary has 100,000 of tokens and merges."""
        data, at, size = self.data, self.at, len(self.data)
        found: list[str] = []
        for _ in range(count):
            (length,) = self.LENGTH.unpack_from(data, at)
            start, at = at + 8, at + 8 + length
            if at > size:
                raise ValueError("it is cut short")
            found.append(data[start:at].decode("utf-8", "replace"))
        self.at = at
        return found

    def string(self) -> str:
        return self.strings(1)[0]

    def value(self, kind: int) -> Any:
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            return self.scalar(self.SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element == self.STRING:
            return self.strings(count)
        if element == self.ARRAY:
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

    def tensors(self, alignment: int) -> list[GgufTensor]:
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(self.tensor_count):
            name, rank = self.string(), self.scalar("I")
            shape = [self.scalar("Q") for _ in range(rank)]
            found.append((name, tuple(reversed(shape)), self.scalar("I"), self.scalar("Q")))
        data = -(-self.at // alignment) * alignment
        return [GgufTensor(name, shape, kind, data + offset) for name, shape, kind, offset in found]


@contextlib.contextmanager
def _reading(path: Path) -> Generator[_Reader]:
    check_gguf(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Reader(data)
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError, RecursionError) as error:
        raise CorruptFile(f"{path}: its metadata can't be read ({error}); fetch or export the model again") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """All of a GGUF's key-value pairs. Raises BadInput, or CorruptFile where it is cut short."""
    with _reading(path) as reader:
        return reader.fields()


def shape_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher's info keeps of its file's metadata, to know its weights by; only what is there."""
    architecture = fields.get("general.architecture")
    found = {
        "architecture": architecture,
        "layers": fields.get(f"{architecture}.block_count"),
        "hidden": fields.get(f"{architecture}.embedding_length"),
        "file_type": fields.get("general.file_type"),
    }
    return {key: value for key, value in found.items() if value is not None}


def read_gguf(path: Path) -> Gguf:
    """Key-value pairs and tensors. Raises as read_metadata does."""
    with _reading(path) as reader:
        fields = reader.fields()
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        return Gguf(path, fields, reader.tensors(alignment))


def whole_gguf(path: Path) -> Gguf:
    """Key-value pairs and tensors, all of which can be read.

    Raises as read_metadata does, BadInput for a part of a model or a way of storing that we can't read, and CorruptFile
    where tensors lie past the end of the file.
    """
    file = read_gguf(path)
    found = PART.search(path.name)
    parts = file.fields.get("split.count") or (int(found[1]) if found else 1)
    if parts != 1:
        raise BadInput(f"{path}: is one of {parts} parts of a model; join them with `llama-gguf-split --merge`")
    size = path.stat().st_size
    for tensor in file.tensors:
        if (end := tensor.start + stored_bytes(path, tensor)) > size:
            raise CorruptFile(
                f"{path}: is cut short: {tensor.name} ends at byte {end:,}, the file at {size:,}; fetch the model again"
            )
    return file


def stored_bytes(path: Path, tensor: GgufTensor) -> int:
    """How many a tensor takes. Raises BadInput where we can't dequantize it, CorruptFile where its rows don't fit."""
    try:
        block, size = blocks_of(tensor.kind)
    except (ValueError, NotImplementedError) as error:
        raise BadInput(
            f"{path}: {tensor.name} is stored in a way that can't be read ({error}); give the model as F16 or Q8_0"
        ) from error
    if not tensor.shape or tensor.shape[-1] % block:
        raise CorruptFile(f"{path}: {tensor.name} has rows that are no multiple of {block}; fetch the model again")
    return math.prod(tensor.shape) // block * size


@lru_cache(maxsize=64)
def blocks_of(kind: int) -> tuple[int, int]:
    """(elements, bytes) of a block. Raises ValueError, NotImplementedError where the library can't dequantize it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    cast("Any", dequantize)(np.zeros((1, size), np.uint8), GGMLQuantizationType(kind))
    return block, size


def dequantized(path: Path, tensor: GgufTensor) -> NDArray[np.float32]:
    """A tensor's values. Raises as stored_bytes does."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.memmap(path, np.uint8, "r", tensor.start, (stored_bytes(path, tensor),))
    block, size = blocks_of(tensor.kind)
    values = np.empty(math.prod(tensor.shape), np.float32)
    step = max(1, AT_ONCE // block)
    for start in range(0, len(raw) // size, step):
        part = raw[start * size : (start + step) * size]
        values[start * block : (start + step) * block] = cast("Any", dequantize)(
            part[None], GGMLQuantizationType(tensor.kind)
        )[0]
    return values.reshape(tensor.shape)


@contextlib.contextmanager
def writing_gguf(path: Path, architecture: str) -> Generator[Any]:
    """The library's writer, to be told all that the file holds; then it is written, whole or not at all. Raises
    DistillError where it can't be."""
    from gguf import GGUFWriter

    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer: Any = GGUFWriter(aside, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(aside, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        writer.close()
        aside.unlink(missing_ok=True)
