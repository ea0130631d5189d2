"""How a step's numerics are chosen: by little work, within a bound, and not at the training's expense."""

from typing import Any

import pytest
import torch

from distill.backbone.model import Backbone, BackboneConfig
from distill.config import TrainSettings
from distill.events import Event
from distill.training import numerics
from distill.training.numerics import Numerics, Trial, choose

FAST, SLOW = 0.004, 0.02


class Passes:
    """Stands for the training and its clock: passes that take as long as told, and a record of them."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.made: list[tuple[str, int]] = []
        self.told: list[Event] = []
        self.now = 0.0

    def perf_counter(self) -> float:
        """In place of time's, so that a busy machine chooses nothing else."""
        return self.now

    def __call__(self, candidate: Numerics, kernel: Any, rows: int) -> None:
        self.made.append((candidate.label, rows))
        self.now += self.seconds[candidate.label]


def race(
    monkeypatch: pytest.MonkeyPatch,
    products: dict[str, float],
    seconds: dict[str, float],
    training: float,
    **settings: Any,
) -> tuple[Numerics, Passes]:
    """What is chosen, and the passes made for it. products: GFLOP/s."""
    passes = Passes(seconds)
    config = BackboneConfig(vocab_size=64, hidden=32, layers=1, heads=2, kv_heads=1, ffn=64, context=16)

    def product(_: Trial, precision: str) -> float:
        return 1e9 * products[precision]

    monkeypatch.setattr(Trial, "product", product)
    monkeypatch.setattr(numerics, "time", passes)
    trial = Trial(Backbone(config), passes, 8, 1, lambda _: training, lambda seconds: seconds, passes.told.append)
    return choose(TrainSettings(device="cpu", **settings), trial), passes


def test_an_emulated_precision_is_dropped_without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, passes = race(monkeypatch, {"float32": 100, "bfloat16": 2}, {}, 240.0)
    assert (chosen.precision, chosen.compiled, passes.made) == ("float32", False, [])
    assert chosen.why == "a product in bfloat16 takes 50.0 times as long"
    chosen, _ = race(monkeypatch, {"float32": 100, "bfloat16": 900}, {}, 240.0)
    assert chosen.precision == "bfloat16"


def test_near_precisions_are_tried_on_part_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    near = {"float32": 100.0, "bfloat16": 150.0}
    chosen, passes = race(monkeypatch, near, {"float32": FAST, "bfloat16": 0.75 * FAST}, 240.0)
    assert chosen.precision == "bfloat16"
    assert passes.made == [("float32", 1)] * 3 + [("bfloat16", 1)] * 3
    assert chosen.trial["bfloat16"] > chosen.trial["float32"] > 0
    chosen, passes = race(monkeypatch, near, {"float32": FAST, "bfloat16": SLOW}, 240.0)
    assert chosen.precision == "float32"
    assert passes.made == [("float32", 1)] * 3 + [("bfloat16", 1)], "one pass tells that it loses"


def test_a_trial_that_cannot_pay_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, passes = race(monkeypatch, {"float32": 1e-6, "bfloat16": 1.5e-6}, {}, 240.0)
    assert (chosen.precision, passes.made) == ("float32", [])
    assert "12 s are 5% of the training" in chosen.why


def test_set_numerics_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, passes = race(monkeypatch, {}, {}, 1e9, precision="bfloat16", compile="never")
    assert (chosen.label, chosen.why, chosen.seconds, passes.made) == ("bfloat16", "as set", 0.0, [])
    chosen, _ = race(monkeypatch, {}, {}, 1e9, precision="float32", compile="always")
    assert chosen.label == "float32, compiled"


@pytest.mark.parametrize("minutes", [4, 600])
def test_compiling_is_tried_where_the_training_pays_for_it(minutes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(*_: object) -> str:
        return "a kernel"

    monkeypatch.setattr(numerics, "apply", plain)
    monkeypatch.setattr(numerics, "compiler_found", plain)
    seconds = {"float32": SLOW, "float32, compiled": FAST}
    chosen, passes = race(monkeypatch, {"float32": 100}, seconds, 60.0 * minutes, precision="float32")
    assert chosen.compiled == (minutes == 600)
    assert set(passes.made) == ({("float32", 8), ("float32, compiled", 8)} if minutes == 600 else set())


def test_a_product_is_measured() -> None:
    config = BackboneConfig(vocab_size=64, hidden=64, layers=1, heads=2, kv_heads=1, ffn=128, context=16)
    told: list[Event] = []
    trial = Trial(Backbone(config), Passes({}), 8, 1, lambda _: 60.0, lambda seconds: seconds, told.append)
    chosen = choose(TrainSettings(device="cpu"), trial)
    assert set(chosen.products) == {"float32", "bfloat16"}
    assert all(speed > 0 for speed in chosen.products.values())
    assert 0 < chosen.seconds < numerics.TRIAL_SECONDS
    assert torch.get_default_dtype() == torch.float32
    assert f"training in {chosen.label}" in told[-1].message
