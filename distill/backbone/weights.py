"""Weights in a folder of safetensors, as transformers lays them out: found by name, read one by one."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import BadInput, CorruptFile

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `read` gives it in float32; raises CorruptFile."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def layer_of(name: str) -> int | None:
    """The layer that one of our tensors belongs to: 3 of `model.layers.3.mlp.up_proj.weight`."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def stored_tensors(folder: Path, tied: bool) -> dict[str, Stored]:
    """All tensors of a folder's weights, without what newer code computes by itself (rotary tables, the output layer of
    a `tied` model). Raises BadInput where there are none that we read, or a tied layer is another than the embedding;
    CorruptFile for a broken file."""
    found: dict[str, Stored] = {}
    places: dict[str, Path] = {}
    for file, names in weight_files(folder).items():
        shapes = _shapes(file)
        if missing := sorted(set(names or ()) - shapes.keys()):
            raise CorruptFile(f"{file}: lacks {missing[0]}, which {INDEX} places there; download it again")
        for name in names or shapes:
            places[name] = file
            if "rotary_emb" not in name and not (tied and name == HEAD):
                found[name] = Stored(shapes[name], partial(_read, file, name))
    if tied and {EMBEDDING, HEAD} <= places.keys():
        rows, head = (_raw(places[name], name) for name in (EMBEDDING, HEAD))
        if not torch.equal(rows, head):
            raise BadInput(f"{folder}: {HEAD} is another than {EMBEDDING}; set tie_word_embeddings to false")
    return found


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files that hold a model's weights, and which of their tensors (None: all). An index rules; without one it is
    model.safetensors, or else the shards, of which none may lack. Raises BadInput, CorruptFile."""
    index, whole = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        files: dict[Path, list[str] | None] = {}
        for name, file in _index(index).items():
            if Path(file).name != file or not (folder / file).is_file():
                raise CorruptFile(f"{folder}: has no {file}, which {INDEX} names; download it again")
            placed = files.setdefault(folder / file, [])
            assert placed is not None
            placed.append(name)
        return files
    if whole.is_file():
        return {whole: None}
    shards = {path: match for path in sorted(folder.glob("model-*")) if (match := SHARD.fullmatch(path.name))}
    if not shards:
        pickled = next((path.name for kind in PICKLED for path in sorted(folder.glob(kind))), "")
        there = f"only {pickled}" if pickled else "no weights"
        raise BadInput(
            f"{folder}: holds {there}, no model*.safetensors; pickled weights are never loaded, convert them first"
        )
    counts = sorted({match[2] for match in shards.values()})
    lacking = {
        count: next((shard for shard in _shards(folder, count) if shard not in shards), None) for count in counts
    }
    whole_sets = [count for count, missing in lacking.items() if missing is None]
    if len(whole_sets) > 1:
        raise BadInput(f"{folder}: holds two models, in {' and in '.join(whole_sets)} files; take one of them out")
    if not whole_sets:
        missing = lacking[counts[0]]
        assert missing is not None
        raise CorruptFile(f"{folder}: has no {missing.name}; download it again")
    return dict.fromkeys(_shards(folder, whole_sets[0]))


def _shards(folder: Path, count: str) -> list[Path]:
    return [folder / f"model-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]


def _index(path: Path) -> dict[str, str]:
    try:
        placed: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in placed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); download it again") from error


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{file}: can't be read ({error}); download or save it again") from error


def _read(file: Path, name: str) -> Tensor:
    return _raw(file, name).to(torch.float32, copy=True)


def _raw(file: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{file}: {name} can't be read ({error}); download or save it again") from error
