"""What embeds pictures: backbones of transformers, and two that need no weights.

Shape legend: B pictures, S a side in pixels, P patches, D the backbone's width.
"""

import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.backbone.from_transformers import load_model, one_line
from distill.config import ImageTokenizerConfig
from distill.errors import BadInput, CorruptFile
from distill.events import Listener
from distill.vision.pictures import Preparation

KINDS = ("clip", "dinov2", "resnet", "lite", "patch")
HUB = {"clip": "openai/clip-vit-base-patch32", "resnet": "microsoft/resnet-50"}
"""The weights that are taken where `vision.weights` names none."""
WIDTHS = {"clip": "projection_dim", "dinov2": "hidden_size"}
CLASSES = {"clip": "CLIPModel", "dinov2": "Dinov2Model", "resnet": "ResNetModel"}
USUAL: dict[str, dict[str, Any]] = {
    "clip": {
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
}
"""What a preprocessor_config.json says of such models, for folders that have none."""
LICENCES = {
    "clip": "CLIP by OpenAI (MIT)",
    "dinov2": "DINOv2-S/14 by Meta (Apache-2.0)",
    "resnet": "ResNet-50 by Microsoft (Apache-2.0)",
}
"""Of the weights that are taken where none are named."""
ITS_OWN = {"clip": 224, "resnet": 224, "dinov2": 224, "lite": 128, "patch": 224}
"""Pixels of a side where neither the settings nor the weights say."""


class Backbone(nn.Module):
    """Pixels as `prepare` makes them, (B, 3, S, S), to one embedding each, (B, D).

    name: the kind, and whose weights; dim: D; patch_size: pixels of a patch's side, 0 where there are none.
    """

    name: str
    dim: int
    patch_size: int
    preparation: Preparation

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, P, D'): features of the picture's parts, row by row."""
        raise NotImplementedError


class Pretrained(Backbone):
    """A vision model of transformers, frozen, read from safetensors alone. setting: that says its image size."""

    def __init__(self, kind: str, source: str, image_size: int, setting: str = "vision.image_size") -> None:
        super().__init__()
        import transformers
        from transformers.utils.hub import cached_file

        self.kind, self.name = kind, f"{kind}:{source}"
        here = Path(source).exists()
        remedy = "name a folder with config.json and model.safetensors in vision.weights"
        remedy += "" if here else ", or take vision.backbone=dinov2, which needs no hub"
        self.model: Any = load_model(
            getattr(transformers, CLASSES[kind]), source, f"a {kind} model", remedy, local=here
        )
        config = self.model.config
        vision = config.vision_config if kind == "clip" else config
        self.dim = getattr(config, WIDTHS[kind]) if kind != "resnet" else config.hidden_sizes[-1]
        self.patch_size = getattr(vision, "patch_size", 0)
        own = vision.image_size if kind == "clip" else ITS_OWN[kind]
        try:
            found: Any = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
            said = {**USUAL.get(kind, {}), **(json.loads(Path(found).read_text(encoding="utf-8")) if found else {})}
            if image_size:
                said |= {"size": {"shortest_edge": image_size}, "crop_size": image_size}
            self.preparation = Preparation.of(said, own)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = f"preprocessor_config.json can't be read ({one_line(error)})"
            raise CorruptFile(f"{source}: its {reason}; download the model again") from error
        if self.patch_size and self.preparation.size % self.patch_size:
            raise BadInput(f"{setting}={self.preparation.size}: not a multiple of {self.patch_size}, its patch")
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self._seen(pixels).pooler_output.flatten(1)
        return self.model.visual_projection(pooled) if self.kind == "clip" else pooled

    def patches(self, pixels: Tensor) -> Tensor:
        states = self._seen(pixels).last_hidden_state
        return states.flatten(2).mT if self.kind == "resnet" else states[:, 1:]

    def _seen(self, pixels: Tensor) -> Any:
        if self.kind != "clip":
            return self.model(pixels)
        return self.model.vision_model(pixels, interpolate_pos_encoding=True)  # as DINOv2 always does


class Lite(Backbone):
    """A small convolutional net that needs no weights: random filters, the same ones always.

    What a picture's quarters hold of each filter at three scales. Random filters with rectification and pooling
    tell things apart without any training: K. Jarrett et al., "What is the best multi-stage architecture for object
    recognition?" (2009).
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.name, self.patch_size = "lite", 0
        self.preparation = Preparation(image_size or ITS_OWN["lite"])
        widths = (3, 32, 64, 96)
        self.filters = nn.ParameterList()
        for before, after in pairwise(widths):
            filters = torch.randn(after, before, 5, 5, generator=generator) / (25 * before) ** 0.5
            self.filters.append(filters - filters.mean((2, 3), keepdim=True) * (before == 3) / 2)
        self.dim = 4 * sum(widths[1:])
        self.eval().requires_grad_(False)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        maps, seen = [], pixels
        for filters in self.filters:
            seen = F.avg_pool2d(F.conv2d(seen, filters, padding=2).relu(), 2)
            seen = seen / (seen.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-6)
            maps.append(seen)
        return maps

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(seen, 2).flatten(1) for seen in self._maps(pixels)], 1)

    def patches(self, pixels: Tensor) -> Tensor:
        return self._maps(pixels)[-1].flatten(2).mT


class Patches(Backbone):
    """The earliest way: each square of pixels by itself, through fixed random numbers; a picture is their mean."""

    basis: Tensor

    def __init__(self, patch_size: int, image_size: int) -> None:
        super().__init__()
        warnings.warn('backbone="patch" sees no things, only colours; use "clip"', DeprecationWarning, stacklevel=4)
        self.name, self.patch_size, self.dim = "patch", patch_size, min(512, 3 * patch_size**2)
        self.preparation = Preparation((image_size or ITS_OWN["patch"]) // patch_size * patch_size or patch_size)
        self.register_buffer("basis", orthonormal(3 * patch_size**2, self.dim))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels).mean(1)

    def patches(self, pixels: Tensor) -> Tensor:
        return F.unfold(pixels, self.patch_size, stride=self.patch_size).mT @ self.basis


def orthonormal(rows: int, columns: int) -> Tensor:
    """(rows, columns) whose columns have length 1 and are at right angles, drawn once and for all; rows ≥ columns."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].float()


def licence(config: ImageTokenizerConfig) -> str:
    """Whose the weights are, or which their user must know."""
    return f"that of {config.weights}" if config.weights else LICENCES.get(config.backbone, "none: no weights")


def open_backbone(config: ImageTokenizerConfig, listen: Listener) -> Backbone:
    """The backbone that the settings name. Raises BadInput where there is none, or its weights can't be had."""
    kind, size = config.backbone, config.image_size
    if kind not in KINDS:
        raise BadInput(f"vision.backbone={kind}: choose one of {', '.join(KINDS)}")
    if kind == "lite":
        return Lite(size)
    if kind == "patch":
        return Patches(config.patch_size, size)
    source = config.weights or HUB.get(kind, "")
    if not source:
        from distill.vision.dinov2 import dinov2_small

        source = str(dinov2_small(listen))
    return Pretrained(kind, source, size)
