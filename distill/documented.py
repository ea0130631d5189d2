"""The settings tree as YAML with its documentation, read from the source of distill/config.py itself."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

import yaml

from distill import config

WIDTH = 110


def _docs(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """A dataclass's own docstring and, by field, the string that follows the field in the source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    fields: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    fields[statement.target.id] = inspect.cleandoc(text)
                case _:
                    pass
    return inspect.cleandoc(ast.get_docstring(tree) or ""), fields


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH - len(indent))]


def _scalar(value: Any) -> str:
    """A value on one line, lists in brackets."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _lines(value: Any, indent: str = "") -> list[str]:
    _, docs = _docs(type(value))
    lines: list[str] = []
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if dataclasses.is_dataclass(entry):
            lines += ["", *_comment(_docs(type(entry))[0], indent), f"{indent}{field.name}:"]
            lines += _lines(entry, indent + "  ")
        else:
            lines += _comment(docs[field.name], indent) if field.name in docs else []
            lines.append(f"{indent}{field.name}: {_scalar(entry)}")
    return lines


def documented_yaml() -> str:
    """Every setting with its default and its meaning; `load_settings` reads it back as `Settings()`."""
    head = ["# Every setting, its default and its meaning. Made from distill/config.py by `dream settings`."]
    return "\n".join(head + _lines(config.Settings())) + "\n"
