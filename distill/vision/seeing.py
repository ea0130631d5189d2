"""How students see: at five places of a picture one image token each, where something is there.

A run's pictures are looked at once, when its tokenizer is built: the training's pictures, and where in them what is
shown stands, teach the map from the backbone's embeddings to the codebook; then all pictures are said in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from distill.config import ImageTokenizerConfig
from distill.corpus.datasets.stage import dataset_lines
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.run import Run
from distill.tokens.concepts import Vectors
from distill.tokens.image_tokens import Codebook
from distill.tokens.shown import PLACES, save_shown
from distill.vision.codebook import PictureCodebook
from distill.vision.image_tokenizer import ImageTokenizer
from distill.vision.pictures import Picture, as_image

TOGETHER = 32
"""Pictures embedded at once."""
ONE = Lock()
"""Whoever embeds holds it: what is opened is shared."""

Found = Mapping[str, tuple[float, float]]
"""What a picture shows → where its middle is, as shares of width and height."""


def learn_to_see(run: Run, folder: Path, codebook: Codebook, listen: Listener) -> dict[str, Any]:
    """Write the map of pictures and what each picture's tokens are into `folder`. Returns how good they are; {} for a
    run without pictures."""
    train, rest = found_in(run)
    if not train:
        return {}
    tokenizer = ImageTokenizer(run.settings.vision, listen=listen)
    names, looked = [*train, *rest], list[Vectors]()
    files = iter(run.path / name for name in names)
    while some := list(islice(files, TOGETHER)):
        looked += embed_places(tokenizer, some)
        listen(Event("tokenize", "progress", done=len(looked), total=len(names), unit="picture"))
    embeddings = np.stack(looked)
    labels = [own for found in [*train.values(), *rest.values()] for own in at_places(found)]
    learnt = len(train) * len(PLACES)
    flat = embeddings.reshape(-1, tokenizer.embedding_dim)
    eyes = PictureCodebook.learn(codebook, run.settings.vision, flat[:learnt], labels[:learnt])
    eyes.save(folder)
    said = [eyes.seen(own) for own in embeddings]
    save_shown(folder, dict(zip(names, said, strict=True)))
    summary = {f"pictures_{name}": value for name, value in eyes.report(flat, 1).items()}
    return summary | {
        f"pictures_{name}": value for name, value in eyes.recall(flat[learnt:], labels[learnt:], 1).items()
    }


def found_in(run: Run) -> tuple[dict[str, Found], dict[str, Found]]:
    """Of the training's pictures, and of those held out, by path what each shows."""
    train: dict[str, Found] = {}
    rest: dict[str, Found] = {}
    for line in dataset_lines(run):
        (train if line["split"] == "train" else rest).update(line.get("pictures", {}))
    return train, rest


def with_images(
    eyes: PictureCodebook | None, prompt: str, images: Sequence[Picture], triplets: Sequence[Sequence[Picture]] = ()
) -> str:
    """The prompt and after it what is seen in images, as in training. triplets: pictures of a what, an action and a
    result, each said by one image token: `⟨vase⟩⟨push⟩⟨breaks⟩`.

    Raises BadInput where the student was not trained to see, or an image can't be read.
    """
    if not images and not triplets:
        return prompt
    if eyes is None:
        raise BadInput("images: this student can't see; train one that can (`dream run --config emoji-scenes`)")
    if any(len(triplet) != 3 for triplet in triplets):
        raise BadInput("image_triplets: each is three pictures: what, action, result")
    with ONE:
        embedded = embed_places(_opened(**asdict(eyes.vision)), [*images, *(one for own in triplets for one in own)])
    said = [eyes.seen(own) for own in embedded[: len(images)]]
    things = [eyes.surest(own) for own in embedded[len(images) :]]
    said += ["".join(things[i : i + 3]) for i in range(0, len(things), 3)]
    return " ".join([prompt, *said]).strip()


@cache
def _opened(**vision: Any) -> ImageTokenizer:
    return ImageTokenizer(ImageTokenizerConfig(**vision))


def at_places(found: Found) -> list[list[str]]:
    """Of each place what stands nearest to it."""
    nearest = {
        name: min(PLACES, key=lambda place: np.hypot(*np.subtract(PLACES[place], at))) for name, at in found.items()
    }
    return [[name for name, place in nearest.items() if place == here] for here in PLACES]


def embed_places(tokenizer: ImageTokenizer, pictures: Iterable[Picture]) -> list[Vectors]:
    """Of each picture (places, d). Raises BadInput for one that can't be read."""
    views = (view for picture in pictures for view in looked_at(picture))
    embedded = [vector.numpy() for vector in tokenizer.stream(views, TOGETHER) if vector is not None]
    return list(np.stack(embedded).reshape(-1, len(PLACES), tokenizer.embedding_dim))


def looked_at(picture: Picture) -> list[Image.Image]:
    """A picture's parts around the places, half as wide and half as high."""
    whole = as_image(picture)
    width, height = whole.size
    corners = [((x - 0.25) * width, (y - 0.25) * height) for x, y in PLACES.values()]
    return [whole.crop((int(x), int(y), int(x + (width + 1) / 2), int(y + (height + 1) / 2))) for x, y in corners]
