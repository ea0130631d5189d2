"""Encoders that are trained from chance: of a picture, and of a triplet of pictures (what, action, result).

A triplet's three pictures are read by one encoder; each role's embedding, added to their features, tells them apart.
Then each role asks all three by cross-attention. What comes out stands in the codebook's space, role by role, and
together for the whole triplet.

Shape legend: B triplets, 3 roles, P patches of a picture, S a side in pixels, D = 512, C codes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import ImageTokenizerConfig
from distill.errors import BadInput, CorruptFile
from distill.run import write_atomic
from distill.tokens.concepts import CONCEPT_DIM
from distill.vision.pictures import Picture, Preparation, prepare, read_picture

KINDS = ("vit", "resnet")
SIDE = 64
"""S where the settings don't say."""
FILES = ("triplet_encoder.json", "triplet_encoder.safetensors")

Pictures = Sequence[Picture] | Tensor
"""Pictures of any kind, or pixels (B, 3, H, W), as `prepare` takes them."""


class VisionEncoder(nn.Module):
    """A vision transformer or a residual net of transformers', small enough to learn from a few thousand pictures.

    config: `embedding_dim` is D, `patch_size` the transformer's, `image_size` S. Raises BadInput for what doesn't fit.
    """

    def __init__(self, config: ImageTokenizerConfig | None = None, kind: str = "vit") -> None:
        super().__init__()
        import transformers

        self.config, self.kind = config or ImageTokenizerConfig(), kind
        self.dim, size = self.config.embedding_dim or CONCEPT_DIM, self.config.image_size or SIDE
        self.preparation = Preparation(size)
        if kind not in KINDS:
            raise BadInput(f"kind={kind}: choose one of {', '.join(KINDS)}")
        if kind == "vit":
            patch, width = self.config.patch_size, 192
            if patch < 1 or size % patch:
                raise BadInput(f"vision.image_size={size}: not a multiple of vision.patch_size={patch}")
            sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 3}
            shape = transformers.ViTConfig(num_hidden_layers=4, image_size=size, patch_size=patch, **sizes)
            self.model: Any = transformers.ViTModel(shape, add_pooling_layer=False)
        else:
            widths = [48, 96, width := 192]
            net = transformers.ResNetConfig(
                embedding_size=32, hidden_sizes=widths, depths=[1] * len(widths), layer_type="basic"
            )
            self.model = transformers.ResNetModel(net)
        self.out = nn.Linear(width, self.dim)

    def pixels(self, images: Pictures) -> Tensor:
        """(B, 3, S, S). Raises BadInput for a picture that can't be read."""
        read = [prepare(read_picture(image), self.preparation) for image in images]
        return torch.stack(read).to(self.out.weight.device)

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, P, D)."""
        states = self.model(pixels).last_hidden_state
        return self.out(states[:, 1:] if self.kind == "vit" else states.flatten(2).mT)

    def forward(self, images: Pictures) -> Tensor:
        """(B, D): the mean of a picture's features."""
        return self.patches(self.pixels(images)).mean(1)


class TripletEncoder(nn.Module):
    """Three pictures, of a what, an action and a result, as one embedding; `learn_triplets` trains it.

        >>> encoder = TripletEncoder(ImageTokenizerConfig(embedding_dim=512, patch_size=16))
        >>> encoder(*torch.rand(3, 2, 3, 64, 64)).shape
        torch.Size([2, 512])

    kind: of its VisionEncoder. layers: of the fusion. Raises BadInput as that does.
    """

    def __init__(self, config: ImageTokenizerConfig | None = None, kind: str = "vit", layers: int = 1) -> None:
        super().__init__()
        self.vision, self.layers = VisionEncoder(config, kind), layers
        dim = self.vision.dim
        if dim % 8:
            raise BadInput(f"vision.embedding_dim={dim}: not a multiple of 8, so many are the heads of the fusion")
        self.role = nn.Parameter(torch.randn(3, dim) * dim**-0.5)
        layer = nn.TransformerDecoderLayer(dim, 8, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.fusion = nn.TransformerDecoder(layer, layers, nn.LayerNorm(dim))
        self.seen, self.meant = nn.Linear(3 * dim, dim), nn.Linear(3 * dim, dim)
        self.sharp = nn.Parameter(torch.tensor([10.0, 10.0]))
        """Of similarities: of triplets, and of image tokens."""

    def roles(self, what: Pictures, action: Pictures, result: Pictures) -> Tensor:
        """(B, 3, D): near the centroids of the triplet's image tokens, once it is trained."""
        given = [self.vision.pixels(images) for images in (what, action, result)]
        if len({len(own) for own in given}) > 1:
            raise BadInput("what, action and result are not equally many pictures")
        patches = self.vision.patches(torch.cat(given)).unflatten(0, (3, -1)) + self.role[:, None, None]
        return self.fusion(patches.mean(2).transpose(0, 1), patches.transpose(0, 1).flatten(1, 2))

    def forward(self, what: Pictures, action: Pictures, result: Pictures) -> Tensor:
        """(B, D), of length 1."""
        return self.whole(self.roles(what, action, result))

    def whole(self, roles: Tensor) -> Tensor:
        """(B, 3, D) of `roles` → (B, D), of length 1."""
        return F.normalize(self.seen(roles.flatten(1)), dim=-1)

    def meaning(self, centroids: Tensor) -> Tensor:
        """(B, 3, D) of a triplet's image tokens → (B, D), of length 1: where the pictures' embedding shall be."""
        return F.normalize(self.meant(centroids.flatten(1)), dim=-1)

    def logits(self, roles: Tensor, centroids: Tensor) -> Tensor:
        """(B, 3, D) of `roles`, all centroids (C, D) → (B, 3, C): how likely each image token is, each role's."""
        return self.sharp[1] * F.normalize(roles, dim=-1) @ centroids.T

    def save(self, folder: Path) -> None:
        """Write triplet_encoder.json and triplet_encoder.safetensors."""
        about = {"version": 1, "config": asdict(self.vision.config), "kind": self.vision.kind, "layers": self.layers}
        write_atomic(folder / FILES[1], save({name: own.contiguous() for name, own in self.state_dict().items()}))
        write_atomic(folder / FILES[0], json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "TripletEncoder":
        """Read what `save` wrote. Raises CorruptFile."""
        path = folder / FILES[0]
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            encoder = cls(ImageTokenizerConfig(**about["config"]), about["kind"], about["layers"])
            encoder.load_state_dict(load_file(folder / FILES[1]))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, BadInput) as error:
            raise CorruptFile(f"{path}: not an encoder of triplets ({error}); train it again") from error
        return encoder.eval()
