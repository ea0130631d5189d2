"""bundle.json: what a bundle holds, and where it comes from."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from distill.errors import BadInput, CorruptFile
from distill.run import sha256_file, write_atomic

NAME = "bundle.json"
VERSION = 1
GGUF = "model.gguf"
LICENSE = "LICENSE"
"""The terms of the weights, in full, where they are known."""
NATIVE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "dream_tokenizer.json")
"""What we load of a bundle."""


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json.

    files                 path → {"sha256", "bytes"} of every file but bundle.json
    dtype                 of model.gguf
    ollama                {"template", "system", "parameters"} for /api/create
    provenance            teacher and its licence, what the weights began as and their licence, prompts, run, checkpoint
    evaluation            results.json of the run's evaluation, or None
    verification_prompts  held-out prompts that `verify` asks
    verification_answers  [prompt, the teacher's answer] of held-out prompts: `verify` measures what they cost
    verification_pictures [question, file] about pictures of the bundle, for students that read them themselves
    parity                what `verify` found before the bundle was published
    """

    name: str
    dtype: str
    ollama: dict[str, Any]
    provenance: dict[str, Any]
    verification_prompts: list[str]
    evaluation: dict[str, Any] | None = None
    verification_answers: list[list[str]] = field(default_factory=list[list[str]])
    verification_pictures: list[list[str]] = field(default_factory=list[list[str]])
    parity: dict[str, Any] = field(default_factory=dict[str, Any])
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    version: int = VERSION


def list_files(folder: Path) -> list[str]:
    """Every file of a bundle but bundle.json, as sorted POSIX paths; hidden ones are not part of it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(p.as_posix() for p in paths if p.as_posix() != NAME and not any(x.startswith(".") for x in p.parts))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write bundle.json with the digests of what lies in `folder` now."""
    files = {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in list_files(folder)
    }
    complete = replace(manifest, files=files)
    write_atomic(folder / NAME, json.dumps(asdict(complete), indent=2, ensure_ascii=False) + "\n")
    return complete


def read_manifest(folder: Path) -> Manifest:
    """Raises BadInput where the folder is no bundle, CorruptFile where bundle.json can't be read."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise BadInput(
                f"{path}: is of version {content['version']}, this program reads {VERSION}; export the run again"
            )
        known = {entry.name for entry in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in content.items() if key in known})
        for name, entry in manifest.files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts or not {"sha256", "bytes"} <= entry.keys():
                raise ValueError(f"its entry of {name!r} is no file of this folder")
        return manifest
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(f"{folder}: is no bundle (no {NAME}); `dream export` makes one") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); export the run again") from error


def check_file(folder: Path, manifest: Manifest, name: str) -> None:
    """Raises CorruptFile where a file is missing, cut short, altered, or not of the bundle."""
    path = folder / name
    if name not in manifest.files:
        raise CorruptFile(f"{path}: is not listed in {NAME}; export the run again")
    if not path.is_file():
        raise CorruptFile(f"{path}: is missing; export the run again")
    entry = manifest.files[name]
    if path.stat().st_size != entry["bytes"]:
        raise CorruptFile(f"{path}: has {path.stat().st_size} bytes, not {entry['bytes']}; export the run again")
    if sha256_file(path) != entry["sha256"]:
        raise CorruptFile(f"{path}: was altered (its SHA-256 is not the one in {NAME}); export the run again")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check every file, and that there are no others. Raises CorruptFile for the first that is wrong."""
    for name in sorted({*manifest.files, *list_files(folder)}):
        check_file(folder, manifest, name)
