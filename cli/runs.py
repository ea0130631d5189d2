"""Run folders as the command line names them: `runs/NAME`, any path, or just NAME."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from distill.errors import BadInput, DistillError

if TYPE_CHECKING:
    from distill.config import Settings
    from distill.events import Listener
    from distill.run import Run

RUNS_DIR = "cli.runs_dir"
"""Key in `Context.meta` of the folder that run names are looked up in."""

PREVIEW = "runtime.enable_gpt51_codex_preview"
MARKS = ("config.yaml", "bundle.json", "config.json")
"""Files by which a run, a bundle and a checkpoint are known."""


def runs_dir(ctx: click.Context) -> Path:
    """The folder that holds runs: --runs-dir, $DREAM_RUNS or `runs`."""
    return Path(ctx.meta.get(RUNS_DIR) or os.environ.get("DREAM_RUNS") or "runs").expanduser()


def resolve(name: str, folder: Path) -> Path:
    """The run that `name` means: a path is itself; a bare name lies in `folder`, unless it names a student here."""
    path = Path(name)
    if os.sep in name or name in (".", "..") or any((path / mark).exists() for mark in MARKS):
        return path
    return folder / name


class RunName(click.ParamType[Path]):
    """A run's path or name; completes the names that exist. Converts to a Path."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not value.strip():
            self.fail("the name is empty", param, ctx)
        if any(not character.isprintable() for character in value):
            raise BadInput(f"{value!r}: the name of a run holds no line breaks or other control characters")
        return resolve(value, runs_dir(ctx or click.get_current_context()))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        folder, _, start = incomplete.rpartition("/")
        place = Path(folder or "/") if "/" in incomplete else runs_dir(ctx)
        prefix = f"{folder}/" if "/" in incomplete else ""
        runs = sorted(path.parent.name for path in place.glob("*/config.yaml")) if place.is_dir() else []
        found = [CompletionItem(prefix + name) for name in runs if name.startswith(start)]
        return found or [CompletionItem(incomplete, type="dir")]


class RunOrFile(RunName):
    """A file or folder that is there, else a run by its name. Converts to a Path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if not (here := Path(value)).exists() and not path.exists():
            self.fail(f"{value!r}: no such file, folder or run", param, ctx)
        return here if here.exists() else path


def open_run(
    path: Path, config: Path | None, overrides: list[str], flags: dict[str, Any], *, create: bool = False
) -> "Run":
    """The run at `path`, its settings changed by what the command line says and saved.

    Later wins: the run's own config.yaml (or the defaults), `config`, `overrides` (key=value), `flags`
    ("section.name" → value). Raises BadInput.
    """
    from distill.config import Settings
    from distill.run import Run
    from distill.settings import load_settings

    exists = (path / "config.yaml").exists()
    if not exists and not create:
        raise BadInput(_no_such_run(path))
    if exists and not (config or overrides or flags):
        return Run.open(path)
    base = Run.open(path).settings if exists else Settings()
    settings = load_settings(config, overrides, base, flags)
    if PREVIEW in flags and settings.teacher.model != (preview := f"openai:{settings.runtime.preview_model}"):
        raise BadInput(f"--preview/--no-preview: is for --teacher {preview}, not {settings.teacher.model}")
    named = {*flags, *(override.partition("=")[0].strip() for override in overrides)}
    asked = sorted({"capture.prompts", "capture.limit"} & named)
    if asked and settings.capture.gathered and "capture.gathered" not in named:
        text = f"`dream gather` fills it, so {asked[0]} isn't used"
        raise BadInput(f"{path}: {text}; --set capture.gathered=false asks its teacher again")
    other = settings.train.steps != base.train.steps and settings.train.minutes == base.train.minutes
    if "train.minutes" not in named and ("train.steps" in named or other):
        settings.train.minutes = 0.0  # which would win over steps
    make_absolute(settings, base)
    return Run.create(path, settings)


FILES = {
    "capture.dataset_files": "",
    "student.init": "",
    "teacher.model": "embedded:",
    "teacher.weights": "",
    "tokenize.encoder": "clip:",
    "vision.weights": "",
}
"""Settings that name a file or a folder → what stands before it."""


def make_absolute(settings: "Settings", base: "Settings") -> None:
    """Files that were named just now, relative to the working folder, are found from any other."""
    from distill.corpus.prompts import file_and_column, prompt_sets

    def absolute(name: str) -> str:
        path, column = file_and_column(name)
        return str(path.absolute()) + (column and f":{column}") if name and path.exists() else name

    for given, known in ((settings.capture, base.capture), (settings.polish, base.polish)):
        if given.prompts != known.prompts:
            sets = prompt_sets()
            given.prompts = [name if name in sets else absolute(name) for name in given.prompts]
    for name, before in FILES.items():
        section, key = name.split(".")
        there, now = (getattr(getattr(each, section), key) for each in (base, settings))
        if now != there and now.startswith(before) and (name != "student.init" or settings.student.model):
            setattr(getattr(settings, section), key, before + absolute(now.removeprefix(before)))


@contextlib.contextmanager
def undone_on_failure(path: Path) -> Generator[None]:
    """Put the settings of the run at `path` back where a command fails that got no stage done with the new ones.

    A folder that the command made is removed, if nothing else is in it. After Ctrl-C the settings stay: the same
    work goes on.
    """
    config, records = path / "config.yaml", path / "run.json"
    existed, before, done = path.exists(), _content(config), _content(records)
    try:
        yield
    except (DistillError, click.ClickException):
        if _content(records) == done:
            with contextlib.suppress(OSError):  # what is to be told is the first error
                _put_back(config, before, existed)
        raise


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _put_back(config: Path, before: bytes | None, existed: bool) -> None:
    from distill.run import write_atomic

    if before is not None:
        if _content(config) != before:
            write_atomic(config, before)
    elif list(config.parent.iterdir()) == [config]:
        config.unlink()
        if not existed:
            config.parent.rmdir()


def nearest_run(path: Path) -> str:
    """The name most like that of `path` among the runs beside it, "" where none is."""
    import difflib

    names = [found.parent.name for found in path.parent.glob("*/config.yaml")]
    return next(iter(difflib.get_close_matches(path.name, names, n=1)), "")


def _no_such_run(path: Path) -> str:
    """What to say of a run that is not there: the nearest name, or how to make one."""
    if path.is_dir():
        return f"{path}: not a run folder (no config.yaml); `dream run --name NAME` makes one"
    near = nearest_run(path)
    remedy = f"did you mean {path.parent / near}?" if near else "`dream run --name NAME` makes one"
    return f"{path}: no such run; {remedy}"


def bundle_of(path: Path) -> Path:
    """The bundle that a path means: a bundle folder, or a run's. Raises BadInput."""
    for folder in (path, path / "bundle"):
        if (folder / "bundle.json").exists():
            return folder
    if (path / "config.yaml").exists():
        raise BadInput(f"{path}: has no bundle yet; run `dream export {path}` first")
    raise BadInput(_no_such_run(path) if not path.exists() else f"{path}: neither a run nor a bundle folder")


def bundle_to_ship(path: Path, listen: "Listener") -> Path:
    """`bundle_of`, with a warning where the run has another student or name than it was exported with."""
    from bundle.manifest import read_manifest
    from distill.events import Event
    from distill.run import Run

    folder = bundle_of(path)
    if folder != path and (path / "config.yaml").exists():
        run, name = Run.open(path), read_manifest(folder).name
        why = run.stale("export") if "export" in run.records() else []
        why += [f"the run was called {name}"] if name != run.name else []
        if why:
            text = f"{folder}: is stale ({'; '.join(why)}); `dream export {path}` brings it up to date"
            listen(Event("export", "warning", text))
    return folder
