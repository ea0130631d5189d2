"""A teacher's own weights, read for a student to begin with, or for our engine to run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.backbone.gguf_names import our_name, separate
from distill.backbone.model import Backbone, BackboneConfig
from distill.errors import BadInput, CorruptFile
from distill.teacher.gguf_tokenizer import read_metadata, tokenizer_from_metadata
from distill.teacher.protocol import TeacherTokenizer


@dataclass(frozen=True)
class Source:
    """A model file that weights can be read from.

    config: of the whole model, its context the one that it was trained with. license: "" where the file doesn't say.
    """

    path: Path
    config: BackboneConfig
    license: str
    metadata: dict[str, Any]

    @cached_property
    def tokenizer(self) -> TeacherTokenizer:
        return tokenizer_from_metadata(self.metadata)

    def weights(self) -> dict[str, Tensor]:
        """All tensors in float32, by the names of `Backbone.state_dict()`; tied weights once."""
        from gguf import GGUFReader
        from gguf.quants import dequantize

        found: dict[str, Tensor] = {}
        for tensor in GGUFReader(self.path).tensors:
            name = our_name(str(tensor.name))
            if name is None:
                continue
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            if name.endswith("q_proj.weight"):
                values = separate(values, self.config.heads)
            elif name.endswith("k_proj.weight"):
                values = separate(values, self.config.kv_heads)
            found[name] = torch.from_numpy(values)
        return found

    def backbone(self, context: int = 0) -> Backbone:
        """The whole model. context: places to make room for, at most those it was trained with; 0: all of them."""
        from dataclasses import replace

        config = replace(self.config, context=min(context or self.config.context, self.config.context))
        model = Backbone(config)
        missing, unexpected = model.load_state_dict(self.weights(), strict=False)
        if unexpected or [name for name in missing if not (config.tie_embeddings and name == "lm_head.weight")]:
            raise CorruptFile(f"{self.path}: weights don't fit its own description; fetch the model again")
        return model.eval()


def open_source(path: Path) -> Source:
    """Read a GGUF's description. Raises BadInput for what we can't read, CorruptFile for a broken file."""
    fields = read_metadata(path)
    architecture = str(fields.get("general.architecture", ""))
    if architecture != "llama":
        raise BadInput(f"{path}: its architecture {architecture!r} can't be read; llama can")
    at = f"{architecture}."
    heads = int(fields[at + "attention.head_count"])
    tokens = fields["tokenizer.ggml.tokens"]
    from distill.teacher.gguf_tokenizer import read_tensors

    names = {name for name, _, _ in read_tensors(path)}
    config = BackboneConfig(
        vocab_size=len(tokens),
        hidden=int(fields[at + "embedding_length"]),
        layers=int(fields[at + "block_count"]),
        heads=heads,
        kv_heads=int(fields.get(at + "attention.head_count_kv", heads)),
        ffn=int(fields[at + "feed_forward_length"]),
        context=int(fields[at + "context_length"]),
        rope_theta=float(fields.get(at + "rope.freq_base", 10_000.0)),
        norm_eps=float(fields[at + "attention.layer_norm_rms_epsilon"]),
        tie_embeddings="output.weight" not in names,
        eos_id=int(fields["tokenizer.ggml.eos_token_id"]),
    )
    return Source(path, config, str(fields.get("general.license", "")), fields)
