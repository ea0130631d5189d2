"""The `start` stage: what an inherited student begins as, cut out of its teacher by its own training answers.

`start/` holds config.json and model.safetensors, and start.json: what stayed, what was measured, whose weights it is.
A training of a student from chance, or from another checkpoint, has no such stage.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.backbone.model import Backbone, count_parameters, save_backbone
from distill.config import StudentSettings
from distill.corpus.teachers_source import teachers_source
from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener, silent
from distill.ranges import check_choice
from distill.run import Run, publish_folder, sha256_file, write_atomic
from distill.student.cut import Sample, drop_layers, keep_layers, narrow, quality
from distill.student.image_rows import begin_image_rows
from distill.student.initialize import transplant
from distill.teacher.find_weights import wants_teacher
from distill.teacher.source import Source
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import parse_dream
from distill.tokens.packing import Documents, pack
from distill.training import checkpoint
from distill.training.batches import Batches
from distill.training.mixture import Mixture
from distill.training.plan import data_fingerprint, fixed_settings

VERSION = 4
ABOUT = "start.json"
NARROW_TOKENS = 36_864
"""Positions whose activations decide which neurons and heads stay, where there is time for so many."""
JUDGED_TOKENS = 4_096
"""Positions on which layers are tried and the start is judged."""
SIZES = ("layers", "ffn", "heads", "preset", "hidden", "kv_heads")
"""Student settings that say nothing of one that begins as a whole model."""


def start_settings(run: Run) -> dict[str, Any]:
    """All that the stage depends on, besides the data. No seed: trainings with several begin alike."""
    student = run.settings.student
    return {
        **asdict(student),
        "weights": run.settings.teacher.weights,
        "version": VERSION,
    }


def begin(run: Run, listen: Listener = silent, force: bool = False) -> Path | None:
    """The folder of the weights that the run's training begins with; None where chance or another model gives them.

    Where the teacher's weights can't be read, that is said, with what would change it. Raises BadInput for more layers
    or neurons than the teacher has, for too little memory and for weights of another model, CorruptFile for a broken
    file, and unless forced RunMismatch where what was trained there began otherwise.
    """
    settings = run.settings.student
    check_choice("student.image_rows", settings.image_rows)
    if not wants_teacher(run.settings):
        if settings.image_rows == "untied":
            raise BadInput("student.image_rows=untied: is for a student that begins as its teacher; this one doesn't")
        if settings.model and (named := [n for n in SIZES if getattr(settings, n)]):
            text = f"student.{named[0]}: isn't used: the student begins as {settings.init}, as large as that is"
            listen(Event("start", "warning", text))
        if settings.model and (force or not checkpoint.list_checkpoints(run)):
            text = "tags and image tokens that it lacks begin as their words, and learn no quicker than the rest"
            listen(Event("train", "note", f"the student begins as {settings.init}: {text}"))
        return None
    record = None if force else run.fresh("start", start_settings(run))
    if record is not None and record.outputs:
        return run.start
    if not force and record is None:
        _check_goes_on(run)
    if not force and (before := _before(run)) and before.get("start") is None:
        listen(Event("train", "note", "the student began from chance, and goes on so; --force begins it anew"))
        return None
    started = time.monotonic()
    source = teachers_source(run, listen)
    if isinstance(source, str):
        listen(Event("train", "warning", f"the student begins from chance: {source}"))
        run.record("start", start_settings(run), {}, {"from": "chance", "reason": source}, 0.0)
        return None
    if record is not None:  # its weights couldn't be read before
        _check_goes_on(run)
    listen(Event("train", "note", f"the student begins as its teacher, {source.path.name}"))
    pack(run)
    start = make_start(run, source, listen)
    with publish_folder(run.start) as folder:
        save_backbone(start.model, folder)
        write_atomic(folder / ABOUT, json.dumps(start.about, indent=2) + "\n")
    outputs = {f"{run.start.name}/{path.name}": sha256_file(path) for path in sorted(run.start.iterdir())}
    run.record("start", start_settings(run), outputs, start.about, time.monotonic() - started)
    return run.start


def _check_goes_on(run: Run) -> None:
    """Before another start takes the place of the one that was trained on. Raises RunMismatch."""
    checkpoint.refuse(run, "train")
    if (before := _before(run)) is None:
        return
    run.check_same(
        "train", fixed_settings(run), {key: value for key, value in before.items() if key not in ("data", "start")}
    )
    if before.get("start") and (record := run.records().get("start")) is not None:
        weights, was = run.settings.teacher.weights, str(record.settings.get("weights") or "")
        run.check_same("teacher", {"weights": Path(weights).name}, {"weights": Path(was).name})  # it may have moved


def _before(run: Run) -> dict[str, Any] | None:
    """What the training that would go on was begun with; None where there is none: one of other data is set aside."""
    if not (found := checkpoint.list_checkpoints(run)):
        return None
    pack(run)
    before = checkpoint.read_loop(found[-1]).settings
    return before if before.get("data") == data_fingerprint(run) else None


def begin_alike(run: Run) -> None:
    """Take what a run in a folder beside it began as, if this one would begin so too and hasn't begun: trainings that
    are compared agree there, whatever time a cut has, and nothing is cut twice."""
    if "start" in run.records():
        return
    wanted = run.fingerprint("start", start_settings(run))
    for path in sorted(run.path.parent.glob("*/run.json")):
        with contextlib.suppress(CorruptFile):  # another's, which is no fault of this run
            other = Run(path.parent, run.settings)
            lent = other.fresh("start", start_settings(other))
            if lent is not None and lent.outputs and lent.fingerprint == wanted:
                with publish_folder(run.start) as folder:
                    shutil.copytree(other.start, folder, dirs_exist_ok=True)
                run.record("start", start_settings(run), lent.outputs, lent.summary, 0.0)
                return


def started_at(run: Run) -> Path | None:
    """The folder of the weights that the run's training begins with, where `begin` made one for these settings."""
    record = run.fresh("start", start_settings(run))
    return run.start if record is not None and record.outputs else None


def is_inherited(run: Run) -> bool:
    """Whether the run's student begins with weights that were trained before."""
    return run.settings.student.model is not None or started_at(run) is not None


def began_as(run: Run, folder: Path) -> str:
    """What a checkpoint's training began with, whatever was made or set since: "teacher", the path of another model, ""
    for chance. Of a folder that doesn't say it, what the run says. Raises CorruptFile."""
    fixed = checkpoint.read_loop(folder).settings if (folder / "loop.json").is_file() else {}
    init = str(fixed.get("student", {}).get("init", run.settings.student.init))
    if StudentSettings(init=init).model is not None:
        return init
    record = run.records().get("start")
    started = fixed.get("start", record is not None and record.outputs)
    return "teacher" if started else ""


@dataclass(frozen=True)
class Start:
    """A student as its training finds it, and what is known of how it came about."""

    model: Backbone
    about: dict[str, Any]


def make_start(run: Run, source: Source, listen: Listener) -> Start:
    """The teacher under our vocabulary, cut to the size that the settings ask for."""
    started, settings = time.monotonic(), run.settings.student
    tokenizer = StudentTokenizer.load(run.tokenizer)
    model = transplant(source, tokenizer, settings.context)
    config = model.config
    ffn = settings.ffn or default_ffn(config.ffn, whole=bool(settings.layers))
    keep = settings.layers or config.layers, ffn, settings.heads or config.heads
    cut = cut_to(run, model, tokenizer, keep, NARROW_TOKENS, listen)
    judged = samples(run, tokenizer, config.context, JUDGED_TOKENS)
    at_once = quality(cut.model, judged)
    action = action_shares(Documents.load(run.data / "train"), tokenizer)
    model = begin_image_rows(cut.model, tokenizer, judged, settings.image_rows, action)
    about = {
        "from": source.path.name,
        "license": source.license,
        "layers": cut.layers,
        "of_layers": config.layers,
        "ffn": ffn,
        "of_ffn": config.ffn,
        "heads": model.config.heads,
        "of_heads": config.heads,
        "parameters": count_parameters(model),
        "nats_a_token_at": {str(count): round(nats, 4) for count, nats in cut.path.items()},
        "at_once": {name: round(value, 4) for name, value in asdict(at_once).items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    return Start(model, about)


def action_shares(documents: Documents, tokenizer: StudentTokenizer) -> Tensor:
    """(C,) how often each code is an action in the mined dreams: 1 always, −1 never, 0 where it isn't in any."""
    acts, total = torch.zeros(len(tokenizer.image_ids)), torch.zeros(len(tokenizer.image_ids))
    for i in range(len(documents)):
        for steps in parse_dream(tokenizer, documents.dream(i).tolist()).values():
            for what, action, result in steps:
                acts[action] += 1
                for code in (what, action, result):
                    total[code] += 1
    return torch.where(total > 0, 2 * acts / total.clamp_min(1) - 1, 0.0)


@dataclass(frozen=True)
class Cut:
    """A smaller model; layers: of the whole one's, those that stayed; path: layers → nats a token on the way down."""

    model: Backbone
    layers: list[int]
    path: dict[int, float]


def cut_to(
    run: Run, model: Backbone, tokenizer: StudentTokenizer, keep: tuple[int, int, int], tokens: int, listen: Listener
) -> Cut:
    """So many layers, neurons and heads of a model, chosen by the run's own training answers; about `tokens`
    positions of them decide which neurons and heads stay."""
    config, seconds = model.config, run.settings.student.measure_seconds
    layers, ffn, heads = keep
    kept, path = list(range(config.layers)), dict[int, float]()
    if layers != config.layers:
        listen(Event("train", "note", f"choosing {layers} of {config.layers} layers"))
        judged = samples(run, tokenizer, config.context, JUDGED_TOKENS)
        kept, path = drop_layers(model, judged, layers, seconds, _told(listen, "layers gone"))
        model = keep_layers(model, kept)
    if (ffn, heads) != (config.ffn, config.heads):
        size = f"{ffn} of {config.ffn} neurons and {heads} of {config.heads} heads"
        listen(Event("train", "note", f"choosing {size} in each of {len(kept)} layers"))
        seen = samples(run, tokenizer, config.context, tokens)
        model = narrow(model, seen, ffn, heads, seconds, _told(listen, "layers narrowed"))
    return Cut(model, kept, path)


def default_ffn(ffn: int, whole: bool) -> int:
    """Neurons that stay where no number is asked for: a third, in rows that quantize well; all where layers go."""
    return ffn if whole else max(1, round(ffn / 3 / 256)) * 256 if ffn >= 768 else ffn


def _told(listen: Listener, unit: str) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        listen(Event("train", "progress", done=done, total=total, unit=unit))

    return told


def samples(run: Run, tokenizer: StudentTokenizer, context: int, tokens: int, part: str = "train") -> list[Sample]:
    """Packed rows of answers after their questions, without dreams: about so many positions of them."""
    documents = Documents.load(run.data / part)
    plain = Mixture(dreams=False, empty=1.0, drafts=0.0)
    batches = Batches(documents, tokenizer, context, plain, 0, 0.0)  # alike, whatever the seed
    rows = batches.epoch(0)[: max(1, tokens // context)]
    found: list[Sample] = []
    for row in rows:
        batch = batches.assemble([row])
        real = slice(batch.loss_positions)
        found.append(Sample(batch.ids, batch.positions, batch.spans, batch.where[real], batch.targets.labels[real]))
    return found
