"""`dream` in processes forked from one which has imported everything: many of them may be called, or killed."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distill.corpus.traces import TraceStore
from distill.run import sha256_file
from distill.training import distributed

distributed.PRELOADED += [  # one process to fork from, for those that training starts too
    "support.preloaded",
    "bundle.export",
    "cli.pipeline",
    "distill.corpus.capture",
    "distill.knowledge.mine",
    "distill.report.evaluate",
    "distill.report.plots",
    "distill.tokens.build",
    "distill.training.engine.phases",
    "rouge_score.rouge_scorer",
    "sacrebleu.metrics.chrf",
    "sklearn.decomposition",
    "sklearn.feature_extraction.text",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
]
# It is told no sys.path, and leaves out in silence what it can't import.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
CLOCKED = re.compile(
    r"seconds|tokens?_(per|a)_second|finished|exported|asked_now|fingerprint|bytes|(bundle/)?README\.md|"
    r"tokens a second|in_flight|ms_|latency"
)
"""Keys, and lines of reports, of what a clock, the number of sessions or the folder's name decides."""
WANTED = int(os.environ.get("DREAM_MOMENTS", "0"))
"""Moments at which a test of kills shall do so, where it isn't a few: 100 take minutes."""
HANGS = 120
"""Seconds in which a process that was told to end has ended."""


def start(folder: Path, args: Sequence[str], streams: Path | None = None) -> BaseProcess:
    """`dream ARGS` in a folder; what it says is added to output.txt there, or its `streams` are files of that folder:
    0, which is there, 1 and 2."""
    os.environ["OMP_NUM_THREADS"] = "1"
    process = distributed.context().Process(target=_work, args=(folder, list(args), streams))
    process.start()
    return process


def _work(folder: Path, args: list[str], streams: Path | None) -> None:
    from cli.main import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process that a shell starts
    del distributed.PRELOADED[1:]  # where it trains in several, they are forked from another one
    os.environ.pop("DREAM_RUNS", None)
    os.chdir(folder)
    if streams is None:
        with (folder / "output.txt").open("a", encoding="utf-8") as file:
            sys.stdout = sys.stderr = file
            main(args)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with (streams / str(number)).open("r" if number == 0 else "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    main(args)


def call(folder: Path, args: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` would tell of `dream ARGS`."""
    with tempfile.TemporaryDirectory() as name:
        streams = Path(name)
        (streams / "0").write_text(stdin, encoding="utf-8")
        process = start(folder, args, streams)
        process.join(500)
        assert process.exitcode is not None, "it hangs"
        out, err = ((streams / number).read_text(encoding="utf-8", errors="replace") for number in "12")
        return subprocess.CompletedProcess(list(args), process.exitcode, out, err)


def disturb(folder: Path, args: Sequence[str], moments: Iterable[float], seed: int) -> list[int | None]:
    """Start the command again and again, to be ended after so many seconds by SIGTERM or SIGKILL, and last undisturbed.
    The exit codes; None of one that hung."""
    draw = random.Random(seed)
    codes: list[int | None] = []
    for seconds in [*moments, None]:
        process = start(folder, args)
        process.join(seconds)
        if process.exitcode is None:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, draw.choice([signal.SIGTERM, signal.SIGKILL]))
            process.join(HANGS)
        codes.append(process.exitcode)
        if codes[-1] is None:
            process.kill()
            process.join()
    return codes


def begin_after_capture(source: Path, run: Path) -> None:
    """A run folder in which all answers are there, and nothing else."""
    run.mkdir(parents=True)
    for name in ("traces.db", "config.yaml"):
        shutil.copyfile(source / name, run / name)
    content = json.loads((source / "run.json").read_text(encoding="utf-8"))
    content["stages"] = {"capture": content["stages"]["capture"]}
    (run / "run.json").write_text(json.dumps(content), encoding="utf-8")


def contents(run: Path) -> dict[str, Any]:
    """What a run's files hold, but for what a clock decides: all that must not depend on how often it was stopped."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name.startswith(("tensorboard/", "traces.db-")) or path.name in ("checksums.json", "report.html"):
            continue
        if name == "traces.db":
            with TraceStore(path, readonly=True) as store:
                found[name] = store.content_digest()
        elif path.suffix in (".json", ".jsonl", ".md", ".yaml"):
            text = path.read_text(encoding="utf-8").replace(str(run.parents[1]), "")
            lines = [text] if path.suffix == ".json" else text.splitlines()
            if path.suffix in (".md", ".yaml"):
                found[name] = [line for line in lines if not CLOCKED.search(line)]
            else:
                found[name] = [_timeless(json.loads(line)) for line in lines]
        else:
            found[name] = sha256_file(path)
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if not CLOCKED.search(key)}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]
