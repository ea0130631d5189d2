"""How a student reads a picture itself: patch features of a vision transformer, through a projector, as its embeddings.

The recipe is LLaVA's (arXiv:2310.03744), computed as llama.cpp does: DINOv2's blocks without the class token, the layer
scale folded into the weights before it, GELU by its tanh formula, the last norm, then two layers into the student's
embedding space. One file holds all of it, mmproj.gguf: llama.cpp and Ollama load it beside the student's own.

Shape legend: N pictures, S a side in pixels, P patches of a picture, W the encoder's width, D the student's hidden,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import LlamaFileType
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from distill.backbone.model import Backbone, assemble
from distill.errors import BadInput, CorruptFile
from distill.teacher.gguf_file import dequantized, whole_gguf, writing_gguf
from distill.vision.backbones import LICENCES, Pretrained
from distill.vision.pictures import Picture, Preparation, as_image

PAD = (122, 116, 104)
"""The grey around a picture that isn't square, as llama.cpp has it for projectors of this kind."""
TOGETHER = 16
"""Pictures encoded at once."""
APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


@dataclass
class Sight:
    """encoder: tensors by GGUF's names, frozen. size: S. heads: of the encoder's attention; eps: of its norms. whose:
    the encoder is, and its licence."""

    encoder: dict[str, Tensor]
    projector: nn.Sequential
    size: int
    heads: int
    eps: float
    whose: str

    @classmethod
    def new(cls, source: str, size: int, hidden: int, seed: int, whose: str = "", share: float = 1.0) -> "Sight":
        """DINOv2's weights in a folder, for pictures of S = `size`, and a projector by chance into D = `hidden`. whose:
        the weights are, where they aren't DINOv2-S/14. share: of the blocks, the first ones; after fewer than all the
        norm is a plain one.
        Raises BadInput for a size that its patches don't divide, CorruptFile."""
        model = Pretrained("dinov2", source, size, "see.image_size").model
        state, config = model.state_dict(), model.config
        if config.use_swiglu_ffn:
            raise BadInput(
                f"{source}: its feed-forward layers are gated, as llama.cpp can't read them; take a smaller one"
            )
        side = size // config.patch_size
        blank = torch.zeros(1, 1 + side * side, config.hidden_size)
        places = model.embeddings.interpolate_pos_encoding(blank, size, size)[0, 1:]
        tensors = {"v.position_embd.weight": places}
        for ours, theirs in (("v.patch_embd", "embeddings.patch_embeddings.projection"), ("v.post_ln", "layernorm")):
            tensors |= {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}
        depth = max(1, round(share * config.num_hidden_layers))
        if depth < config.num_hidden_layers:
            tensors |= {"v.post_ln.weight": torch.ones(config.hidden_size)}
            tensors |= {"v.post_ln.bias": torch.zeros(config.hidden_size)}
        for layer in range(depth):
            for ours, theirs, scale in BLOCK:
                own, of = f"v.blk.{layer}.{ours}", f"encoder.layer.{layer}."
                weight, bias = state[f"{of}{theirs}.weight"], state[f"{of}{theirs}.bias"]
                factor = state[f"{of}{scale}.lambda1"] if scale else torch.ones(1)
                tensors[f"{own}.weight"] = weight * (factor[:, None] if weight.ndim > 1 else factor)
                tensors[f"{own}.bias"] = bias * factor
        tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            projector = layers(config.hidden_size, hidden, hidden)
        whose = whose or f"{LICENCES['dinov2']}, {APACHE}"
        return cls(tensors, projector, size, config.num_attention_heads, config.layer_norm_eps, whose)

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return self.encoder["v.patch_embd.weight"].shape[-1]

    @property
    def patches(self) -> int:
        """P: so many embeddings of the student's context a picture takes."""
        return (self.size // self.patch) ** 2

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, P, W) float32. Raises BadInput for a picture that can't be read."""
        parts = [pictures[start : start + TOGETHER] for start in range(0, len(pictures), TOGETHER)]
        return torch.cat([self._encoded(torch.stack([self.pixels(one) for one in part])) for part in parts])

    @torch.no_grad()
    def rows(self, pictures: Sequence[Picture]) -> Tensor:
        """(N · P, D): what the student reads, patch by patch. Raises BadInput for a picture that can't be read."""
        return self.projector(self.features(pictures).flatten(0, 1))

    def pixels(self, picture: Picture) -> Tensor:
        """(3, S, S): the whole picture, its longer side S, in the middle of grey, as llama.cpp prepares it."""
        image = as_image(picture)
        scale = min(np.float32(self.size) / np.float32(side) for side in image.size)  # it rounds in float32
        width, height = (min(int(np.ceil(np.float32(side) * scale)), self.size) for side in image.size)
        canvas = Image.new("RGB", (self.size, self.size), PAD)
        small = image if image.size == canvas.size else image.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(small, ((self.size - width) // 2, (self.size - height) // 2))
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (Preparation.mean, Preparation.std))
        return (torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255 - mean) / deviation

    def _encoded(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, W)."""
        own = self.encoder

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

        def norm(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], self.eps)

        x = F.conv2d(pixels, own["v.patch_embd.weight"], own["v.patch_embd.bias"], stride=self.patch).flatten(2).mT
        x = x + own["v.position_embd.weight"]
        for block in (f"v.blk.{layer}." for layer in range(self._depth)):
            y = norm(f"{block}ln1", x)
            parts = (linear(f"{block}attn_{part}", y) for part in "qkv")
            q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
            x = x + linear(f"{block}attn_out", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            y = F.gelu(linear(f"{block}ffn_up", norm(f"{block}ln2", x)), approximate="tanh")
            x = x + linear(f"{block}ffn_down", y)
        return norm("v.post_ln", x)

    @property
    def _depth(self) -> int:
        return sum(name.endswith(".ln1.weight") for name in self.encoder)

    def save(self, path: Path, dtype: str = "f16") -> None:
        """Write mmproj.gguf, whole or not at all; matrices in `dtype`, f16 or f32, the rest in float32. Raises
        DistillError."""
        with writing_gguf(path, "clip") as writer:
            self._describe(writer, dtype)
            mm = {f"mm.{name}": tensor.detach() for name, tensor in self.projector.state_dict().items()}
            for name, tensor in {**self.encoder, **mm}.items():
                narrow = dtype == "f16" and tensor.ndim == 2 and name != "v.position_embd.weight"
                writer.add_tensor(name, tensor.cpu().numpy().astype(np.float16 if narrow else np.float32))

    def _describe(self, writer: Any, dtype: str) -> None:
        """What llama.cpp's reader of projectors asks for. No `block_count` without `vision.` before it: by that Ollama
        knows a projector."""
        up = self.encoder["v.blk.0.ffn_up.weight"]
        writer.add_type("mmproj")
        writer.add_string("general.license.name", self.whose)
        writer.add_file_type(LlamaFileType.MOSTLY_F16 if dtype == "f16" else LlamaFileType.ALL_F32)
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_string("clip.projector_type", "mlp")
        writer.add_bool("clip.use_gelu", True)
        numbers = {"image_size": self.size, "patch_size": self.patch, "block_count": self._depth}
        numbers |= {"embedding_length": up.shape[1], "feed_forward_length": up.shape[0]}
        numbers |= {"projection_dim": self.projector[2].out_features, "attention.head_count": self.heads}
        for key, number in numbers.items():
            writer.add_uint32(f"clip.vision.{key}", number)
        writer.add_float32("clip.vision.attention.layer_norm_epsilon", self.eps)
        writer.add_array("clip.vision.image_mean", list(Preparation.mean))
        writer.add_array("clip.vision.image_std", list(Preparation.std))
        # All of its layers: unsaid, llama.cpp takes all but the last.
        writer.add_array("clip.vision.feature_layer", [self._depth])

    @classmethod
    def load(cls, path: Path) -> "Sight":
        """Read what `save` wrote. Raises BadInput where there is none, CorruptFile."""
        file = whole_gguf(path)
        found = {tensor.name: torch.from_numpy(dequantized(path, tensor)) for tensor in file.tensors}
        try:
            encoder = {name: tensor for name, tensor in found.items() if name.startswith("v.")}
            first, last = found["mm.0.weight"], found["mm.2.weight"]
            projector = layers(first.shape[1], *last.shape[::-1])
            projector.load_state_dict({name[3:]: tensor for name, tensor in found.items() if name.startswith("mm.")})
            sight = cls(encoder, projector.requires_grad_(False), *(file.fields[key] for key in READ))
            sight.features([Image.new("RGB", (1, 1))])
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise CorruptFile(f"{path}: not a projector that we wrote ({error}); export the run again") from error
        return sight


READ = (
    *(f"clip.vision.{key}" for key in ("image_size", "attention.head_count", "attention.layer_norm_epsilon")),
    "general.license.name",
)
BLOCK = (
    ("ln1", "norm1", ""),
    ("attn_q", "attention.q_proj", ""),
    ("attn_k", "attention.k_proj", ""),
    ("attn_v", "attention.v_proj", ""),
    ("attn_out", "attention.o_proj", "layer_scale1"),
    ("ln2", "norm2", ""),
    ("ffn_up", "mlp.fc1", ""),
    ("ffn_down", "mlp.fc2", "layer_scale2"),
)
"""GGUF's name of a part of a block, transformers', and the layer scale that comes after it."""


def layers(width: int, wide: int, hidden: int) -> nn.Sequential:
    """The projector, W → `wide` → D; its state's names are GGUF's after `mm.`."""
    return nn.Sequential(nn.Linear(width, wide), nn.GELU("tanh"), nn.Linear(wide, hidden))


def showing(model: Backbone, rows: Tensor) -> Backbone:
    """The same model, to which ids from V on are `rows` (n, D): what it reads but never writes."""
    shown = assemble(model.config, dict(model.state_dict())).to(model.cos.device)
    table = torch.cat([model.model.embed_tokens.weight.detach(), rows.to(model.cos.device)])
    shown.model.embed_tokens = nn.Embedding.from_pretrained(table)
    return shown
