"""A teacher's weights in a GGUF."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.backbone.architecture import CLASSES, READABLE, BackboneConfig, RopeScaling
from distill.backbone.gguf_names import ROPE_DIVISORS, from_gguf, our_name
from distill.backbone.model import misfit
from distill.backbone.weights import Stored
from distill.errors import BadInput, CorruptFile
from distill.teacher.gguf_file import Gguf, GgufTensor, dequantized, whole_gguf
from distill.teacher.gguf_tokenizer import tokenizer_from_metadata
from distill.teacher.licenses import License
from distill.teacher.protocol import TeacherTokenizer
from distill.teacher.source import Source

PLAIN: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "rope.scaling.attn_factor"), (0, 1)),
    **dict.fromkeys(("attention.scale", "attn_logit_softcapping", "final_logit_softcapping", "expert_count"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_scale"), (0,)),
}
"""What a GGUF may say of the arithmetic → the values that say what we compute."""


def open_gguf(path: Path) -> Source:
    """Raises BadInput for what we can't read, CorruptFile for a broken file."""
    file = whole_gguf(path)
    architecture = file.fields.get("general.architecture")
    if architecture not in CLASSES:
        raise BadInput(f"{path}: its architecture {architecture!r} can't be read; {READABLE} can")
    try:
        config = _config(file, f"{architecture}.")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptFile(f"{path}: its metadata lack or garble {error}; fetch or export the model again") from error
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    stored: dict[str, Stored] = {}
    for tensor in file.tensors:
        if tensor.name != ROPE_DIVISORS:
            name = our_name(tensor.name) or tensor.name
            stored[name] = Stored(tensor.shape, partial(_read, path, config, name, tensor))
    if wrong := misfit(config, {name: tensor.shape for name, tensor in stored.items()}):
        raise CorruptFile(f"{path}: weights don't fit its description as a plain {architecture} ({wrong})")
    license = License.of_metadata(file.fields)
    return Source(path, config, str(license) if license.name else "", stored, partial(_tokenizer, file))


def _read(path: Path, config: BackboneConfig, name: str, tensor: GgufTensor) -> Tensor:
    return torch.from_numpy(from_gguf(name, dequantized(path, tensor), config))


def _tokenizer(file: Gguf) -> TeacherTokenizer:
    try:
        return tokenizer_from_metadata(file.fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{file.path}: its metadata lack or garble {error}; fetch the model again") from error


def _config(file: Gguf, at: str) -> BackboneConfig:
    """at: what its architecture's keys begin with. Raises BadInput, and KeyError where a key lacks."""
    fields = file.fields
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    heads, hidden = int(fields[at + "attention.head_count"]), int(fields[at + "embedding_length"])
    size = int(fields.get(at + "attention.key_length", hidden // heads))
    for key, plain in PLAIN.items():
        if fields.get(at + key, next(iter(plain))) not in plain:
            raise BadInput(f"{at}{key} is {fields[at + key]}, which can't be computed; {plain[-1]} can")
    for key in ("rope.dimension_count", "attention.value_length"):
        if int(fields.get(at + key, size)) != size:
            raise BadInput(f"{at}{key} is {fields[at + key]}, and only heads of {size} alike can be read")
    window = int(fields.get(at + "attention.sliding_window") or 0)  # within it, everything is seen
    context = int(fields[at + "context_length"])
    if (tokens := len(fields["tokenizer.ggml.tokens"])) != shapes["token_embd.weight"][0]:
        raise ValueError(f"tokenizer.ggml.tokens ({tokens} for {shapes['token_embd.weight'][0]} rows)")
    config = BackboneConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden=hidden,
        layers=int(fields[at + "block_count"]),
        heads=heads,
        kv_heads=int(fields.get(at + "attention.head_count_kv", heads)),
        ffn=int(fields[at + "feed_forward_length"]),
        context=min(context, window) if window else context,
        rope_theta=_decimal(fields.get(at + "rope.freq_base", 10_000.0)),
        norm_eps=_decimal(fields[at + "attention.layer_norm_rms_epsilon"]),
        tie_embeddings="output.weight" not in shapes,
        pad_id=fields.get("tokenizer.ggml.padding_token_id"),
        bos_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_id=int(fields["tokenizer.ggml.eos_token_id"]),
        architecture=at[:-1],
        head_size=None if size * heads == hidden else size,
    )
    return replace(config, rope_scaling=_scaling(file, at, config))


def _decimal(value: float) -> float:
    """A float32 as the shortest decimal that names it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(file: Gguf, at: str, config: BackboneConfig) -> RopeScaling | None:
    """A factor without a kind is linear, and had another name once: so llama.cpp reads it."""
    factors = (file.fields.get(at + key) for key in ("rope.scaling.factor", "rope.scale_linear"))
    factor = _decimal(next((found for found in factors if found), 1.0))
    kind = str(file.fields.get(at + "rope.scaling.type", "none" if factor == 1 else "linear"))
    divisors = next((tensor for tensor in file.tensors if tensor.name == ROPE_DIVISORS), None)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "none":
        raise BadInput(f"rotary positions scaled as {kind!r} can't be read; linear and llama3 can")
    if divisors is None:
        return None
    frequencies, values = config.frequencies(), torch.from_numpy(dequantized(file.path, divisors))
    found = RopeScaling.fitted(values, frequencies) if values.shape == frequencies.shape else None
    if found is None and not bool((values == 1).all()):
        raise BadInput(f"{ROPE_DIVISORS} scales rotary positions as no Llama 3 does; that can't be read")
    return found
