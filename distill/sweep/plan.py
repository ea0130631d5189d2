"""What a sweep is to train: one YAML file read, checked and spread out into cells, before anything is begun."""

import copy
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from distill.config import LEAST, Settings, load_settings
from distill.errors import BadInput
from distill.exam.metrics.catalogue import METRICS, metric_of
from distill.run import Run, fingerprint
from distill.sweep.draws import Changes, all_different, draw

KEYS = ("name", "base", "settings", "variants", "grid", "random", "seeds", "metric", "baseline", "engine")
LONGEST = 60
"""Characters of a cell's name, its seed left out; a longer one is cut and ends in a hash."""
TOKENS = "cells are to see as many tokens each; use train.steps"
MOST = 10_000
"""Cells at most: more are a slip of the pen."""

Found = Callable[[str], Path]


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

    def mark(self, engine: bool) -> str:
        """Of all settings that its training depends on."""
        return fingerprint(self.depends(engine))

    def depends(self, engine: bool) -> dict[str, Any]:
        """Those settings, as one section a stage."""
        tree = asdict(self.settings)
        used = {name: tree[name] for name in ("seed", "capture", "mine", "tokenize", "student", "train")}
        used["teacher"] = {"model": tree["teacher"]["model"]}
        return {**used, "dreaming": tree["dreaming"]} if engine else used


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
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.system, []).append(cell)
        return found


def read_plan(file: Path, find_run: Found = Path, absolute: Callable[[Settings, Settings], None] | None = None) -> Plan:
    """Read and check a sweep file. find_run: where a run of that name lies. absolute: makes files that settings
    name independent of the working folder. Raises BadInput that names the key."""
    content = _Reader(file, find_run)
    return content.plan(absolute or (lambda settings, base: None))


def setting_names(tree: object = None, prefix: str = "") -> Changes:
    """All settings, dotted → their defaults."""
    tree = Settings() if tree is None else tree
    names: Changes = {}
    assert is_dataclass(tree)
    for field in fields(tree):
        value = getattr(tree, field.name)
        name = f"{prefix}{field.name}"
        names |= setting_names(value, f"{name}.") if is_dataclass(value) else {name: value}
    return names


class _Reader:
    def __init__(self, file: Path, find_run: Found) -> None:
        self.file, self.find_run, self.names = file, find_run, setting_names()
        self.content = self._load()
        self.checked: dict[str, Any] = {}

    def _fail(self, where: str, text: str) -> BadInput:
        return BadInput(f"{self.file}: {where}: {text}")

    def _load(self) -> dict[str, Any]:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:  # PyYAML alone reads 1e-3 as text
            content: Any = OmegaConf.to_container(OmegaConf.load(self.file))
        except FileNotFoundError as error:
            raise BadInput(f"{self.file}: no such sweep file") from error
        except (OSError, UnicodeDecodeError, OmegaConfBaseException, YAMLError) as error:
            raise BadInput(f"{self.file}: can't be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict) or not content:
            raise BadInput(f"{self.file}: holds no keys; a sweep has variants, grid or random (docs/sweeping.md)")
        for key in content:
            if key not in KEYS:
                raise self._fail(str(key), f"no such key{_near(str(key), KEYS)}; keys are {', '.join(KEYS)}")
        return content

    def plan(self, absolute: Callable[[Settings, Settings], None]) -> Plan:
        base = self._base()
        start = Settings() if base is None else base.settings
        given = self._flat("settings", self.content.get("settings") or {})
        common = self._set(start, given, "settings")
        absolute(common, start)
        if given.get("train.minutes"):
            raise self._fail("settings.train.minutes", TOKENS)
        _by_steps(common, "train.steps" in given, base)
        engine = self._typed("engine", bool, False)
        systems = self._systems()
        for system, changes in systems.items():
            self._check_changes(changes, engine, self._where(system))
        cells: list[Cell] = []
        seeds = self._seeds(common.seed)
        if len(systems) * len(seeds) > MOST:
            raise self._fail(self._kind(), f"{len(systems) * len(seeds):,} cells are too many; {MOST:,} is the most")
        for system, changes in systems.items():
            settings = self._set(common, changes, self._where(system))
            absolute(settings, common)
            self._check_values(settings, self._where(system))
            data = copy.deepcopy(settings)
            data.seed = start.seed if base is not None else common.seed
            cells += [Cell(system, seed, changes, _seeded(settings, seed), data) for seed in seeds]
        baseline = self._typed("baseline", str, next(iter(systems)))
        if baseline not in systems:
            near = _near(baseline, list(systems))
            raise self._fail("baseline", f"{baseline!r} is none of its cells{near} ({', '.join(list(systems)[:6])}, …)")
        likelihood = "bits_per_byte_used" if common.evaluate.dreams else "bits_per_byte"
        metric = self._typed("metric", str, "exact_match" if common.capture.dataset else likelihood)
        try:
            metric_of(metric)
        except KeyError as error:
            raise self._fail("metric", f"{metric!r} is none{_near(metric, list(METRICS))} (docs/metrics.md)") from error
        return Plan(self.file, self._name(), base, common, cells, metric, baseline, engine)

    # The parts of the file.
    def _typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
            words = {bool: "true or false", str: "a name"}
            raise self._fail(key, f"{value!r} should be {words[kind]}")
        return value

    def _name(self) -> str:
        return self._typed("name", str, self.file.stem)

    def _base(self) -> Run | None:
        name = self._typed("base", str, None)
        if name is None:
            return None
        try:
            run = Run.open(self.find_run(name))
        except BadInput as error:
            raise self._fail("base", str(error)) from error
        if "capture" not in run.records():
            raise self._fail("base", f"{run.path} has captured nothing; run `dream capture {run.path}` first")
        return run

    def _seeds(self, first: int) -> list[int]:
        seeds = self.content.get("seeds", 1)
        if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
            return [first + i for i in range(seeds)]
        listed: list[Any] = seeds if isinstance(seeds, list) else []
        if not listed or any(type(seed) is not int or seed < 0 for seed in listed) or len(set(listed)) < len(listed):
            raise self._fail("seeds", f"{seeds!r} should be how many (1 or more), or a list of different numbers")
        return listed

    def _kind(self) -> str:
        return next(key for key in ("variants", "grid", "random") if key in self.content)

    def _where(self, system: str) -> str:
        return f"variants.{system}" if system in (self.content.get("variants") or {}) else self._kind()

    def _systems(self) -> dict[str, Changes]:
        """Name → changes. Variants and a grid combine."""
        kinds = [key for key in ("variants", "grid", "random") if key in self.content]
        if not kinds:
            raise BadInput(f"{self.file}: has nothing to try; give it variants, grid or random (docs/sweeping.md)")
        if "random" in kinds and len(kinds) > 1:
            raise self._fail("random", f"can't be combined with {kinds[0]}; take one of them away")
        if kinds == ["random"]:
            return self._named(self._random())
        variants, grid = self._variants(), self._grid()
        if not variants:
            return self._named(grid)
        cells = variants
        if grid:
            both = set(itertools.chain(*variants.values())) & set(grid[0])
            if both:
                raise self._fail(f"grid.{min(both)}", "is changed by a variant too; leave it to one of them")
            slugs = self._named(grid)
            cells = {f"{name},{slug}": variants[name] | slugs[slug] for name in variants for slug in slugs}
        return {_short(name): changes for name, changes in cells.items()}

    def _variants(self) -> dict[str, Changes]:
        if "variants" not in self.content:
            return {}
        variants = self._mapping("variants", self.content["variants"])
        for name in variants:
            if not re.fullmatch(r"[\w.+=-]+", str(name)) or str(name).startswith("."):
                raise self._fail(f"variants.{name}", "a variant is named with letters, digits, -, _, + or =")
        found = {str(name): self._flat(f"variants.{name}", changes or {}) for name, changes in variants.items()}
        self._all_different("variants", list(found.values()))
        return found

    def _grid(self) -> list[Changes]:
        if "grid" not in self.content:
            return []
        axes = self._flat("grid", self._mapping("grid", self.content["grid"]))
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise self._fail(f"grid.{key}", f"{values!r} should be a list of values, such as [1, 2]")
            self._all_different(f"grid.{key}", values)
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def _random(self) -> list[Changes]:
        content = dict(self._mapping("random", self.content["random"]))
        samples, seed = content.pop("samples", None), content.pop("seed", 0)
        for key, value, least in (("samples", samples, 1), ("seed", seed, 0)):
            if type(value) is not int or not least <= value <= MOST:
                raise self._fail(f"random.{key}", f"{value!r} should be a whole number from {least} to {MOST:,}")
        how = self._flat("random", content, draws=True)
        try:
            return draw(how, int(samples or 0), int(seed))
        except BadInput as error:
            raise BadInput(f"{self.file}: random.{error}") from error

    # Settings.
    def _mapping(self, where: str, value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict) or not value:
            raise self._fail(where, f"{value!r} should hold names and values")
        return value

    def _flat(self, where: str, content: Any, prefix: str = "", draws: bool = False) -> Changes:
        """Dotted or nested keys → dotted. Raises BadInput for a setting that there is none of."""
        if not isinstance(content, dict):
            raise self._fail(where, f"{content!r} should hold settings, such as train.lr: 1e-3")
        found: Changes = {}
        for key, value in content.items():
            name = f"{prefix}{key}"
            section = any(other.startswith(f"{name}.") for other in self.names)
            if section and isinstance(value, dict):
                inner = self._flat(where, value, f"{name}.", draws)
            elif section:
                raise self._fail(f"{where}.{name}", f"{value!r}: {name} is a section; write {name}.SETTING: VALUE")
            elif name not in self.names:
                near = _near(name, list(self.names))
                raise self._fail(f"{where}.{name}", f"no such setting{near} (`dream settings` lists them)")
            elif isinstance(value, dict) and not draws:
                raise self._fail(f"{where}.{name}", f"{value!r} should be a value")
            else:
                inner = {name: value}
            if twice := found.keys() & inner.keys():
                raise self._fail(f"{where}.{min(twice)}", "is given twice")
            found |= inner
        return found

    def _set(self, base: Settings, changes: Mapping[str, Any], where: str) -> Settings:
        base = copy.deepcopy(base)
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            setattr(getattr(base, section) if section else base, name, self._value(key, value, where))
        return base

    def _value(self, key: str, value: Any, where: str) -> Any:
        """As the setting's type has it. Each is checked once: a large grid has few values, and many cells."""
        override = f"{key}={json.dumps(value)}"
        if type(value) is type(self.names[key]) and type(value) in (int, float, bool) and key not in LEAST:
            return value  # load_settings takes long, and would find nothing to say
        if override not in self.checked:
            try:
                settings = load_settings(None, [override])
            except BadInput as error:
                raise self._fail(f"{where}.{key}", str(error).removeprefix(f"--set {override}: ")) from error
            section, _, name = key.rpartition(".")
            self.checked[override] = getattr(getattr(settings, section) if section else settings, name)
        return copy.deepcopy(self.checked[override])

    def _check_changes(self, changes: Changes, engine: bool, where: str) -> None:
        for key in changes:
            section = key.partition(".")[0]
            if key == "seed":
                raise self._fail(f"{where}.seed", "cells get their seeds from the key seeds")
            if section in ("evaluate", "export"):
                raise self._fail(
                    f"{where}.{key}", "no training reads it; all cells are measured alike: put it in settings"
                )
            if section == "dreaming" and not engine:
                raise self._fail(f"{where}.{key}", "only the dream engine reads it; add engine: true to train one")
            if key == "train.minutes":
                raise self._fail(f"{where}.{key}", TOKENS)

    def _check_values(self, settings: Settings, where: str) -> None:
        """Refuse now what a cell's training would refuse after hours."""
        from distill.backbone.model import config_for
        from distill.training import plan
        from distill.training.engine import plan as engine_plan

        try:
            plan.check_settings(settings.train)
            engine_plan.check_settings(settings.dreaming)
            config_for(settings.student, 1024, 0, 2)
            if settings.train.steps < 1:
                raise BadInput(f"train.steps: {settings.train.steps} is too small; 1 is the least")
        except BadInput as error:
            raise self._fail(where, str(error)) from error

    def _all_different(self, where: str, values: Sequence[Any]) -> None:
        try:
            all_different(values)
        except BadInput as error:
            raise self._fail(where, str(error)) from error

    def _named(self, cells: list[Changes]) -> dict[str, Changes]:
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


def _near(name: str, names: list[str] | tuple[str, ...]) -> str:
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
