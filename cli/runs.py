"""Run folders as the command line names them: `runs/NAME`, any path, or just NAME."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from distill.errors import BadInput

if TYPE_CHECKING:
    from distill.run import Run

RUNS_DIR = "cli.runs_dir"
"""Key in `Context.meta` of the folder that run names are looked up in."""


def runs_dir(ctx: click.Context) -> Path:
    """The folder that holds runs: --runs-dir, $DREAM_RUNS or `runs`."""
    return Path(ctx.meta.get(RUNS_DIR) or os.environ.get("DREAM_RUNS") or "runs")


def resolve(name: str, folder: Path) -> Path:
    """The run that `name` means: a path is itself; a bare name lies in `folder`, unless it is a run here."""
    path = Path(name)
    if os.sep in name or (path / "config.yaml").exists():
        return path
    return folder / name


class RunName(click.ParamType[Path]):
    """A run's path or name; completes the names that exist. Converts to a Path."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        if not value.strip():
            self.fail("the name is empty", param, ctx)
        return resolve(value, runs_dir(ctx or click.get_current_context()))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        folder, _, start = incomplete.rpartition("/")
        place = Path(folder or "/") if "/" in incomplete else runs_dir(ctx)
        prefix = f"{folder}/" if "/" in incomplete else ""
        runs = sorted(path.parent.name for path in place.glob("*/config.yaml")) if place.is_dir() else []
        found = [CompletionItem(prefix + name) for name in runs if name.startswith(start)]
        return found or [CompletionItem(incomplete, type="dir")]


def open_run(
    path: Path, config: Path | None, overrides: list[str], flags: dict[str, Any], *, create: bool = False
) -> "Run":
    """The run at `path`, its settings changed by what the command line says and saved.

    Later wins: the run's own config.yaml (or the defaults), `config`, `overrides` (key=value), `flags`
    ("section.name" → value). Raises BadInput.
    """
    from distill.config import Settings, load_settings
    from distill.run import Run

    exists = (path / "config.yaml").exists()
    if not exists and not create:
        raise BadInput(_no_such_run(path))
    if exists and not (config or overrides or flags):
        return Run.open(path)
    base = Run.open(path).settings if exists else Settings()
    settings = load_settings(config, overrides, base=base)
    for key, value in flags.items():
        section, _, name = key.partition(".")
        assert hasattr(getattr(settings, section), name), key
        setattr(getattr(settings, section), name, value)
    return Run.create(path, settings)


def _no_such_run(path: Path) -> str:
    """What to say of a run that is not there: the nearest name, or how to make one."""
    import difflib

    if path.is_dir():
        return f"{path}: not a run folder (no config.yaml); `dream run --name NAME` makes one"
    names = [found.parent.name for found in path.parent.glob("*/config.yaml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    remedy = f"did you mean {path.parent / near[0]}?" if near else "`dream run --name NAME` makes one"
    return f"{path}: no such run; {remedy}"


def bundle_of(path: Path) -> Path:
    """The bundle that a path means: a bundle folder, or a run's. Raises BadInput."""
    for folder in (path, path / "bundle"):
        if (folder / "bundle.json").exists():
            return folder
    if (path / "config.yaml").exists():
        raise BadInput(f"{path}: has no bundle yet; run `dream export {path}` first")
    raise BadInput(_no_such_run(path) if not path.exists() else f"{path}: neither a run nor a bundle folder")
