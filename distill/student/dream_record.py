"""What one dreaming was: every path with its steps, scores and edges, as plain data that can be shown and saved."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Dreamer = Literal["engine", "backbone", "none"]
DREAMERS: tuple[Dreamer, ...] = ("engine", "backbone", "none")


@dataclass(frozen=True)
class Slot:
    """One image token of a step, and how sure the dreamer was of it (0 to 1)."""

    label: str
    code: int
    probability: float


@dataclass(frozen=True)
class Step:
    """One triplet. importance: its node's in the graph, 0 to 1; 0 where no graph was built."""

    what: Slot
    action: Slot
    result: Slot
    importance: float = 0.0

    @property
    def slots(self) -> tuple[Slot, Slot, Slot]:
        return self.what, self.action, self.result


@dataclass(frozen=True)
class Branch:
    """One path. score: the arbiter's, 0 to 1; kept: the backbone read it; gates: weight of each expert.

    provenance says where the path comes from: "engine path 3", "backbone", "guided engine path 1".
    """

    lens: str
    steps: list[Step]
    score: float
    kept: bool
    provenance: str
    gates: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Edge:
    """Between two steps, each named by (branch, step)."""

    source: tuple[int, int]
    target: tuple[int, int]
    kind: Literal["temporal", "causal"]
    importance: float


@dataclass(frozen=True)
class DreamRecord:
    """One prompt's dreaming. A record may be partial: the viewer gets one after each step that forms."""

    prompt: str
    dreamer: str
    branches: list[Branch] = field(default_factory=list[Branch])
    edges: list[Edge] = field(default_factory=list[Edge])
    answer: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DreamRecord":
        """The other way. Raises KeyError or TypeError for what `to_json` didn't write."""
        branches = [
            Branch(**{**branch, "steps": [_step(step) for step in branch["steps"]]}) for branch in value["branches"]
        ]
        edges = [Edge(**{**e, "source": tuple(e["source"]), "target": tuple(e["target"])}) for e in value["edges"]]
        return cls(**{**value, "branches": branches, "edges": edges})


def _step(value: dict[str, Any]) -> Step:
    return Step(*(Slot(**value[role]) for role in ("what", "action", "result")), importance=value["importance"])
