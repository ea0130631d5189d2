"""Fixtures that many tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded teacher's GGUF: a real model, fetched once and cached."""
    from distill.errors import DistillError
    from distill.teacher.weights import smollm2 as fetch

    try:
        return fetch()
    except DistillError as error:
        pytest.skip(f"the embedded teacher's weights can't be had here: {error}")
