"""How a step is computed: in which precision, compiled or not. A short trial on real batches decides.

The choice is written down beside the checkpoints, because a resumed training must go on exactly as it began.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.backbone.attention import attend
from distill.backbone.model import Backbone
from distill.config import TrainSettings
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.run import write_atomic
from distill.training import losses

COMPILE_SECONDS = 90.0
"""What compiling costs at most, roughly; a shorter training is not worth it."""


@dataclass
class Numerics:
    """The choice, and the tokens a second that the trial measured for each candidate."""

    precision: str
    compiled: bool
    trial: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def label(self) -> str:
        return f"{self.precision}{', compiled' if self.compiled else ''}"


def check(settings: TrainSettings) -> None:
    """Raise BadInput for a setting that names no choice."""
    for name, allowed in (("precision", ("auto", "float32", "bfloat16")), ("compile", ("auto", "always", "never"))):
        if getattr(settings, name) not in allowed:
            raise BadInput(f"train.{name}: {getattr(settings, name)!r} is none of {', '.join(allowed)}")


def compiler_found(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    if device.type == "cuda":
        import importlib.util

        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def apply(chosen: Numerics, model: Backbone) -> Any:
    """Compile the model's blocks in place if so chosen; returns the loss's kernel, compiled or not."""
    if not chosen.compiled:
        return losses.tail_kernel
    for block in model.model.layers:
        # Left out of the graph: spans change from batch to batch, and each would compile anew.
        vars(block.self_attn)["attend"] = torch.compiler.disable(attend)
        block.compile(dynamic=False)
    return torch.compile(losses.tail_kernel, dynamic=False)


def undo(model: Backbone) -> None:
    """Back to uncompiled blocks."""
    for block in model.model.layers:
        block._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]
        vars(block.self_attn).pop("attend", None)


def choose(
    settings: TrainSettings,
    device: torch.device,
    seconds_of: Callable[[Numerics], float],
    batch_tokens: int,
    expected_steps: Callable[[float], float],
    listen: Listener,
) -> Numerics:
    """Measure the candidates that the settings leave open and return the fastest.

    seconds_of(candidate) is the time of one warm step; expected_steps(seconds a step) is how many will follow.
    Compiling is tried where the training is long enough to earn it back.
    """
    check(settings)
    precisions = ["float32", "bfloat16"] if settings.precision == "auto" else [settings.precision]
    if settings.precision == "auto" and device.type == "cuda":
        precisions = ["bfloat16"] if torch.cuda.is_bf16_supported() else ["float32"]
    candidates = [Numerics(precision, settings.compile == "always") for precision in precisions]
    trial: dict[str, float] = {}
    times: list[float] = []
    for candidate in candidates:
        listen(Event("train", "note", f"trying {candidate.label}"))
        times.append(seconds_of(candidate) if len(candidates) > 1 or settings.compile == "auto" else 0.0)
        if times[-1]:
            trial[candidate.label] = round(batch_tokens / times[-1], 1)
    best = candidates[times.index(min(times))]
    seconds = min(times)
    worth = settings.compile == "auto" and seconds * expected_steps(seconds) > 2 * COMPILE_SECONDS
    if worth and compiler_found(device):
        compiled = Numerics(best.precision, True)
        listen(Event("train", "note", f"trying {compiled.label} (compiling takes a minute)"))
        try:
            faster = seconds_of(compiled)
            trial[compiled.label] = round(batch_tokens / faster, 1)
            best = compiled if faster < seconds else best
        except RuntimeError as error:  # torch.compile's errors; training works without it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            listen(Event("train", "warning", f"compiling failed, going on without: {reason}"))
    best.trial = trial
    listen(Event("train", "note", f"training in {best.label} ({trial})" if trial else f"training in {best.label}"))
    return best


def save(chosen: Numerics, path: Path) -> None:
    write_atomic(path, json.dumps(asdict(chosen), indent=2) + "\n")


def load(path: Path) -> Numerics | None:
    """The choice of an earlier session; None where there is none, or it can't be read."""
    try:
        return Numerics(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step after one to warm up: the shorter of two."""
    step()
    times: list[float] = []
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
