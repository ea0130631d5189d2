"""Where a model is computed."""

import warnings

import torch
from torch import Tensor

from distill.errors import BadInput


def pick_device(name: str, setting: str = "") -> torch.device:
    """Raises BadInput for a device that there isn't, and names the setting that asks for it; where none does, "cuda"
    without a GPU is the CPU, with a warning."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not setting and not torch.cuda.is_available():
        warnings.warn("device='cuda': there is no such GPU here; the CPU is used", stacklevel=3)
        return torch.device("cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"{setting or 'device'}={name!r}: can't be used; choose auto, cpu or cuda") from error


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on its way to a device; the tensor itself where it is there. A GPU takes it from pinned memory, in its
    turn, so that nobody waits for what it is at."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
