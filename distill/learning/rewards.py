"""Who says what an answer is worth: true answers, a JSON schema, or a function of yours."""

import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.corpus.datasets.stage import dataset_file
from distill.corpus.truth import read_truths, same_answer
from distill.errors import BadInput
from distill.learning.feedback import FEEDBACK, read_feedback
from distill.run import Run

ALMOST = 0.5
"""Reward for JSON that isn't as the schema wants it: without it a student that never fits would learn nothing."""


@dataclass(frozen=True)
class Reply:
    """An answer to judge, and what it answers. key: of the prompt's trace. question and words: the prompt's ids, up to
    where a reply begins, and the answer's, its end among them where it came to one."""

    key: str
    prompt: str
    answer: str
    question: list[int]
    words: list[int]


Judge = Callable[[Sequence[Reply]], list[float]]
"""A reward for each reply, the more the better."""


def learned_from(by: str, run: Run) -> Path | None:
    """The pairs that a reward is learned from; None where it is known without. Raises BadInput without feedback."""
    if by == "feedback":
        read_feedback(run.path / FEEDBACK)
        return run.path / FEEDBACK
    return Path(by.removeprefix("pairs:")) if by.startswith("pairs:") else None


def open_judge(by: str, run: Run) -> tuple[Judge, Path | None]:
    """`exact`, `schema:FILE` or `MODULE:FUNCTION`, and the file that its judgement depends on.

    Raises BadInput, one line, where there is no such reward, or it can't be read.
    """
    kind, _, rest = by.partition(":")
    if by == "exact":
        return _exact(run), dataset_file(run)
    if kind == "schema" and rest:
        return _schema(Path(rest)), Path(rest)
    if kind and rest:
        return _function(by, kind, rest)
    text = "exact, feedback, pairs:FILE, schema:FILE or MODULE:FUNCTION"
    raise BadInput(f"--by {by}: is no reward; give {text}")


def _exact(run: Run) -> Judge:
    truths = read_truths(run)
    if not truths:
        text = "no true answers, which only a dataset has (`dream run --dataset causal-world`)"
        raise BadInput(f"{run.path}: --by exact: {text}; give another reward")

    def judge(replies: Sequence[Reply]) -> list[float]:
        return [float(same_answer(each.answer, truths[each.key].answer)) for each in replies]

    return judge


def _schema(path: Path) -> Judge:
    try:
        from jsonschema import SchemaError, validators
        from jsonschema_specifications import REGISTRY
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise BadInput("--by schema: needs a package more: pip install jsonschema") from error
    try:
        schema: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(schema, dict | bool):
            raise TypeError("one is an object, true or false")
        kind: Any = validators.validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SchemaError) as error:
        raise BadInput(f"{path}: is no JSON schema: {str(error).splitlines()[0]}") from error
    validator = kind(schema, registry=REGISTRY)  # what it refers to is its own, or a standard: nothing is fetched

    def worth(answer: str) -> float:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return 0.0
        try:
            return 1.0 if validator.is_valid(value) else ALMOST
        except Unresolvable as error:
            raise BadInput(f"{path}: refers to what isn't in it: {error}") from error

    return lambda replies: [worth(each.answer) for each in replies]


def _function(by: str, module: str, name: str) -> tuple[Judge, Path | None]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # where the command is run, as with `python -m`
    try:
        function: Any = getattr(importlib.import_module(module), name)
        source = inspect.getsourcefile(function)
    except Exception as error:
        raise BadInput(f"--by {by}: can't be had: {type(error).__name__}: {error}") from error

    def worth(reply: Reply) -> float:
        try:
            found = float(function(reply.prompt, reply.answer))
            if not math.isfinite(found):
                raise ValueError(f"{found} is no reward")
        except Exception as error:
            text = f"{type(error).__name__}: {error}, for the answer {reply.answer!r} to {reply.prompt!r}"
            raise BadInput(f"--by {by}: {text}; it takes a prompt and an answer, and returns a number") from error
        return found

    return lambda replies: [worth(each) for each in replies], Path(source) if source else None
