"""How long `dream --help` takes, beside a click program that does nothing."""

import subprocess
import sys
from functools import partial

from bench.result import BenchResult
from bench.stopwatch import Stopwatch, ratio, took
from distill.errors import DistillError

PROGRAMS = {
    "dream --help": "from cli.main import main; main(['--help'])",
    "bare click --help": (
        "import click\n@click.command()\ndef bare(): 'Does nothing.'\nbare(['--help'], prog_name='bare')"
    ),
}


def bench_startup(watch: Stopwatch) -> BenchResult:
    """Seconds of whole processes and their ratio. The two alternate, so that a busy machine slows both; the warm-up
    fills the file cache. Raises DistillError where one of them doesn't end well."""
    jobs = {name: partial(_call, name, code) for name, code in PROGRAMS.items()}
    seconds = watch.seconds(jobs, "bench startup")
    over = ratio("dream over click", seconds["dream --help"], seconds["bare click --help"], better=-1)
    return watch.result("startup", [*took(seconds), over])


def _call(name: str, code: str) -> None:
    try:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
    except subprocess.SubprocessError as error:
        raise DistillError(f"{name}: does not end well ({error}); see `dream doctor`") from error
