"""What a sweep is to train: one YAML file read, checked and spread out into cells, before anything is begun."""

import copy
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from distill.config import Settings, change, check_ranges, kind_of
from distill.errors import BadInput
from distill.exam.metrics.catalogue import METRICS, metric_of
from distill.exam.provenance import default_settings
from distill.run import Run
from distill.written import read_yaml, typed

KEYS = ("name", "base", "settings", "variants", "grid", "seeds", "metric", "baseline", "engine")
LONGEST = 60
"""Characters of a cell's name, its seed left out; a longer one is cut and ends in a hash."""
TOKENS = "cells are to see as many tokens each; use train.steps"
MOST = 10_000
"""Cells at most: more are a slip of the pen."""

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

    @property
    def told(self) -> str:
        """What it changes, in words."""
        return ", ".join(f"{key}={value}" for key, value in self.changes.items()) or "settings as they are"

    def depends(self, engine: bool) -> Changes:
        """All settings that its training, and its engine's, depends on."""
        sections = ("seed", "capture", "mine", "tokenize", "student", "train", *(["dreaming"] if engine else []))
        wanted = [key for key in _defaults() if key.partition(".")[0] in sections]
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


def read_plan(file: Path, find_run: Callable[[str], Path] = Path, absolute: Absolute | None = None) -> Plan:
    """Read and check a sweep file. find_run: where a run of that name lies. Raises BadInput that names the key."""
    content = read_content(file)
    try:
        base = _base(content, find_run)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    return plan_of(file, content, base, absolute)


def read_content(file: Path) -> dict[str, Any]:
    """What the file holds, its keys checked."""
    try:
        content: Any = read_yaml(file.read_text(encoding="utf-8-sig"), str(file))
    except FileNotFoundError as error:
        raise BadInput(f"{file}: no such sweep file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise BadInput(f"{file}: holds no keys; a sweep has variants or grid (docs/sweeping.md)")
    for key in content:
        if key not in KEYS:
            raise BadInput(f"{file}: {key}: no such key{_near(str(key), KEYS)}; keys are {', '.join(KEYS)}")
    return content


def plan_of(file: Path, content: Mapping[str, Any], base: Run | None, absolute: Absolute | None = None) -> Plan:
    """The plan that a sweep file's content is. Raises BadInput that names the file and the key."""
    try:
        return _plan(file, content, base, absolute or (lambda settings, base: None))
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


def _plan(file: Path, content: Mapping[str, Any], base: Run | None, absolute: Absolute) -> Plan:
    start = Settings() if base is None else base.settings
    given = _flat("settings", content.get("settings") or {})
    common = _changed(start, given, "settings")
    absolute(common, start)
    if given.get("train.minutes"):
        raise BadInput(f"settings.train.minutes: {TOKENS}")
    _by_steps(common, "train.steps" in given, base)
    engine, systems = _typed(content, "engine", bool, False), _systems(content)
    kind, variants = "variants" if "variants" in content else "grid", content.get("variants") or {}
    where = {system: f"variants.{system}" if system in variants else kind for system in systems}
    for system, changes in systems.items():
        _check_changes(changes, engine, where[system])
    seeds = _seeds(content.get("seeds", 1), common.seed)
    if (count := len(systems) * len(seeds)) > MOST:
        raise BadInput(f"{kind}: {count:,} cells are too many; {MOST:,} is the most")
    cells: list[Cell] = []
    for system, changes in systems.items():
        settings = _changed(common, changes, where[system])
        absolute(settings, common)
        _check_values(settings, where[system])
        data = _seeded(settings, start.seed if base is not None else common.seed)
        cells += [Cell(system, seed, changes, _seeded(settings, seed), data) for seed in seeds]
    baseline = _typed(content, "baseline", str, next(iter(systems)))
    if baseline not in systems:
        near = _near(baseline, list(systems))
        raise BadInput(f"baseline: {baseline!r} is none of its cells{near} ({', '.join(list(systems)[:6])}, …)")
    likelihood = "bits_per_byte_used" if common.evaluate.dreams else "bits_per_byte"
    metric = _typed(content, "metric", str, "exact_match" if common.capture.dataset else likelihood)
    try:
        metric_of(metric)
    except KeyError as error:
        raise BadInput(f"metric: {metric!r} is none{_near(metric, list(METRICS))} (docs/metrics.md)") from error
    return Plan(file, _typed(content, "name", str, file.stem), base, common, cells, metric, baseline, engine)


# The parts of the file. Each raises BadInput with the key in front.
def _typed(content: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key)
    if value is None:
        return default
    try:
        found = typed(kind, value)
    except ValueError as error:
        raise BadInput(f"{key}: {value!r} should be {'true or false' if kind is bool else 'a name'}") from error
    if isinstance(found, str) and not found.strip():
        raise BadInput(f"{key}: {value!r} should be a name")
    return found


def _base(content: Mapping[str, Any], find_run: Callable[[str], Path]) -> Run | None:
    name = _typed(content, "base", str, None)
    if name is None:
        return None
    try:
        run = Run.open(find_run(name))
    except BadInput as error:
        raise BadInput(f"base: {error}") from error
    if "capture" not in run.records():
        raise BadInput(f"base: {run.path} has captured nothing; run `dream capture {run.path}` first")
    return run


def _seeds(seeds: Any, first: int) -> list[int]:
    try:
        if not isinstance(seeds, list) and (count := typed(int, seeds)) >= 1:
            return [first + i for i in range(count)]
        listed: list[int] = typed(list[int], seeds)
    except ValueError:
        listed = []
    if not listed or min(listed) < 0 or len(set(listed)) < len(listed):
        raise BadInput(f"seeds: {seeds!r} should be how many (1 or more), or a list of different numbers")
    return listed


def _systems(content: Mapping[str, Any]) -> dict[str, Changes]:
    """Name → changes. Variants and a grid combine: each with each."""
    if "variants" not in content and "grid" not in content:
        raise BadInput("has nothing to try; give it variants or grid (docs/sweeping.md)")
    variants = _variants(content["variants"]) if "variants" in content else {}
    cells = _named(_grid(content["grid"])) if "grid" in content else {}
    if not variants:
        return cells
    if not cells:
        return {_short(name): changes for name, changes in variants.items()}
    if both := set(itertools.chain(*variants.values())) & next(iter(cells.values())).keys():
        raise BadInput(f"grid.{min(both)}: is changed by a variant too; leave it to one of them")
    pairs = itertools.product(variants, cells)
    return {_short(f"{name},{cell}"): variants[name] | cells[cell] for name, cell in pairs}


def _variants(content: Any) -> dict[str, Changes]:
    variants = _mapping("variants", content)
    for name in variants:
        if not re.fullmatch(r"[\w.+=-]+", str(name)) or str(name).startswith("."):
            raise BadInput(f"variants.{name}: a variant is named with letters, digits, -, _, + or =")
    found = {str(name): _flat(f"variants.{name}", changes or {}) for name, changes in variants.items()}
    _all_different("variants", list(found.values()))
    return found


def _grid(content: Any) -> list[Changes]:
    axes = _flat("grid", _mapping("grid", content), several=True)
    for key, values in axes.items():
        _all_different(f"grid.{key}", values)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _mapping(where: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise BadInput(f"{where}: {value!r} should hold names and values")
    return value


def _all_different(where: str, values: Sequence[Any]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise BadInput(f"{where}: holds {'no change' if value == {} else repr(value)} twice")


# Settings.
@cache
def _defaults() -> Changes:
    return default_settings()


def _flat(where: str, content: Any, prefix: str = "", *, several: bool = False) -> Changes:
    """Dotted or nested keys → dotted, values as their settings have them; `several` values each, in a list.

    Raises BadInput for a setting that there is none of.
    """
    if not isinstance(content, dict):
        raise BadInput(f"{where}: {content!r} should hold settings, such as train.lr: 1e-3")
    names, found = _defaults(), Changes()
    for key, value in content.items():
        name = f"{prefix}{key}"
        section = any(other.startswith(f"{name}.") for other in names)
        if section and not isinstance(value, dict):
            raise BadInput(f"{where}.{name}: {value!r}: {name} is a section; write {name}.SETTING: VALUE")
        if not section and name not in names:
            near = _near(name, list(names))
            raise BadInput(f"{where}.{name}: no such setting{near} (`dream settings` lists them)")
        if not section and isinstance(value, dict):
            raise BadInput(f"{where}.{name}: {value!r} should be a value")
        if section:
            inner = _flat(where, value, f"{name}.", several=several)
        else:
            inner = {name: _read(f"{where}.{name}", kind_of(name), value, several)}
        if twice := found.keys() & inner.keys():
            raise BadInput(f"{where}.{min(twice)}: is given twice")
        found |= inner
    return found


def _read(where: str, kind: Any, value: Any, several: bool) -> Any:
    if several and (not isinstance(value, list) or not value):
        raise BadInput(f"{where}: {value!r} should be a list of values, such as [1, 2]")
    try:
        return [typed(kind, each) for each in value] if several else typed(kind, value)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from error


def _changed(base: Settings, changes: Mapping[str, Any], where: str) -> Settings:
    base = copy.deepcopy(base)
    change(base, changes, where)
    check_ranges(base)
    return base


def _check_changes(changes: Changes, engine: bool, where: str) -> None:
    for key in changes:
        section = key.partition(".")[0]
        if key == "seed":
            raise BadInput(f"{where}.seed: cells get their seeds from the key seeds")
        if section in ("evaluate", "export"):
            raise BadInput(f"{where}.{key}: no training reads it; all cells are measured alike: put it in settings")
        if section == "dreaming" and not engine:
            raise BadInput(f"{where}.{key}: only the dream engine reads it; add engine: true to train one")
        if key == "train.minutes":
            raise BadInput(f"{where}.{key}: {TOKENS}")


def _check_values(settings: Settings, where: str) -> None:
    """Refuse now what a cell's training would refuse after hours."""
    from distill.backbone.model import config_for
    from distill.training import plan
    from distill.training.engine import plan as engine_plan

    try:
        plan.check_settings(settings.train)
        engine_plan.check_settings(settings.dreaming)
        config_for(settings.student, 1024, 0, 2)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    if settings.train.steps < 1:
        raise BadInput(f"{where}: train.steps: {settings.train.steps} is too small; 1 is the least")


def _by_steps(settings: Settings, given: bool, base: Run | None) -> None:
    """Train by steps: as many as the base's student had, where the base went by the clock and the file says none."""
    from distill.training.checkpoint import latest, list_checkpoints, read_loop

    if settings.train.minutes and not given and base is not None and list_checkpoints(base):
        settings.train.steps = read_loop(latest(base)).step
    settings.train.minutes = 0.0
    settings.evaluate.baselines = []


def _seeded(settings: Settings, seed: int) -> Settings:
    settings = copy.deepcopy(settings)
    settings.seed = seed
    return settings


# Names.
def _named(cells: list[Changes]) -> dict[str, Changes]:
    """Cells named by what they change: `lr=0.001,preset=nano`."""
    last = [key.rpartition(".")[2] for key in cells[0]]
    names = {key: key if last.count(end) > 1 else end for key, end in zip(cells[0], last, strict=True)}
    found: dict[str, Changes] = {}
    for changes in cells:
        slug = _short(",".join(f"{names[key]}={_word(value)}" for key, value in changes.items()))
        if slug in found:  # words that differ in signs only
            slug = _short(f"{slug}-{_hash(json.dumps(changes))}")
        found[slug] = changes
    return found


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, list):
        return "+".join(_word(entry) for entry in value) or "none"
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text) or "none"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{_hash(name)}"
