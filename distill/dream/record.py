"""What one dreaming was: every path with its steps, scores and edges, as plain data that can be shown and saved."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from distill.mining.triplets import LENSES
from distill.tokens.bpe import image_text

Dreamer = Literal["engine", "checked", "backbone", "none"]
DREAMERS: tuple[Dreamer, ...] = ("engine", "checked", "backbone", "none")
ROLES = ("what", "action", "result")
"""Of a step's three image tokens."""
NONE = "none"
"""How an empty dream is written."""
EdgeKind = Literal["temporal", "causal"]
Part = TypeVar("Part", bound="Slot | Step | Branch | Edge | Word | DreamRecord")


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

    provenance says where the path comes from: "engine path 3", "backbone", "guided engine path 1", "given".
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
    kind: EdgeKind
    importance: float


@dataclass(frozen=True)
class Word:
    """A word of an answer, with the white space before it, and what was attended to where it was chosen.

    question, dream, answer: shares of all attention, 1 together; tags and lenses are the dream's. tokens: shares of
    what the dream's image tokens got, 1 together, in the order that the backbone read them in. See dream/reading.py.
    """

    text: str
    question: float
    dream: float
    answer: float
    tokens: list[float]

    @property
    def steps(self) -> list[float]:
        """The same by step."""
        return [sum(self.tokens[i : i + 3]) for i in range(0, len(self.tokens), 3)]


CUT = "cut: it didn't end within its tokens, or within the context"
"""Told of an answer that didn't end by itself."""


@dataclass(frozen=True)
class DreamRecord:
    """One prompt's dreaming. A record may be partial: the viewer gets one after each step that forms.

    dreamer: who dreamed; "given" where a user wrote the dream. words: of the answer, where its attention was noted.
    pictures: those that were asked about, small, as base64 of JPEGs. lenses: in the order that the backbone reads.
    cut: the answer didn't end by itself.
    """

    prompt: str
    dreamer: str
    branches: list[Branch] = field(default_factory=list[Branch])
    edges: list[Edge] = field(default_factory=list[Edge])
    answer: str = ""
    seconds: float = 0.0
    words: list[Word] = field(default_factory=list[Word])
    pictures: list[str] = field(default_factory=list[str])
    lenses: list[str] = field(default_factory=lambda: [*LENSES])
    cut: bool = False

    @property
    def lanes(self) -> list[tuple[int, Branch]]:
        """Branches with their numbers, those of one lens together, lenses in their order."""
        order = {lens: i for i, lens in enumerate(self.lenses)}
        return sorted(enumerate(self.branches), key=lambda lane: (order.get(lane[1].lens, len(order)), lane[0]))

    @property
    def read(self) -> list[tuple[int, int]]:
        """(branch, step) of all that the backbone read, in its order: token n of the dream stands in step ⌈n / 3⌉."""
        return [(i, t) for i, branch in self.lanes if branch.kept for t in range(len(branch.steps))]

    @property
    def dream(self) -> str:
        """What the backbone read, as `generate(dream=…)` takes it."""
        written = "".join(
            image_text(branch.lens) + "".join(image_text(slot.label) for step in branch.steps for slot in step.slots)
            for _, branch in self.lanes
            if branch.kept
        )
        return written or NONE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DreamRecord":
        """The other way. Raises KeyError or TypeError for what `to_json` didn't write."""
        parts: dict[str, Any] = {
            "branches": [_branch(branch) for branch in value["branches"]],
            "edges": [_edge(edge) for edge in value["edges"]],
            "words": [_word(word) for word in value.get("words", [])],  # files from before there were any
            "pictures": [*value.get("pictures", [])],
            "lenses": [*value.get("lenses", LENSES)],
        }
        for name in ("pictures", "lenses"):
            if not all(_is(text, str) for text in parts[name]):
                raise TypeError(f"{name}: not a text for each")
        made = _checked(cls(**{**value, **parts}))
        if any(len(word.tokens) != 3 * len(made.read) for word in made.words):
            raise TypeError("words: not a share for each token of the dream")
        return made


def _step(value: dict[str, Any]) -> Step:
    slots = (_checked(Slot(**value[role])) for role in ("what", "action", "result"))
    return _checked(Step(*slots, importance=value["importance"]))


def _branch(value: dict[str, Any]) -> Branch:
    parts: dict[str, Any] = {"steps": [_step(step) for step in value["steps"]], "gates": {**value["gates"]}}
    if not all(_is(weight, float) for weight in parts["gates"].values()):
        raise TypeError("gates: not a number for each expert")
    return _checked(Branch(**{**value, **parts}))


def _edge(value: dict[str, Any]) -> Edge:
    places: dict[str, Any] = {end: tuple(value[end]) for end in ("source", "target")}
    edge = _checked(Edge(**{**value, **places}))
    if edge.kind not in get_args(EdgeKind):
        raise TypeError(f"kind: {edge.kind!r} is none of an edge")
    if not all(len(place) == 2 and all(_is(i, int) for i in place) for place in (edge.source, edge.target)):
        raise TypeError("source, target: not two numbers each")
    return edge


def _word(value: dict[str, Any]) -> Word:
    parts: dict[str, Any] = {"tokens": [*value["tokens"]]}
    if not all(_is(share, float) for share in parts["tokens"]):
        raise TypeError("tokens: not a number for each")
    return _checked(Word(**{**value, **parts}))


def _checked(made: Part) -> Part:
    """Itself; raises TypeError where a field of text, number or truth value holds something else."""
    for one in fields(made):
        kind: Any = one.type
        if kind in (str, int, float, bool) and not _is(getattr(made, one.name), kind):
            raise TypeError(f"{one.name}: is no {kind.__name__}")
    return made


def _is(value: object, kind: type) -> bool:
    """Whether it is of a JSON type. A number may be whole, but not larger than a float tells apart."""
    if isinstance(value, bool) or kind in (bool, str):
        return type(value) is kind
    if isinstance(value, int):
        return abs(value) <= 2**53
    return kind is float and isinstance(value, float)
