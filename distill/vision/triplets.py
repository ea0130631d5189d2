"""What a run's pictures say, triplet by triplet, and how encoders learn it.

Shape legend: B triplets of a batch, n triplets, N of them different, 3 roles, D = 512.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from distill.corpus.datasets.stage import dataset_lines
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.mining.triplets import read_triplets
from distill.run import Run
from distill.tokens.image_tokens import Codebook, load_codes
from distill.vision.pictures import as_image
from distill.vision.vision_encoder import TripletEncoder

LOSSES: tuple[str, ...] = ("contrastive", "tokens")


def half(whole: Image.Image, x: float, y: float) -> Image.Image:
    """The part around a place that is half as wide and half as high; black where it goes beyond."""
    edges = ((x - 0.25) * whole.width, (y - 0.25) * whole.height, (x + 0.25) * whole.width, (y + 0.25) * whole.height)
    left, top, right, bottom = map(round, edges)
    return whole.crop((left, top, right, bottom))


@dataclass(frozen=True)
class Shown:
    """A triplet that is true of a picture. codes: its image tokens. at: where the middle of what and of result is, as
    shares of width and height; None of what stands nowhere."""

    picture: Path
    codes: tuple[int, int, int]
    split: str
    at: tuple[tuple[float, float] | None, tuple[float, float] | None]

    def views(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """What: the half of the picture around it; action: the whole picture; result: as what, or the whole."""
        whole = as_image(self.picture)
        what, result = (whole if at is None else half(whole, *at) for at in self.at)
        return what, whole, result


def shown_triplets(run: Run, codebook: Codebook) -> list[Shown]:
    """Of all pictures of a run, each once. Raises BadInput where there are none, CorruptFile."""
    asked = {line["key"]: (line["split"], line.get("pictures", {})) for line in dataset_lines(run)}
    codes, found = load_codes(run.tokenizer, codebook), dict[Shown, None]()
    for triplet in read_triplets(run.triplets):
        split, pictures = asked.get(triplet.trace, ("", {}))
        what, action, result = (codes.get(phrase, -1) for phrase in triplet.phrases)
        if min(what, action, result) >= 0:
            for name, places in pictures.items():
                at = [tuple(places[phrase]) if phrase in places else None for phrase in (triplet.what, triplet.result)]
                found[Shown(run.path / name, (what, action, result), split, (at[0], at[1]))] = None
    if not found:
        raise BadInput(f"{run.path}: nothing is known of pictures; take a dataset that has some, and `dream mine`")
    return list(found)


def learn_triplets(
    encoder: TripletEncoder,
    codebook: Codebook,
    shown: Sequence[Shown],
    steps: int = 2000,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    listen: Listener = silent,
) -> dict[str, float]:
    """Train an encoder on those of split `train`: to tell each triplet of pictures from the others of its batch by what
    it means, both ways (InfoNCE, arXiv:1807.03748, as CLIP has it), and to say each role's image token.

    Deterministic by seed. Returns the last hundred steps' mean losses. Raises BadInput for a width that isn't the
    codebook's, too few triplets, or a picture that can't be read.
    """
    if encoder.vision.dim != codebook.centroids.shape[1]:
        raise BadInput(f"vision.embedding_dim={encoder.vision.dim}: the codebook has {codebook.centroids.shape[1]}")
    known = [one for one in shown if one.split == "train"]
    if len(known) < 2 or steps < 1 or batch < 2:
        raise BadInput(f"{len(known)} triplets, {steps} steps of {batch}: at least 2, 1 and 2 are needed")
    draw, losses = random.Random(seed), list[tuple[float, float]]()
    centroids = torch.from_numpy(codebook.centroids).to(encoder.role.device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    encoder.train()
    for step in range(1, steps + 1):
        some = draw.sample(known, min(batch, len(known)))
        codes = torch.tensor([one.codes for one in some], device=centroids.device)
        roles = encoder.roles(*_views(some))
        alike = encoder.sharp[0] * encoder.whole(roles) @ encoder.meaning(centroids[codes]).T
        own = torch.arange(len(some), device=codes.device)
        same = (codes[:, None] == codes).all(2) & ~torch.eye(len(some), dtype=torch.bool, device=codes.device)
        alike = alike.masked_fill(same, -torch.inf)  # another picture of the very triplet is no other triplet
        apart = (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2
        tokens = F.cross_entropy(encoder.logits(roles, centroids).flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        (apart + tokens).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[-99:], (apart.item(), tokens.item())]
        about = dict(zip(LOSSES, (round(loss, 3) for loss in losses[-1]), strict=True))
        listen(Event("vision", "progress", done=step, total=steps, unit="step", data=about))
    encoder.eval()
    return {name: sum(own) / len(own) for name, own in zip(LOSSES, zip(*losses, strict=True), strict=True)}


@torch.no_grad()
def retrieval(encoder: TripletEncoder, codebook: Codebook, shown: Sequence[Shown], batch: int = 64) -> dict[str, float]:
    """How well pictures find their triplet among the N different ones of `shown`. Raises BadInput where there are none.

    first, five: share of pictures whose own is the nearest, or among five; chance: of `first`, 1 / N. what, action,
    result: share of image tokens that are said right.
    """
    if not shown:
        raise BadInput("no triplets to look for; take another split")
    centroids = torch.from_numpy(codebook.centroids).to(encoder.role.device)
    different = {codes: place for place, codes in enumerate(dict.fromkeys(one.codes for one in shown))}
    meanings = encoder.meaning(centroids[torch.tensor(list(different))])
    ranks, right = list[int](), torch.zeros(3)
    for some in (shown[start : start + batch] for start in range(0, len(shown), batch)):
        roles, codes = encoder.roles(*_views(some)), torch.tensor([one.codes for one in some])
        alike = encoder.whole(roles) @ meanings.T
        own = alike.gather(1, torch.tensor([[different[one.codes]] for one in some], device=alike.device))
        ranks += (alike > own).sum(1).tolist()
        right += (encoder.logits(roles, centroids).argmax(-1).cpu() == codes).sum(0)
    found = torch.tensor(ranks)
    told = {"pictures": len(shown), "triplets": len(different), "chance": 1 / len(different)}
    told |= {"first": float((found < 1).float().mean()), "five": float((found < 5).float().mean())}
    return told | dict(zip(("what", "action", "result"), (right / len(shown)).tolist(), strict=True))


def _views(some: Sequence[Shown]) -> Iterator[Any]:
    """What, action and result pictures of several."""
    return zip(*(one.views() for one in some), strict=True)
