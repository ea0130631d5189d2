"""Fixtures that many tests share."""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from distill.run import Run


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded teacher's GGUF: a real model, fetched once and cached."""
    from distill.errors import DistillError
    from distill.teacher.weights import smollm2 as fetch

    try:
        return fetch()
    except DistillError as error:
        pytest.skip(f"the embedded teacher's weights can't be had here: {error}")


@pytest.fixture(scope="session")
def small_run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> "Run":
    """A run folder in which the real teacher answered 24 questions (tests/support/small_capture.py). Don't alter it."""
    from support.small_capture import capture_small

    return capture_small(tmp_path_factory.mktemp("small") / "run", smollm2)


@pytest.fixture(scope="module")
def one_thread() -> Generator[None]:
    """So small a model loses more by waiting for threads than it gains; on a busy machine it is steadier, too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
