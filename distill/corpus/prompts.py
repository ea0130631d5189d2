"""Prompts: from text files, from rows that others wrote, and from YAML sets of templates with slots.

A YAML set, in which a slot belongs to its group or, at the top level, to all groups:

    description: What it is for, in one line.
    slots: {thing: [a ball, a glass]}
    groups:
      - templates: ["What happens when you {action} {thing}?"]
        slots: {action: [drop, throw]}
    prompts: ["Why is the sky blue?"]

Every template is filled with every combination of its slots' values.
"""

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from distill.corpus import prompt_rows
from distill.corpus.prompt_rows import Rows
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.shipped import shipped
from distill.written import compose, whole

SUFFIXES = (".txt", ".yaml", ".yml", *prompt_rows.SUFFIXES)
_SLOT = re.compile(r"\{([^{}]*)\}")
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `source` is the set or file it came from; held-out prompts are never trained on."""

    text: str
    source: str
    held_out: bool


def is_held_out(text: str, share: float) -> bool:
    """Whether a prompt is held out: its SHA-256, read as a number in [0, 1), is below `share`.

    It depends on nothing else, so a prompt stays held out for good, whatever set or order it comes in, and what
    a smaller share holds out a larger one holds out as well.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < share


def prompt_sets() -> dict[str, Path]:
    """The sets that ship with us, by name."""
    return {path.stem: path for path in sorted(shipped("prompts").glob("*.yaml"))}


def load_prompts(names: Iterable[str], held_out: float, limit: int = 0, listen: Listener = silent) -> list[Prompt]:
    """All prompts of some sets and files, each once, in the order in which they first occur.

    With a `limit`, prompts spread evenly over all of them, with the same share of held-out ones (at least one of
    each kind where there is one). A larger limit keeps what a smaller one chose.
    `listen` is told of comments. Raises BadInput, naming file and line, for whatever can't be read, and where
    nothing is left to ask.
    """
    if not 0 <= held_out < 1:
        raise BadInput(f"capture.held_out={held_out}: must be a share, at least 0 and below 1")
    if limit < 0:
        raise BadInput(f"capture.limit={limit}: must be 0 (all prompts) or more")
    found: dict[str, Prompt] = {}
    for name in names:
        path, column = _resolve(name)
        empty = True
        for text in read_prompts(path, listen, column):
            empty = False
            found.setdefault(text, Prompt(text, name, is_held_out(text, held_out)))
        if empty:
            raise BadInput(f"{path}: holds no prompts; write one a line (docs/capture.md shows the formats)")
    if not found:
        raise BadInput("capture.prompts: is empty; name a set (`everyday`) or a file")
    return _spread(list(found.values()), limit) if 0 < limit < len(found) else list(found.values())


def read_prompts(path: Path, listen: Listener = silent, column: str = "") -> list[str]:
    """The prompts of one file, by its suffix; column: of a table. Raises BadInput naming file and line."""
    kind, text = path.suffix.lower(), ""
    if kind not in SUFFIXES:
        raise BadInput(f"{path}: prompts come as {', '.join(SUFFIXES)}, by the file's name")
    try:
        data = path.read_bytes()
        if kind != ".parquet":
            text, data = data.decode("utf-8-sig"), b""
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{path}: can't read it: {error.strerror}") from error
    try:
        if kind == ".txt":
            return _lines(path, text, listen)
        if kind in prompt_rows.SUFFIXES:
            return list(Rows(path, column, listen).prompts(data, text))
        return list(_YamlSet(path).prompts(text))
    except RecursionError as error:
        raise BadInput(f"{path}: brackets are nested too deeply for prompts") from error


def evenly(count: int) -> list[int]:
    """Positions 0 to count - 1 in an order of which any beginning is spread evenly over all.

    They are ranked by the fractional part of i·φ (Weyl's equidistribution, with the golden ratio): never in step
    with the period of a template's slots, as every n-th would be.
    """
    return sorted(range(count), key=lambda i: (i * _GOLDEN) % 1)


def file_and_column(name: str) -> tuple[Path, str]:
    """`chats.csv:question`: a file of rows, and the column that holds the prompts; "" where none is named."""
    path = Path(name).expanduser()
    before, _, column = name.rpartition(":")
    file = Path(before).expanduser()
    if column and not path.exists() and file.suffix.lower() in prompt_rows.SUFFIXES and file.is_file():
        return file, column
    return path, ""


def _resolve(name: str) -> tuple[Path, str]:
    """A file and its column, or the file of the set of that name."""
    sets = prompt_sets()
    if name in sets:
        return sets[name], ""
    path, column = file_and_column(name)
    if path.is_file():
        return path, column
    if path.is_dir():
        raise BadInput(f"{name}: is a folder; name a prompt file or one of the sets {', '.join(sets)}")
    near = difflib.get_close_matches(path.stem, sets, n=3, cutoff=0.4) or list(sets)
    raise BadInput(f"{name}: no such prompt file or set; the nearest sets are {', '.join(near)}")


def _spread(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """`limit` of them, in order."""
    kinds = [[p for p in prompts if p.held_out], [p for p in prompts if not p.held_out]]
    held = round(limit * len(kinds[0]) / len(prompts))
    if limit > 1 and all(kinds):
        held = min(max(held, 1), limit - 1)
    chosen: set[str] = set()
    for kind, count in zip(kinds, (held, limit - held), strict=True):
        chosen.update(kind[i].text for i in evenly(len(kind))[:count])
    return [prompt for prompt in prompts if prompt.text in chosen]


def _lines(path: Path, text: str, listen: Listener) -> list[str]:
    """One prompt a line. Not splitlines(): a prompt may hold U+2028, NEL or a form feed."""
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    comments = [number for number, line in enumerate(lines, start=1) if line.startswith("#")]
    if comments:
        first = lines[comments[0] - 1]
        count = f"{len(comments)} lines that begin" if len(comments) > 1 else "a line that begins"
        message = (
            f"{path}:{comments[0]}: {count} with # left out ({first[:40]!r}); \\# at its beginning makes it a prompt"
        )
        listen(Event("prompts", "note", message))
    return [line.removeprefix("\\") if line.startswith("\\#") else line for line in lines if line and line[0] != "#"]


class _YamlSet:
    """Reads a YAML set from its node graph, whose marks give the line of whatever is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prompts(self, text: str) -> Iterator[str]:
        root = compose(text, str(self.path))
        if root is None:
            return
        parts = self._mapping(root, ("description", "slots", "groups", "prompts"))
        shared = self._slots(parts.get("slots"))
        used: set[str] = set()
        for node in self._items(parts["groups"]) if "groups" in parts else []:
            yield from self._group(node, shared, used)
        self._check_used(shared, used)
        if "prompts" in parts:
            yield from (self._text(node) for node in self._items(parts["prompts"]))

    def _group(self, node: yaml.Node, shared: Mapping[str, yaml.Node], used: set[str]) -> Iterator[str]:
        parts = self._mapping(node, ("templates", "slots"))
        if "templates" not in parts:
            raise self._error(node, "a group needs `templates`")
        own = self._slots(parts.get("slots"))
        slots = {**shared, **own}
        here: set[str] = set()
        for template_node in self._items(parts["templates"]):
            template = self._text(template_node)
            names = list(dict.fromkeys(_SLOT.findall(template)))
            for name in names:
                if name not in slots:
                    raise self._error(template_node, f"no slot is named {name!r}{_hint(name, slots)}")
            here.update(names)
            values = [[self._text(value) for value in self._items(slots[name])] for name in names]
            for combination in itertools.product(*values):
                filled = dict(zip(names, combination, strict=True))
                yield _SLOT.sub(lambda match, filled=filled: filled[match[1]], template)
        self._check_used(own, here)
        used.update(here)

    def _slots(self, node: yaml.Node | None) -> dict[str, yaml.Node]:
        return {} if node is None else self._mapping(node, None)

    def _check_used(self, slots: Mapping[str, yaml.Node], used: set[str]) -> None:
        for name in slots.keys() - used:
            raise self._error(slots[name], f"no template uses the slot {name!r}")

    def _mapping(self, node: yaml.Node, allowed: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, "expected `name: value` pairs")
        parts: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = self._text(key)
            if allowed is not None and name not in allowed:
                raise self._error(key, f"unknown key {name!r}; known are {', '.join(allowed)}")
            if name in parts:
                raise self._error(key, f"{name!r} is there twice")
            parts[name] = value
        return parts

    def _items(self, node: yaml.Node) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._error(node, "expected a list with at least one item")
        return node.value

    def _text(self, node: yaml.Node) -> str:
        # The scalar as it is written: `on`, `1.50` and `no` are words here.
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            raise self._error(node, "expected text")
        try:
            return whole(node.value.strip())
        except ValueError as error:
            raise self._error(node, str(error)) from error

    def _error(self, node: yaml.Node, problem: str) -> BadInput:
        return BadInput(f"{self.path}:{node.start_mark.line + 1}: {problem}")


def _hint(name: str, slots: Iterable[str]) -> str:
    known = list(slots)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; do you mean {near[0]!r}?" if near else f"; there are {', '.join(known) or 'none'}"
