"""What a dataset is made of: questions with true answers and true dreams, some about pictures."""

from collections.abc import Callable
from dataclasses import dataclass

PICTURES = "pictures"
"""The run's folder of them."""
PICTURED = ("emoji-scenes", "coco", "visual-genome")
"""Datasets that ask about pictures."""


@dataclass(frozen=True)
class Step:
    """One triplet of a dream, as phrases."""

    what: str
    action: str
    result: str


@dataclass(frozen=True)
class Drawn:
    """A picture that a question is about. `png` draws it, the same each time; nothing is drawn before it is asked for.

    name: of its file, made of all that decides what is in it. labels: what is to be seen, as phrases; at: where, as
    shares of the picture's width and height.
    """

    name: str
    png: Callable[[], bytes]
    labels: tuple[str, ...]
    at: tuple[tuple[float, float], ...]

    @property
    def path(self) -> str:
        """As prompts name it: from the run's folder, and as Ollama's command finds pictures in a prompt."""
        return f"./{PICTURES}/{self.name}"


@dataclass(frozen=True)
class Question:
    """`split` is "train" or one that is never trained on; `dream` holds a chain for each lens; `depth` its length.

    pictures: those whose paths stand in the prompt, in that order.
    """

    prompt: str
    answer: str
    split: str
    depth: int
    dream: dict[str, list[Step]]
    pictures: tuple[Drawn, ...] = ()
