"""`ImageTokenizer`: pictures, however many and of any kind, as embeddings."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.backbone.device import pick_device
from distill.config import ImageTokenizerConfig
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.ranges import LEAST
from distill.vision.backbones import Backbone, open_backbone, orthonormal
from distill.vision.pictures import Picture, content_digest, prepare, read_picture

KEPT = 16_384
"""Embeddings kept at most, the latest asked for: 32 MB of 512 numbers each."""


class ImageTokenizer:
    """Pictures to semantic tokens: one embedding each.

    backbone: in the place of the settings'. device: `auto` takes a GPU where there is one. Raises BadInput for
    settings that are none, or weights that can't be had.

        >>> tokenizer = ImageTokenizer(ImageTokenizerConfig(embedding_dim=512, patch_size=16), backbone="lite")
        >>> tokenizer.tokenize([torch.rand(3, 224, 224)], batch_size=32)[0].shape
        torch.Size([512])
    """

    def __init__(
        self,
        config: ImageTokenizerConfig | None = None,
        device: str = "auto",
        backbone: str = "",
        listen: Listener = silent,
    ) -> None:
        self.config = replace(config or ImageTokenizerConfig(), **({"backbone": backbone} if backbone else {}))
        for name in ("embedding_dim", "patch_size", "image_size"):
            if (value := getattr(self.config, name)) < (least := LEAST[f"vision.{name}"]):
                raise BadInput(f"vision.{name}={value}: must be at least {least}")
        self.device = pick_device(device)
        self.listen = listen
        self.backbone: Backbone = open_backbone(self.config, listen).to(self.device)
        wide = self.backbone.dim > self.embedding_dim
        self._narrowing = orthonormal(self.backbone.dim, self.embedding_dim).to(self.device) if wide else None
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def embedding_dim(self) -> int:
        """Numbers in an embedding: the settings', or the backbone's own where they say 0."""
        return self.config.embedding_dim or self.backbone.dim

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side, as the weights have it; 0 where a backbone has none."""
        return self.backbone.patch_size

    def tokenize(self, images: Iterable[Picture] | Tensor, batch_size: int = 32) -> list[Tensor | None]:
        """An embedding, (embedding_dim,) float32 on the CPU, of each picture; None of one that can't be read, of which
        a warning tells in one line. However many there are, only `batch_size` of them are held at once.

        A backbone's embedding that is narrower is followed by zeros, a wider one is turned into fewer dimensions by a
        fixed orthonormal map: neither changes much of what is near to what.
        """
        return list(self.stream(images, batch_size))

    @torch.no_grad()
    def stream(self, images: Iterable[Picture] | Tensor, batch_size: int = 32) -> Iterator[Tensor | None]:
        """The same, one after the other as they are ready."""
        if batch_size < 1:
            raise BadInput(f"batch_size={batch_size}: must be at least 1")
        rest = iter(images)
        while batch := list(islice(rest, batch_size)):
            digests: list[str | None] = []
            new: dict[str, Tensor] = {}
            known: dict[str, Tensor] = {}
            for image in batch:
                try:
                    content = read_picture(image)
                    digest = content_digest(content)
                    if digest in self._known:
                        known[digest] = self._known[digest]
                    elif digest not in new:
                        new[digest] = prepare(content, self.backbone.preparation)
                    digests.append(digest)
                except BadInput as error:
                    self.listen(Event("vision", "warning", str(error)))
                    digests.append(None)
            if new:
                embedded = self._embed(torch.stack(list(new.values())).to(self.device)).cpu()
                known |= dict(zip(new, embedded, strict=True))
            for digest in digests:
                if digest is not None:
                    self._known[digest] = known[digest]
                    self._known.move_to_end(digest)
                yield known[digest].clone() if digest is not None else None
            while len(self._known) > KEPT:
                self._known.popitem(last=False)

    def _embed(self, pixels: Tensor) -> Tensor:
        seen = self.backbone(pixels).float()
        if self._narrowing is not None:
            return seen @ self._narrowing
        return F.pad(seen, (0, self.embedding_dim - seen.shape[1]))
