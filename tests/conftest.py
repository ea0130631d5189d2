"""Fixtures that many tests share."""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from xdist.workermanage import NodeManager

if TYPE_CHECKING:
    from support.browser import Browser

    from distill.run import Run


LONGEST = (
    "end_to_end",
    "ollama_end_to_end",
    "cluster",
    "notebooks",
    "sweep",
    "training",
    "facts",
    "bench",
    "reward",
    "scenes",
    "gather",
    "ablation",
    "evaluate_targets",
    "torch_engine",
    "dreaming_model",
    "compare",
    "bpe",
    "watch",
    "mining",
    "statistics",
    "teacher_embedded",
    "retrieval",
    "comparison_html",
    "grammar",
    "dream_engine",
    "dream_phases",
    "evaluate",
    "serve",
    "architectures",
    "capture",
    "bench_results",
    "bundle",
    "source",
    "examination",
)
"""Files that take longest, the longest first: begun first, so that two processes end together."""


sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process that tests start compiles all of torch for itself
os.fsync = lambda fd: None  # thousands of them, milliseconds each; what a power cut would take is no test's business
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # a machine that does other things too is no fault of the code


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist would begin with files of many tests, and so end with the longest alone."""
    config.option.loadscopereorder = False
    NodeManager.EXIT_TIMEOUT = 120  # seconds; what coverage counted is lost with a process that is ended before


def pytest_collection_finish() -> None:
    """What was imported stays: collecting garbage needn't look through it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart() -> None:
    """On a fresh machine nothing is compiled yet: the second process begins at the other end, so that each finds half
    of it done by the other."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        tests = sorted((path.stem for path in Path(__file__).parent.glob("test_*.py")), reverse=True)
        for name in ("sympy", "scipy.stats", "matplotlib.figure", "networkx", *tests):
            with contextlib.suppress(Exception, pytest.skip.Exception):  # collecting tells of what can't be imported
                importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded teacher's GGUF: a real model, fetched once and cached."""
    from distill.errors import DistillError
    from distill.teacher.weights import smollm2 as fetch

    try:
        return fetch()
    except DistillError as error:
        pytest.skip(f"the embedded teacher's weights can't be had here: {error}")


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    from support import shared

    shared.root = shared.shared_root(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def dreamer(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF of a small student that learned to dream DREAM before it answers "What happens when you drop a ball?"
    with ANSWER (support/small_student.py). Don't alter it."""
    import torch
    from support.shared import made_once
    from support.small_student import TEXTS, dreaming_model, small_tokenizer

    from bundle.gguf import write_gguf

    def make(folder: Path) -> None:
        folder.mkdir()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        tokenizer = small_tokenizer(smollm2)
        model = dreaming_model(tokenizer, TEXTS[:1])
        write_gguf(model.state_dict(), model.config, tokenizer, folder / "small.gguf", "f32", {"general.name": "small"})
        torch.set_num_threads(before)

    return made_once("dreamer", make, tmp_path_factory.mktemp("dreamer") / "model") / "small.gguf"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> "Run":
    """A run folder in which the real teacher answered 24 questions (tests/support/small_capture.py). Don't alter it."""
    from support.small_capture import captured_small

    return captured_small(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="module")
def browser() -> "Generator[Browser]":
    """A real one, where there is one."""
    from support.browser import Browser, find_browser

    if find_browser() is None:
        pytest.skip("no chromium or google-chrome on PATH: the page was checked without a browser only")
    with Browser(timeout=60) as browser:
        yield browser


@pytest.fixture(scope="module")
def no_plots() -> Generator[None]:
    """Pages of reports without their plots, which take a second to draw: those who test reports draw them."""
    from markupsafe import Markup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.report.plots.forest", lambda *_: Markup())
        yield


@pytest.fixture(scope="module")
def one_thread() -> Generator[None]:
    """So small a model loses more by waiting for threads than it gains; on a busy machine it is steadier, too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
