"""What a dataset is made of: questions with true answers and true dreams."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One triplet of a dream, as phrases."""

    what: str
    action: str
    result: str


@dataclass(frozen=True)
class Question:
    """`split` is "train" or one that is never trained on; `dream` holds a chain for each lens; `depth` its length."""

    prompt: str
    answer: str
    split: str
    depth: int
    dream: dict[str, list[Step]]
