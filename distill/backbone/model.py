"""The student's text backbone: the Llama architecture, written for training speed and small-batch decoding.

Parameters carry the names of transformers' `LlamaForCausalLM`, so one safetensors file serves us,
transformers, and the GGUF converter. Rotary positions follow RoFormer (arXiv:2104.09864) in the half-split
layout, norms RMSNorm (arXiv:1910.07467), the feed-forward SwiGLU (arXiv:2002.05202), heads grouped-query
attention (arXiv:2305.13245).

Shape legend: B rows, T positions, D hidden, H heads, G key/value heads, E = D / H, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.backbone.attention import Documents, attend
from distill.backbone.weights import stored_tensors
from distill.config import StudentSettings
from distill.errors import BadInput, CorruptFile


@dataclass(frozen=True)
class BackboneConfig:
    """Dimensions. Rows that quantize to K-quants want `hidden` and `ffn` in multiples of 256."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise BadInput(f"student.heads: {self.heads} heads don't divide a hidden size of {self.hidden} evenly")
        if self.heads % self.kv_heads:
            raise BadInput(f"student.kv_heads: {self.heads} heads can't share {self.kv_heads} key/value heads evenly")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def to_hf(self) -> dict[str, Any]:
        """config.json. `rope_theta` stands at the top too: Ollama's importer reads it there."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tie_embeddings,
            "pad_token_id": self.pad_id,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "torch_dtype": "float32",
            "use_cache": True,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> "BackboneConfig":
        """Read config.json. Raises BadInput where the architecture is not plain Llama."""
        if config.get("model_type") != "llama":
            raise BadInput(f"{where}: model_type is {config.get('model_type')!r}; only 'llama' checkpoints can be read")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise BadInput(f"{where}: scaled rotary positions ({rope.get('rope_type')!r}) are not supported")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise BadInput(f"{where}: attention_bias and mlp_bias are not supported")
        try:
            heads = int(config["num_attention_heads"])
            eos = config.get("eos_token_id")
            result = cls(
                vocab_size=int(config["vocab_size"]),
                hidden=int(config["hidden_size"]),
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                ffn=int(config["intermediate_size"]),
                context=int(config["max_position_embeddings"]),
                rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
                norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                pad_id=config.get("pad_token_id"),
                bos_id=config.get("bos_token_id"),
                eos_id=eos[0] if isinstance(eos, list) else eos,
            )
        except KeyError as error:
            raise BadInput(f"{where}: has no {error.args[0]!r}; is it a Llama checkpoint's config?") from error
        if config.get("head_dim") not in (None, result.head_dim):
            raise BadInput(f"{where}: head_dim {config['head_dim']} is not hidden_size / heads; Ollama can't load that")
        return result


PRESETS: dict[str, dict[str, int]] = {
    "nano": {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "ffn": 768},
    "micro": {"hidden": 512, "layers": 7, "heads": 8, "kv_heads": 4, "ffn": 1536},
    "small": {"hidden": 768, "layers": 14, "heads": 12, "kv_heads": 4, "ffn": 2048},
}
"""About 5 M, 25 M and 100 M parameters with a vocabulary of some thousands."""


def config_for(settings: StudentSettings, vocab_size: int, pad_id: int, eos_id: int) -> BackboneConfig:
    """The preset with the settings' own sizes over it. Raises BadInput for an unknown preset."""
    if settings.preset not in PRESETS:
        raise BadInput(f"student.preset: {settings.preset!r} is none of {', '.join(PRESETS)}")
    sizes = {name: getattr(settings, name) or default for name, default in PRESETS[settings.preset].items()}
    return BackboneConfig(vocab_size, **sizes, context=settings.context, pad_id=pad_id, eos_id=eos_id)  # pyright: ignore[reportArgumentType]


def rotary_tables(config: BackboneConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, E) float32: angle of pair i at position t is t · theta^(−2i/E). On the CPU, even
    where modules are made elsewhere: they hold no weights."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    angles = torch.outer(torch.arange(length, device="cpu").float(), 1.0 / config.rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions. x (B, H, T, E); cos, sin (B or 1, 1, T, E)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


class Attention(nn.Module):
    attend = staticmethod(attend)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, T, E), (B, G, T, E), (B, G, T, E): rotated queries and keys, and values."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        mixed = self.attend(q, k, v, documents)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)


class Backbone(nn.Module):
    """A decoder-only Llama. `forward` gives logits; training reads `hidden` and fuses the projection.

    Going on token by token is `distill.backbone.session`'s.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.for_decoding: Any = None
        """What `distill.backbone.prepared` keeps."""
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos, sin = rotary_tables(config, config.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def train(self, mode: bool = True) -> "Backbone":
        if mode:
            self.for_decoding = None  # weights are about to change
        return super().train(mode)

    @torch.no_grad()
    def initialize(self, seed: int) -> "Backbone":
        """Normal(0, 0.02), projections into the residual stream scaled by 1/√(2·layers) as in GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / (2 * self.config.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                deviation = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                parameter.normal_(0.0, deviation, generator=generator)
        return self

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of ids (B, T).

        positions (B, T): place of each token in its document; None: 0…T−1. documents: where they lie; None: a
        row is a document. embeds (B, T, D): read in the place of the ids' own embeddings.
        """
        if positions is None:
            cos, sin = self.cos[: ids.shape[1]][None, None], self.sin[: ids.shape[1]][None, None]
        else:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x = self.model.embed_tokens(ids) if embeds is None else embeds
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        for layer in self.model.layers:
            x = layer(x, cos, sin, documents)
        return self.model.norm(x)

    def forward(self, ids: Tensor, positions: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.lm_head(self.hidden(ids, positions, documents))


def count_parameters(model: nn.Module) -> int:
    """Tied weights once."""
    return sum(p.numel() for p in model.parameters())


def save_backbone(model: Backbone, folder: Path) -> None:
    """Write config.json and model.safetensors (float32; tied weights once) as transformers reads them."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(model.config.to_hf(), indent=2) + "\n")
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path) -> BackboneConfig:
    """BackboneConfig of a checkpoint folder. Raises BadInput or CorruptFile."""
    path = folder / "config.json"
    try:
        return BackboneConfig.from_hf(json.loads(path.read_text()), str(path))
    except FileNotFoundError as error:
        raise BadInput(f"{folder}: no config.json; give the folder of a Llama checkpoint") from error
    except ValueError as error:
        raise CorruptFile(f"{path}: is not JSON ({error})") from error


def assemble(config: BackboneConfig, weights: dict[str, Tensor]) -> Backbone:
    """A Backbone in eval mode, whose parameters are these tensors (tied weights once); they fit, by `misfit`."""
    with torch.device("meta"):  # nothing is drawn by chance to be thrown away
        model = Backbone(config)
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def misfit(config: BackboneConfig, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with tensors of these names and shapes as weights of such a model; "" for nothing."""
    with torch.device("meta"):
        model = Backbone(replace(config, context=1))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del wanted["lm_head.weight"]
    if odd := sorted(wanted.keys() ^ shapes.keys()):
        return f"{odd[0]} is {'missing' if odd[0] in wanted else 'unknown'}"
    for name, shape in wanted.items():
        if shapes[name] != shape:
            return f"{name} has the shape {shapes[name]}, not {shape}"
    return ""


def load_backbone(folder: Path, context: int = 0) -> Backbone:
    """A Backbone from a folder of `save_backbone` or of transformers. Raises BadInput or CorruptFile."""
    config = read_config(folder)
    if context:
        config = replace(config, context=context)
    stored = stored_tensors(folder, config.tie_embeddings)
    if wrong := misfit(config, {name: tensor.shape for name, tensor in stored.items()}):
        raise CorruptFile(f"{folder}: weights don't fit config.json ({wrong})")
    return assemble(config, {name: tensor.read() for name, tensor in stored.items()})


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids (B, T) padded on the left with `pad`, and real (B, T) bool."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    real = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        if len(row):
            ids[i, length - len(row) :] = torch.tensor(row, dtype=torch.long)
            real[i, length - len(row) :] = True
    return ids, real
