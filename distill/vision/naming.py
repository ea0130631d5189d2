"""A projector that begins by saying what each patch of a picture shows, in the student's own words.

Between its two layers stands a number for each image token, for each place, and for nothing. The first layer learns,
without the student, which of them hold of a patch; the second is the student's own embeddings of them. So a patch of a
dog on the left is read as about ⟨dog⟩ + left, words that a student knows before it has seen a picture.

Shape legend: n patches, side² of a picture, W the encoder's width, D the student's, T numbers in between: nothing, the
image tokens, the places.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from distill.events import Event, Listener
from distill.vision.seeing import Found, at_places
from distill.vision.sight import layers

STEPS, LR = 1200, 3e-3
BATCH = (384, 128)
"""Patches of things in a step, and of nothing."""
SHARP, SURER = 2.0, 2.0
"""What is told of patches never seen is told less surely, so that GELU would leave little of it: logits become
SHARP (logit + SURER)."""
ON, OFF = 0.15, 0.3
"""Shares of a picture's longer side: patches as near to a thing's middle show it, those farther than OFF from all
nothing; of others it isn't known."""


def patch_truths(
    pictures: Iterable[tuple[Path, Found]], code: Mapping[str, int], side: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) each, of each patch of square pictures, grey around: 1 + the image token's code, and 1 + the number of the
    place where the thing is; 0: nothing, −1: not known."""
    centres, parts = (np.arange(side) + 0.5) / side - 0.5, list[NDArray[np.int64]]()
    for path, found in pictures:
        with Image.open(path) as image:
            across, down = (length / max(image.size) for length in image.size)
        said, least = np.zeros((2, side, side), np.int64), np.full((side, side), np.inf)
        for place, names in enumerate(at_places(found), 1):
            for name in names:
                x, y = (found[name][0] - 0.5) * across, (found[name][1] - 0.5) * down
                far = np.maximum(abs(centres - x), abs(centres - y)[:, None])
                said[:, far < least] = [[code[name] + 1], [place]]
                least = np.minimum(least, far)
        parts.append(np.where(least <= ON, said, np.where(least > OFF, 0, -1)).reshape(2, -1))
    what, where = np.concatenate(parts, axis=1)
    return what, where


def name_patches(
    features: Tensor,
    truths: tuple[NDArray[np.int64], NDArray[np.int64]],
    rows: Tensor,
    places: int,
    seed: int,
    listen: Listener,
) -> nn.Sequential:
    """The projector, learnt from (n, W) features and what `patch_truths` says of them. rows (T, D): the student's, of
    which the last `places` are the places'. Deterministic by seed."""
    rows, split = rows.clone(), len(rows) - places
    what, where = (torch.from_numpy(own) for own in truths)
    on, off = torch.nonzero(what > 0)[:, 0], torch.nonzero(what == 0)[:, 0]
    kinds = [(kind, size) for kind, size in zip((on, off), BATCH, strict=True) if len(kind)]
    mean, deviation = features[kinds[0][0]].float().mean(0), features[kinds[0][0]].float().std(0) + 1e-3
    weight, bias = torch.zeros(len(rows), features.shape[1]), torch.full((len(rows),), -3.0)
    optimizer = torch.optim.AdamW([weight.requires_grad_(), bias.requires_grad_()], LR)
    draw = torch.Generator().manual_seed(seed)

    def told(some: Tensor) -> Tensor:
        return F.linear((features[some].float() - mean) / deviation, weight, bias)

    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        some = torch.cat([kind[torch.randint(len(kind), (size,), generator=draw)] for kind, size in kinds])
        said, thing, place = told(some), what[some], where[some]
        true = F.one_hot(thing, len(rows)) + F.one_hot(torch.where(place > 0, place + split - 1, 0), len(rows))
        alone = F.binary_cross_entropy_with_logits(said, true.clamp(max=1).float(), reduction="sum")
        among = F.cross_entropy(said[:, :split], thing)
        among = among + F.cross_entropy(torch.cat([said[:, :1], said[:, split:]], 1), place)
        optimizer.zero_grad()
        (alone / len(some) + among).backward()
        optimizer.step()
        listen(Event("see", "progress", "naming", done=step + 1, total=STEPS, unit="steps of the projector"))
    projector = layers(features.shape[1], *rows.shape)
    first, second = cast("nn.Linear", projector[0]), cast("nn.Linear", projector[2])
    with torch.no_grad():
        first.weight.copy_(SHARP * weight / deviation)
        first.bias.copy_(SHARP * (bias + SURER - weight @ (mean / deviation)))
        # What is told right shall be as long as its words are.
        for patches, units, right in (
            (on, slice(1, split), what),
            (on, slice(split, None), where + split - 1),
            (off, slice(1), what),
        ):
            some = patches[:: len(patches) // 4096 + 1]
            if len(some):
                told_right = F.gelu(SHARP * (told(some) + SURER), approximate="tanh").gather(1, right[some, None])
                rows[units] /= told_right.mean().clamp(min=0.1)
        second.weight.copy_(rows.T)
        second.bias.zero_()
    return projector
