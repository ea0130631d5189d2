"""A run, a checkpoint or a bundle, as it is served to other programs."""

from contextlib import suppress
from functools import partial
from pathlib import Path

from bundle.load import load_student, run_of
from bundle.manifest import NAME, read_manifest
from distill.config import ExportSettings
from distill.errors import DistillError
from distill.learning.feedback import FEEDBACK, keep_said
from distill.run import Run
from distill.serve.student import Offer
from distill.student.made_with import made_with, taught_to_dream


def offer(path: Path) -> Offer:
    """What `dream serve` is given. Raises as `load_student` does, when it is opened."""
    dreams, temperature, keeps, folder, rename = True, ExportSettings.temperature, None, path, f"rename {path}"
    is_run = (path / "config.yaml").is_file()
    if (path / NAME).is_file():
        manifest = read_manifest(path)
        dreams = bool(manifest.provenance.get("dreams", True))
        temperature = float(manifest.ollama.get("parameters", {}).get("temperature", temperature))
        rename = f"rename the run's folder of {path}, and export it again"
    elif (run := Run.open(path) if is_run else run_of(path)) is not None:
        settings = made_with(run)
        dreams, temperature = taught_to_dream(settings), settings.export.temperature
        if is_run:
            keeps, folder = partial(keep_said, path / FEEDBACK), _read_of(run)
        else:
            rename = ""  # its run knows a checkpoint by its name
    modified = path.stat().st_mtime if path.exists() else 0.0
    stamp, renew = _stamp(folder), partial(offer, path)
    return Offer(partial(load_student, path), dreams, temperature, modified, keeps, str(path), rename, stamp, renew)


def _read_of(run: Run) -> Path:
    """The folder that `load_student` reads of a run."""
    from distill.training.checkpoint import best

    with suppress(DistillError):  # which it raises itself
        return best(run)
    return run.bundle


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Of what a digest is computed from; nothing where that can't be told."""
    weights = sorted(folder.glob("*.safetensors"))
    others = (folder / name for name in ("config.json", "tokenizer.json", "tokenizer/tokenizer.json"))
    files = [*weights, *filter(Path.is_file, others)] if weights else []
    with suppress(OSError):
        return tuple((str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files)
    return ()
