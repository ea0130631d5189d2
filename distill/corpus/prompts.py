"""Prompts: from text files, from rows that others wrote, and from YAML sets of templates with slots.

A prompt is a question, or a conversation that ends in one (distill/turns.py).

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

from distill.corpus import prompt_files
from distill.corpus.prompt_files import HUB, files_in, from_hub, kind_of
from distill.corpus.prompt_rows import LAST, Reading, Rows
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.shipped import shipped
from distill.turns import opening
from distill.written import compose, whole

SUFFIXES = (".txt", ".yaml", ".yml", *prompt_files.SUFFIXES)
_SLOT = re.compile(r"\{([^{}]*)\}")
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `source` is the set or file it came from; held-out prompts are never trained on. `answer`: what it
    was answered there, "" where that isn't known or asked for."""

    text: str
    source: str
    held_out: bool
    answer: str = ""


def is_held_out(text: str, share: float) -> bool:
    """Whether a prompt is held out: the SHA-256 of its first question, read as a number in [0, 1), is below `share`.

    It depends on nothing else, so a prompt stays held out for good, whatever set or order it comes in, all questions of
    a conversation are on one side, and what a smaller share holds out a larger one holds out as well.
    """
    return int.from_bytes(hashlib.sha256(opening(text).encode()).digest()[:8], "big") / 2**64 < share


def prompt_sets() -> dict[str, Path]:
    """The sets that ship with us, by name."""
    return {path.stem: path for path in sorted(shipped("prompts").glob("*.yaml"))}


def load_prompts(
    names: Iterable[str], held_out: float, limit: int = 0, listen: Listener = silent, how: Reading = LAST
) -> list[Prompt]:
    """All prompts of some sets and files, each once (each of its answers, where these are read), in the order in which
    they first occur.

    With a `limit`, prompts spread evenly over all of them, with the same share of held-out ones (at least one of
    each kind where there is one). A larger limit keeps what a smaller one chose.
    `listen` is told of what is left out. Raises BadInput, naming file and line, for what can't be read, and where
    nothing is left to ask.
    """
    if not 0 <= held_out < 1:
        raise BadInput(f"capture.held_out={held_out}: must be a share, at least 0 and below 1")
    if limit < 0:
        raise BadInput(f"capture.limit={limit}: must be 0 (all prompts) or more")
    found: dict[str | tuple[str, str], Prompt] = {}
    for name in names:
        path, columns = _resolve(name, listen)
        empty = True
        for text, answer in _read(path, columns, how, listen):
            empty = False
            found.setdefault(
                (text, answer) if answer else text, Prompt(text, name, is_held_out(text, held_out), answer)
            )
        if empty:
            what = "answered prompts" if how.given else "prompts; write one a line"
            raise BadInput(f"{path}: holds no {what} (docs/capture.md shows the formats)")
    if not found:
        raise BadInput("capture.prompts: is empty; name a set (`everyday`) or a file")
    return _spread(list(found.values()), limit) if 0 < limit < len(found) else list(found.values())


def read_prompts(path: Path, listen: Listener = silent, columns: str = "", how: Reading = LAST) -> list[str]:
    """The prompts of one file, by its suffix; columns: as `Rows` takes them. Raises BadInput naming file and line."""
    return [text for text, _ in _read(path, columns, how, listen)]


def _read(path: Path, columns: str, how: Reading, listen: Listener) -> Iterable[tuple[str, str]]:
    """(prompt, answer) as they come. What asks alone has no answers."""
    kind = kind_of(path)
    if path.is_dir() or kind in prompt_files.SUFFIXES:
        return Rows(files_in(path, listen) if path.is_dir() else [path], columns, how, listen).asked()
    if kind not in SUFFIXES:
        raise BadInput(f"{path}: prompts come as {', '.join(SUFFIXES)}, by the file's name, or in a folder")
    if how.given:
        raise BadInput(f"{path}: holds no answers; name rows with answers, or leave out --answers given")
    with prompt_files.text_of(path) as file:
        texts = list(_YamlSet(path).prompts(file.read())) if kind != ".txt" else _lines(path, file, listen)
    return ((text, "") for text in texts)


def evenly(count: int) -> list[int]:
    """Positions 0 to count - 1 in an order of which any beginning is spread evenly over all.

    They are ranked by the fractional part of i·φ (Weyl's equidistribution, with the golden ratio): never in step
    with the period of a template's slots, as every n-th would be.
    """
    return sorted(range(count), key=lambda i: (i * _GOLDEN) % 1)


def file_and_column(name: str) -> tuple[Path, str]:
    """`chats.csv:question,reply`: a file or folder of rows, and its columns of prompts and answers; "" where none are
    named."""
    path = Path(name).expanduser()
    before, _, columns = name.rpartition(":")
    file = Path(before).expanduser()
    if before and not path.exists() and (file.is_dir() or (kind_of(file) in prompt_files.SUFFIXES and file.is_file())):
        return file, columns
    return path, ""


def _resolve(name: str, listen: Listener) -> tuple[Path, str]:
    """A file or folder and its columns, the file of the set of that name, or the folder of what a hub has."""
    sets = prompt_sets()
    if not name.strip():  # the path "" would be the working folder
        raise BadInput("a prompt file or set without a name; is a variable empty?")
    if name in sets:
        return sets[name], ""
    if name.startswith(HUB):
        repository, _, columns = name.removeprefix(HUB).partition(":")
        return from_hub(repository, listen), columns
    path, columns = file_and_column(name)
    if path.exists():
        return path, columns
    near = difflib.get_close_matches(path.stem, sets, n=3, cutoff=0.4) or list(sets)
    raise BadInput(f"{name}: no such prompt file or set; the nearest sets are {', '.join(near)}")


def _spread(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """`limit` of them, each with all its answers, in order."""
    sides = {prompt.text: prompt.held_out for prompt in prompts}
    if limit >= len(sides):
        return prompts
    kinds = [[text for text, held in sides.items() if held], [text for text, held in sides.items() if not held]]
    held = round(limit * len(kinds[0]) / len(sides))
    if limit > 1 and all(kinds):
        held = min(max(held, 1), limit - 1)
    chosen: set[str] = set()
    for kind, count in zip(kinds, (held, limit - held), strict=True):
        chosen.update(kind[i] for i in evenly(len(kind))[:count])
    return [prompt for prompt in prompts if prompt.text in chosen]


def _lines(path: Path, file: Iterable[str], listen: Listener) -> list[str]:
    """One prompt a line. Not splitlines(): a prompt may hold U+2028, NEL or a form feed."""
    lines = [line.strip() for line in file]
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
