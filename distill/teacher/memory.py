"""How much memory a model may take."""

import contextlib
import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""What a container may use, by both generations of Linux' control groups."""


def available_memory() -> int | None:
    """Bytes that can be had without swapping: on Linux by the kernel's word, within the container's limit; elsewhere
    all that the machine has, as what is free isn't told; None where nothing is."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = next(
            (line for line in MEMINFO.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable:")), ""
        )
        found.append(1024 * int(line.split()[1]))
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            found.append(int(path.read_text(encoding="utf-8")))
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: Windows
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)
