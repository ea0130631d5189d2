"""How a step is computed: in which precision, compiled or not. A short trial decides, as cheaply as it can.

One matrix product in the model's own shape tells in milliseconds where bfloat16 is only emulated (a hundred times
slower on some CPUs). Only precisions that come near each other there are tried on whole steps, and then on few rows.
Compiling is tried where the training is long enough to pay for it twentyfold.

The choice is written down beside the checkpoints, because a resumed training must go on exactly as it began: unless
the settings name something else by then, or it goes on on another kind of device.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from distill.backbone.attention import attend
from distill.backbone.model import Backbone, count_parameters
from distill.backbone.products import product_seconds
from distill.config import TrainSettings
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.run import write_atomic
from distill.training import losses

TRIAL_SHARE = 0.05
"""Of the training that follows: what a trial may take at most."""
TRIAL_SECONDS = 20.0
"""What trying precisions may take at most."""
COMPILE_SECONDS = 90.0
"""What compiling costs at most, roughly."""
CLEAR = 2.0
"""So many times slower: lost, without a closer look."""
TRIES = 3
"""Passes that a candidate makes; the first warms it up."""


@dataclass
class Numerics:
    """The choice and its grounds.

    trial: tokens a second of each candidate that was tried on whole passes. products: GFLOP/s of one product in each
    precision. why: what decided. seconds: what finding out took. device: cpu, cuda …; what is quick on one isn't on
    another.
    """

    precision: str
    compiled: bool
    trial: dict[str, float] = field(default_factory=dict[str, float])
    products: dict[str, float] = field(default_factory=dict[str, float])
    why: str = "as set"
    seconds: float = 0.0
    device: str = ""

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


@dataclass
class Trial:
    """What candidates are tried on, and what hangs on it.

    step(candidate, kernel, rows): one pass forward and backward over so many packed rows. rows: of a batch; part: of
    what precisions are tried on. training(seconds of a step): seconds that the training will take. share(seconds):
    as the first process measured them, so that all processes decide alike.
    """

    model: Backbone
    step: Callable[[Numerics, Any, int], None]
    rows: int
    part: int
    training: Callable[[float], float]
    share: Callable[[float], float]
    listen: Listener

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def tokens(self, rows: int) -> int:
        return rows * self.model.config.context

    def flops(self, rows: int) -> float:
        """Of a pass, roughly: 6 for each weight and token (arXiv:2001.08361, section 2.1)."""
        return 6.0 * count_parameters(self.model) * self.tokens(rows)

    def product(self, precision: str) -> float:
        """FLOP/s of a few tokens through one of the model's feed-forward matrices."""
        config, count = self.model.config, 64 if self.device.type == "cpu" else 8192
        seconds = product_seconds(count, config.hidden, config.ffn, getattr(torch, precision), self.device)
        return 2.0 * count * config.hidden * config.ffn / self.share(seconds)

    def seconds(self, candidate: Numerics, rows: int, rival: Sequence[float] = ()) -> list[float]:
        """Of each of a few passes; it stops where it is clearly slower than the rival's."""
        self.listen(Event("train", "note", f"trying {candidate.label}"))
        kernel = apply(candidate, self.model)
        try:
            return self._times(lambda: self.step(candidate, kernel, rows), rival)
        finally:
            undo(self.model)

    def _times(self, run: Callable[[], object], rival: Sequence[float] = ()) -> list[float]:
        settle = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        times: list[float] = []
        for number in range(TRIES):
            settle()
            started = time.perf_counter()
            run()
            settle()
            times.append(self.share(time.perf_counter() - started))
            if number < len(rival) and times[-1] > CLEAR * rival[number]:
                break
        return times


def precisions(settings: TrainSettings, device: str, kept: Numerics | None = None) -> list[str]:
    """Those that are left to choose from, or the one that is clear from the first."""
    if settings.precision != "auto":
        return [settings.precision]
    if kept is not None and kept.device in ("", device):
        return [kept.precision]
    if device == "cuda":
        return ["bfloat16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["float32"]
    return ["float32", "bfloat16"]


def choose(settings: TrainSettings, trial: Trial, kept: Numerics | None = None) -> Numerics:
    """The fastest of what the settings leave open; measured only where that pays. kept: the choice that a training was
    begun with, which stays where the settings leave it open."""
    check(settings)
    found = precisions(settings, trial.device.type, kept)
    if kept is not None and kept.device in ("", trial.device.type):
        compiled = kept.compiled if settings.compile == "auto" else settings.compile == "always"
        if (found[0], compiled) == (kept.precision, kept.compiled):
            return kept
        chosen = Numerics(found[0], compiled, device=trial.device.type)
        trial.listen(Event("train", "note", f"going on in {chosen.label}, as set; so far it was {kept.label}"))
        return chosen
    chosen = Numerics(found[0], settings.compile == "always", device=trial.device.type)
    if len(found) == 1 and settings.compile != "auto":
        return chosen
    begun = time.perf_counter()
    chosen.products = {precision: float(f"{trial.product(precision) / 1e9:.3g}") for precision in found}
    if len(found) > 1:
        _choose_precision(chosen, trial)
    if settings.compile == "auto":
        _choose_compiling(chosen, trial)
    chosen.seconds = round(time.perf_counter() - begun, 3)
    trial.listen(
        Event("train", "note", f"training in {chosen.label} ({chosen.why}; {chosen.seconds:.1f} s to find out)")
    )
    return chosen


def _choose_precision(chosen: Numerics, trial: Trial) -> None:
    speeds = chosen.products
    slow, fast = sorted(speeds, key=speeds.__getitem__)
    if speeds[fast] > CLEAR * speeds[slow]:
        chosen.precision = fast
        chosen.why = f"a product in {slow} takes {speeds[fast] / speeds[slow]:.1f} times as long"
        return
    # A pass is more than its products: twice their time is allowed for.
    needed = sum(TRIES * 2 * trial.flops(trial.part) / (1e9 * speed) for speed in speeds.values())
    limit = min(TRIAL_SECONDS, TRIAL_SHARE * trial.training(trial.flops(trial.rows) / (1e9 * speeds[fast])))
    if needed > limit:
        chosen.why = (
            f"trying bfloat16 would take {needed:.0f} s, and {limit:.0f} s are {TRIAL_SHARE:.0%} of the training"
        )
        return
    rival: list[float] = []
    for precision in speeds:
        times = trial.seconds(Numerics(precision, False), trial.part, rival)
        chosen.trial[precision] = round(trial.tokens(trial.part) / min(times), 1)
        rival = rival or times
    chosen.precision = max(chosen.trial, key=chosen.trial.__getitem__)
    chosen.why = "the fastest of those tried"


def _choose_compiling(chosen: Numerics, trial: Trial) -> None:
    """Try a compiled step, if the training is long enough to pay for trying it."""
    speed = chosen.trial.get(chosen.precision, 0.0)
    expected = (
        trial.tokens(trial.rows) / speed
        if speed
        else trial.flops(trial.rows) / (1e9 * chosen.products[chosen.precision])
    )
    if not _pays(expected, trial) or not compiler_found(trial.device):
        return
    plain = min(trial.seconds(Numerics(chosen.precision, False), trial.rows))
    if not _pays(plain, trial):
        return
    compiled = Numerics(chosen.precision, True)
    try:
        faster = min(trial.seconds(compiled, trial.rows))
    except RuntimeError as error:  # torch.compile's errors; training works without it
        if hasattr(trial.model, "reset_iter_state"):  # FSDP2, in the middle of a pass
            cast(Any, trial.model).reset_iter_state()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        trial.listen(Event("train", "warning", f"compiling failed, going on without: {reason}"))
        return
    for candidate, seconds in ((Numerics(chosen.precision, False), plain), (compiled, faster)):
        chosen.trial[candidate.label] = round(trial.tokens(trial.rows) / seconds, 1)
    chosen.compiled, chosen.why = faster < plain, "the fastest of those tried"


def _pays(step: float, trial: Trial) -> bool:
    """Whether trying a compiled step of so many seconds is a small part of the training."""
    return COMPILE_SECONDS + 2 * TRIES * step < TRIAL_SHARE * trial.training(step)


def save(chosen: Numerics, path: Path) -> None:
    write_atomic(path, json.dumps(asdict(chosen), indent=2) + "\n")


def load(path: Path) -> Numerics | None:
    """The choice of an earlier session; None where there is none, or it can't be read."""
    try:
        return Numerics(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
