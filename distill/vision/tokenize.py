"""The `tokenize` stage: the tokenizer, and where a run's dataset has pictures, how they are seen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.corpus.datasets.questions import PICTURED
from distill.events import Listener, silent
from distill.run import Run
from distill.tokens.build import build_tokenizer

if TYPE_CHECKING:
    from distill.tokens.image_tokens import Codebook


def tokenize(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """`build_tokenizer`; what sees is imported for pictures alone, as that takes seconds. Returns the summary."""

    def see(folder: Path, codebook: "Codebook") -> dict[str, Any]:
        from distill.vision.seeing import learn_to_see

        return learn_to_see(run, folder, codebook, listen)

    return build_tokenizer(run, listen, force, see if run.settings.capture.dataset in PICTURED else None)
