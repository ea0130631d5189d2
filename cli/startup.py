"""How long `dream --help` takes, beside a click program that does nothing."""

import statistics
import subprocess
import sys
import time

BARE = "import click\n@click.command()\ndef bare(): 'Does nothing.'\nbare(['--help'], prog_name='bare')"
DREAM = "from cli.main import main; main(['--help'])"


def _seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
    return time.perf_counter() - began


def measure(repeats: int = 15) -> dict[str, float]:
    """Median seconds of whole processes and their ratio. The two alternate, so that a busy machine slows both."""
    for code in (BARE, DREAM):  # fill the file cache
        _seconds(code)
    pairs = [(_seconds(DREAM), _seconds(BARE)) for _ in range(repeats)]
    dream = statistics.median(pair[0] for pair in pairs)
    click = statistics.median(pair[1] for pair in pairs)
    return {"dream": dream, "click": click, "ratio": dream / click, "repeats": repeats}
