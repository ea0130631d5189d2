"""How fast pictures become embeddings, beside transformers' own processor and model on the same weights, and in how
much memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.result import BenchResult, Series
from bench.scale import resident
from bench.stopwatch import Stopwatch, listed, rates, ratio
from distill.config import ImageTokenizerConfig
from distill.vision.image_tokenizer import ImageTokenizer

SIDE = 256
"""Pixels of a picture's side."""


def bench_pictures(
    watch: Stopwatch, config: ImageTokenizerConfig, pictures: int = 64, batch: int = 32, many: int = 0
) -> BenchResult:
    """Pictures a second from Pillow's images to embeddings, and the ratio of each round. config: of a DINOv2.
    many: then so many are embedded at once, and the most memory is told of a tenth of them and of all.

    Each time they are new ones, as what was seen before is not computed again. about.apart: the largest difference
    between both's embeddings. Raises BadInput, DistillError where the weights can't be had.
    """
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    tokenizer = ImageTokenizer(config, "cpu", "dinov2")
    how, random = tokenizer.backbone.preparation, np.random.default_rng(0)
    model: Any = tokenizer.backbone.model
    process: Any = BitImageProcessorPil(
        size={"height": how.size, "width": how.size}, do_center_crop=False, image_mean=how.mean, image_std=how.std
    )

    def drawn(count: int = pictures) -> Iterator[Image.Image]:
        return (Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(count))

    def ours(images: list[Image.Image]) -> list[torch.Tensor | None]:
        return tokenizer.tokenize(images, batch)

    @torch.no_grad()
    def theirs(images: list[Image.Image]) -> list[torch.Tensor]:
        parts = (images[start : start + batch] for start in range(0, len(images), batch))
        return [row for part in parts for row in model(**process(part, return_tensors="pt")).pooler_output]

    some = list(drawn(batch))
    apart = max(float((a - b).abs().max()) for a, b in zip(ours(some), theirs(some), strict=True) if a is not None)
    jobs = {"ours": lambda: ours(list(drawn())), "transformers": lambda: theirs(list(drawn()))}
    found = rates(pictures, watch.seconds(jobs, "bench pictures"))
    series = [*listed(found, "pictures/s", 1), ratio("ours over transformers", found["ours"], found["transformers"])]
    series += _memory(tokenizer, drawn(many), many, batch) if many else []
    about = {"pictures": pictures, "side": SIDE, "batch": batch, "image_size": how.size}
    return watch.result("pictures", series, about, {"apart": apart})


def _memory(tokenizer: ImageTokenizer, pictures: Iterator[Image.Image], many: int, batch: int) -> list[Series]:
    """MiB of the whole process: pictures come one after the other, and all embeddings are kept."""
    most = list[int]()

    def looked_at() -> Iterator[Image.Image]:
        for picture in pictures:
            most.append(resident())
            yield picture

    kept = tokenizer.tokenize(looked_at(), batch)
    most.append(resident())
    assert len(kept) == many
    counts = (max(1, many // 10), many)
    return [Series(f"memory, {count:,} pictures", "MiB", -1, (max(most[: count + 1]) / 2**20,)) for count in counts]
