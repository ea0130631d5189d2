"""What examinees behind a server have in common: how seeds, storage types and think blocks are written there."""

from distill.tokens.chat import END_THINK, THINK

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF's names of what we call otherwise; Q4_1 is called so by everyone."""


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
