"""Where a model is computed."""

import warnings

import torch

from distill.errors import BadInput


def pick_device(name: str) -> torch.device:
    """Raises BadInput for a device that there isn't; "cuda" without a GPU is the CPU, with a warning."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        warnings.warn("device='cuda': there is no such GPU here; the CPU is used", stacklevel=3)
        return torch.device("cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device={name!r}: can't be used; choose auto, cpu or cuda") from error
