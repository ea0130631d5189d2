"""The `export` stage: one folder that transformers, Ollama, llama.cpp and we load as it is."""

import itertools
import json
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bundle.card import render_card
from bundle.gguf import write_gguf
from bundle.load import Student, load_checkpoint, system_message
from bundle.manifest import (
    GGUF,
    LICENSE,
    NAME,
    NATIVE,
    Manifest,
    check_files,
    list_files,
    read_manifest,
    write_manifest,
)
from bundle.modelfile import license_text, ollama_settings, render_modelfile
from bundle.verify import ONE_THREAD, verify
from distill.backbone.model import Backbone, count_parameters, save_backbone
from distill.config import ExportSettings
from distill.dream.engine import ABOUT, WEIGHTS
from distill.dream.pretrained import CODEBOOK
from distill.errors import BadInput, CorruptFile, DistillError, ParityError
from distill.events import Event, Listener, silent
from distill.exam.contamination import HASHES, hashes_json, selects_what_it_read
from distill.knowledge.graph_rag import RETRIEVAL
from distill.ranges import check_choice
from distill.run import Run, beside, publish_folder, sha256_file, write_atomic
from distill.student.grammar import longest_path
from distill.student.made_with import made_with, taught_to_dream
from distill.teacher.find_weights import license_of
from distill.teacher.gguf_file import read_metadata
from distill.teacher.licenses import License
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.recall import kept_attention
from distill.tokens.shown import NAMED, load_shown, show
from distill.vision import PROJECTOR, SEEING

VERIFICATION_PROMPTS = 10
VERIFICATION_PICTURES = 20
FEWER = 6
"""Of these, so many are asked while a large student is exported; `dream verify` asks them all."""


@dataclass(frozen=True)
class Origin:
    """What a bundle tells of where its student comes from. extras: name in the bundle → file to copy. training_prompts:
    hashes of what it was trained on, as JSON; "" where that isn't known. license: of the weights that it began with;
    unknown also where it began from chance. verification_answers: [prompt, the teacher's answer]. pictures: questions
    that `verify` asks of the pair, with a picture's file each."""

    name: str
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])
    evaluation: dict[str, Any] | None = None
    verification_prompts: list[str] = field(default_factory=list[str])
    verification_answers: list[list[str]] = field(default_factory=list[list[str]])
    extras: dict[str, Path] = field(default_factory=dict[str, Path])
    training_prompts: str = ""
    license: License = field(default_factory=License)
    pictures: list[tuple[str, Path]] = field(default_factory=list[tuple[str, Path]])


MADE = {*NATIVE, GGUF, LICENSE, HASHES, "generation_config.json", "Modelfile", "README.md"}
"""What `write_bundle` makes anew; what else there is comes with the student."""
EDITED = ("README.md", "Modelfile", LICENSE)
"""What people edit of a bundle."""
PICTURES = "pictures"


def export(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """Write, verify and publish run.bundle from the best checkpoint; return its summary.

    Raises MissingStage, BadInput, CorruptFile, RunMismatch, and ParityError where the bundle doesn't answer as the
    student does; then whatever bundle there was stays.
    """
    from distill.training.checkpoint import best, weights_of

    started = time.monotonic()
    run.require("train")
    source, made = best(run), made_with(run)
    system = system_message(made)
    marks = {**asdict(run.settings.export), "system_message": system, "checkpoint": source.name, "version": 4}
    marks["weights"] = weights_of(source)
    marks |= {"sure": made.dreaming.sure, "dream_steps": longest_path(made), "facts": made.train.retrieve_limit}
    for name in (run.knowledge, run.path / RETRIEVAL):
        marks[name.name] = sha256_file(name) if name.is_file() else ""
    record = run.fresh("export", marks)
    if record is not None and not force:
        try:
            manifest = read_manifest(run.bundle)
            check_files(run.bundle, manifest)
            if manifest.name == run.name:  # the folder was renamed, or is a copy
                return record.summary
        except (BadInput, CorruptFile) as error:
            listen(Event("export", "warning", f"{str(error).partition(';')[0]}: exporting again"))
    listen(Event("export", "start", f"{run.name}, {source.name}"))
    student = load_checkpoint(source, run.name, system)
    origin = describe_run(run, source)
    began = origin.provenance["began_as"]
    if began and not origin.license.name:
        whose = origin.provenance["teacher"].get("name") if began == "teacher" else began
        unknown = f"licence of {whose}: unknown; its weights are in the bundle"
        listen(Event("export", "warning", f"{unknown}: find out its terms before you pass it on"))
    summary = write_bundle(run.bundle, student, replace(run.settings.export, system=system), origin, listen)
    outputs = {f"bundle/{name}": sha256_file(run.bundle / name) for name in list_files(run.bundle)}
    run.record("export", marks, outputs, summary, time.monotonic() - started)
    listen(Event("export", "done", str(run.bundle), data=summary))
    return summary


def write_bundle(
    final: Path, student: Student, settings: ExportSettings, origin: Origin, listen: Listener = silent
) -> dict[str, Any]:
    """Fill a folder aside, verify it there and put it in place of `final`; what that held and it didn't list, such as
    somebody's notes, or a card that was edited, is kept beside it. Raises ParityError."""

    def verifying(event: Event) -> None:
        if event.kind == "progress":
            listen(replace(event, stage="export", message="verifying"))

    _check(settings, student.model.config.context)
    with publish_folder(final) as folder:
        manifest = _fill(folder, student, settings, origin, listen)
        large = count_parameters(student.model) > ONE_THREAD
        report = verify(folder, verifying, most=FEWER if large else None)
        if not report.ok:
            raise ParityError(f"{final}: not published: {report.summary.replace(str(folder), 'the bundle')}")
        checks = {name: f"{verdict}: {detail}" for name, verdict, detail in report.rows()}
        manifest = replace(manifest, parity={**report.numbers, "checks": checks})
        _write_card(folder, manifest, student.model)
        manifest = write_manifest(folder, manifest)
        _keep_unlisted(final, listen)
    return {
        "bundle": final.name,
        "dtype": settings.dtype,
        "checkpoint": origin.provenance.get("checkpoint", ""),
        "bytes": sum(entry["bytes"] for entry in manifest.files.values()),
        "gguf_bytes": manifest.files[GGUF]["bytes"],
        **report.numbers,
    }


def _keep_unlisted(final: Path, listen: Listener) -> None:
    """Hidden ones too, and those of EDITED that were. Of a folder without a manifest that can be read nobody knows what
    was whose: all of it."""
    edited = set[str]()
    try:
        files = read_manifest(final).files
        there = (name for name in EDITED if name in files and (final / name).is_file())
        edited = {name for name in there if sha256_file(final / name) != files[name]["sha256"]}
        listed = {*files, NAME} - edited
    except (BadInput, CorruptFile):
        listed = set[str]()
    names = sorted(path.relative_to(final) for path in final.rglob("*") if path.is_file())
    others = (name for name in names if name.as_posix() not in listed)
    for _, group in itertools.groupby(others, key=lambda name: name.parts[0]):
        moved = [(final / name, _free(final.with_name(f"{final.name}.kept") / name)) for name in group]
        for path, kept in moved:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
        more = f" and {len(moved) - 1} more in its folder" if len(moved) > 1 else ""
        why = "was edited" if moved[0][0].relative_to(final).as_posix() in edited else "none of the bundle's files"
        listen(Event("export", "warning", f"{moved[0][0]}{more}: {why}; kept in {moved[0][1]}"))


def _free(path: Path) -> Path:
    """It, or with a number behind it where it is taken."""
    return beside(path) if path.exists() else path


def _check(settings: ExportSettings, trained: int) -> None:
    check_choice("export.dtype", settings.dtype)
    if settings.temperature < 0:
        raise BadInput(f"export.temperature={settings.temperature}: must be at least 0; 0 is greedy")
    if not 0 <= settings.context <= trained:
        raise BadInput(f"export.context: {settings.context} is not within the {trained} tokens it was trained with")


def _fill(folder: Path, student: Student, settings: ExportSettings, origin: Origin, listen: Listener) -> Manifest:
    """All files of a bundle but its card, which tells what verification finds."""
    model, config = student.model, student.model.config
    save_backbone(model, folder)
    # Without the map of the teacher's ids, which only training reads.
    tokenizer = StudentTokenizer(student.tokenizer.hf, student.tokenizer.origin)
    tokenizer.save(folder, config.context)
    sampling: dict[str, Any] = {"do_sample": bool(settings.temperature)}
    sampling |= {"temperature": settings.temperature} if settings.temperature else {}
    generation = {**sampling, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    write_atomic(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    pictures = {f"{PICTURES}/{path.name}": path for _, path in origin.pictures}
    for name, path in (origin.extras | pictures).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    if origin.training_prompts:
        write_atomic(folder / HASHES, origin.training_prompts)
    metadata = _gguf_metadata(origin)
    write_gguf(model.state_dict(), config, tokenizer, folder / GGUF, settings.dtype, metadata, listen)
    ollama = ollama_settings(settings.system, settings.temperature, settings.context or config.context)
    models = [f"./{name}" for name in (GGUF, PROJECTOR) if (folder / name).is_file()]
    sees = str(read_metadata(folder / PROJECTOR)["general.license.name"]) if len(models) > 1 else ""
    terms = license_text(origin.license, sees)
    write_atomic(folder / "Modelfile", render_modelfile(origin.name, "\nFROM ".join(models), ollama, terms))
    if origin.license.text:
        write_atomic(folder / LICENSE, origin.license.text.rstrip() + "\n")
    manifest = Manifest(
        name=origin.name,
        dtype=settings.dtype,
        ollama=ollama,
        provenance={
            **origin.provenance,
            "license": replace(origin.license, text="").to_json(),
            "image_tokens": len(tokenizer.image_ids),
            "importable": tokenizer.importable,
            **({"sees": sees} if sees else {}),
        },
        verification_prompts=origin.verification_prompts,
        verification_answers=origin.verification_answers,
        verification_pictures=[[question, f"{PICTURES}/{path.name}"] for question, path in origin.pictures],
        evaluation=origin.evaluation,
    )
    return write_manifest(folder, manifest)


def _write_card(folder: Path, manifest: Manifest, model: Backbone) -> None:
    from distill.report.tables import evaluation_rows

    sizes = {name: (folder / name).stat().st_size for name in list_files(folder)}
    table = evaluation_rows(manifest.evaluation, intervals=True) if manifest.evaluation else []
    write_atomic(folder / "README.md", render_card(manifest, model.config, count_parameters(model), sizes, table))


def _gguf_metadata(origin: Origin) -> dict[str, str]:
    teacher = origin.provenance.get("teacher", {})
    found = {
        "general.name": origin.name,
        "general.description": f"Dreams before it answers; distilled from {teacher.get('name') or 'a teacher'}",
        "distill.teacher": teacher.get("name", ""),
        "distill.teacher_digest": teacher.get("digest", ""),
        "distill.checkpoint": origin.provenance.get("checkpoint", ""),
        "general.license": origin.license.name,
        "general.license.name": origin.license.title,
        "general.license.link": origin.license.link,
    }
    return {key: str(value) for key, value in found.items() if value}


def describe_run(run: Run, checkpoint: Path) -> Origin:
    """What the run's folder tells: teacher, prompts, versions, evaluation, held-out prompts, codebook, graph."""
    from distill.training.engine.plan import engine_of
    from distill.training.start import began_as

    teacher: dict[str, Any] = {}
    answers: dict[str, str] = {}
    pictured: dict[Path, str] = {}
    hashes = ""
    license = License()
    shown = load_shown(run.tokenizer)
    if run.traces.exists():
        from distill.corpus.traces import TraceStore

        with TraceStore(run.traces, readonly=True) as store:
            info = store.teacher()
            license = license_of(run.settings.teacher, info)
            teacher = {"name": info.name, "digest": info.digest, "version": info.version}
            is_model = not (info.is_dataset or info.is_given)
            teacher |= {"license": replace(license, text="").to_json(), "is_model": is_model}
            for _, prompt, answer in store.answers(held_out=True):
                if len(answers) < VERIFICATION_PROMPTS:
                    answers.setdefault(show(prompt, shown), answer)
                if len(found := NAMED.findall(prompt)) == 1:  # one question about each picture
                    pictured.setdefault(run.path / found[0], NAMED.sub("", prompt).strip())
            if selects_what_it_read(run):
                hashes = hashes_json(show(prompt, shown) for _, prompt, _ in store.answers(held_out=False))
    records, capture, began = run.records(), run.settings.capture, began_as(run, checkpoint)
    if began == "teacher" and not teacher.get("is_model", True):
        began, license = _named_weights(run)
    elif began != "teacher":
        license = _license_at(Path(began)) if began else License()
    made = made_with(run)
    provenance = {
        "teacher": teacher,
        "began_as": began if began in ("", "teacher") else Path(began).name,
        "prompts": [capture.dataset] if capture.dataset else [Path(name).name for name in capture.prompts],
        "run": run.name,
        "checkpoint": checkpoint.name,
        "weights": sha256_file(checkpoint / "model.safetensors"),
        "seed": run.settings.seed,
        "dreams": taught_to_dream(made),
        "dream_steps": longest_path(made),
        "sure": run.settings.dreaming.sure,
        "facts": made.train.retrieve_limit,
        "versions": records["train"].versions if "train" in records else {},
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    tokenizer = checkpoint / "tokenizer"
    extras = {name: tokenizer / name for name in (*CODEBOOK, *SEEING) if (tokenizer / name).exists()}
    if run.knowledge.exists():
        extras[run.knowledge.name] = run.knowledge
    if kept_attention(run) is not None:
        extras[RETRIEVAL] = run.path / RETRIEVAL
    pictures = list[tuple[str, Path]]()
    if (projector := checkpoint / PROJECTOR).is_file():
        extras[PROJECTOR] = projector
        asked = [(question, path) for path, question in pictured.items()]
        pictures = asked[:: max(1, len(asked) // VERIFICATION_PICTURES)][:VERIFICATION_PICTURES]
    if (engine := engine_of(run, checkpoint / "model.safetensors")) is not None:
        extras |= {name: engine / name for name in (WEIGHTS, ABOUT)}
    pairs = [[prompt, answer] for prompt, answer in answers.items() if answer.strip()]
    told = (run.name, provenance, _evaluation(run, checkpoint), list(answers), pairs, extras, hashes, license)
    return Origin(*told, pictures)


def origin_of(path: Path) -> Origin:
    """Where a student comes from that is in a run's folder or a bundle; of another folder nobody says."""
    from distill.training.checkpoint import best, list_checkpoints

    def said(name: str) -> str:
        return (path / name).read_text(encoding="utf-8") if (path / name).is_file() else ""

    if (path / NAME).is_file():
        manifest = read_manifest(path)
        return Origin(
            manifest.name,
            manifest.provenance,
            manifest.evaluation,
            manifest.verification_prompts,
            manifest.verification_answers,
            {name: path / name for name in manifest.files if name not in MADE and not name.startswith(f"{PICTURES}/")},
            said(HASHES),
            replace(License.from_json(manifest.provenance.get("license")), text=said(LICENSE)),
            [(question, path / name) for question, name in manifest.verification_pictures],
        )
    if (path / "config.yaml").is_file():
        run = Run.open(path)
        return describe_run(run, best(run)) if list_checkpoints(run) else origin_of(run.bundle)
    return Origin("student", extras={name: path / name for name in (*CODEBOOK, *SEEING) if (path / name).is_file()})


def _named_weights(run: Run) -> tuple[str, License]:
    """Whose weights a student began as that has its answers from a dataset or a file, and their licence: those which
    its start was cut from, though another would be made now."""
    record, settings = run.records().get("start"), run.settings.teacher
    weights = (record.settings.get("weights") if record else "") or settings.weights
    license = _license_at(Path(weights).expanduser()) if weights else license_of(settings, None)
    if record and not license.name:
        license = License(record.summary.get("license", ""))
    return weights or settings.model.partition(":")[2], license


def _license_at(path: Path) -> License:
    """Unknown, too, where the model that a student began as is there no more."""
    try:
        return License.of_weights(path)
    except (DistillError, OSError):
        return License()


OF_EVALUATION = (
    *("version", "run", "checkpoint", "teacher", "tokenizer", "prompts", "left_out", "answer_tokens", "answer_bytes"),
    *("seed", "settings", "systems", "fall"),
)
"""What a bundle keeps of results.json: numbers, and nothing of the machine or of what was said."""
OF_SYSTEM = ("metrics", "missing", "versus_student", "tokens_per_second", "checkpoint", "step")


def _evaluation(run: Run, checkpoint: Path) -> dict[str, Any] | None:
    """Of results.json, if it is of this checkpoint."""
    from distill.training.checkpoint import weights_of

    try:
        results: dict[str, Any] = json.loads((run.evaluation / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    weights = weights_of(checkpoint)
    if (results.get("checkpoint"), results.get("weights", weights)) != (checkpoint.name, weights):
        return None
    systems = {name: {key: s[key] for key in OF_SYSTEM if key in s} for name, s in results["systems"].items()}
    return {**{key: results[key] for key in OF_EVALUATION if key in results}, "systems": systems}
