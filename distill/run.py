"""The run folder: the only place where stages meet.

`run.json` records, for each finished stage, a fingerprint of all that it depends on, the SHA-256 of what it
wrote, its counts and its seconds. A stage whose fingerprint is unchanged is skipped. Nothing is ever half
written: files and folders are made beside their place and renamed into it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.config import Settings
from distill.errors import BadInput, CorruptFile, DistillError, MissingStage, RunMismatch, unwritable
from distill.journal import lock
from distill.settings import load_settings, settings_yaml

UPSTREAM: dict[str, tuple[str, ...]] = {
    "capture": (),
    "mine": ("capture",),
    "tokenize": ("capture", "mine"),
    "start": ("capture", "mine", "tokenize"),
    "redream": ("capture", "mine", "tokenize"),
    "train": ("capture", "mine", "tokenize", "start", "redream"),
    "see": ("train",),
    "polish": ("train",),
    "facts": ("train", "see", "polish"),
    "learn": ("train", "see", "polish", "facts"),
    "reward": ("train", "see", "polish", "facts", "learn"),
    "engine": ("train",),
    "evaluate": ("capture", "mine", "train", "see", "polish", "facts", "learn", "reward"),
    "export": ("train", "see", "polish", "facts", "learn", "reward", "engine", "evaluate"),
}
"""Which stages each stage reads from, where they were run: not all must have been."""

COMMANDS = {"engine": "train", "start": "train", "facts": "learn"}
"""Stages that another stage's command runs too."""


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: object) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_of(values: Iterable[object]) -> str:
    """`fingerprint` of them as a list, of which no more than one at a time is spelled."""
    digest, between = hashlib.sha256(b"["), b""
    for value in values:
        digest.update(between + json.dumps(value, sort_keys=True, default=str).encode())
        between = b", "
    digest.update(b"]")
    return digest.hexdigest()


def write_atomic(path: Path, data: str | bytes | Iterable[str]) -> None:
    """Write a file, of one text or several, so that a reader, or a crash, sees the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with aside.open("wb") as file:
            parts = [data] if isinstance(data, str | bytes) else data
            file.writelines(part.encode() if isinstance(part, str) else part for part in parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """One JSON value a line, atomically."""
    write_atomic(path, (json.dumps(value, ensure_ascii=False) + "\n" for value in values))


@contextlib.contextmanager
def publish_folder(final: Path) -> Generator[Path]:
    """A folder to fill; on success it takes the place of `final`, on failure it vanishes.

    Raises DistillError where the disk is full or can't be written.
    """
    from safetensors import SafetensorError  # what a full disk is called when tensors are written

    old, aside = (final.with_name(f".{final.name}.{os.getpid()}.{kind}") for kind in ("old", "partial"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final)
        aside.mkdir()
        yield aside
        rights = aside.stat().st_mode & 0o666  # as anything that this user makes; safetensors lets nobody else read
        for path in (*aside.rglob("*"), aside):
            if path.is_file():
                path.chmod(rights)
            _flush(path)
        if final.exists():
            os.rename(final, old)
        os.rename(aside, final)
        _flush(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise DistillError(f"{final}: can't write it: {error} (free some space, or check the rights)") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def beside(path: Path) -> Path:
    """The first of PATH.1, PATH.2, … that is free: where something goes that must not be lost."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _flush(path: Path) -> None:
    """Have the disk take what was written, so that a power cut can't leave a published folder empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(final: Path) -> None:
    """Clear what killed processes left beside `final`, file or folder; what it held is put back where it is missing."""
    for path in final.parent.glob(f".{final.name}.*"):
        process, _, kind = path.name.removeprefix(f".{final.name}.").partition(".")
        if kind not in ("old", "partial") or not process.isdigit() or _alive(int(process)):
            continue
        if kind == "old" and not final.exists():
            os.rename(path, final)
        elif path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process of that number runs."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass
class StageRecord:
    """What a finished stage left in run.json."""

    fingerprint: str
    outputs: dict[str, str]
    """Path relative to the run → SHA-256 (of content; for a database, of its logical content)."""
    summary: dict[str, Any]
    seconds: float
    finished: str
    versions: dict[str, str] = field(default_factory=dict[str, str])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """All that the stage took into account besides its upstream."""


class Run:
    """One run folder. Use `Run.create` for a new or matching one, `Run.open` for one that must exist."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings

    @classmethod
    def create(cls, path: Path, settings: Settings) -> "Run":
        """Make the folder, or take up one again: its settings become `settings` (stages notice)."""
        if path.exists() and not path.is_dir():
            raise BadInput(f"{path}: is a file; a run needs a folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            sweep(path / "config.yaml")
            if any(path.iterdir()) and not (path / "config.yaml").exists():
                raise BadInput(f"{path}: is not empty and not a run folder; choose another --name")
        except OSError as error:
            raise BadInput(f"{path}: can't be a run folder: {error.strerror}; choose another --name") from error
        write_atomic(path / "config.yaml", settings_yaml(settings))
        return cls(path, settings)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing run. Raises BadInput where the folder is none."""
        config = path / "config.yaml"
        if not config.exists():
            raise BadInput(f"{path}: not a run folder (no config.yaml); `dream run` or `dream capture` makes one")
        return cls(path, load_settings(config))

    @contextlib.contextmanager
    def working(self) -> Generator[None]:
        """Keep other processes from working on this run: they would lose each other's records.

        Raises DistillError where one is at it.
        """
        if os.name == "nt":  # opens no folders
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            text = "another dream command is working on this run; wait for it, or use another --name"
            lock(folder, f"{self.path}: {text}")
            yield
        finally:
            os.close(folder)

    # Where things lie.
    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def traces(self) -> Path:
        return self.path / "traces.db"

    @property
    def triplets(self) -> Path:
        return self.path / "triplets.jsonl"

    @property
    def dreams(self) -> Path:
        return self.path / "dreams.jsonl"

    @property
    def knowledge(self) -> Path:
        return self.path / "knowledge.graphml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def start(self) -> Path:
        return self.path / "start"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def engine(self) -> Path:
        return self.path / "engine"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    # What was done.
    def records(self) -> dict[str, StageRecord]:
        """Finished stages by name. Raises CorruptFile where run.json can't be read."""
        path = self.path / "run.json"
        if not path.exists():
            return {}
        try:
            return {
                name: StageRecord(**record)
                for name, record in json.loads(path.read_text(encoding="utf-8"))["stages"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptFile(f"{path}: can't be read ({error}); delete it to run the stages again") from error

    def fingerprint(self, stage: str, settings: Mapping[str, Any]) -> str:
        """Of a stage's settings and of what its upstream stages wrote."""
        records = self.records()
        upstream = {name: records[name].outputs for name in UPSTREAM[stage] if name in records}
        return fingerprint({"stage": stage, "settings": dict(settings), "upstream": upstream})

    def fresh(self, stage: str, settings: Mapping[str, Any]) -> StageRecord | None:
        """The stage's record if nothing that it depends on has changed since and its files are there."""
        record = self.records().get(stage)
        if record is None or record.fingerprint != self.fingerprint(stage, settings):
            return None
        if any(not (self.path / output).exists() for output in record.outputs):
            return None
        return record

    def superseded(self, stage: str) -> bool:
        """Whether an earlier stage has run again since that stage was done. Raises MissingStage."""
        record = self.require(stage)
        return record.fingerprint != self.fingerprint(stage, record.settings)

    def stale(self, stage: str) -> list[str]:
        """Why a finished stage would run again, as far as the run folder tells; empty where it is up to date.

        Unlike `fresh` it needs no stage's code: it compares the settings that the stage recorded, key by key,
        with those of now. Raises MissingStage.
        """
        record = self.require(stage)
        now = json.loads(json.dumps(asdict(self.settings)))
        # What tokenizing came to have later isn't recorded where it is as it was before.
        before = asdict(Settings().tokenize) if stage == "tokenize" else {}
        reasons = _changes({**before, **record.settings}, now.get(stage, {}), now, f"{stage}.")
        if self.superseded(stage):
            reasons.append("an earlier stage has run again")
        if stage in ("evaluate", "export") and (was := record.settings.get("sure", 1.0)) != self.settings.dreaming.sure:
            reasons.append(f"dreaming.sure was {was!r}, is {self.settings.dreaming.sure!r}")
        missing = [output for output in record.outputs if not (self.path / output).exists()]
        return reasons + [f"{output} is missing" for output in missing]

    def require(self, stage: str) -> StageRecord:
        """The record of a stage that must have run. Raises MissingStage."""
        record = self.records().get(stage)
        if record is None:
            command = COMMANDS.get(stage, stage)
            raise MissingStage(f"{self.path}: no finished {stage} stage; run `dream {command} {self.path}` first")
        return record

    def record(
        self,
        stage: str,
        settings: Mapping[str, Any],
        outputs: Mapping[str, str],
        summary: Mapping[str, Any],
        seconds: float,
    ) -> StageRecord:
        """Write down that a stage is done."""
        import importlib.metadata

        versions: dict[str, str] = {}
        for package in ("dreaming-student", "torch", "transformers", "spacy"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        entry = StageRecord(
            fingerprint=self.fingerprint(stage, settings),
            outputs=dict(outputs),
            summary=dict(summary),
            seconds=round(seconds, 3),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            versions=versions,
            settings=dict(settings),
        )
        self.keep({**self.records(), stage: entry})
        return entry

    def forget(self, stage: str) -> None:
        """What the stage left is gone, or no longer what was recorded."""
        if stage in (records := self.records()):
            self.keep({name: record for name, record in records.items() if name != stage})

    def keep(self, records: Mapping[str, StageRecord]) -> None:
        """All that run.json says from now on."""
        content = {"version": 1, "stages": {name: asdict(record) for name, record in records.items()}}
        write_atomic(self.path / "run.json", json.dumps(content, indent=2) + "\n")

    def check_same(self, stage: str, settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
        """Raise RunMismatch naming the first keys in which `settings` differs from what was `recorded`. What an older
        version didn't record had its default then."""
        defaults = asdict(getattr(Settings(), stage))
        recorded = {key: value for key, value in defaults.items() if key in settings} | dict(recorded)
        different = [key for key in sorted({*settings, *recorded}) if settings.get(key) != recorded.get(key)]
        if different:
            what = ", ".join(
                f"{stage}.{key} ({recorded.get(key)!r} there, {settings.get(key)!r} now)" for key in different
            )
            raise RunMismatch(f"{self.path}: made by another configuration: {what}; use another --name, or --force")


def _changes(recorded: Mapping[str, Any], here: Mapping[str, Any], tree: Mapping[str, Any], prefix: str) -> list[str]:
    """Recorded settings that have another value now, looked up in their own section, then in the whole tree."""
    reasons: list[str] = []
    for key, value in recorded.items():
        if key in here:
            if here[key] != value:
                reasons.append(f"{prefix}{key} was {value!r}, is {here[key]!r}")
        elif isinstance(value, Mapping) and isinstance(tree.get(key), Mapping):
            reasons += _changes(value, tree[key], {}, f"{key}.")
        elif key in tree and not isinstance(tree[key], Mapping) and tree[key] != value:
            reasons.append(f"{key} was {value!r}, is {tree[key]!r}")
    return reasons
