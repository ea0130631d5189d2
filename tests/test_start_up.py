"""`dream --help` is as fast as click, because it imports little more."""

import subprocess
import sys

import pytest

from bench.startup import bench_startup
from bench.stopwatch import Stopwatch

HEAVY = {
    "torch",
    "matplotlib",
    "transformers",
    "spacy",
    "numpy",
    "requests",
    "tqdm",
    "yaml",
    "httpx",
    "sklearn",
    "starlette",
    "uvicorn",
    "ray",
}


def imported(code: str) -> set[str]:
    """Top-level modules that a fresh process has imported once `code` has run."""
    probe = f"import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stderr.split()}


def test_help_imports_nothing_heavy() -> None:
    modules = imported("from cli.main import main; main(['--help'])")
    assert "click" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("args", [["train"], ["serve"], ["bench"], ["bench", "generate"]])
def test_a_command_s_help_imports_nothing_heavy(args: list[str]) -> None:
    assert not imported(f"from cli.main import main; main([*{args!r}, '--help'])") & HEAVY


def test_the_quickest_benchmark_needs_no_torch() -> None:
    modules = imported("from cli.main import main; main(['bench', 'startup', '--repeat', '1', '--warmup', '0'])")
    assert not modules & {"torch", "transformers", "spacy", "sklearn", "xllamacpp"}


def test_a_tokenizer_without_pictures_needs_no_torch() -> None:
    assert not imported("import distill.vision.tokenize") & {"torch", "PIL", "transformers", "sklearn"}


def test_ray_is_imported_for_a_cluster_alone() -> None:
    assert "ray" not in imported("import distill.cluster, distill.knowledge.mine, distill.teacher.afar")


def test_status_needs_no_torch(tmp_path: object) -> None:
    code = (
        "from pathlib import Path; from distill.config import Settings; from distill.run import Run\n"
        f"Run.create(Path({str(tmp_path)!r}) / 'r', Settings())\n"
        f"from cli.main import main; main(['status', {str(tmp_path)!r} + '/r'])"
    )
    modules = imported(code)
    assert "yaml" in modules
    assert not modules & {"torch", "transformers", "spacy", "sklearn", "xllamacpp"}


def test_help_takes_as_long_as_click() -> None:
    """1.5 is promised (`dream bench startup`); 2.0 leaves room for a machine that does other things."""
    assert bench_startup(Stopwatch(9)).named("dream over click").median < 2.0
