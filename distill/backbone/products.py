"""How fast matrices are multiplied here: whether a precision is computed or emulated, a few milliseconds tell."""

import time

import torch
import torch.nn.functional as F

TRIES = 3
"""The first warms it up."""


def product_seconds(rows: int, inner: int, outer: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of (rows, inner) times (inner, outer), the best of a few."""
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    w = torch.ones(outer, inner, dtype=dtype, device=device)
    times = list[float]()
    for _ in range(TRIES):
        started = time.perf_counter()
        F.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
