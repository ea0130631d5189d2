"""The next batch is made while a GPU is at the one before: the CPU would only wait meanwhile."""

import torch

from distill.training.batches import Batch, Batches, Row
from distill.training.step import move


class Ahead:
    """Batches on a device. What is prepared is what would have been made: by then a caller may want something else."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self._made: tuple[tuple[list[list[Row]], float], list[Batch]] | None = None

    def take(self, parts: list[list[Row]], unread: float = 0.0) -> list[Batch]:
        """A batch of each part's rows. unread: as of `Batches.assemble`."""
        made, self._made = self._made, None
        return made[1] if made and made[0] == self._asked(parts, unread) else self._assemble(parts, unread)

    def prepare(self, parts: list[list[Row]], unread: float = 0.0) -> None:
        """Make what is likely taken next, while the device has something to do. A CPU has nobody to wait for, and what
        is hidden of questions is another share in each step."""
        asked = self._asked(parts, unread)
        if self.device.type != "cpu" and not asked[1]:
            self._made = asked, self._assemble(*asked)

    def _asked(self, parts: list[list[Row]], unread: float) -> tuple[list[list[Row]], float]:
        mixture = self.batches.mixture
        return parts, unread if mixture.bottleneck or mixture.prompt_dropout else 0.0

    def _assemble(self, parts: list[list[Row]], unread: float) -> list[Batch]:
        return [move(self.batches.assemble(part, unread), self.device) for part in parts]
