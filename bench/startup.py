"""How long `dream --help` takes, beside a click program that does nothing."""

import subprocess
import sys
from functools import partial

from bench.result import BenchResult, Series, alternate, machine, ratio
from distill.errors import DistillError
from distill.events import Listener, silent

BARE = "import click\n@click.command()\ndef bare(): 'Does nothing.'\nbare(['--help'], prog_name='bare')"
DREAM = "from cli.main import main; main(['--help'])"


def bench_startup(repeat: int = 15, warmup: int = 1, listen: Listener = silent) -> BenchResult:
    """Seconds of whole processes and their ratio. The two alternate, so that a busy machine slows both; the warm-up
    fills the file cache. Raises DistillError where one of them doesn't end well."""
    programs = {"dream --help": DREAM, "bare click --help": BARE}
    jobs = {name: partial(_call, name, code) for name, code in programs.items()}
    seconds = alternate(jobs, repeat, warmup, "bench startup", listen)
    return BenchResult(
        "startup",
        [
            *(Series(name, "s", -1, tuple(seconds[name])) for name in programs),
            ratio("dream over click", seconds["dream --help"], seconds["bare click --help"], better=-1),
        ],
        warmup=warmup,
        machine=machine(),
    )


def _call(name: str, code: str) -> None:
    try:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
    except subprocess.SubprocessError as error:
        raise DistillError(f"{name}: does not end well ({error}); see `dream doctor`") from error
