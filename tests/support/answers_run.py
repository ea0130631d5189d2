"""63 real answers of SmolLM2-135M (fixtures/mining/answers.jsonl), as texts and as a captured run."""

import json
from pathlib import Path

from distill.config import MineSettings, Settings
from distill.corpus.traces import Trace, TraceStore
from distill.run import Run
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo

FILE = Path(__file__).parents[1] / "fixtures" / "mining" / "answers.jsonl"
TEACHER = TeacherInfo("embedded:smollm2", "smollm2", "d" * 64, "t" * 64, "1", logprobs=False)


def answers() -> list[dict[str, str]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def texts() -> list[tuple[str, str, str, str]]:
    """(trace key, prompt, text, done_reason) as the syntax miner takes them."""
    return [(f"{i:04d}", a["prompt"], a["text"], a["done_reason"]) for i, a in enumerate(answers())]


def traces() -> list[Trace]:
    options = GenerateOptions()
    return [
        Trace(
            TraceStore.key(TEACHER, a["prompt"], options),
            a["prompt"],
            False,
            Response(a["text"], None, a["done_reason"]),
            options,
            TEACHER.digest,
        )
        for a in answers()
    ]


def captured_run(folder: Path, miner: str = "syntax") -> Run:
    """A run whose capture stage is done."""
    run = Run.create(folder, Settings(mine=MineSettings(miner=miner)))
    with TraceStore(run.traces) as store:
        store.put_teacher(TEACHER, None)
        for trace in traces():
            store.put(trace)
        store.select({trace.key: trace.held_out for trace in traces()})
        digest = store.content_digest()
    run.record("capture", {}, {"traces.db": digest}, {}, 0.0)
    return run
