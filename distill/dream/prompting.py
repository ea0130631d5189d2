"""What may be asked of a dreaming model, checked: words, images, image tokens that guide a dream.

Shape legend: B prompts, N images, D = 512.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.dream.editor import image_phrases
from distill.dream.memory import NO_GRAPH
from distill.dream.output_decoder import Sampling
from distill.dream.pretrained import Parts
from distill.dream.record import DREAMERS, Dreamer, DreamRecord
from distill.errors import BadInput
from distill.knowledge.retrieval import RETRIEVALS
from distill.tokens.bpe import image_text
from distill.tokens.chat import Dream, with_steps
from distill.tokens.concepts import CONCEPT_DIM
from distill.vision.pictures import Picture

OutputMode = Literal["text", "image", "both"]
OUTPUT_MODES: tuple[OutputMode, ...] = get_args(OutputMode)


@dataclass(frozen=True)
class Asked:
    """One call of `generate`, checked.

    guide: codes. dream: read in the place of one of the student's own. replace: number of a token → the code that takes
    its place. spares: nobody named a dreamer or looks on: a sure answer may stand. attention: note what each word read.
    watch: draw the dream on the console. on_dream: gets it too. pictures: small ones of those asked about, for its
    record; prompt: as it was before what is seen in them was put into it. picture: the file for one of the outcome;
    painter: the model that paints it. explore: a policy over paths draws.
    """

    mode: OutputMode
    sampling: Sampling
    dreamer: Dreamer
    guide: list[int]
    retrieve: str
    dream: Dream | None = None
    replace: Mapping[int, int] = field(default_factory=dict[int, int])
    spares: bool = False
    attention: bool = False
    watch: bool = False
    on_dream: Callable[[DreamRecord], None] | None = None
    pictures: list[str] = field(default_factory=list[str])
    prompt: str | None = None
    picture: Path | None = None
    painter: str = ""
    explore: bool = False


def check(
    parts: Parts,
    sampling: Sampling,
    mode: str | None,
    dreamer: str | None,
    guide: str | None,
    retrieve: str,
    knows: bool,
    dream: str | None = None,
    replace: Mapping[int, str] | None = None,
    drawn: bool = False,
) -> Asked:
    """The arguments of `generate` with their defaults filled in. knows: there is a graph to retrieve from. drawn: a
    picture is wanted.

    Raises BadInput, naming the choices, for what there isn't or what doesn't go together.
    """
    replace = replace or {}
    written = {"guide": guide, "dream": dream}
    texts = {name: text for name, text in written.items() if text is not None}
    for name, text in {**texts, **{f"token {number}": label for number, label in replace.items()}}.items():
        _check_text(name, text)
    if any(type(number) is not int for number in replace):
        raise BadInput(f"replace: {list(replace)} are no numbers of tokens; count them from 1")
    chosen = choice("output_mode", mode or parts.config.output_mode, OUTPUT_MODES)
    who = choice("dreamer", dreamer or _usual(parts, drawn or chosen != "text", guide), DREAMERS)
    how = choice("retrieve", retrieve, ("", *RETRIEVALS))
    if who in ("engine", "checked") and parts.engine is None:
        raise BadInput(
            f"dreamer={who!r}: this student has no engine; train one (`dream train --phase all`), or use 'backbone'"
        )
    if who == "none" and (chosen != "text" or guide or replace):
        what = f"output_mode={chosen!r}" if chosen != "text" else "a guide" if guide else "a replacement"
        raise BadInput(f"dreamer='none': {what} needs a dream; choose another dreamer")
    given = None if dream is None else parts.editor.written(dream)
    if who == "none":
        if with_steps(given):
            raise BadInput("dream: one is given, and dreamer='none' reads none; leave out either")
        given = None  # its prompt ends in an empty dream already
    if guide and dream is not None:
        raise BadInput("guide: it begins a dream of the student's own, and one is given; leave out either")
    if sampling.max_tokens < 1:
        raise BadInput(f"max_length={sampling.max_tokens}: must be at least 1")
    if how and not knows:
        raise BadInput(f"retrieve={how!r}: {NO_GRAPH}")
    codes = parts.editor.replacements(replace)
    if given is not None and codes:
        given, codes = parts.editor.replaced(given, codes), {}
    return Asked(chosen, sampling, who, parse_guide(parts, guide) if guide else [], how, given, codes)


def _usual(parts: Parts, shown: bool, guide: str | None) -> Dreamer:
    """Who dreams where nobody is named. An answer reads the dream that the backbone would write, as in Ollama, drafted
    by the engine where there is one; what is guided, shown (a backbone may dream of nothing), or chosen among paths by
    a policy is the engine's own."""
    if parts.engine is None:
        return "backbone"
    return "engine" if shown or guide or parts.policy is not None else "checked"


def choice(name: str, value: str, choices: Sequence[Any]) -> Any:
    """The value; raises BadInput, naming the choices, for another."""
    if value not in choices:
        raise BadInput(f"{name}={value!r}: choose one of {', '.join(choice for choice in choices if choice)}")
    return value


def _check_text(name: str, text: object) -> None:
    """Raise BadInput unless it is text that can be encoded."""
    if not isinstance(text, str):
        raise BadInput(f"{name}: {type(text).__name__} instead of text; write it as a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{name}: character {error.start + 1} is half of one (a lone surrogate); give it as valid UTF-8"
        ) from error


def parse_guide(parts: Parts, guide: str) -> list[int]:
    """Codes of one to three image tokens, "⟨a ball⟩⟨release⟩"; a single one may be given without its brackets.

    Raises BadInput for more of them, and for what is no image token, offering the nearest.
    """
    phrases = image_phrases("guide", guide)
    if len(phrases) > 3:
        raise BadInput(f"guide: {len(phrases)} image tokens; give one to three: what, action, result")
    return [parts.editor.code("guide", phrase) for phrase in phrases]


def pictures_of(given: Any) -> list[Picture]:
    """The pictures, where some are given, pixels (N, 3, H, W) of one prompt's or (1, N, 3, H, W) too; none where
    embeddings or nothing are."""
    if isinstance(given, Tensor):
        given = given[0] if given.ndim == 5 and len(given) == 1 else given
        return list(given) if given.ndim == 4 else []
    some: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    return some if some and all(map(_is_picture, some)) else []


def triplets_of(given: Any) -> list[Sequence[Picture]]:
    """Triplets of pictures (what, action, result), where those are tensors (B, 3, H, W) B of them. Raises BadInput."""
    some: list[Sequence[Picture]] = []
    for triplet in given or ():
        if not isinstance(triplet, list | tuple) or not all(map(_is_picture, triplet)):
            raise BadInput("image_triplets: give tuples of three pictures: what, action, result")
        several = [list(one) if isinstance(one, Tensor) and one.ndim == 4 else [one] for one in triplet]
        if len({len(own) for own in several}) > 1:
            raise BadInput("image_triplets: what, action and result are not equally many pictures")
        some += zip(*several, strict=True)
    return some


def _is_picture(given: Any) -> bool:
    pixels = isinstance(given, Tensor) and given.ndim in (3, 4)
    return pixels or isinstance(given, str | PathLike | bytes | Image.Image)


def images_of(given: Any) -> Tensor | None:
    """Embeddings (B, N, D) of a tensor, an array or a list of either. Raises BadInput where they are none."""
    if given is None:
        return None
    try:
        images = torch.stack([_tensor(one) for one in given]) if isinstance(given, list | tuple) else _tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"images: no numbers of one shape ({reason}); give embeddings of shape (prompts, images, {CONCEPT_DIM})"
        ) from error
    shape = tuple(images.shape)
    if images.ndim == 5 or (images.ndim == 4 and shape[1] in (1, 3, 4)):
        raise BadInput(
            f"images: pixels of shape {shape}; give paths, files' bytes or images of Pillow, or embeddings of shape "
            f"(prompts, images, {CONCEPT_DIM})"
        )
    if images.ndim != 3 or shape[2] != CONCEPT_DIM or not all(shape):
        raise BadInput(f"images: shape {shape}; give embeddings of shape (prompts, images, {CONCEPT_DIM})")
    if not bool(images.isfinite().all()):
        raise BadInput("images: not all values are finite numbers; check what embedded them")
    return images


def _tensor(given: Any) -> Tensor:
    return given if isinstance(given, Tensor) else torch.tensor(np.asarray(given))


def image_words(parts: Parts, images: Tensor) -> str:
    """Embeddings (N, D) as the nearest image tokens' text. Raises BadInput where there is no codebook."""
    if parts.codebook is None or not parts.labels:
        raise BadInput("images: this student has no codebook to write them as image tokens with; leave them out")
    codes = parts.codebook.nearest(images.detach().float().cpu().numpy())
    return "".join(image_text(parts.labels[int(code)]) for code in codes)


def prompts_of(prompt: str | Sequence[str] | None, images: Tensor | None) -> list[str]:
    """The prompts asked; none but images are as many empty ones. Raises BadInput where nothing is asked."""
    if prompt is None:
        if images is None:
            raise BadInput("prompt: nothing is asked; give a prompt, images or both")
        return [""] * len(images)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for text in prompts:
        _check_text("prompt", text)
    if not prompts or (images is None and not all(text.strip() for text in prompts)):
        raise BadInput("prompt: is empty; ask something")
    if images is not None and len(images) != len(prompts):
        raise BadInput(f"images: {len(images)} sets of images for {len(prompts)} prompts; give one for each")
    return prompts
