"""A picture of an outcome: the nearest of a run's own, or what a model of diffusers paints.

Shape legend: n triplets of the run's pictures, C codes, D = 512.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.backbone.from_transformers import one_line
from distill.corpus.datasets.questions import PICTURED
from distill.corpus.datasets.stage import dataset_file
from distill.errors import BadInput, MissingDependency
from distill.run import Run, write_atomic
from distill.tokens.concepts import Vectors, unit_rows
from distill.tokens.image_tokens import Codebook
from distill.vision.pictures import as_image, png
from distill.vision.triplets import Shown, shown_triplets


@dataclass
class Album:
    """A run's pictures, each found by the triplets that are true of it."""

    run: Run
    codebook: Codebook

    @classmethod
    def of(cls, run: Run, codebook: Codebook | None) -> "Album | None":
        """None where the run's dataset has no pictures."""
        pictured = run.settings.capture.dataset in PICTURED and dataset_file(run).is_file()
        return cls(run, codebook) if pictured and codebook is not None and len(codebook) else None

    @cached_property
    def _shown(self) -> list[Shown]:
        return shown_triplets(self.run, self.codebook)

    def nearest(self, outcome: Vectors) -> Path:
        """The picture with the triplet that is nearest to (3, D), what, action and result each by its cosine; of equal
        ones the first. Raises BadInput, CorruptFile."""
        alike = unit_rows(outcome) @ self.codebook.centroids.T
        codes = np.array([shown.codes for shown in self._shown])
        return self._shown[int(alike[np.arange(3), codes].sum(1).argmax())].picture


def canvas(file: str | Path | None, album: Album | None, painter: str) -> Path:
    """The file for a picture. Raises BadInput where it is no .png, or there is nothing that could make one."""
    if file is None or Path(file).suffix.lower() != ".png":
        raise BadInput(f"picture: {file or 'no file'} is no .png; name one for what is painted")
    if painter:
        diffusers()
    elif album is None:
        raise BadInput(
            "picture: there are none to choose from; ask the run of a student that sees, or name a model of diffusers "
            "as painter (pip install 'dreaming-student[paint]')"
        )
    return Path(file)


def draw(file: Path, outcome: Tensor, codebook: Codebook | None, album: Album | None, painter: str, seed: int) -> None:
    """Write the picture of an outcome (1, 3, D): the painter's, if one is named, else the album's. Raises as both."""
    vectors = outcome[0].float().cpu().numpy()
    if painter:
        if codebook is None:
            raise BadInput("painter: without a codebook no image token has a word that could be painted")
        words = " ".join(codebook.labels[code] for code in codebook.nearest(vectors).tolist())
        write_atomic(file, png(paint(painter, words, outcome.device, seed)))
    elif album is not None:
        write_atomic(file, png(as_image(album.nearest(vectors))))


def paint(model: str, words: str, device: torch.device, seed: int) -> Image.Image:
    """What a text-to-image model of diffusers, a folder or a name on the hub, paints of words. Raises MissingDependency
    without diffusers, BadInput where it can't paint with the model, loaded from safetensors alone."""
    pipelines = diffusers().AutoPipelineForText2Image
    try:
        painter = pipelines.from_pretrained(model, use_safetensors=True).to(device)
        return painter(words, generator=torch.Generator().manual_seed(seed)).images[0]
    except Exception as error:  # whatever the many pipelines there raise
        raise BadInput(f"painter={model}: diffusers can't paint with it ({one_line(error)})") from error


def diffusers() -> Any:
    """Raises MissingDependency."""
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise MissingDependency(
            "painter: diffusers isn't installed; pip install 'dreaming-student[paint]' adds it"
        ) from error
