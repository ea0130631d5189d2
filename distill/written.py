"""What people write by hand, YAML and text: read as it is written, and refused in one line where it can't be."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from distill.errors import BadInput

SMALL = 10_000
"""Characters of YAML that is remembered once it was read."""
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def whole(text: str) -> str:
    r"""The text, each surrogate pair (JSON's `\ud83d\ude00`) as the one character that it is.

    Raises ValueError for half of a pair, which no file can hold.
    """
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        half = int.from_bytes(error.object[error.start : error.start + 2], "little")
        raise ValueError(f"holds \\u{half:x}, half of a surrogate pair; write the whole character") from error


def repaired(text: str) -> str:
    """The same, half of a pair as U+FFFD, as in Go."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def compose(text: str, where: str) -> Any:
    """The YAML node at the root, None where there is none: don't alter it. Raises BadInput with the line; `where` names
    the text."""
    import yaml

    try:
        return (_composed if len(text) < SMALL else _composed.__wrapped__)(text)
    except RecursionError as error:
        raise BadInput(f"{where}: is not YAML: brackets are nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an escape that is no character
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if isinstance(mark, yaml.Mark) else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"{where}{line}: is not YAML: {reason}") from error


@lru_cache(64)
def _composed(text: str) -> Any:
    """Runs are opened again and again, and many hold the same settings, which take 12 ms to read."""
    import yaml

    return yaml.compose(text, Loader=yaml.SafeLoader)


def read_yaml(text: str, where: str) -> Any:
    """Mappings and lists as Python has them, every scalar as it is written: `no`, 007 and 1e-3 are text, null is None.

    What a scalar should be, whoever wanted it knows. Raises BadInput with the line.
    """
    try:
        root = compose(text, where)
        return None if root is None else _plain(root, where)
    except RecursionError as error:
        raise BadInput(f"{where}: is not YAML: it holds itself, or is nested too deeply") from error


def _plain(node: Any, where: str) -> Any:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, where) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key, value in node.value:
            name = key.value
            if not isinstance(name, str) or name in found:
                what = f"{name!r} is there twice" if isinstance(name, str) else "a key should be text"
                raise BadInput(f"{where}:{key.start_mark.line + 1}: {what}")
            found[name] = _plain(value, where)
        return found
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def dump_yaml(value: Any) -> str:
    """Mappings, lists and scalars as YAML that `read_yaml`, and any other reader, takes for the same."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts that are no plain line in the quotes that keep them: YAML takes U+0085 for a line break."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')

    Dumper.add_representer(str, text)
    Dumper.add_multi_representer(str, text)
    return yaml.dump(
        value, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=float("inf")
    )


def typed(kind: Any, value: Any) -> Any:
    """A value, or the text that somebody wrote for it, as the type has it.

    Raises ValueError, and what a type of texts raises itself.
    """
    if value is None:
        raise ValueError('is empty; write "" for a text of no letters')
    if get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r} should be a list, such as [a, b]")
        return [typed(get_args(kind)[0], entry) for entry in cast("list[Any]", value)]
    if issubclass(kind, str):
        if isinstance(value, str):
            return kind(whole(value))
        raise ValueError(f"{value!r} should be text")
    if kind is bool:
        found = value if isinstance(value, bool) else WORDS.get(str(value).lower())
        if found is None:
            raise ValueError(f"{value!r} should be true or false")
        return found
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        number = kind(value)
        if not math.isfinite(number):
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{str(value)[:60]!r} should be {what}") from error
    return number


def read_settings(file: Path) -> dict[str, Any]:
    """A YAML file of settings. Raises BadInput."""
    try:
        content = read_yaml(file.read_text(encoding="utf-8-sig"), str(file))
    except FileNotFoundError as error:
        raise BadInput(f"{file}: no such settings file") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise BadInput(f"{file}: can't be read: {reason}") from error
    if not isinstance(content, dict | None):
        raise BadInput(f"{file}: should hold settings, such as train: {{lr: 1e-3}}")
    return content or {}
