"""How mining, tokenizing and packing grow with the corpus: seconds and memory over the number of answers.

The answers are made up: a sentence or two of words that grow in number with the corpus, as they do in text (Heaps'
law), in the tokens of a small byte-level BPE with a few alternatives each. Every stage runs in a process of its own,
whose largest memory is told.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch, seconds_of
from distill.corpus.traces import Trace, TraceStore
from distill.errors import DistillError
from distill.events import Event
from distill.mining.triplets import Triplet, write_triplets
from distill.run import Run, sha256_file
from distill.settings import load_settings
from distill.spread import cores
from distill.teacher.pre_tokenizers import PRE_TOKENIZATIONS
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo, TeacherTokenizer, TokenTargets

ALTERNATIVES = 4
VOCABULARY = 4000
"""Tokens of the made-up teacher at most."""
ONE = "mine, one process"
MIB = 2**20
_VERBS = ("breaks", "lifts", "covers", "heats", "pushes", "cools", "bends", "fills", "wets", "cuts", "drops")
_PLACES = ("on", "under", "behind", "into", "over", "across")


def bench_scale(watch: Stopwatch, counts: Sequence[int], mined: int, processes: int = 0) -> BenchResult:
    """Each stage's seconds, those that processors worked for it (busy neighbours change them least), and the most
    memory that its processes held together, for each number of answers.

    mined: where there are more answers, triplets are made up, too, as mining takes longest. processes: at work at once,
    0: as many as cores; where they are several, mining by one alone is measured as well. Raises DistillError where a
    stage fails.
    """
    processes, series = processes or cores(), list[Series]()
    for place, count in enumerate(counts):
        with tempfile.TemporaryDirectory(prefix="dream-scale-") as folder:
            run = made_up_run(Path(folder) / "run", count)
            if count > mined:
                made_up_triplets(run)
            mining = [] if count > mined else [ONE, "mine"] if processes > 1 else ["mine"]
            for stage in (*mining, "tokenize", "pack"):
                found = _apart(run.path, stage, processes)
                label, setting = f"{stage}, {count:,} answers", {"answers": count}
                series += [
                    Series(label, "s", -1, (found["seconds"],), setting),
                    Series(f"{label}, processors", "s", -1, (found["worked"],), setting),
                    Series(f"{label}, memory", "MiB", -1, (found["bytes"] / MIB,), setting),
                ]
        watch.listen(Event("bench scale", "progress", done=place + 1, total=len(counts), unit="corpus"))
    return watch.result("scale", series, {"processes": processes})


def _apart(run: Path, stage: str, processes: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    told = run / "measured.json"
    command = [sys.executable, "-m", "bench.scale", str(run), stage, str(1 if stage == ONE else processes), str(told)]
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)
    if done.returncode:
        raise DistillError(f"{stage}: ended with code {done.returncode}: {done.stderr.strip()[-400:]}")
    return json.loads(told.read_text(encoding="utf-8"))


def measure(path: Path, stage: str, processes: int) -> dict[str, float]:
    """Run a stage here: seconds, those that processors worked, and the most bytes that this process and those that it
    started held at a time."""
    from distill.knowledge.mine import mine
    from distill.tokens.build import build_tokenizer
    from distill.tokens.packing import pack

    run, most, over = Run.open(path), 0, threading.Event()
    run.settings.mine.processes = processes
    jobs = {"tokenize": lambda: build_tokenizer(run), "pack": lambda: pack(run)}

    def look() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, resident())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    before = worked()
    seconds = seconds_of(jobs.get(stage, lambda: mine(run, force=True)))
    over.set()
    watcher.join()
    return {"seconds": seconds, "worked": worked() - before, "bytes": max(most, resident())}


def worked() -> float:
    """Seconds that processors have worked for this process and for those that it started and that have ended."""
    return sum(os.times()[:4])


def resident() -> int:
    """Bytes of this process and its children in memory. Elsewhere than on Linux: the most of this one, and of one."""
    processes = Path("/proc/self/task")
    if not processes.is_dir():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    pages = 0
    children = [
        child for thread in processes.glob("*/children") for child in thread.read_text(encoding="ascii").split()
    ]
    for process in ("self", *children):
        with contextlib.suppress(OSError):  # it has ended
            pages += int(Path("/proc", process, "statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# What is made up.


def words(count: int) -> list[str]:
    """Nouns, as many as a text of so many sentences would hold, about."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < 200 + round(8 * count**0.5):
        found["".join(draw.choice(syllables) for _ in range(draw.choice((2, 3)))) + draw.choice("nkt")] = None
    return list(found)


def said(count: int) -> Iterator[tuple[str, str, tuple[str, str, str]]]:
    """(prompt, answer, triplet), no prompt twice; common words are said more often."""
    draw, nouns = random.Random(1), words(count)

    def noun() -> str:
        return nouns[int(len(nouns) * draw.random() ** 3)]

    for number in range(count):
        one, other, verb, place = noun(), noun(), draw.choice(_VERBS), draw.choice(_PLACES)
        prompt = f"What happens when {one} {number} falls {place} the {other}?"
        yield prompt, f"The {one} {verb} the {other}. It falls {place} the {noun()}.", (one, verb[:-1], other)


def made_up_run(path: Path, count: int) -> Run:
    """A run folder as capturing leaves it."""
    run = Run.create(path, load_settings(None, ["teacher.model=made-up", f"capture.top_logprobs={ALTERNATIVES}"]))
    tokenizer = _tokenizer([answer for _, answer, _ in said(2000)])
    from distill.tokens.aligned import AlignedCut

    encode, numbers = AlignedCut(tokenizer).full.encode, np.random.default_rng(0)
    info = TeacherInfo("made-up", "made-up", "1", "", "", logprobs=True)
    options = GenerateOptions(top_logprobs=ALTERNATIVES)
    with closing(TraceStore(run.traces)) as store:
        store.put_teacher(info, tokenizer)
        for number, (prompt, answer, _) in enumerate(said(count)):
            ids = np.array([*encode(answer).ids, tokenizer.eos_id], np.int32)
            top = numbers.integers(256, len(tokenizer.tokens) - 1, (len(ids), ALTERNATIVES)).astype(np.int32)
            top[:, 0] = ids
            logprobs = np.log(np.array([[0.7, 0.1, 0.05, 0.02]], np.float32)).repeat(len(ids), 0)
            soft = np.arange(len(ids)) < len(ids) - 1
            targets = TokenTargets(ids, logprobs[:, 0].copy(), top, logprobs, soft)
            response = Response(answer, targets, "stop")
            key = TraceStore.key(info, prompt, options)
            store.put(Trace(key, prompt, number % 20 == 0, response, options, info.digest))
    run.record("capture", {}, {"traces.db": str(count)}, {}, 0.0)
    return run


def made_up_triplets(run: Run) -> None:
    """What mining would leave of the traces, about."""
    with TraceStore(run.traces, readonly=True) as store:
        told = {prompt: triplet for prompt, _, triplet in said(store.stats().responses)}
        found = (Triplet(*told[prompt], "causal", 0, key, 0, "syntax") for key, prompt, _ in store.answers())
        write_triplets(run.triplets, found)
    run.record("mine", {}, {run.triplets.name: sha256_file(run.triplets)}, {}, 0.0)


def _tokenizer(texts: Sequence[str]) -> TeacherTokenizer:
    """A byte-level BPE learned from some texts, as a GGUF file spells it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    learned, trainer = (
        Tokenizer(BPE()),
        BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=ByteLevel.alphabet(), show_progress=False),
    )
    learned.pre_tokenizer = PRE_TOKENIZATIONS["gpt-2"].build()
    learned.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(learned.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<eos>"]
    merges = [" ".join(pair) for pair in model["merges"]]
    return TeacherTokenizer("gpt2", "gpt-2", tokens, merges, [1] * (len(tokens) - 1) + [3], len(tokens) - 1)


if __name__ == "__main__":
    where, which, at_once, to = sys.argv[1:]
    Path(to).write_text(json.dumps(measure(Path(where), which, int(at_once))), encoding="utf-8")
