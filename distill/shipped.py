"""Where the files lie that ship with us."""

from pathlib import Path


def shipped(folder: str) -> Path:
    """`configs` or `prompts`: in the wheel, or in the checkout where there is no wheel."""
    packaged = Path(__file__).parent / f"_{folder}"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / folder
