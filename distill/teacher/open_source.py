"""A teacher's own weights, in whichever form they lie."""

from pathlib import Path

from distill.teacher.source import Source
from distill.teacher.source_folder import open_folder
from distill.teacher.source_gguf import open_gguf


def open_source(path: Path) -> Source:
    """Read a model's description: of a GGUF, or of a folder with config.json and model*.safetensors.

    Raises BadInput for what we can't read, CorruptFile for a broken file.
    """
    if path.is_dir():
        return open_folder(path)
    return open_gguf(path)
