"""Batches that are made before they are asked for."""

import pytest
import torch

from bench.training import FixedTokens, synthetic_documents
from distill.training.ahead import Ahead
from distill.training.batches import Batch, Batches, Row
from distill.training.mixture import Mixture
from distill.training.step import move

BATCHES = Batches(synthetic_documents(500), FixedTokens(500), 128, Mixture(True, 0.25, 0.0), 0, 0.8)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: whatever is no CPU
def test_what_was_prepared_is_taken_once_and_by_whoever_asked_for_it(device: str) -> None:
    made: list[tuple[list[Row], float]] = []

    def make(rows: list[Row], unread: float) -> list[Batch]:
        made.append((rows, unread))
        return [move(BATCHES.assemble([row], unread), torch.device(device)) for row in rows]

    ahead, rows = Ahead(make, torch.device(device)), BATCHES.epoch(0)
    first = ahead.take(rows[:2])
    ahead.prepare(rows[2:4])
    assert len(made) == (1 if device == "cpu" else 2)
    assert [len(parts) for parts in (first, ahead.take([*rows[2:4]]))] == [2, 2]
    assert made == [(rows[:2], 0.0), (rows[2:4], 0.0)]
    ahead.take(rows[2:4])
    assert len(made) == 3, "a step changes what it read"
    ahead.prepare(rows[4:6])
    ahead.take(rows[4:6], 0.5)
    ahead.take(rows[4:6])
    assert made[-2:] == [(rows[4:6], 0.5), (rows[4:6], 0.0)], "what became of it isn't known"
    assert {part.ids.device.type for part in first} == {device}
