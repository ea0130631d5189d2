"""What a sweep is to train: one YAML file read, checked and spread out into cells, before anything is begun."""

import contextlib
import copy
import difflib
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from distill.config import Settings
from distill.errors import BadInput
from distill.exam.metrics.catalogue import METRICS
from distill.exam.provenance import default_settings
from distill.ranges import check_ranges
from distill.run import Run
from distill.settings import change
from distill.written import read_yaml, typed

TEXTS = ("name", "base", "metric", "baseline")
KEYS = (*TEXTS, "settings", "variants", "seeds", "engine")

Changes = dict[str, Any]
"""Setting, dotted → value."""
Absolute = Callable[[Settings, Settings], None]
"""Makes files that the first settings name, other than the second, independent of the working folder."""


@dataclass(frozen=True)
class Cell:
    """One training. system: what all its seeds have in common. changes: setting → value, as the file has them.

    data: settings that its data is made with: the same for all its seeds.
    """

    system: str
    seed: int
    changes: Changes
    settings: Settings
    data: Settings

    @property
    def name(self) -> str:
        return f"{self.system}-seed{self.seed}"

    def depends(self, engine: bool) -> Changes:
        """All settings that its training, and its engine's, depends on."""
        from distill.training.plan import FREE

        sections = ("seed", "capture", "mine", "tokenize", "student", "train", *(["dreaming"] if engine else []))
        free = {"mine.processes", *(f"train.{name}" for name in FREE - {"steps", "minutes"})} - self.changes.keys()
        wanted = [key for key in default_settings() if key.partition(".")[0] in sections and key not in free]
        return {key: attrgetter(key)(self.settings) for key in [*wanted, "teacher.model"]}


@dataclass(frozen=True)
class Plan:
    """A sweep file, read. base: the run whose data is shared, None where the sweep makes its own.

    common: settings of all cells. engine: whether cells train a dream engine too.
    """

    file: Path
    name: str
    base: Run | None
    common: Settings
    cells: list[Cell]
    metric: str
    baseline: str
    engine: bool

    @property
    def systems(self) -> dict[str, list[Cell]]:
        """Cells that differ in their seed alone, under one name."""
        return by_system(self.cells)


def by_system(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """System → its cells, in their order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.system, []).append(cell)
    return found


def told(changes: Mapping[str, Any]) -> str:
    """Changes in words; "" for none."""
    return ", ".join(f"{key}={value}" for key, value in changes.items())


@contextlib.contextmanager
def _of(where: object) -> Generator[None]:
    """What is refused within begins with that."""
    try:
        yield
    except (BadInput, ValueError) as error:
        raise BadInput(f"{where}: {error}") from error


def read_plan(
    file: Path, find_run: Callable[[str], Path] = Path, absolute: Absolute | None = None, cluster: str = ""
) -> Plan:
    """Read and check a sweep file. find_run: where a run of that name lies. cluster: instead of the file's. Raises
    BadInput that names the key."""
    content, base = read_content(file), None
    if cluster:
        content["settings"] = _flat("settings", content.get("settings") or {}) | {"runtime.cluster": cluster}
    if name := content.get("base"):
        with _of(f"{file}: base"):
            base = Run.open(find_run(name))
            if "capture" not in base.records():
                raise BadInput(f"{base.path} has captured nothing; run `dream capture {base.path}` first")
    return plan_of(file, content, base, absolute)


def read_content(file: Path) -> dict[str, Any]:
    """What the file holds, its keys checked."""
    try:
        content: Any = read_yaml(file.read_text(encoding="utf-8-sig"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise BadInput(f"{file}: holds no keys; a sweep has variants (docs/sweeping.md)")
    found = cast("dict[str, Any]", content)
    for key, value in found.items():
        with _of(f"{file}: {key}"):
            if key not in KEYS:
                raise BadInput(f"no such key{_near(key, KEYS)}")
            if value is not None and key in (*TEXTS, "engine"):
                found[key] = typed(bool if key == "engine" else str, value)
    return found


def plan_of(file: Path, content: Mapping[str, Any], base: Run | None, absolute: Absolute | None = None) -> Plan:
    """The plan that a sweep file's content is. Raises BadInput that names the file and the key."""
    with _of(file):
        start = Settings() if base is None else base.settings
        common, given = _changed(start, content.get("settings") or {}, "settings")
        _by_steps(common, given, base)
        engine, seeds = bool(content.get("engine")), _seeds(content.get("seeds", 1), common.seed)
        systems = _systems(content, common, engine)
        if absolute is not None:
            for settings in (common, *(settings for settings, _ in systems.values())):
                absolute(settings, start)
        first = start.seed if base is not None else common.seed
        cells = [
            Cell(system, seed, changes, replace(settings, seed=seed), replace(settings, seed=first))
            for system, (settings, changes) in systems.items()
            for seed in seeds
        ]
        baseline = content.get("baseline") or next(iter(systems))
        if baseline not in systems:
            raise BadInput(f"baseline: {baseline!r} is none of its cells{_near(baseline, list(systems))}")
        likelihood = "bits_per_byte_used" if common.evaluate.dreams else "bits_per_byte"
        metric = content.get("metric") or ("exact_match" if common.capture.dataset else likelihood)
        if metric not in METRICS:
            raise BadInput(f"metric: {metric!r} is none{_near(metric, list(METRICS))} (docs/metrics.md)")
        return Plan(file, content.get("name") or file.stem, base, common, cells, metric, baseline, engine)


# The parts of the file. Each raises BadInput with the key in front.
def _seeds(seeds: Any, first: int) -> list[int]:
    try:
        several = isinstance(seeds, list)
        listed: list[int] = typed(list[int], seeds) if several else [first + i for i in range(typed(int, seeds))]
    except ValueError:
        listed = []
    if not listed or min(listed) < 0 or len(set(listed)) < len(listed):
        raise BadInput(f"seeds: {seeds!r} should be how many (1 or more), or a list of different numbers")
    return listed


def _systems(content: Mapping[str, Any], common: Settings, engine: bool) -> dict[str, tuple[Settings, Changes]]:
    """Variant → settings, and what they change."""
    if "variants" not in content:
        raise BadInput("has nothing to try; give it variants (docs/sweeping.md)")
    systems: dict[str, tuple[Settings, Changes]] = {}
    for name, variant in _mapping("variants", content["variants"]).items():
        where = f"variants.{name}"
        if not re.fullmatch(r"[\w+=-][\w.+=-]*", name):
            raise BadInput(f"{where}: a variant is named with letters, digits, -, _, + or =")
        settings, changes = _changed(common, variant or {}, where)
        _check(settings, changes, engine, where)
        systems[name] = settings, changes
    return systems


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise BadInput(f"{where}: {value!r} should hold names and values")
    return cast("dict[str, Any]", value)


def _flat(where: str, content: Any, prefix: str = "") -> Changes:
    """Dotted or nested keys → dotted. What they are is seen when they are applied."""
    if not isinstance(content, dict):
        raise BadInput(f"{where}: {content!r} should hold settings, such as train.lr: 1e-3")
    found = Changes()
    for key, value in cast("dict[str, Any]", content).items():
        inner = _flat(where, value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        if twice := found.keys() & inner.keys():
            raise BadInput(f"{where}: {min(twice)}: is given twice")
        found |= inner
    return found


# Settings.
def _changed(base: Settings, content: Any, where: str) -> tuple[Settings, Changes]:
    """`base` with these changes, and the changes as their settings have them."""
    changes, settings = _flat(where, content), copy.deepcopy(base)
    change(settings, changes, where)
    check_ranges(settings)
    return settings, {key: attrgetter(key)(settings) for key, value in changes.items() if value is not None}


def _check(settings: Settings, changes: Changes, engine: bool, where: str) -> None:
    """Refuse what no training reads, and now what a cell's training would refuse after hours."""
    from distill.backbone.model import config_for
    from distill.teacher.find_weights import wants_teacher
    from distill.training import plan
    from distill.training.engine import plan as engine_plan

    for key in changes:
        section = key.partition(".")[0]
        if key == "seed":
            raise BadInput(f"{where}: seed: cells get their seeds from the key seeds")
        if section in ("evaluate", "export", "runtime"):
            raise BadInput(f"{where}: {key}: no training reads it; all cells are measured alike: put it in settings")
        if section in ("redream", "see", "polish"):
            raise BadInput(f"{where}: {key}: no training reads it; `dream {section}` a cell's run for it")
        if section == "teacher" and key not in ("teacher.model", "teacher.weights"):
            raise BadInput(f"{where}: {key}: all cells learn from the same answers; put it in settings")
        if section == "dreaming" and not engine:
            raise BadInput(f"{where}: {key}: only the dream engine reads it; add engine: true to train one")
    with _of(where):
        plan.check_settings(settings.train)
        engine_plan.check_settings(settings.dreaming)
        if not wants_teacher(settings):
            config_for(settings.student, 1024, 0, 2)
    if settings.train.minutes:
        raise BadInput(f"{where}: cells are to see as many tokens each; give train.steps and no minutes")


def _by_steps(settings: Settings, given: Changes, base: Run | None) -> None:
    """Train by steps: as many as the base's student had, where the base went by the clock and the file says none."""
    from distill.training.checkpoint import list_checkpoints, trained_steps

    if given.get("train.minutes"):
        raise BadInput("settings: train.minutes: cells are to see as many tokens each; give train.steps")
    if settings.train.minutes and "train.steps" not in given and base is not None and list_checkpoints(base):
        settings.train.steps = trained_steps(base)
    settings.train.minutes = 0.0
    settings.evaluate.baselines = []


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f" of {', '.join(names[:6])} …"
