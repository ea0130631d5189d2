"""Pictures in prompts: where a prompt names one, its image tokens are read, each before the place where it was seen.

`What is in this picture? ./pictures/0a1b.png` is read as `What is in this picture? ⟨dog⟩ left ⟨cup⟩ right`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from distill.corpus.datasets.questions import PICTURES
from distill.errors import CorruptFile
from distill.run import write_atomic

PLACES = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75), "middle": (0.5, 0.5)}
"""Where one looks: the middle of what is seen there, as shares of the picture's width and height."""
NAMED = re.compile(rf"\./{PICTURES}/[\w-]+\.png")
FILE = "shown.json"


def show(prompt: str, shown: Mapping[str, str]) -> str:
    """The prompt with each known picture's image tokens in the place of its path."""
    return NAMED.sub(lambda found: shown.get(found[0], found[0]), prompt) if shown else prompt


def words_around(prompt: str) -> str:
    """The prompt with the words that image tokens stand between, in the place of pictures: what BPE is learnt from."""
    return NAMED.sub(" ".join(PLACES), prompt)


def save_shown(folder: Path, shown: Mapping[str, str]) -> None:
    write_atomic(folder / FILE, json.dumps(shown, ensure_ascii=False, indent=0) + "\n")


def load_shown(folder: Path) -> dict[str, str]:
    """Picture's path → its tokens' text; none where the run has no pictures. Raises CorruptFile."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
            raise ValueError("each picture has a text")
        return found
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); run `dream tokenize --force`") from error
