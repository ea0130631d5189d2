"""An interpreter of the part of Go's text/template that chat templates are written in.

Actions: `range` over a list (with `$i, $x :=`), `if` / `else if` / `else`, `with`, `end`, `$x := …`, `$x = …`,
printing, comments, `{{-` and `-}}`. Values: fields (`.A.B`, `$.A`), variables, strings ("…", `…`), integers, booleans,
nil, parentheses. Functions: eq, ne, lt, le, gt, ge, and, or (short-circuit), not, len, index, slice, print, printf of
%s, %d and %v. Pipelines. Anything else raises GoTemplateError: a template that we can't read is not a template that
passes. Fields that a map lacks are nil, as in Go ("<no value>" when printed).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class GoTemplateError(Exception):
    """The template is wrong, or goes beyond this interpreter."""


# Syntax: a template is a list of nodes; an expression is a nested tuple whose first item names its kind.


@dataclass
class Text:
    text: str


@dataclass
class Action:
    pipeline: Any
    declares: str = ""
    assigns: str = ""


@dataclass
class Branch:
    """`if`, `with` or `range`."""

    word: str
    pipeline: Any
    variables: list[str]
    body: list[Any] = field(default_factory=list[Any])
    otherwise: list[Any] = field(default_factory=list[Any])


_TOKEN = re.compile(
    r"""\s+|(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?\d+)|(?P<variable>\$\w*)"""
    r"""|(?P<field>\.\w+)|(?P<dot>\.(?!\w))|(?P<symbol>:=|[=|(),])|(?P<word>[A-Za-z_]\w*)"""
)
_ACTION = re.compile(r"\{\{(-(?=\s))?(/\*.*?\*/|(?:\"(?:\\.|[^\"\\])*\"|`[^`]*`|.)*?)((?<=\s)-)?\}\}", re.DOTALL)
_SPACE = " \t\r\n"


def _pieces(template: str) -> Iterator[tuple[str, bool]]:
    """(text or action, is it an action), with the markers' trimming done."""
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip(_SPACE) if trim else text
        yield (text.rstrip(_SPACE) if match[1] else text), False
        content = match[2].lstrip(_SPACE) if match[1] else match[2]
        if content.lstrip(_SPACE).startswith("/*") and not content.startswith("/*"):
            raise GoTemplateError("a comment must begin right at the delimiter")
        yield content.strip(_SPACE), True
        at, trim = match.end(), bool(match[3])
    rest = template[at:]
    if "{{" in rest:
        raise GoTemplateError("an action is not closed")
    yield (rest.lstrip(_SPACE) if trim else rest), False


def _tokens(action: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(action):
        match = _TOKEN.match(action, at)
        if match is None:
            raise GoTemplateError(f"{action!r}: unexpected {action[at]!r}")
        if match.lastgroup:
            # A field right behind a value belongs to it (`$.A`, `.A.B`); behind a space it is a new operand.
            joined = (
                match.lastgroup == "field" and at > 0 and not action[at - 1].isspace() and action[at - 1] not in "(|,"
            )
            tokens.append(("chain" if joined else match.lastgroup, match[0]))
        at = match.end()
    return tokens


class _Parser:
    """Of one action's tokens."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = [*tokens, ("end", "")]

    def next(self, text: str | None = None) -> tuple[str, str]:
        token = self.tokens.pop(0)
        if text is not None and token[1] != text:
            raise GoTemplateError(f"expected {text!r}, found {token[1]!r}")
        return token

    def pipeline(self) -> Any:
        value = self.command()
        while self.tokens[0][1] == "|":
            self.next()
            kind, name, arguments = self.command(piped=True)
            assert kind == "call"
            value = ("call", name, [*arguments, value])
        return value

    def command(self, piped: bool = False) -> Any:
        if self.tokens[0][0] == "word" and self.tokens[0][1] not in ("true", "false", "nil"):
            name = self.next()[1]
            arguments: list[Any] = []
            while self.tokens[0][0] != "end" and self.tokens[0][1] not in (")", "|"):
                arguments.append(self.operand())
            return ("call", name, arguments)
        if piped:
            raise GoTemplateError("what follows | must be a function")
        value = self.operand()
        if self.tokens[0][0] != "end" and self.tokens[0][1] not in (")", "|"):
            raise GoTemplateError(f"{self.tokens[0][1]!r}: an argument to what is no function")
        return value

    def operand(self) -> Any:
        kind, text = self.next()
        value: Any
        if kind == "string":
            value = ("literal", text[1:-1] if text[0] == "`" else _unescape(text[1:-1]))
        elif kind == "number":
            value = ("literal", int(text))
        elif kind == "word" and text in ("true", "false", "nil"):
            value = ("literal", {"true": True, "false": False, "nil": None}[text])
        elif kind == "variable":
            value = ("variable", text)
        elif kind == "dot":
            value = ("dot",)
        elif kind == "field":
            value = ("field", ("dot",), text[1:])
        elif text == "(":
            value = self.pipeline()
            self.next(")")
        else:
            raise GoTemplateError(f"unexpected {text!r}")
        while self.tokens[0][0] == "chain":
            value = ("field", value, self.next()[1][1:])
        return value


def _unescape(text: str) -> str:
    simple = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}

    def replace(match: re.Match[str]) -> str:
        if match[1][0] in "ux":
            return chr(int(match[1][1:], 16))
        if match[1] not in simple:
            raise GoTemplateError(f"unknown escape {match[0]!r}")
        return simple[match[1]]

    return re.sub(r"\\(u[0-9a-fA-F]{4}|x[0-7][0-9a-fA-F]|.)", replace, text)


def _parse(pieces: list[tuple[str, bool]], inside: bool) -> tuple[list[Any], list[tuple[str, str]]]:
    """Nodes up to `end` or `else` (whose tokens come back), or up to the end of the template."""
    nodes: list[Any] = []
    while pieces:
        content, is_action = pieces.pop(0)
        if not is_action:
            if content:
                nodes.append(Text(content))
            continue
        if content.startswith("/*"):
            continue
        tokens = _tokens(content)
        if not tokens:
            raise GoTemplateError("an action is empty")
        word = tokens[0][1] if tokens[0][0] == "word" else ""
        if word in ("end", "else"):
            if not inside:
                raise GoTemplateError(f"{word} without a beginning")
            return nodes, tokens
        nodes.append(_branch(tokens, pieces) if word in ("if", "with", "range") else _action(tokens))
    if inside:
        raise GoTemplateError("a block is not ended")
    return nodes, []


def _branch(tokens: list[tuple[str, str]], pieces: list[tuple[str, bool]]) -> Branch:
    word, head = tokens[0][1], tokens[1:]
    variables: list[str] = []
    texts = [text for _, text in head]
    if ":=" in texts:
        split = texts.index(":=")
        variables = [text for text in texts[:split] if text != ","]
        head = head[split + 1 :]
    branch = Branch(word, _whole(head), variables)
    branch.body, closing = _parse(pieces, inside=True)
    if closing[0][1] == "else" and len(closing) > 1:
        branch.otherwise = [_branch(closing[1:], pieces)]
    elif closing[0][1] == "else":
        branch.otherwise, closing = _parse(pieces, inside=True)
        if closing[0][1] != "end":
            raise GoTemplateError("else after else")
    return branch


def _action(tokens: list[tuple[str, str]]) -> Action:
    if len(tokens) > 1 and tokens[0][0] == "variable" and tokens[1][1] in (":=", "="):
        declares, assigns = (tokens[0][1], "") if tokens[1][1] == ":=" else ("", tokens[0][1])
        return Action(_whole(tokens[2:]), declares, assigns)
    return Action(_whole(tokens))


def _whole(tokens: list[tuple[str, str]]) -> Any:
    parser = _Parser(tokens)
    pipeline = parser.pipeline()
    if parser.tokens[0][0] != "end":
        raise GoTemplateError(f"unexpected {parser.tokens[0][1]!r}")
    return pipeline


# Evaluation.


def _truth(value: Any) -> bool:
    """Go's: the zero value and whatever is empty are false."""
    return value is not None and value is not False and value != 0 and value != "" and value != [] and value != {}


def _printed(value: Any) -> str:
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise GoTemplateError(f"printing a {type(value).__name__} is beyond this interpreter")


def _compare(a: Any, b: Any) -> tuple[Any, Any]:
    if type(a) is not type(b):
        raise GoTemplateError(f"incompatible types for comparison: {a!r} and {b!r}")
    return a, b


def _slice(value: str | Sequence[Any], *bounds: int) -> Any:
    start, stop = (*bounds, len(value))[:2] if bounds else (0, len(value))
    if not 0 <= start <= stop <= len(value):
        raise GoTemplateError(f"slice [{start}:{stop}] of {len(value)} items")
    return value[start:stop]


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else value[key]
    return value


def _printf(pattern: str, *values: Any) -> str:
    rest = list(values)
    return re.sub(r"%([sdv%])", lambda match: "%" if match[1] == "%" else _printed(rest.pop(0)), pattern)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, *others: any(x == y for x, y in (_compare(a, other) for other in others)),
    "ne": lambda a, b: not (lambda pair: pair[0] == pair[1])(_compare(a, b)),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "not": lambda a: not _truth(a),
    "len": len,
    "slice": _slice,
    "index": _index,
    "print": lambda *values: "".join(map(_printed, values)),
    "printf": _printf,
}


class _Scope:
    """Variables, innermost last."""

    def __init__(self, root: Any) -> None:
        self.frames: list[dict[str, Any]] = [{"$": root}]

    def frame_of(self, name: str) -> dict[str, Any]:
        for frame in reversed(self.frames):
            if name in frame:
                return frame
        raise GoTemplateError(f"undefined variable {name}")


def _evaluate(expression: Any, dot: Any, scope: _Scope) -> Any:
    kind, *rest = expression
    if kind == "literal":
        return rest[0]
    if kind == "dot":
        return dot
    if kind == "variable":
        return scope.frame_of(rest[0])[rest[0]]
    if kind == "field":
        value = _evaluate(rest[0], dot, scope)
        if not isinstance(value, Mapping):
            raise GoTemplateError(f"can't evaluate field {rest[1]} of {value!r}")
        return value.get(rest[1])
    name, arguments = rest
    if name in ("and", "or"):
        value = None
        for argument in arguments:
            value = _evaluate(argument, dot, scope)
            if _truth(value) is (name == "or"):
                break
        return value
    if name not in _FUNCTIONS:
        raise GoTemplateError(f"function {name} is beyond this interpreter")
    return _FUNCTIONS[name](*(_evaluate(argument, dot, scope) for argument in arguments))


def _run(nodes: list[Any], dot: Any, scope: _Scope) -> str:
    return "".join(_node(node, dot, scope) for node in nodes)


def _block(nodes: list[Any], dot: Any, scope: _Scope, variables: dict[str, Any]) -> str:
    scope.frames.append(variables)
    try:
        return _run(nodes, dot, scope)
    finally:
        scope.frames.pop()


def _node(node: Any, dot: Any, scope: _Scope) -> str:
    if isinstance(node, Text):
        return node.text
    value = _evaluate(node.pipeline, dot, scope)
    if isinstance(node, Action):
        if node.declares:
            scope.frames[-1][node.declares] = value
        elif node.assigns:
            scope.frame_of(node.assigns)[node.assigns] = value
        else:
            return _printed(value)
        return ""
    if node.word == "range" and value:
        return "".join(
            _block(node.body, item, scope, dict(zip(node.variables, [i, item][-len(node.variables) :], strict=True)))
            if node.variables
            else _block(node.body, item, scope, {})
            for i, item in enumerate(value)
        )
    if not _truth(value):
        return _block(node.otherwise, dot, scope, {})
    return _block(node.body, value if node.word == "with" else dot, scope, dict.fromkeys(node.variables, value))


def render(template: str, data: Mapping[str, Any]) -> str:
    """Execute a template over `data` (keys as Go's fields: Messages, Role, Content …). Raises GoTemplateError."""
    nodes, _ = _parse(list(_pieces(template)), inside=False)
    return _run(nodes, data, _Scope(data))
