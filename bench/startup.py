"""How long `dream --help` takes, beside a click program that does nothing."""

import subprocess
import sys
from functools import partial

from bench.result import BenchResult
from bench.stopwatch import Stopwatch, listed, ratio

PROGRAMS = {
    "dream --help": "from cli.main import main; main(['--help'])",
    "bare click --help": "import click\n@click.command()\ndef bare(): 'Does nothing.'\nbare(['--help'])",
}


def bench_startup(watch: Stopwatch) -> BenchResult:
    """Seconds of whole processes and their ratio. The warm-up fills the file cache."""
    jobs = {
        name: partial(subprocess.run, [sys.executable, "-P", "-c", code], check=True, stdout=subprocess.DEVNULL)
        for name, code in PROGRAMS.items()
    }
    seconds = watch.seconds(jobs, "bench startup")
    over = ratio("dream over click", seconds["dream --help"], seconds["bare click --help"], better=-1)
    return watch.result("startup", [*listed(seconds), over])
