"""A run or a bundle, as it is served to other programs."""

from functools import partial
from pathlib import Path

from bundle.load import load_student
from bundle.manifest import NAME, read_manifest
from distill.config import ExportSettings
from distill.learning.feedback import FEEDBACK, keep_said
from distill.run import Run
from distill.serve.student import Offer, Student


def offer(path: Path) -> Offer:
    """What `dream serve` is given. Raises as `load_student` does, when it is opened."""
    dreams, temperature, keeps = True, ExportSettings.temperature, None
    if (path / NAME).is_file():
        temperature = float(read_manifest(path).ollama.get("parameters", {}).get("temperature", temperature))
    elif (path / "config.yaml").is_file():
        settings = Run.open(path).settings
        dreams, temperature = settings.train.dreams and not settings.train.pause, settings.export.temperature
        keeps = partial(keep_said, path / FEEDBACK)

    def opened() -> Student:
        return load_student(path)

    return Offer(opened, dreams, temperature, path.stat().st_mtime if path.exists() else 0.0, keeps)
