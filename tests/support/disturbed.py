"""`dream` in processes that are forked from one which has imported everything, so that many of them may be killed."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = ["distill.corpus.capture", "distill.knowledge.mine", "distill.tokens.build", "distill.training.loop",
             "distill.training.engine.phases", "distill.report.evaluate", "bundle.export", "cli.pipeline", "spacy",
             "transformers", "torch.utils.tensorboard", "xllamacpp", "tensorboard"]  # fmt: skip


def start(folder: Path, args: Sequence[str]) -> BaseProcess:
    """`dream ARGS` in a folder; what it says is added to output.txt there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.disturbed", *PRELOADED])
    os.environ["OMP_NUM_THREADS"] = "1"
    process = context.Process(target=_work, args=(folder, list(args)))
    process.start()
    return process


def _work(folder: Path, args: list[str]) -> None:
    from cli.main import main

    os.chdir(folder)
    with (folder / "output.txt").open("a") as file:
        sys.stdout = sys.stderr = file
        main(args)


def disturb(folder: Path, args: Sequence[str], moments: Sequence[float], seed: int) -> list[int]:
    """Start the command again and again, each time to be killed after so many seconds, by SIGTERM or SIGKILL in turn,
    and last undisturbed. The exit codes."""
    codes: list[int] = []
    draw = random.Random(seed)
    for seconds in moments:
        process = start(folder, args)
        process.join(seconds)
        if process.exitcode is None:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, draw.choice([signal.SIGTERM, signal.SIGKILL]))
        process.join(120)
        codes.append(process.exitcode if process.exitcode is not None else 999)
    process = start(folder, args)
    process.join(600)
    return [*codes, process.exitcode if process.exitcode is not None else 999]


if __name__ == "__main__":
    began = time.monotonic()
    print(disturb(Path(sys.argv[1]), sys.argv[3:], [float(x) for x in sys.argv[2].split(",") if x], 0))
    print(time.monotonic() - began)
