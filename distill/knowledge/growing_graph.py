"""A knowledge graph that grows with every dream, over runs, and never past a bound.

Its file is the same GraphML as the mined graph's (graph.py). In memory it is plain dictionaries: a dream is
some sixty nodes and as many edges, and adding one must cost microseconds. What is mentioned once and forgotten by
the next pruning starts anew when it comes back, as in lossy counting: the bound has that price.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from distill.errors import BadInput
from distill.journal import lock
from distill.knowledge.graph import MAX_BYTES, NODE_TYPES, Graph, add_edge, load_graph, save_graph
from distill.mining.triplets import LENSES
from distill.run import sha256_file

ImportanceFn = Callable[[str, dict[str, Any]], float]
"""(node, data) → importance. data: type, label, count, importance (as of mined graphs), attention, weighed."""

SLACK = 1.25
"""A graph, or a node's edges, may grow past their bound by so much before the least are dropped, all at once."""
EDGES = 64
"""Edges that lead away from one node, the most counted."""
MILLION = 10**6
"""Attention is summed in millionths, as whole numbers: the order of adding and merging then changes nothing."""

# What XML can't hold, and a carriage return, which would come back as a line feed.
_NOT_HELD = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Kind = tuple[str, str, str]
"""Type, lens and, of a `yields` edge, the action that it is by."""


@dataclass(frozen=True)
class Chain:
    """One path of a dream: its lens, the phrases of its steps, and what attention (0 to 1) each got, where known."""

    lens: str
    steps: Sequence[tuple[str, str, str]]
    attention: Sequence[float] | None = None


class Node:
    """count mentions, of them `weighed` with attention of `attention` millionths in all.

    edges    target → kind → count, of `size` edges in all
    near     the nodes at either end of an edge with this one
    settled  (count, weighed, attention) and edges as they are in the file: what is above them is new here
    """

    __slots__ = ("attention", "count", "edges", "label", "near", "settled", "settled_edges", "size", "type", "weighed")

    def __init__(self, kind: str, label: str) -> None:
        self.type, self.label = kind, label
        self.count = self.weighed = self.attention = self.size = 0
        self.edges: dict[str, dict[Kind, int]] = {}
        self.near: set[str] = set()
        self.settled: tuple[int, int, int] = (0, 0, 0)
        self.settled_edges: dict[str, dict[Kind, int]] = {}

    def data(self) -> dict[str, Any]:
        """Its attributes in networkx and GraphML."""
        return {
            "type": self.type,
            "label": self.label,
            "count": self.count,
            "importance": float(self.count * (1 + len(self.near))),
            "attention": self.attention / (MILLION * self.weighed) if self.weighed else 0.0,
            "weighed": self.weighed,
        }


class Tally:
    """Nodes and edges with their counts, at most `ceiling` nodes at any moment."""

    def __init__(self, max_nodes: int, importance_fn: ImportanceFn | None) -> None:
        self.nodes: dict[str, Node] = {}
        self.max_nodes, self.importance_fn = max_nodes, importance_fn
        self.ceiling = max(int(SLACK * max_nodes), max_nodes + 3)

    def add(self, chain: Chain) -> None:
        """Count a chain's steps."""
        performs, causes, then = ((kind, chain.lens, "") for kind in ("performs", "causes", "then"))
        attention = chain.attention or [None] * len(chain.steps)
        nodes, previous = self.nodes, ""
        for (what, action, result), share in zip(chain.steps, attention, strict=True):
            if len(nodes) + 3 > self.ceiling:
                self.prune()
            names = f"what:{what}", f"action:{action}", f"result:{result}"
            paid = round((share or 0.0) * MILLION)
            for name in names:
                node = nodes.get(name) or self._born(name)
                node.count += 1
                node.weighed += share is not None
                node.attention += paid
            self.join(names[0], names[1], performs, 1)
            self.join(names[1], names[2], causes, 1)
            self.join(names[0], names[2], ("yields", chain.lens, action), 1)
            if previous in nodes:
                self.join(previous, names[1], then, 1)
            previous = names[2]

    def _born(self, name: str) -> Node:
        role, label = name.split(":", 1)
        node = self.nodes[name] = Node(NODE_TYPES[role], label)
        return node

    def join(self, source: str, target: str, kind: Kind, count: int) -> None:
        node = self.nodes[source]
        edges = node.edges.get(target)
        if edges is not None and kind in edges:
            edges[kind] += count
            return
        if node.size >= SLACK * EDGES:
            self._thin(source)
        node.edges.setdefault(target, {})[kind] = count
        node.size += 1
        node.near.add(target)
        self.nodes[target].near.add(source)

    def _thin(self, source: str) -> None:
        """Leave a node the edges that count most."""
        node = self.nodes[source]
        edges = [(-count, target, kind) for target, kinds in node.edges.items() for kind, count in kinds.items()]
        for _, target, kind in sorted(edges)[EDGES:]:
            del node.edges[target][kind]
            node.settled_edges.get(target, {}).pop(kind, None)
            node.size -= 1
            if not node.edges[target]:
                del node.edges[target]
                if source not in self.nodes[target].edges:
                    node.near.discard(target)
                    self.nodes[target].near.discard(source)

    def prune(self) -> None:
        """Keep the `max_nodes` most important nodes, of equals the first by name."""
        if len(self.nodes) <= self.max_nodes:
            return
        rank = {name: -self._importance(name, node) for name, node in self.nodes.items()}
        for name in sorted(rank, key=lambda name: (rank[name], name))[self.max_nodes :]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        for other in self.nodes.pop(name).near - {name}:
            neighbour = self.nodes[other]
            neighbour.size -= len(neighbour.edges.pop(name, ()))
            neighbour.settled_edges.pop(name, None)
            neighbour.near.discard(name)

    def _importance(self, name: str, node: Node) -> float:
        if self.importance_fn is None:
            return float(node.count * (1 + len(node.near)))
        given = self.importance_fn(name, node.data())
        try:
            value = float(given)
        except (TypeError, ValueError):
            value = math.nan
        if value != value:
            raise BadInput(f"importance_fn: gave no number for {name!r}; give each node one, 0.0 for the least")
        return value

    def merge(self, graph: Graph) -> None:
        """Add another graph's nodes, edges and counts. Merging in another order comes to the same, but for ties."""
        for name, data in graph.nodes(data=True):
            weighed = data.get("weighed", 0)
            node = self.nodes.setdefault(name, Node(data["type"], data["label"]))
            node.count += data["count"]
            node.weighed += weighed
            node.attention += round(data.get("attention", 0.0) * weighed * MILLION)
        for source, target, data in graph.edges(data=True):
            self.join(source, target, (data["type"], data["lens"], data.get("by", "")), data["count"])
        if len(self.nodes) > self.ceiling:
            self.prune()

    def merge_new(self, other: "Tally") -> None:
        """Add what another tally counted since it was settled."""
        for name, theirs in other.nodes.items():
            node = self.nodes.setdefault(name, Node(theirs.type, theirs.label))
            count, weighed, attention = theirs.settled
            node.count += theirs.count - count
            node.weighed += theirs.weighed - weighed
            node.attention += theirs.attention - attention
        for name, theirs in other.nodes.items():
            for target, kinds in theirs.edges.items():
                settled = theirs.settled_edges.get(target, {})
                for kind, count in kinds.items():
                    if count > settled.get(kind, 0):
                        self.join(name, target, kind, count - settled.get(kind, 0))
        for name in [name for name, node in self.nodes.items() if not node.count]:
            self._drop(name)  # settled before, and gone from the file since
        if len(self.nodes) > self.ceiling:
            self.prune()

    def settle(self) -> None:
        """What there is now is what the file holds."""
        for node in self.nodes.values():
            node.settled = node.count, node.weighed, node.attention
            node.settled_edges = {target: dict(kinds) for target, kinds in node.edges.items()}

    def graph(self) -> Graph:
        graph: Graph = nx.MultiDiGraph()
        graph.add_nodes_from((name, node.data()) for name, node in self.nodes.items())
        for name, node in self.nodes.items():
            for target, kinds in node.edges.items():
                for (kind, lens, by), count in kinds.items():
                    add_edge(graph, name, target, kind, lens, count, by)
        return graph


class KnowledgeGraph:
    """The persistent graph in the file `path`, which need not exist yet.

    Never more than 1.25 × `max_nodes` nodes in memory and `max_nodes` in the file: the most important, by
    `importance_fn` or else by mentions times connections. Several processes may grow one file.
    """

    def __init__(
        self,
        path: Path,
        max_nodes: int = 1000,
        importance_fn: ImportanceFn | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Raises BadInput for a bound that is none or a file above `max_bytes`, CorruptFile for one of another kind."""
        if max_nodes < 1:
            raise BadInput(f"max_nodes={max_nodes}: a knowledge graph needs at least one node")
        self.path, self.max_nodes, self.importance_fn, self.max_bytes = path, max_nodes, importance_fn, max_bytes
        self._read = ""
        self._tally = Tally(max_nodes, importance_fn)
        self._catch_up()

    def __len__(self) -> int:
        return len(self._tally.nodes)

    def add(self, chains: Iterable[Chain]) -> None:
        """Grow by the chains of dreams. Raises BadInput for a lens that there isn't, or a phrase that no
        file could hold; then none is added."""
        chains = list(chains)
        for chain in chains:
            if chain.lens not in LENSES:
                raise BadInput(f"{chain.lens!r} is no lens; a dream has {', '.join(LENSES)}")
            for phrase in (phrase for step in chain.steps for phrase in step):
                if _NOT_HELD.search(phrase):
                    raise BadInput(f"{phrase!r}: has characters that a graph's file can't hold; leave them out")
        for chain in chains:
            self._tally.add(chain)

    def merge(self, graph: Graph) -> None:
        """Grow by another knowledge graph (`load_graph`, `build_graph`)."""
        self._tally.merge(graph)

    def graph(self) -> Graph:
        """A copy as networkx.MultiDiGraph, of the form that `build_graph` gives."""
        return self._tally.graph()

    def save(self) -> None:
        """Write the most important nodes, after merging what others have written since this graph was read."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.with_name(f".{self.path.name}.lock").open("w", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{self.path}: can't be written ({error.strerror}); name another file") from error
        with file:
            lock(file)
            self._catch_up()
            self._tally.prune()
            save_graph(self.graph(), self.path, self.max_nodes)
            self._read = _digest(self.path)
            self._tally.settle()

    def _catch_up(self) -> None:
        """Where the file isn't the one read or written last: what it holds, and what is new here on top."""
        if not self.path.exists() or (digest := _digest(self.path)) == self._read:
            return
        tally = Tally(self.max_nodes, self.importance_fn)
        tally.merge(load_graph(self.path, self.max_bytes, remedy="delete it, or name another file"))
        tally.settle()
        tally.merge_new(self._tally)
        self._tally, self._read = tally, digest


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}); name another file") from error
