"""llama.cpp with a projector beside the model: it reads pictures between texts."""

import base64
import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.teacher.llama_cpp import LlamaCpp

_xllamacpp: Any = importlib.import_module("xllamacpp")  # a Cython module without type stubs


class PictureEngine(LlamaCpp):
    """One slot, exact. mmproj: the projector's GGUF, None for none. embeds: it embeds instead of writing."""

    def __init__(
        self, path: Path, mmproj: Path | None, *, context: int, threads: int = 0, embeds: bool = False
    ) -> None:
        self._mmproj, self._embeds = mmproj, embeds
        super().__init__(path, exact=True, context=context, threads=threads)

    def _params(self, threads: int, exact: bool) -> Any:
        params = super()._params(threads, exact)
        if self._mmproj is not None:
            params.mmproj.path = str(self._mmproj)
        if self._embeds:
            params.embedding, params.pooling_type = True, _xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        return params

    def prompt(self, texts: Sequence[str], pictures: Sequence[bytes]) -> dict[str, Any]:
        """A prompt for `complete` and `embeddings`: texts, and between them a picture each, a file's bytes."""
        coded = [base64.b64encode(picture).decode() for picture in pictures]
        return {"prompt_string": self._marker.join(texts), "multimodal_data": coded}

    @cached_property
    def _marker(self) -> str:
        """What stands for a picture in a prompt; each engine draws its own."""
        return str(self._post("/props", None)["media_marker"])

    def embeddings(self, prompt: dict[str, Any]) -> NDArray[np.float64]:
        """(T, D): what leaves the last norm at each of a prompt's T words; of pictures nothing is told."""
        found: Any = self._post("/embeddings", {"content": [prompt], "embd_normalize": -1})
        return np.array(found[0]["embedding"])
