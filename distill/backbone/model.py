"""The text backbone of student and teacher: Llama and its kin, written for training speed and small-batch decoding.

Parameters carry the names of transformers' own class (architecture.py), so one safetensors file serves us,
transformers, and the GGUF converter. Rotary positions follow RoFormer (arXiv:2104.09864) in the half-split
layout, norms RMSNorm (arXiv:1910.07467), the feed-forward SwiGLU (arXiv:2002.05202), heads grouped-query
attention (arXiv:2305.13245).

Shape legend: B rows, T positions, D hidden, H heads, G key/value heads, E head size, V vocabulary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.backbone.architecture import BackboneConfig
from distill.backbone.attention import Documents, attend
from distill.backbone.weights import layer_of, stored_tensors
from distill.config import StudentSettings
from distill.errors import BadInput, CorruptFile

PRESETS: dict[str, dict[str, int]] = {
    "nano": {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "ffn": 768},
    "micro": {"hidden": 512, "layers": 7, "heads": 8, "kv_heads": 4, "ffn": 1536},
    "small": {"hidden": 768, "layers": 14, "heads": 12, "kv_heads": 4, "ffn": 2048},
    "large": {"hidden": 2048, "layers": 20, "heads": 16, "kv_heads": 8, "ffn": 6144},
}
"""About 5 M, 25 M, 100 M and 1 G parameters with a vocabulary of some thousands."""


def config_for(settings: StudentSettings, vocab_size: int, pad_id: int, eos_id: int) -> BackboneConfig:
    """The preset with the settings' own sizes over it. Raises BadInput for an unknown preset."""
    preset = settings.preset or next(iter(PRESETS))
    if preset not in PRESETS:
        raise BadInput(f"student.preset: {preset!r} is none of {', '.join(PRESETS)}")
    sizes = {name: getattr(settings, name) or default for name, default in PRESETS[preset].items()}
    return BackboneConfig(vocab_size, **sizes, context=settings.context, pad_id=pad_id, eos_id=eos_id)  # pyright: ignore[reportArgumentType]


def rotary_tables(config: BackboneConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, E) float32: angle of pair i at position t is t · its frequency, after any scaling.

    On the CPU, even where modules are made elsewhere: they hold no weights.
    """
    frequencies = config.frequencies()
    if config.rope_scaling is not None:
        frequencies = frequencies / config.rope_scaling.divisors(frequencies)
    angles = torch.outer(torch.arange(length, device="cpu").float(), frequencies)
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
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.head_norms else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.head_norms else None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, T, E), (B, G, T, E), (B, G, T, E): rotated queries and keys, and values."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def weights(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        """(B, H, T − start, T) float32: what the positions of x (B, T, D) from `start` on attend to, rows of sum 1."""
        q, k, _ = self.project(x, cos, sin)
        q, k = q[:, :, start:].float(), k.repeat_interleave(self.heads // self.kv_heads, dim=1).float()
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).triu(start + 1)
        scores = (q @ k.transpose(2, 3) * self.head_dim**-0.5).masked_fill(future, float("-inf"))
        return scores.softmax(-1)

    def mixed(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        """(B, T, H · E): of each head the values that it attends to."""
        return self.attend(*self.project(x, cos, sin), documents).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        return self.o_proj(self.mixed(x, cos, sin, documents))


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
        # Zeros until they are initialized or loaded: drawing them on the meta device would import half of torch.
        rows = torch.zeros(config.vocab_size, config.hidden)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden, _weight=rows)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)


class Backbone(nn.Module):
    """A decoder-only language model. `forward` gives logits; training reads `hidden` and fuses the projection.

    Going on token by token is `distill.backbone.session`'s.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether training keeps what enters a layer alone (activation checkpointing, arXiv:1604.06174)."""
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
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
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
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of ids (B, T).

        positions (B, T): place of each token in its document; None: 0…T−1. documents: where they lie; None: a
        row is a document. embeds (B, T, D): read in the place of the ids' own embeddings. states: gets what leaves each
        layer, (B, T, D).
        """
        if positions is None:
            cos, sin = self.cos[: ids.shape[1]][None, None], self.sin[: ids.shape[1]][None, None]
        else:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x = self.model.embed_tokens(ids) if embeds is None else embeds
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, documents, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, documents)
            if states is not None:
                states.append(x)
        return self.model.norm(x)

    def attention(self, ids: Tensor, start: int = 0) -> Iterator[Tensor]:
        """Layer by layer, what the tokens of ids (B, T) from `start` on attend to: (B, H, T − start, T), rows of sum 1.

        A pass of its own: the fused kernels of all others never hold these weights.
        """
        states = [self.model.embed_tokens(ids)]
        self.hidden(ids, states=states)
        cos, sin = self.cos[: ids.shape[1]][None, None], self.sin[: ids.shape[1]][None, None]
        for block, x in zip(cast("Sequence[Block]", self.model.layers), states, strict=False):
            yield block.self_attn.weights(block.input_layernorm(x), cos, sin, start)

    def forward(self, ids: Tensor, positions: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.lm_head(self.hidden(ids, positions, documents))


def count_parameters(model: nn.Module) -> int:
    """Tied weights once."""
    return sum(p.numel() for p in model.parameters())


def save_backbone(model: Backbone, folder: Path) -> None:
    """Write config.json and model.safetensors (float32; tied weights once) as transformers reads them."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(model.config.to_hf(), indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path) -> BackboneConfig:
    """BackboneConfig of a checkpoint folder. Raises BadInput or CorruptFile."""
    path = folder / "config.json"
    try:
        return BackboneConfig.from_hf(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError as error:
        raise BadInput(f"{folder}: no config.json; give the folder of a checkpoint") from error
    except (ValueError, RecursionError) as error:
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
    if (layers := len({layer_of(name) for name in shapes} - {None})) != config.layers:
        return f"it describes {config.layers} layers, and there are {layers}"
    try:
        with torch.device("meta"):
            model = Backbone(replace(config, context=1))
    except RuntimeError:  # more elements than 64 bits count
        return "it describes impossible sizes"
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del wanted["lm_head.weight"]
    if odd := sorted(wanted.keys() ^ shapes.keys()):
        return f"{odd[0]} is {'missing' if odd[0] in wanted else 'unknown'}"
    for name, shape in wanted.items():
        if shapes[name] != shape:
            return f"{name} has the shape {shapes[name]}, not {shape}"
    return ""


def load_backbone(folder: Path) -> Backbone:
    """A Backbone from a folder of `save_backbone` or of transformers. Raises BadInput or CorruptFile."""
    config = read_config(folder)
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
