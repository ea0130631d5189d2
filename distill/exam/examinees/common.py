"""What examinees behind a server have in common: how seeds, storage types and think blocks are written there."""

from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import CorruptFile
from distill.tokens.chat import END_THINK, THINK

if TYPE_CHECKING:
    from torch import nn

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF's names of what we call otherwise; Q4_1 is called so by everyone."""


def check_finite(model: "nn.Module", folder: Path) -> None:
    """Raises CorruptFile for weights that are no numbers: whatever was measured of them would be none either."""
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise CorruptFile(
                f"{folder}: {name} holds NaN or infinity, so that it can say nothing; take an earlier checkpoint, or "
                "download the model again"
            )


def engine_seed(seed: int) -> int:
    """The seed as llama.cpp takes it, 32 bits wide and not all ones: that would mean a random one."""
    return seed % (2**31 - 1)


def without_thought(text: str) -> str:
    """An answer without the think block that it opens with, should it open with one."""
    stripped = text.lstrip()
    if stripped.startswith(THINK):
        _, tag, after = stripped.partition(END_THINK)
        return after.lstrip() if tag else ""
    return text
