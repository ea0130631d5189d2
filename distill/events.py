"""How library code tells what it is doing. It never prints: whoever listens draws the bars."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """One thing that happened in a stage.

    `progress` events carry `done` of `total` in `unit` (total is None while unknown) and, in `data`, what a
    progress bar may show beside it ({"loss": 3.1}). `note` and `warning` carry a `message` of one line.
    """

    stage: str
    kind: Literal["start", "progress", "note", "warning", "done"]
    message: str = ""
    done: float = 0
    total: float | None = None
    unit: str = ""
    data: dict[str, Any] = field(default_factory=dict[str, Any])


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener of whoever does not care."""
