"""A sweep's random search: settings drawn from what its file gives as ranges and choices."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import BadInput

Changes = dict[str, Any]
"""Setting, dotted → value."""

KINDS = ("log_uniform", "uniform", "integer", "choice")


def draw(how: Mapping[str, Any], samples: int, seed: int) -> list[Changes]:
    """So many different samples. how: setting → {kind: bounds or choices}.

    Neither more samples nor another setting beside it change what is drawn for a setting. Raises BadInput, the
    setting's name first, for what is no range, and where there are fewer different samples.
    """
    if not how:
        raise BadInput("samples: nothing is drawn; name a setting, such as train.lr: {log_uniform: [1e-4, 1e-2]}")
    draws = {key: _drawer(key, value) for key, value in how.items()}
    found: dict[str, Changes] = {}
    for attempt in range(100 * samples):
        changes = {key: draw(_generator(seed, attempt, key)) for key, draw in draws.items()}
        found.setdefault(json.dumps(changes), changes)
        if len(found) == samples:
            return list(found.values())
    raise BadInput(f"samples: only {len(found)} different ones can be drawn, not {samples}; lower it, or use a grid")


def all_different(values: Sequence[Any]) -> None:
    """Raise BadInput for a value that is there twice."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise BadInput(f"holds {'no change' if value == {} else repr(value)} twice")


def _drawer(key: str, how: Any) -> Callable[[np.random.Generator], Any]:
    if not isinstance(how, dict) or len(how) != 1 or next(iter(how)) not in KINDS:
        raise BadInput(f"{key}: {how!r} should be one of {', '.join(KINDS)}, such as {{uniform: [0, 0.1]}}")
    kind, given = next(iter(how.items()))
    where = f"{key}.{kind}"
    if not isinstance(given, list) or not given:
        raise BadInput(f"{where}: {given!r} should be a list")
    values: list[Any] = given
    if kind == "choice":
        try:
            all_different(values)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
        return lambda generator: values[int(generator.integers(len(values)))]
    kinds = (int,) if kind == "integer" else (int, float)
    if len(values) != 2 or any(type(bound) not in kinds or not math.isfinite(bound) for bound in values):
        raise BadInput(f"{where}: {values!r} should be two {'whole ' * (kind == 'integer')}numbers")
    low, high = values
    if not low < high or (kind == "log_uniform" and low <= 0):
        above = "above 0 and " * (kind == "log_uniform")
        raise BadInput(f"{where}: {values!r}: the first should be {above}below the second")
    if kind == "integer":
        return lambda generator: int(generator.integers(low, high, endpoint=True))
    if kind == "uniform":
        return lambda generator: _rounded(generator.uniform(low, high))
    return lambda generator: _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))


def _generator(seed: int, attempt: int, key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}:{attempt}:{key}".encode()).digest()[:8]))


def _rounded(value: float) -> float:
    """To four digits, so that a cell's name says it all."""
    return float(f"{value:.4g}")
