"""The next batch is made while a GPU is at the one before: the CPU would only wait meanwhile."""

from collections.abc import Callable

import torch

from distill.training.batches import Batch, Row

Make = Callable[[list[Row], float], list[Batch]]
"""(rows, unread as of `Batches.assemble`) → batches on the device, always the same for the same."""


class Ahead:
    """What `make` gives, perhaps before it is asked for."""

    def __init__(self, make: Make, device: torch.device) -> None:
        self.make, self.device = make, device
        self._made: tuple[tuple[list[Row], float], list[Batch]] | None = None

    def take(self, rows: list[Row], unread: float = 0.0) -> list[Batch]:
        made, self._made = self._made, None
        return made[1] if made and made[0] == (rows, unread) else self.make(rows, unread)

    def prepare(self, rows: list[Row], unread: float = 0.0) -> None:
        """Make what is likely taken next, after the device was given something to do. Nobody waits for a CPU."""
        if self.device.type != "cpu":
            self._made = (rows, unread), self.make(rows, unread)
