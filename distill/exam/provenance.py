"""How a result was made, in a form that another machine can make it again from."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import Settings

HIDDEN = ("teacher.hosts",)
"""Settings that tell of the machines, and not of the result."""


def changed_settings(settings: Settings) -> dict[str, Any]:
    """Settings that aren't their defaults, by dotted name; of files their names alone, and no addresses of servers."""
    now, default = _flat(asdict(settings)), _flat(asdict(Settings()))
    return {name: _portable(value) for name, value in now.items() if value != default[name] and name not in HIDDEN}


def default_settings() -> dict[str, Any]:
    """Every setting's default, by dotted name."""
    return _flat(asdict(Settings()))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _portable(value: Any) -> Any:
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    if isinstance(value, str) and "://" not in value:
        head, colon, tail = value.rpartition(":")
        return head + colon + Path(tail).name if Path(tail).is_absolute() else value
    return value


def versions() -> dict[str, str]:
    """Of Python and of what the numbers come from."""
    found = {"python": platform.python_version()}
    for package in ("dreaming-student", "torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine(device: str = "auto") -> dict[str, Any]:
    """What computed: the processor's and the device's names and numbers, nothing that names the machine.

    device: as torch names it; auto: the CUDA device where there is one. Where torch isn't loaded it has no threads.
    """
    torch: Any = sys.modules.get("torch")
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    if device == "auto":
        device = "cuda" if torch and torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    threads = torch.get_num_threads() if torch else None
    return {"processor": processor, "cores": os.cpu_count(), "threads": threads, "device": device}
