"""Visual Genome's scene graphs as questions about its pictures: what is in them, and what holds between two things.

relationships.json is an array of pictures, {image_id, relationships: [{predicate, subject, object}]}, things with their
name and box (x, y, w, h in pixels). Pictures are IMAGE_ID.jpg in any folder beside it. Some are held out (`picture`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.corpus.datasets.brought import dealt, digest, elements, find, picture, pictures_in, sampled
from distill.corpus.datasets.questions import Question, Step
from distill.errors import CorruptFile
from distill.events import Listener, silent

__all__ = ["LICENCE", "VERSION", "digest", "questions"]

VERSION = 1
LICENCE = "Visual Genome (CC BY 4.0), R. Krishna et al.; its pictures: YFCC100M and COCO, under their owners' licences"
PATTERN, SOURCE = "relationships*.json*", "homes.cs.washington.edu/~ranjay/visualgenome"


class Pair(NamedTuple):
    """One relation of a picture; things with the middles of their boxes in pixels."""

    image: str
    what: str
    action: str
    result: str
    at: tuple[tuple[float, float], tuple[float, float]]


def pairs(path: Path) -> Iterator[Pair]:
    """Of each picture the first relation of two things with names of their own. Raises CorruptFile."""
    for number, found in enumerate(elements(path), 1):
        try:
            image = str(int(found["image_id"]))
            for relation in found["relationships"]:
                (what, one), (result, other) = _thing(relation["subject"]), _thing(relation["object"])
                if what and result and what != result and (action := relation["predicate"].lower().strip()):
                    yield Pair(image, what, action, result, (one, other))
                    break
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__} {error}"
            raise CorruptFile(f"{path}, element {number}: no picture's relationships ({reason})") from error


def _thing(found: dict[str, Any]) -> tuple[str, tuple[float, float]]:
    name = found["name"] if "name" in found else found["names"][0]
    return name.lower().strip(), (found["x"] + found["w"] / 2, found["y"] + found["h"] / 2)


def questions(size: int, held_out: int, seed: int, files: str = "", listen: Listener = silent) -> Iterator[Question]:
    """`size` training questions at most, then `held_out` about pictures never trained on; one a picture."""
    path = find(files, "visual-genome", PATTERN, SOURCE, listen)
    there = pictures_in(path.parent, SOURCE)
    seen = (pair for pair in pairs(path) if f"{pair.image}.jpg" in there)
    chosen = sampled(seen, 2 * size + 20 * held_out, seed, lambda pair: pair.image)
    for pair, aside in dealt(chosen, lambda pair: pair.image, seed, size, held_out):
        drawn = picture(there[f"{pair.image}.jpg"], {pair.what: pair.at[0], pair.result: pair.at[1]})
        said, dream = f"{pair.what} {pair.action} {pair.result}.", [Step(pair.what, pair.action, pair.result)]
        prompt, split = f"What is in this picture? {drawn.path}", "picture" if aside else "train"
        yield Question(prompt, said[0].upper() + said[1:], split, 1, {"spatial": dream}, (drawn,))
