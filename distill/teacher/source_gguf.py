"""A teacher's weights in a GGUF."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.backbone.gguf_names import our_name, separate
from distill.backbone.model import BackboneConfig, misfit
from distill.backbone.weights import Stored
from distill.errors import BadInput, CorruptFile
from distill.teacher.gguf_file import Gguf, GgufTensor, dequantized, read_gguf, stored_bytes
from distill.teacher.gguf_tokenizer import tokenizer_from_metadata
from distill.teacher.source import Source

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def open_gguf(path: Path) -> Source:
    """Raises BadInput for what we can't read, CorruptFile for a broken file."""
    file = read_gguf(path)
    _check_whole(file)
    architecture = str(file.fields.get("general.architecture", ""))
    if architecture != "llama":
        raise BadInput(f"{path}: its architecture {architecture!r} can't be read; llama can")
    try:
        config = _config(file, architecture)
        license = str(file.fields.get("general.license", ""))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path}: its metadata lack or garble {error}; fetch or export the model again") from error
    stored: dict[str, Stored] = {}
    for tensor in file.tensors:
        name = our_name(tensor.name)
        if name is None:
            raise BadInput(f"{path}: holds {tensor.name}, which no {architecture} that can be read here has")
        stored[name] = Stored(tensor.shape, partial(_read, path, config, name, tensor))
    if wrong := misfit(config, {name: tensor.shape for name, tensor in stored.items()}):
        raise CorruptFile(f"{path}: weights don't fit its own description ({wrong}); fetch the model again")
    return Source(path, config, license, stored, partial(tokenizer_from_metadata, file.fields))


def _check_whole(file: Gguf) -> None:
    """Raises BadInput for a part of a model, CorruptFile where the end is missing."""
    found = PART.search(file.path.name)
    parts = int(file.fields.get("split.count", 0)) or (int(found[2]) if found else 1)
    if parts > 1:
        raise BadInput(
            f"{file.path}: is one of {parts} parts of a model; join them with llama.cpp's `llama-gguf-split --merge`"
        )
    size = file.path.stat().st_size
    for tensor in file.tensors:
        if (end := tensor.start + stored_bytes(file.path, tensor)) > size:
            raise CorruptFile(
                f"{file.path}: is cut short: {tensor.name} should end at byte {end:,}, and it has {size:,}; "
                "fetch the model again"
            )


def _config(file: Gguf, architecture: str) -> BackboneConfig:
    """Raises KeyError where a key lacks."""
    fields: dict[str, Any] = file.fields
    at = f"{architecture}."
    heads = int(fields[at + "attention.head_count"])
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    return BackboneConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden=int(fields[at + "embedding_length"]),
        layers=int(fields[at + "block_count"]),
        heads=heads,
        kv_heads=int(fields.get(at + "attention.head_count_kv", heads)),
        ffn=int(fields[at + "feed_forward_length"]),
        context=int(fields[at + "context_length"]),
        rope_theta=float(fields.get(at + "rope.freq_base", 10_000.0)),
        norm_eps=float(fields[at + "attention.layer_norm_rms_epsilon"]),
        tie_embeddings="output.weight" not in shapes,
        eos_id=int(fields["tokenizer.ggml.eos_token_id"]),
    )


def _read(path: Path, config: BackboneConfig, name: str, tensor: GgufTensor) -> Tensor:
    values = dequantized(path, tensor)
    if name.endswith("q_proj.weight"):
        values = separate(values, config.heads)
    elif name.endswith("k_proj.weight"):
        values = separate(values, config.kv_heads)
    return torch.from_numpy(values)
