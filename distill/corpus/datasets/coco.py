"""COCO's captions and boxes as questions about its pictures: what is in them, and how two things stand to each other.

captions_*.json has `images` (id, file_name) and `annotations` (image_id, caption); instances_*.json, beside it,
`annotations` (image_id, category_id, bbox: x, y, w, h in pixels) and `categories` (id, name). Pictures lie anywhere in
the folder that has the annotations/. Those with two things or more are asked about; some are held out (`picture`).
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.corpus.datasets.brought import dealt, digest, elements, find_all, picture, pictures_in, sampled
from distill.corpus.datasets.questions import Question, Step
from distill.errors import BadInput, CorruptFile
from distill.events import Listener, silent

__all__ = ["LICENCE", "VERSION", "digest", "questions"]

VERSION = 1
LICENCE = "COCO's annotations (CC BY 4.0), T.-Y. Lin et al.; its pictures: Flickr's, under their owners' licences"
CAPTIONS, SOURCE = "captions_*.json*", "cocodataset.org/#download"


def questions(size: int, held_out: int, seed: int, files: str = "", listen: Listener = silent) -> Iterator[Question]:
    """`size` training questions at most, then `held_out` about pictures never trained on; one a picture."""
    both = {each: _boxes(each) for each in find_all(files, "coco", CAPTIONS, SOURCE)}
    there, names = dict[str, Path](), dict[int, str]()
    for folder in dict.fromkeys(captions.parent for captions in both):
        there |= pictures_in(folder.parent if folder.name == "annotations" else folder, SOURCE)
    for captions in both:
        with _read(captions):
            each = ((int(one["id"]), str(one["file_name"])) for one in elements(captions, "images"))
            names |= {image: name for image, name in each if name in there}
    chosen = set(sampled(names, 2 * size + 20 * held_out, seed, str))
    said, found = dict[int, str](), dict[int, dict[str, tuple[float, float]]]()
    for captions, boxes in both.items():
        with _read(captions):
            for one in elements(captions, "annotations"):
                if one["image_id"] in chosen:
                    said.setdefault(one["image_id"], str(one["caption"]).strip())
        with _read(boxes):
            found |= _things(boxes, chosen)
    fitting = sorted(image for image in said if len(found.get(image, ())) > 1)
    for image, aside in dealt(fitting, str, seed, size, held_out):
        drawn, split = picture(there[names[image]], found[image]), "picture" if aside else "train"
        dream = {"spatial": [_step(*found[image].items())]}
        yield Question(f"What is in this picture? {drawn.path}", said[image], split, 1, dream, (drawn,))


def _boxes(captions: Path) -> Path:
    boxes = captions.with_name(captions.name.replace("captions", "instances", 1))
    if not boxes.is_file():
        raise BadInput(f"{boxes}: is not there; download it, with the captions, from {SOURCE}")
    return boxes


@contextmanager
def _read(path: Path) -> Generator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path}: not COCO's ({type(error).__name__} {error})") from error


def _things(boxes: Path, images: set[int]) -> dict[int, dict[str, tuple[float, float]]]:
    """Picture → its two largest things of different names, and the middles of their boxes."""
    names = {one["id"]: str(one["name"]) for one in elements(boxes, "categories")}
    largest: dict[int, dict[str, tuple[float, tuple[float, float]]]] = {}
    for one in elements(boxes, "annotations"):
        if one["image_id"] in images:
            x, y, width, height = map(float, one["bbox"])
            own, name = largest.setdefault(one["image_id"], {}), names[one["category_id"]]
            own[name] = max(own.get(name, (0.0, (0.0, 0.0))), (width * height, (x + width / 2, y + height / 2)))
    return {
        image: {name: at for name, (_, at) in sorted(own.items(), key=lambda thing: -thing[1][0])[:2]}
        for image, own in largest.items()
    }


def _step(one: tuple[str, tuple[float, float]], other: tuple[str, tuple[float, float]]) -> Step:
    (name, (x, y)), (beside, (u, v)) = one, other
    across = "left of" if x < u else "right of"
    return Step(name, across if abs(x - u) > abs(y - v) else "above" if y < v else "below", beside)
