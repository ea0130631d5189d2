"""The dream graph: which of the steps that were dreamed matter, which paths are right, and what they come to.

Every step of every path is a node. Temporal edges join the steps that follow each other on a path (16 for 4 × 5),
causal edges join the paths at one time step. Messages go both ways along both, and along nothing else.

Shape legend: B prompts, S paths, T steps, N = S·T nodes, D = 512, W inner width, H heads, E = W / H.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from distill.dream.record import Branch, DreamRecord, Edge
from distill.errors import BadInput
from distill.knowledge.growing_graph import Chain, ImportanceFn, KnowledgeGraph
from distill.mining.triplets import LENSES, clean_phrase

Labels = Sequence[Sequence[tuple[str, str, str]]]
"""(what, action, result) of each step of each path."""

DreamSequence = DreamRecord | Branch | Mapping[str, Sequence[tuple[str, str, str]]]
"""What knowledge is made of: a whole dreaming (what it kept), one path, or lens → steps as labels."""

SELF, EARLIER, LATER, ACROSS = range(4)
"""What one node is to another that reads it: itself, the step before it or after it, the same step elsewhere."""

NEVER = -30.0
"""Logit of the chance that a path without steps is right."""


@dataclass(frozen=True)
class Reasoned:
    """What the graph says of the dreams of B prompts.

    embedding          (B, D) what all dreams come to
    importance_logits  (B, S, T) of the nodes; of no meaning where no step lives
    node_importance    (B, S, T) in [0, 1], 0 where no step lives
    temporal           (B, S, T − 1) in [0, 1]: edge between steps t and t + 1, the mean of both directions
    causal             (B, T, S, S) in [0, 1]: [t, a, b] is how much path a reads path b at step t; 0 for a = b
    score_logits       (B, S) of the chance that a path is right

    Edge importances are attention itself, mean over heads and hops, divided by the strongest edge's of the prompt.
    """

    embedding: Tensor
    importance_logits: Tensor
    node_importance: Tensor
    temporal: Tensor
    causal: Tensor
    score_logits: Tensor

    @property
    def scores(self) -> Tensor:
        """(B, S) chance, 0 to 1, that each path is right."""
        return self.score_logits.sigmoid()


class Hop(nn.Module):
    """One round of messages: attention along edges, then a feed-forward layer, each on top of what was there.

    Each head adds a learned bias for what the two nodes are to each other (edge encoding, arXiv:2106.05234).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.relation = nn.Parameter(torch.zeros(4, heads))
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, nodes: Tensor, relations: Tensor, readable: Tensor) -> tuple[Tensor, Tensor]:
        """nodes (B, N, W), relations (N, N) with −1 for no edge, readable (B, N, N) → nodes, attention (B, H, N, N)."""
        q, k, v = self.qkv(self.norm(nodes)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relation[relations.clamp_min(0)].permute(2, 0, 1)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        attention = scores.masked_fill(~readable[:, None], float("-inf")).softmax(-1)
        nodes = nodes + self.out((attention @ v).transpose(1, 2).flatten(2))
        return nodes + self.feed(nodes), attention


class DreamGraphReasoner(nn.Module):
    """Reasons over the graph of all dreams of a prompt; see the module."""

    def __init__(self, dim: int = 512, heads: int = 8, hops: int = 3, width: int = 256) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"a width of {width} can't be shared evenly by {heads} heads of the dream graph")
        self.dim, self.heads, self.width = dim, heads, width
        self.step = nn.Linear(3 * dim, width)
        self.prompt = nn.Linear(3 * dim, width)
        self.hops = nn.ModuleList(Hop(width, heads) for _ in range(hops))
        self.norm = nn.LayerNorm(width)
        self.importance = nn.Linear(width, 1)
        self.score = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, 1))
        self.outcome = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, embeddings: Tensor, live: Tensor, prompt: Tensor) -> Reasoned:
        """embeddings (B, S, T, 3, D) of image tokens, live (B, S, T) bool, prompt (B, 3, D).

        What stands in a step that doesn't live changes nothing. Order of paths changes nothing but the order of
        what is said of them.
        """
        _, paths, steps = live.shape
        relations = relations_of(paths, steps, live.device)
        alive = live.flatten(1)
        itself = relations == SELF  # a node that doesn't live reads itself, so that no row is empty
        readable = (relations >= 0) & alive[:, None, :] | itself
        question = self.prompt(prompt.flatten(1))
        nodes = self.step(embeddings.flatten(3)) + question[:, None, None] + positions(steps, self.width, question)
        nodes = nodes.masked_fill(~live[..., None], 0.0).flatten(1, 2)
        weights = nodes.new_zeros(len(nodes), paths * steps, paths * steps)
        for hop in self.hops:
            nodes, attention = hop(nodes, relations, readable)
            weights = weights + attention.mean(1) / len(self.hops)
        nodes = self.norm(nodes).unflatten(1, (paths, steps))
        logits = self.importance(nodes)[..., 0]
        importance = logits.sigmoid() * live
        share = importance / importance.sum((1, 2), keepdim=True).clamp_min(1e-6)
        embedding = self.outcome(torch.cat([(nodes * share[..., None]).sum((1, 2)), question], -1))
        temporal, causal = edge_importances(weights, live)
        return Reasoned(embedding, logits, importance, temporal, causal, self._score(nodes, live))

    def _score(self, nodes: Tensor, live: Tensor) -> Tensor:
        """(B, S, T, W) → (B, S): mean, maximum (one wrong step spoils a path) and last of a path's steps."""
        real = live[..., None]
        count = live.sum(-1, keepdim=True)
        mean = (nodes * real).sum(2) / count.clamp_min(1)
        most = nodes.masked_fill(~real, float("-inf")).amax(2).masked_fill(count == 0, 0.0)
        at = (live * torch.arange(1, live.shape[-1] + 1, device=live.device)).amax(-1).clamp_min(1) - 1
        last = nodes.gather(2, at[..., None, None].expand(-1, -1, 1, nodes.shape[-1]))[:, :, 0]
        return self.score(torch.cat([mean, most, last], -1))[..., 0].masked_fill(count[..., 0] == 0, NEVER)

    @staticmethod
    def arbitrate(reasoned: Reasoned, live: Tensor, keep_above: float) -> Tensor:
        """(B, S) bool: the paths that are worth reading. Of each lens the best, if its chance is `keep_above` or more.

        Path k is of lens k mod 4; of equals the first. There may be none.
        """
        scores = reasoned.scores.masked_fill(~live.any(-1), -1.0)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        for lens in range(min(len(LENSES), scores.shape[1])):
            best = lens + len(LENSES) * scores[:, lens :: len(LENSES)].argmax(1, keepdim=True)
            keep.scatter_(1, best, scores.gather(1, best) >= max(keep_above, 0.0))
        return keep

    @staticmethod
    def to_networkx(reasoned: Reasoned, live: Tensor, labels: Labels | None = None, item: int = 0) -> Any:
        """Prompt `item`'s graph as networkx.MultiDiGraph, of plain values that GraphML can hold.

        Nodes "path/step" with lens, importance and, given `labels`, what, action, result and label (all three).
        Edges as `graph_edges` gives them, with kind and importance.
        """
        graph: Any = nx.MultiDiGraph()
        importance = reasoned.node_importance[item].tolist()
        for path, step in live[item].nonzero().tolist():
            data: dict[str, Any] = {"lens": LENSES[path % len(LENSES)], "importance": importance[path][step]}
            if labels is not None:
                words = labels[path][step]
                data |= {"what": words[0], "action": words[1], "result": words[2], "label": " ".join(words)}
            graph.add_node(f"{path}/{step}", **data)
        for edge in graph_edges(reasoned, live, item):
            ends = (f"{path}/{step}" for path, step in (edge.source, edge.target))
            graph.add_edge(*ends, kind=edge.kind, importance=edge.importance)
        return graph

    @staticmethod
    def save_important_knowledge_to_graphml(
        dream_sequences: Iterable[DreamSequence],
        filepath: str | Path,
        importance_fn: ImportanceFn | None = None,
        max_nodes: int = 1000,
    ) -> None:
        """Add dreams to the knowledge graph in a file, which need not exist yet, and keep its most important nodes.

        importance_fn(node, data) → float, by default data["importance"]: mentions times connections. data holds
        also label, type, count, attention (the mean importance of the node's steps, 0 to 1) and weighed (of how
        many). The file loads with networkx.read_graphml. Raises what `KnowledgeGraph` raises.
        """
        graph = KnowledgeGraph(Path(filepath), max_nodes, importance_fn)
        for dream in dream_sequences:
            graph.add(chains_of(dream))
        graph.save()


def chains_of(dream: DreamSequence) -> Iterator[Chain]:
    """A dream as the knowledge graph takes it, in clean phrases. Of a whole dreaming what was kept is knowledge."""
    if isinstance(dream, Mapping):
        for lens, steps in dream.items():
            yield Chain(lens, [labels for step in steps if all(labels := _clean(*step))])
        return
    branches = [dream] if isinstance(dream, Branch) else [branch for branch in dream.branches if branch.kept]
    for branch in branches:
        labels = [_clean(*(slot.label for slot in step.slots)) for step in branch.steps]
        whole = [(said, step.importance) for said, step in zip(labels, branch.steps, strict=True) if all(said)]
        yield Chain(branch.lens, [said for said, _ in whole], [importance for _, importance in whole])


def _clean(what: str, action: str, result: str) -> tuple[str, str, str]:
    return clean_phrase(what), clean_phrase(action), clean_phrase(result)


def graph_edges(reasoned: Reasoned, live: Tensor, item: int = 0) -> list[Edge]:
    """The edges between prompt `item`'s living steps, each end named by (path, step).

    A temporal edge leads from a step to the next, a causal one from the path that is read to the one that reads.
    """
    alive = live[item].tolist()
    edges: list[Edge] = []
    for path, row in enumerate(reasoned.temporal[item].tolist()):
        for step, weight in enumerate(row):
            if alive[path][step] and alive[path][step + 1]:
                edges.append(Edge((path, step), (path, step + 1), "temporal", weight))
    for step, table in enumerate(reasoned.causal[item].tolist()):
        for reader, row in enumerate(table):
            for read, weight in enumerate(row):
                if reader != read and alive[reader][step] and alive[read][step]:
                    edges.append(Edge((read, step), (reader, step), "causal", weight))
    return edges


def relations_of(paths: int, steps: int, device: torch.device | None = None) -> Tensor:
    """(N, N): what the column's node is to the row's (SELF, EARLIER, LATER, ACROSS), −1 without an edge."""
    path = torch.arange(paths, device=device).repeat_interleave(steps)
    step = torch.arange(steps, device=device).repeat(paths)
    same, apart = path[:, None] == path, step[:, None] - step
    found = torch.full((paths * steps, paths * steps), -1, device=device)
    for relation, where in (
        (SELF, same & (apart == 0)),
        (EARLIER, same & (apart == 1)),
        (LATER, same & (apart == -1)),
        (ACROSS, ~same & (apart == 0)),
    ):
        found[where] = relation
    return found


def positions(steps: int, width: int, like: Tensor) -> Tensor:
    """(T, W) sine and cosine of the step's number (arXiv:1706.03762)."""
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10_000.0) / width))
    angles = torch.arange(steps, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width].to(like.dtype)


def edge_importances(weights: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, N, N) → temporal (B, S, T − 1) and causal (B, T, S, S), the prompt's strongest edge being 1."""
    _, paths, steps = live.shape
    table = weights.unflatten(2, (paths, steps)).unflatten(1, (paths, steps))  # (B, S, T, S, T)
    forward = table.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (B, S, T, T): of one path, reader × read
    both = (forward.diagonal(1, 2, 3) + forward.diagonal(-1, 2, 3)) / 2
    temporal = both * (live[..., 1:] & live[..., :-1])
    across = table.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)  # (B, T, S, S)
    pairs = live.transpose(1, 2)[..., :, None] & live.transpose(1, 2)[..., None, :]
    causal = across * (pairs & ~torch.eye(paths, dtype=torch.bool, device=live.device))
    most = torch.cat([temporal.flatten(1), causal.flatten(1)], 1).amax(1).clamp_min(1e-9)
    return temporal / most[:, None, None], causal / most[:, None, None, None]
