"""Settings as people give them: a YAML file, `--set`, flags; and the tree as YAML again."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache, reduce
from operator import attrgetter
from pathlib import Path
from typing import Any, cast, get_type_hints

from distill.address import masked
from distill.config import Settings
from distill.errors import BadInput
from distill.ranges import check_ranges
from distill.written import dump_yaml, read_settings, read_yaml, typed


def load_settings(
    file: Path | None = None, overrides: Sequence[str] = (), base: Settings | None = None, values: Any = None
) -> Settings:
    """`base` (the defaults), then `file` (YAML), `overrides` such as "train.lr=3e-4", `values` by dotted name: later
    wins, and text is taken as it is written, whatever YAML would make of it. Raises BadInput."""
    settings = copy.deepcopy(base) if base is not None else Settings()
    change(settings, read_settings(file) if file is not None else {}, str(file))
    for override in overrides:
        source = f"--set {masked(override).splitlines()[0] if override else override}"
        key, given, text = override.partition("=")
        if not given:
            raise BadInput(f"{source}: write it as section.key=value, for example train.lr=3e-4")
        as_text = isinstance(kind := kind_of(key := key.strip()), type) and issubclass(kind, str)
        change(settings, {key: text if as_text else read_yaml(text, source)}, source)
    change(settings, values or {}, "settings")
    check_ranges(settings)
    return settings


def change(settings: Settings, values: Mapping[str, Any], source: str, within: str = "") -> None:
    """Set settings by dotted name, or whole sections; a text is read as the setting's type. Raises BadInput."""
    for key, value in values.items():
        kind, (section, _, last) = kind_of(name := f"{within}{key}"), name.rpartition(".")
        if is_dataclass(kind) and isinstance(value, Mapping | None):  # None: a section of which all is commented out
            change(settings, cast("Mapping[str, Any]", value or {}), source, f"{name}.")
            continue
        try:
            if kind is None:
                near = difflib.get_close_matches(last, _fields(kind_of(section) if section else Settings), n=1)
                raise BadInput(f"no such setting{f'. Did you mean: {near[0]!r}?' if near else ''}")
            if is_dataclass(kind):
                raise BadInput(f"{value!r}: it is a section; write {name}.SETTING: VALUE")
            setattr(attrgetter(section)(settings) if section else settings, last, typed(kind, value))
        except (ValueError, BadInput) as error:
            raise BadInput(f"{source}: {name}: {error} (`dream settings` lists every setting)") from error


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind) if is_dataclass(kind) else {}


def kind_of(name: str) -> Any:
    """The type of the setting of that dotted name, None where there is none."""
    return reduce(lambda kind, part: _fields(kind).get(part), name.split("."), cast("Any", Settings))


def settings_yaml(settings: Settings) -> str:
    """The tree as YAML, every key written out. What `load_settings` reads of it is the same."""
    return dump_yaml(asdict(settings))
