"""A run, a checkpoint or a bundle, as it is served to other programs."""

from functools import partial
from pathlib import Path

from bundle.load import load_student, run_of
from bundle.manifest import NAME, read_manifest
from distill.config import ExportSettings
from distill.learning.feedback import FEEDBACK, keep_said
from distill.run import Run
from distill.serve.student import Offer, Student
from distill.student.made_with import made_with, taught_to_dream


def offer(path: Path) -> Offer:
    """What `dream serve` is given. Raises as `load_student` does, when it is opened."""
    dreams, temperature, keeps = True, ExportSettings.temperature, None
    is_run = (path / "config.yaml").is_file()
    if (path / NAME).is_file():
        manifest = read_manifest(path)
        dreams = bool(manifest.provenance.get("dreams", True))
        temperature = float(manifest.ollama.get("parameters", {}).get("temperature", temperature))
    elif (run := Run.open(path) if is_run else run_of(path)) is not None:
        settings = made_with(run)
        dreams, temperature = taught_to_dream(settings), settings.export.temperature
        keeps = partial(keep_said, path / FEEDBACK) if is_run else None

    def opened() -> Student:
        return load_student(path)

    return Offer(opened, dreams, temperature, path.stat().st_mtime if path.exists() else 0.0, keeps, str(path))
