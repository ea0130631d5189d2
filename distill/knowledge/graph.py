"""The knowledge graph of all triplets: entities, actions and outcomes, and how often each led to the next.

Nodes are `what:ball` (type entity), `action:falls` (action) and `result:to the ground` (outcome). Edges:
`performs` what → action, `causes` action → result, `then` result → the action of the chain's next step, and `yields`
what → result, `by` the action: which three were said together, where many share an action. Each
carries its lens and a count; edges of one kind, lens and action between two nodes are one edge. A graph that grows with
every dream (growing_graph.py) also has on each node the mean `attention` that the dreamer paid it, and in
`weighed` how many mentions that is the mean of.
"""

import io
import warnings
from array import array
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import networkx as nx
import numpy as np

from distill.errors import BadInput, CorruptFile
from distill.mining.triplets import LENSES, Triplet, by_trace
from distill.run import write_atomic

Graph = Any
"""networkx.MultiDiGraph; networkx has no precise types."""

NODE_TYPES = {"what": "entity", "action": "action", "result": "outcome"}
EDGE_TYPES = ("performs", "causes", "then", "yields")
EDGES = 32
"""Edges a node that are written at most, in the mean."""
MAX_BYTES = 256 * 2**20
"""Of a GraphML file that is read back: about 400,000 nodes."""


def build_graph(triplets: Iterable[Triplet]) -> Graph:
    """The graph of triplets, with `importance` on each node."""
    graph: Graph = nx.MultiDiGraph()
    for group in by_trace(triplets).values():
        previous: Triplet | None = None
        for triplet in group:
            what, action, result = _nodes(graph, triplet)
            add_edge(graph, what, action, "performs", triplet.lens, 1)
            add_edge(graph, action, result, "causes", triplet.lens, 1)
            add_edge(graph, what, result, "yields", triplet.lens, 1, triplet.action)
            if previous is not None and previous.lens == triplet.lens:
                add_edge(graph, f"result:{previous.result}", action, "then", triplet.lens, 1)
            previous = triplet
    weigh(graph)
    return graph


class Tally:
    """The graph of more triplets than a graph can hold: 16 bytes each, and each phrase once."""

    def __init__(self) -> None:
        self.phrases: dict[str, int] = {}
        self.nodes = self.edges = self.dropped = 0
        self._rows = array("i")  # of each its phrases' numbers, and 2 · lens + whether it follows the one before

    def number(self, phrase: str) -> int:
        return self.phrases.setdefault(phrase, len(self.phrases))

    def add(self, triplets: Iterable[Triplet]) -> None:
        """Those of one trace, in order of lenses and steps."""
        before = ""
        for triplet in triplets:
            code = 2 * LENSES.index(triplet.lens) + (triplet.lens == before)
            self._rows.extend((*map(self.number, triplet.phrases), code))
            before = triplet.lens

    def graph(self, max_nodes: int) -> Graph:
        """What `most_important` leaves of `build_graph` of them all, with the commonest EDGES a node. Counts all
        `nodes` and `edges`, and the `dropped` ones between these nodes."""
        rows = np.frombuffer(self._rows, np.int32).reshape(-1, 4).astype(np.int64)
        phrases, roles = list(self.phrases), list(NODE_TYPES)
        size = len(phrases) * len(roles)  # a node's number: its phrase's, then its role's
        what, action, result = (rows[:, i] * len(roles) + i for i in range(len(roles)))
        lens, follows = rows[:, 3] // 2, np.flatnonzero(rows[:, 3] % 2)
        told = (what, action, 0, lens, -1), (action, result, 1, lens, -1), (what, result, 3, lens, rows[:, 1])
        then = (result[follows - 1], action[follows], 2, lens[follows], -1)
        edges = np.concatenate([np.stack(np.broadcast_arrays(*columns), axis=1) for columns in (*told, then)])
        edges = edges[np.lexsort(edges.T)]
        first = np.flatnonzero((np.diff(edges, axis=0, prepend=-2) != 0).any(1))
        times, edges = np.diff(first, append=len(edges)), edges[first]
        pairs = np.concatenate([edges[:, 0] * size + edges[:, 1], edges[:, 1] * size + edges[:, 0]])
        counts = np.bincount(np.concatenate([what, action, result]), minlength=size)
        importance = counts * (1 + np.bincount(np.unique(pairs) // max(size, 1), minlength=size))
        self.nodes, self.edges = int((counts > 0).sum()), len(edges)

        def name(node: int) -> str:
            return f"{roles[node % len(roles)]}:{phrases[node // len(roles)]}"

        least = np.sort(importance)[-max_nodes:].min(initial=np.iinfo(np.int64).max) if max_nodes else np.inf
        among = np.flatnonzero((importance >= least) & (counts > 0)).tolist()
        ranked = sorted(among, key=lambda node: (-importance[node], name(node)))[:max_nodes]
        small: Graph = nx.MultiDiGraph()
        for node in ranked:
            role, phrase = roles[node % len(roles)], phrases[node // len(roles)]
            _node(small, name(node), NODE_TYPES[role], phrase, int(counts[node]))
            small.nodes[name(node)]["importance"] = float(importance[node])
        kept = np.flatnonzero(np.isin(edges[:, :2], ranked).all(1))
        self.dropped = max(len(kept) - EDGES * max_nodes, 0)
        kept = np.sort(kept[np.argsort(-times[kept], kind="stable")][: EDGES * max_nodes])
        for (source, target, kind, of, by), count in zip(edges[kept].tolist(), times[kept].tolist(), strict=True):
            action_of = phrases[by] if by >= 0 else ""
            add_edge(small, name(source), name(target), EDGE_TYPES[kind], LENSES[of], count, action_of)
        return small


def _nodes(graph: Graph, triplet: Triplet) -> list[str]:
    names: list[str] = []
    for (role, kind), phrase in zip(NODE_TYPES.items(), triplet.phrases, strict=True):
        name = f"{role}:{phrase}"
        _node(graph, name, kind, phrase, 1)
        names.append(name)
    return names


def _node(graph: Graph, name: str, kind: str, label: str, count: int) -> None:
    if name in graph:
        graph.nodes[name]["count"] += count
    else:
        graph.add_node(name, type=kind, label=label, count=count, importance=0.0)


def add_edge(graph: Graph, source: str, target: str, kind: str, lens: str, count: int, by: str = "") -> None:
    key = f"{kind}/{lens}/{by}" if by else f"{kind}/{lens}"
    if graph.has_edge(source, target, key):
        graph.edges[source, target, key]["count"] += count
    else:
        graph.add_edge(source, target, key, type=kind, lens=lens, count=count, **({"by": by} if by else {}))


def weigh(graph: Graph) -> None:
    """Set each node's `importance`: mentions times the number of different nodes it is connected with, plus one.

    What is said often is important, and so is what connects; either alone is not enough for the top.
    """
    for name, data in graph.nodes(data=True):
        data["importance"] = float(
            data["count"] * (1 + len(set(graph.successors(name)) | set(graph.predecessors(name))))
        )


def merge(into: Graph, other: Graph) -> None:
    """Add another graph's nodes, edges and counts, and weigh anew."""
    for name, data in other.nodes(data=True):
        _node(into, name, data["type"], data["label"], data["count"])
    for source, target, data in other.edges(data=True):
        add_edge(into, source, target, data["type"], data["lens"], data["count"], data.get("by", ""))
    weigh(into)


def most_important(graph: Graph, max_nodes: int, first: Container[str] = ()) -> Graph:
    """The subgraph of the `max_nodes` most important nodes, ties by name; in a fixed order of nodes and edges. first:
    nodes that come before all others."""
    ranked = sorted(graph.nodes, key=lambda name: (name not in first, -graph.nodes[name]["importance"], name))
    ranked = ranked[:max_nodes]
    kept = set(ranked)
    small: Graph = nx.MultiDiGraph()
    small.add_nodes_from((name, dict(graph.nodes[name])) for name in ranked)
    edges = [edge for edge in graph.edges(keys=True, data=True) if edge[0] in kept and edge[1] in kept]
    small.add_edges_from(sorted(edges, key=lambda edge: edge[:3]))
    return small


def save_graph(graph: Graph, path: Path, max_nodes: int, first: Container[str] = ()) -> None:
    """Write the most important nodes, of them these `first`, as GraphML, atomically. Equal graphs give equal bytes."""
    buffer = io.BytesIO()
    writer: Any = nx.write_graphml_xml
    writer(most_important(graph, max_nodes, first), buffer)
    write_atomic(path, buffer.getvalue())


def load_graph(path: Path, max_bytes: int = MAX_BYTES, remedy: str = "run `dream mine --force`") -> Graph:
    """Read a graph that `save_graph` wrote. `remedy`: what to do about a file that can't be used.

    Raises BadInput where there is none or it is larger than `max_bytes`, CorruptFile where it is no such graph.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise BadInput(f"{path}: {size:,} bytes, more than {max_bytes:,}; {remedy}")
        head = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}); {remedy}") from error
    try:
        # Entities can expand without bound, and GraphML needs none; in UTF-16, full of zeros, they could hide.
        if b"<!ENTITY" in head or b"<!DOCTYPE" in head or b"\0" in head:
            raise ValueError("a document type declaration, or not UTF-8")
        read: Any = nx.read_graphml
        with warnings.catch_warnings():  # of what `_check` refuses in one line
            warnings.simplefilter("ignore", UserWarning)
            graph: Graph = read(io.BytesIO(head), force_multigraph=True)
        _check(graph)
    except (ParseError, nx.NetworkXError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CorruptFile(f"{path}: not a knowledge graph ({reason}); {remedy}") from error
    return graph


def _check(graph: Graph) -> None:
    if not graph.is_directed():
        raise ValueError("its edges have no direction")
    for name, data in graph.nodes(data=True):
        known = NODE_TYPES.get(name.split(":", 1)[0]) == data.get("type") and isinstance(data.get("label"), str)
        attention, weighed = data.get("attention", 0.0), data.get("weighed", 0)
        fits = isinstance(attention, int | float) and 0 <= attention <= 1 and type(weighed) is int and weighed >= 0
        if not (known and fits and _is_count(data.get("count"))):
            raise ValueError(f"node {name!r} lacks a valid type, label, count or attention")
    for source, target, data in graph.edges(data=True):
        known = data.get("type") in EDGE_TYPES and data.get("lens") in LENSES and _is_count(data.get("count"))
        if not known or isinstance(data.get("by"), str) != (data["type"] == "yields"):
            raise ValueError(f"edge {source!r} → {target!r} lacks a valid type, lens, count or action")


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
