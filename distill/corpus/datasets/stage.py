"""What the capture stage does where a dataset stands in for the teacher.

The dataset's answers become traces without soft targets, and RUN/dataset.jsonl says of each question which split it
belongs to and what the right answer is. Its true dreams become triplets when it is mined.
"""

import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.corpus.datasets.questions import PICTURES, Question, Step
from distill.corpus.selecting import selecting
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.run import Run, fingerprint, write_atomic
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo

DATASETS = {
    "causal-world": "distill.corpus.datasets.causal_world",
    "hearsay-world": "distill.corpus.datasets.hearsay_world",
    "emoji-scenes": "distill.corpus.datasets.emoji_scenes",
    "coco": "distill.corpus.datasets.coco",
    "visual-genome": "distill.corpus.datasets.visual_genome",
    "conceptnet": "distill.corpus.datasets.conceptnet",
}
HELD_OUT = 300
"""Questions of each split that is never trained on."""
MOST = 1_000_000


def _module(run: Run) -> Any:
    """The run's dataset. One that is made of files of others has LICENCE, which says whose, and their `digest`; it is
    told where they lie. Raises BadInput for an unknown one."""
    name = run.settings.capture.dataset
    if name not in DATASETS:
        raise BadInput(f"capture.dataset: {name!r} is none of {', '.join(DATASETS)}")
    return importlib.import_module(DATASETS[name])


def questions(run: Run, listen: Listener = silent) -> Iterator[Question]:
    """All questions of the run's dataset, the same each time. Raises BadInput for an unknown one or a bad size."""
    module, capture = _module(run), run.settings.capture
    if not 1 <= capture.dataset_size <= MOST:
        raise BadInput(f"capture.dataset_size: {capture.dataset_size} is not from 1 to {MOST:,}")
    files = (capture.dataset_files, listen) if hasattr(module, "LICENCE") else ()
    return module.questions(capture.dataset_size, HELD_OUT, run.settings.seed, *files)


def facts(run: Run) -> list[list[Step]]:
    """What the graph knows besides what answers say, as chains of the abstract lens: of a dataset that brings any."""
    found = getattr(_module(run), "facts", None)
    return [] if found is None else list(found(run.settings.seed))


def info(run: Run) -> TeacherInfo:
    """The dataset, in the place of a teacher."""
    name, module = run.settings.capture.dataset, _module(run)
    made_of = [module.digest(run.settings.capture.dataset_files)] if hasattr(module, "LICENCE") else []
    digest = fingerprint(["dataset", name, module.VERSION, run.settings.seed, *made_of])
    return TeacherInfo(f"dataset:{name}", name, digest, "", str(module.VERSION), logprobs=False)


def dataset_file(run: Run) -> Path:
    return run.path / "dataset.jsonl"


def dataset_lines(run: Run) -> Iterator[dict[str, Any]]:
    """What the file says of each question; nothing where there is none."""
    if (path := dataset_file(run)).is_file():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def capture_dataset(run: Run, listen: Listener, force: bool = False) -> dict[str, Any]:
    """The capture stage of a dataset: traces.db and dataset.jsonl. Returns the summary."""
    settings = {
        "dataset": run.settings.capture.dataset,
        "dataset_size": run.settings.capture.dataset_size,
        "system": run.settings.capture.system,
        "held_out_questions": HELD_OUT,
        "seed": run.settings.seed,
        "digest": info(run).digest,
    }
    record = None if force else run.fresh("capture", settings)
    if record is not None:
        listen(Event("capture", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    started = time.monotonic()
    if run.settings.capture.limit:
        raise BadInput("capture.limit: a dataset is made to measure; set capture.dataset_size instead")
    drawn, licence = questions(run, listen), getattr(_module(run), "LICENCE", "")
    listen(Event("capture", "start", f"dataset {run.settings.capture.dataset}"))
    if licence:
        listen(Event("capture", "note", licence))
    about, options = info(run), GenerateOptions(temperature=0.0, system=run.settings.capture.system)
    lines: list[str] = []
    wanted: dict[str, bool] = {}
    total = run.settings.capture.dataset_size + 3 * HELD_OUT
    with TraceStore(run.traces) as store, selecting(run, store, run.fresh("capture", settings) is None):
        store.put_teacher(about, None)
        for done, question in enumerate(drawn, 1):
            key = store.key(about, question.prompt, options)
            held_out = question.split != "train"
            wanted[key] = held_out
            if not store.has(key):
                response = Response(question.answer, None, "stop")
                store.put(Trace(key, question.prompt, held_out, response, options, about.digest))
            about_it = {"split": question.split, "depth": question.depth, "answer": question.answer}
            lines.append(json.dumps({"key": key, **about_it, **_draw(run, question)}))
            if done % 500 == 0:
                listen(Event("capture", "progress", done=done, total=total, unit="question"))
        if all(wanted.values()):
            where = run.settings.capture.dataset_files or run.settings.capture.dataset
            raise BadInput(f"{where}: no question came of it to train on; its pictures may be another file's")
        store.select(wanted)
        stats, digest = store.stats(), store.content_digest()
    write_atomic(dataset_file(run), "".join(f"{line}\n" for line in lines))
    summary = {"responses": stats.responses, "held_out": stats.held_out, "dataset": run.settings.capture.dataset}
    summary |= {"licence": licence} if licence else {}
    outputs = {run.traces.name: digest, dataset_file(run).name: fingerprint(sorted(lines))}
    run.record("capture", settings, outputs, summary, time.monotonic() - started)
    listen(Event("capture", "done", f"{stats.responses} questions", data=summary))
    return summary


def _draw(run: Run, question: Question) -> dict[str, Any]:
    """Draw the question's pictures that aren't there yet. Returns what dataset.jsonl says of them."""
    for picture in question.pictures:
        path = run.path / PICTURES / picture.name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.partial")  # made anew in any case: nothing is lost but itself
            aside.write_bytes(picture.png())
            aside.replace(path)
    shown = {picture.path: dict(zip(picture.labels, picture.at, strict=True)) for picture in question.pictures}
    return {"pictures": shown} if shown else {}
