"""Labelled little pictures: npm's emoji-datasource-google, through npm's own command, or a file that the user has."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distill.errors import BadInput, CorruptFile, DistillError, MissingDependency
from distill.events import Event, Listener
from distill.run import fingerprint, sha256_file
from distill.teacher.weights import cache_dir

PACKAGE = "emoji-datasource-google@16.0.0"
FILE = "emoji-datasource-google-16.0.0.tgz"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
LICENCE = "pictures: Noto Emoji by Google (Apache-2.0); their names: emoji-data by Cal Henderson (MIT)"
FETCH_SECONDS = 900
MOST_BYTES = 4_000_000
"""Of one file in the archive."""

KINDS = {
    "animal-mammal": "animal",
    "animal-bird": "bird",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "food",
    "food-sweet": "sweet",
    "musical-instrument": "instrument",
    "tool": "tool",
    "household": "household thing",
    "office": "office thing",
    "clothing": "thing to wear",
}
"""Groups of emoji that show one thing → what such things are."""


@dataclass(frozen=True)
class Emoji:
    """png: 64 × 64 pixels, what isn't the thing is transparent."""

    name: str
    kind: str
    png: bytes


def emoji_files(files: str, listen: Listener) -> Path:
    """`files`, or where it is empty the package's archive, from the cache or fetched now by `npm pack`, whose registry,
    mirror and proxy settings hold.

    Raises BadInput where `files` isn't there, MissingDependency without npm or where it can't fetch, CorruptFile where
    what came is something else.
    """
    if files:
        if not (given := Path(files).expanduser()).exists():
            raise BadInput(f"capture.dataset_files={files}: is not there; name a folder or .tgz of emoji-datasource")
        return given
    path = cache_dir() / FILE
    if path.is_file() and sha256_file(path) == SHA256:
        return path
    remedy = f"or download {PACKAGE} yourself and name its .tgz in capture.dataset_files"
    if (npm := shutil.which("npm")) is None:
        raise MissingDependency(f"{PACKAGE}: is fetched by npm, which isn't there; install it, {remedy}")
    listen(Event("capture", "note", f"fetching {PACKAGE} (74 MB) by npm into {path.parent}"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            command = [npm, "pack", PACKAGE, "--pack-destination", folder, "--silent"]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=FETCH_SECONDS
            )
            fetched = Path(folder) / FILE
            if done.returncode or not fetched.is_file():
                said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing came"]
                raise MissingDependency(
                    f"{PACKAGE}: npm can't fetch it ({said[0][:200]}); check its registry, {remedy}"
                )
            if (digest := sha256_file(fetched)) != SHA256:
                raise CorruptFile(f"{PACKAGE}: {FILE} has SHA-256 {digest}, not {SHA256}; {remedy}")
            fetched.replace(path)
    except subprocess.TimeoutExpired as error:
        raise MissingDependency(f"{PACKAGE}: npm took more than {FETCH_SECONDS} s; try again, {remedy}") from error
    except OSError as error:
        reason = error.strerror or error
        raise DistillError(f"{path}: can't be kept: {reason} (free 200 MB, or set DREAM_CACHE)") from error
    return path


def emoji_digest(files: str) -> str:
    """What the names and pictures depend on, cheaply: nothing is fetched for it."""
    if not files:
        return SHA256
    path = Path(files).expanduser()
    index = path / "emoji.json" if path.is_dir() else path
    return sha256_file(index) if index.is_file() else fingerprint(files)


@cache
def read_emoji(path: Path) -> list[Emoji]:
    """One emoji of each plain name of at most two words, by name, of the kinds in KINDS.

    path: a package of the family emoji-datasource, as .tgz or unpacked. Raises CorruptFile.
    """
    try:
        if path.is_dir():
            about = json.loads((path / "emoji.json").read_text(encoding="utf-8"))
            pictures = {found.name: found for found in path.glob("img/*/64/*.png")}
            return _chosen(about, {name: found.read_bytes for name, found in pictures.items()})
        with tarfile.open(path) as archive:
            read: dict[str, bytes] = {}
            for member in archive:
                name, _, last = member.name.rpartition("/")
                wanted = (name.endswith("/64") and last.endswith(".png")) or (last == "emoji.json" and "/" not in name)
                if wanted and member.isfile() and member.size <= MOST_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None
                    read[last] = file.read()
        about = json.loads(read["emoji.json"])
        return _chosen(about, {name: (lambda data=data: data) for name, data in read.items()})
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, tarfile.TarError) as error:
        remedy = "name a folder or .tgz of npm's emoji-datasource-google in capture.dataset_files"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise CorruptFile(f"{path}: not a package of emoji ({reason}); {remedy}") from error


def _chosen(about: list[dict[str, Any]], pictures: dict[str, Callable[[], bytes]]) -> list[Emoji]:
    found: dict[str, Emoji] = {}
    for entry in about:
        name, words = entry["name"].lower(), entry["name"].lower().split()
        plain = name.replace(" ", "").isalpha() and name.isascii() and len(words) <= 2 and not words[0].endswith("ans")
        one = words[-1] != "face" and name not in KINDS.values() and (not name.endswith("s") or name.endswith("ss"))
        if entry["subcategory"] in KINDS and plain and one and entry["image"] in pictures and name not in found:
            found[name] = Emoji(name, KINDS[entry["subcategory"]], pictures[entry["image"]]())
    # A black cat is a cat: of such names the shorter one stays.
    things = [found[name] for name in sorted(found) if name.split()[-1] == name or name.split()[-1] not in found]
    if len(things) < 20 or len({thing.kind for thing in things}) < 2:
        raise ValueError(f"{len(things)} pictures of things, at least 20 of two kinds are needed")
    return things
