"""Models of transformers, of whichever class, loaded whole and quietly or not at all."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from distill.errors import CorruptFile


def one_line(error: BaseException) -> str:
    """The first line of what a library said."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def load_model(loader: Any, source: Path | str, what: str, remedy: str, local: bool = True) -> Any:
    """`loader` (a class of transformers) from a folder, or from the hub, in float32, to be read only.

    From safetensors alone, without any code of the model's own. Raises CorruptFile where it isn't what it should be.
    """
    try:
        with _quiet():
            model, found = loader.from_pretrained(
                source,
                local_files_only=local,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the many architectures there raise
        raise CorruptFile(f"{source}: transformers can't load it as {what} ({one_line(error)}); {remedy}") from error
    # It would go on with random weights.
    if missing := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise CorruptFile(f"{source}: its weights lack {', '.join(missing[:3])}; download the model again")
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' own progress bars and warnings: what matters is checked here."""
    from transformers.utils import logging

    log: Any = logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
