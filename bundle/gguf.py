"""The student as one GGUF file: what llama.cpp and Ollama load."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType, RopeScalingType
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor

from distill.backbone.architecture import BackboneConfig
from distill.backbone.gguf_names import ROPE_DIVISORS, tensor_name, to_gguf
from distill.backbone.model import Backbone
from distill.errors import RunMismatch
from distill.events import Event, Listener, silent
from distill.teacher.gguf_file import writing_gguf
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat_template import JINJA

Q = GGMLQuantizationType
DTYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (Q.F32, LlamaFileType.ALL_F32),
    "f16": (Q.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Q.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Q.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Q.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Q.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Q.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
"""All that can be written without knowing which weights matter most: the K-quants are Ollama's to make."""

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Every token goes through these. SmolLM2 with all else in f16 spends 0.374 bits a byte on its own answers with them in
f16 or q8_0, 0.382 in q5_0, 0.399 in q4_0; a small student's are a small part of it. llama.cpp keeps them wider, too."""


def stored_as(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """How a tensor is stored: vectors in float32, the vocabulary's rows in q8_0 at least, and rows that don't divide
    into blocks in float16."""
    if len(shape) == 1:
        return Q.F32
    block, size = GGML_QUANT_SIZES[wanted]
    if shape[-1] % block:
        return Q.F16
    return Q.Q8_0 if name in VOCABULARY and size / block < 1 else wanted


def file_bytes(config: BackboneConfig, dtype: str) -> int:
    """What the weights of a student of these sizes take in a GGUF; vocabulary and metadata come to it."""
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Backbone(config).state_dict().items()}
    if config.tie_embeddings:
        shapes.pop("lm_head.weight", None)
    total = 0
    for name, shape in shapes.items():
        block, size = GGML_QUANT_SIZES[stored_as(name, shape, DTYPES[dtype][0])]
        total += math.prod(shape) // block * size
    return total


def write_gguf(
    weights: Mapping[str, Tensor],
    config: BackboneConfig,
    tokenizer: StudentTokenizer,
    path: Path,
    dtype: str = "f16",
    metadata: Mapping[str, str] | None = None,
    listen: Listener = silent,
) -> None:
    """Write a student's weights and vocabulary to `path`, whole or not at all.

    weights: as `Backbone.state_dict()` names them. dtype: a key of DTYPES. metadata: keys such as `general.name`
    with their values. Raises RunMismatch where the tokenizer doesn't fit the weights, DistillError for a
    full disk.
    """
    if tokenizer.vocab_size != config.vocab_size:
        raise RunMismatch(
            f"tokenizer: it has {tokenizer.vocab_size} tokens and the student {config.vocab_size}; "
            "export a checkpoint with the tokenizer that it was trained with"
        )
    kind, file_type = DTYPES[dtype]
    with writing_gguf(path, config.architecture) as writer:
        _add_description(writer, config, file_type, metadata or {})
        _add_vocabulary(writer, tokenizer)
        for name, weight in weights.items():
            if name != "lm_head.weight" or not config.tie_embeddings:
                _add_tensor(writer, name, weight.detach().float().cpu().numpy(), config, kind, listen)


def _add_description(
    writer: Any, config: BackboneConfig, file_type: LlamaFileType, metadata: Mapping[str, str]
) -> None:
    writer.add_type("model")
    for key, value in metadata.items():
        writer.add_key_value(key, value, GGUFValueType.STRING)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling and scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling:
        writer.add_tensor(ROPE_DIVISORS, scaling.divisors(config.frequencies()).numpy(), raw_dtype=Q.F32)


def _add_vocabulary(writer: Any, tokenizer: StudentTokenizer) -> None:
    vocabulary = tokenizer.gguf()
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(JINJA)


def _add_tensor(
    writer: Any,
    name: str,
    weight: NDArray[np.float32],
    config: BackboneConfig,
    wanted: GGMLQuantizationType,
    listen: Listener,
) -> None:
    weight = to_gguf(name, weight, config)
    kind = stored_as(name, weight.shape, wanted)
    if kind == Q.F16 != wanted:
        listen(Event("export", "note", f"{name}: rows of {weight.shape[-1]} don't fit {wanted.name}; kept in F16"))
    encode = cast("Callable[[NDArray[np.float32], GGMLQuantizationType], NDArray[Any]]", quantize)
    writer.add_tensor(tensor_name(name), encode(weight, kind), raw_dtype=kind)
