"""Graph retrieval: what a knowledge graph knows of a prompt's things, as (what, action, result).

A prompt's content words are looked up among the labels of nodes, by stem; a rare word weighs more than a common one.
From the nodes found, chains what —performs→ action —causes→ result that were said together (what —yields→ result by
this action) are gathered in one of three ways:

neighbourhood   chains through a node found, then chains next to these; each adds words of the prompt not yet told
walk            from such a chain on to what followed it (`then`), and on; counts, words and the last outcome draw it
sample          chains through a node found, drawn by the importance of their nodes and what they share

A fourth, `attention`, has learned which chains answers need, and goes on over several hops (graph_rag.py).
"""

import contextlib
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from distill.errors import BadInput
from distill.knowledge.graph import Graph
from distill.mining.inflect import content_stems

WAYS = ("neighbourhood", "walk", "sample")
"""Those that need no learning."""
ATTENTION = "attention"
RETRIEVALS = (*WAYS, ATTENTION)
MOST = 2000
"""Chains that one retrieval looks at: those through the nodes that share most with the prompt."""
PER_NODE = 64
"""Of them those through one node on the way of `attention`."""
PATIENCE = 8
"""Steps that a walk may take for each chain wanted."""

Labels = tuple[str, str, str]
Key = TypeVar("Key")


class Chain(NamedTuple):
    """Names of three nodes, and the lens under which they were said together."""

    what: str
    action: str
    result: str
    lens: str


@dataclass
class Entry:
    """A node: its label, the label's stems, how often it was mentioned, and the chains through it.

    then: of an outcome, (action, lens) → how often that came next
    """

    label: str
    stems: frozenset[str]
    count: int = 0
    chains: set[Chain] = field(default_factory=set[Chain])
    then: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    @property
    def importance(self) -> int:
        """Mentions times chains, plus one."""
        return self.count * (1 + len(self.chains))

    @property
    def concept(self) -> frozenset[str]:
        """What it speaks of: `the floor` is `to the floor`, whatever their roles."""
        return self.stems or frozenset((self.label,))


class Attention(Protocol):
    """What has learned which chains a prompt needs (GraphRAGEnhanced)."""

    def weigh(self, retriever: "Retriever", prompt: str) -> dict[Chain, float]:
        """The chains around a prompt, each with its probability."""
        ...

    def rank(self, retriever: "Retriever", prompt: str, draw: random.Random | None = None) -> Iterable[Chain]:
        """The same, likeliest first; with `draw` in an order drawn by their probabilities."""
        ...


class Retriever:
    """An index of a knowledge graph by word. Equal graphs, seeds and prompts give equal chains.

    attention: what ranks chains where they are retrieved by it.
    """

    def __init__(self, graph: Graph, attention: Attention | None = None) -> None:
        """Raises BadInput for a graph that doesn't tell what was said together: of an earlier version, or too small."""
        self.attention = attention
        self.entries: dict[str, Entry] = {}
        self.chains: dict[Chain, int] = {}
        self.by_stem: dict[str, set[str]] = defaultdict(set)
        self.by_concept: dict[frozenset[str], set[str]] = defaultdict(set)
        self.add(graph)
        if graph.number_of_edges() and not self.chains:
            raise BadInput(
                "the knowledge graph holds no chains: either its bound leaves room for none (give `remember` more "
                "max_nodes), or an earlier version wrote it (run `dream mine --force`)"
            )

    def retrieve(
        self, prompt: str, how: str = "neighbourhood", limit: int = 4, seed: int = 0, drawn: bool = False
    ) -> list[Labels]:
        """At most `limit` different chains as labels of what, action and result, the most fitting first.

        Fewer or none where the graph knows little of the prompt's words. drawn: by attention, too, chance has a part,
        each chain having its probability. Raises BadInput for another `how`, and for attention where none was learned.
        """
        if how not in RETRIEVALS:
            raise BadInput(f"{how!r} is no way to retrieve; choose {', '.join(RETRIEVALS)}")
        question = Question(self, prompt, limit, random.Random(f"{seed}:{prompt}"))
        ways: dict[str, Callable[[], Iterable[Chain]]] = {
            "neighbourhood": question.neighbourhood,
            "walk": question.walk,
            "sample": question.sample,
            ATTENTION: lambda: self._attended(prompt, question.draw if drawn else None),
        }
        found: dict[Labels, None] = {}
        for chain in ways[how]():
            if len(found) >= limit:
                break
            found[
                self.entries[chain.what].label, self.entries[chain.action].label, self.entries[chain.result].label
            ] = None
        return list(found)

    def _attended(self, prompt: str, draw: random.Random | None) -> Iterable[Chain]:
        if self.attention is None:
            raise BadInput("retrieve='attention': nothing was learned for this graph; choose another way")
        return self.attention.rank(self, prompt, draw)

    def near(self, seeds: Iterable[str], hops: int, most: int) -> list[Chain]:
        """At most `most` chains within `hops` of nodes, over things and outcomes that share a concept: of each hop
        first those through nodes with few, then those said most. Actions join what has nothing to do with each other:
        no hop leads over one but from a seed."""
        found: dict[Chain, None] = {}
        ahead = {name for name in seeds if name in self.entries}
        passed = set(ahead)
        for _ in range(hops):
            reached: set[frozenset[str]] = set()
            for name in sorted(ahead, key=lambda name: (len(self.entries[name].chains), name)):
                fresh = sorted(self.entries[name].chains - found.keys(), key=lambda chain: (-self.chains[chain], chain))
                for chain in fresh[: min(PER_NODE, most - len(found))]:
                    found[chain] = None
                    reached |= {self.entries[end].concept for end in (chain.what, chain.result)}
            ahead = {name for concept in reached for name in self.by_concept[concept]} - passed
            passed |= ahead
        return list(found)

    @contextlib.contextmanager
    def without(self, graph: Graph) -> Generator[None]:
        """As if the triplets of `graph`, a part of what was indexed, had never been said."""
        self.add(graph, -1)
        try:
            yield
        finally:
            self.add(graph)

    def weight(self, stem: str) -> float:
        """Of a word: inverse document frequency over the labels."""
        return math.log(1 + len(self.entries) / len(self.by_stem[stem]))

    def add(self, graph: Graph, sign: int = 1) -> None:
        """Count a graph's nodes and edges in, or with −1 out. What comes to nothing is gone."""
        for name, data in graph.nodes(data=True):
            entry = self.entries.get(name)
            if entry is None:
                entry = self.entries[name] = Entry(data["label"], frozenset(content_stems([data["label"]])))
                for stem in entry.stems:
                    self.by_stem[stem].add(name)
                self.by_concept[entry.concept].add(name)
            entry.count += sign * data["count"]
        for source, target, data in graph.edges(data=True):
            count, lens = sign * data["count"], data["lens"]
            if data["type"] == "then":
                _tally(self.entries[source].then, (target, lens), count)
            # What was by an action that a full graph dropped is no chain any more.
            elif data["type"] == "yields" and (action := f"action:{data['by']}") in self.entries:
                chain = Chain(source, action, target, lens)
                _tally(self.chains, chain, count)
                for name in chain[:3]:
                    (set.add if chain in self.chains else set.discard)(self.entries[name].chains, chain)
        for name in [name for name in graph if not self.entries[name].count]:
            entry = self.entries.pop(name)
            self.by_concept[entry.concept].discard(name)
            if not self.by_concept[entry.concept]:
                del self.by_concept[entry.concept]
            for stem in entry.stems:
                self.by_stem[stem].discard(name)
                if not self.by_stem[stem]:
                    del self.by_stem[stem]


def _tally(counts: dict[Key, int], key: Key, count: int) -> None:
    counts[key] = counts.get(key, 0) + count
    if not counts[key]:
        del counts[key]


class Question:
    """One prompt's way through the graph.

    weights  the prompt's words that the graph knows → what each weighs
    found    node → those of them that its label holds
    """

    def __init__(self, retriever: Retriever, prompt: str, limit: int, draw: random.Random) -> None:
        self.entries, self.counts, self.limit, self.draw = retriever.entries, retriever.chains, limit, draw
        stems = sorted(stem for stem in content_stems([prompt]) if stem in retriever.by_stem)
        self.weights = {stem: retriever.weight(stem) for stem in stems}
        self._weighed: dict[frozenset[str], float] = {}
        self.found: dict[str, frozenset[str]] = {}
        for stem in stems:
            for name in retriever.by_stem[stem]:
                self.found[name] = self.entries[name].stems & frozenset(stems)

    def neighbourhood(self) -> Generator[Chain]:
        """Chains through a node found; where these are too few, also those that share a node with one of them."""
        chains = self._near()
        yield from self._telling(chains)
        if len(chains) < self.limit:
            nodes = sorted({name for chain in chains for name in chain[:3]})
            further = {chain for name in nodes for chain in self.entries[name].chains}.difference(chains)
            yield from self._telling(sorted(further)[:MOST])

    def sample(self) -> list[Chain]:
        """Chains through a node found in an order drawn by importance, without putting back (exponential keys:
        Efraimidis and Spirakis, 2006)."""
        chains = self._near()
        drawn = {chain: self.draw.expovariate(self._importance(chain)) for chain in chains}
        return sorted(chains, key=drawn.__getitem__)

    def walk(self) -> Generator[Chain]:
        """Chain after chain, each going on where the last came to, or starting anew where that leads nowhere."""
        starts = self._near()
        chain: Chain | None = None
        for _ in range(PATIENCE * self.limit if starts else 0):
            chain = self._onward(chain) or self._pick(starts, frozenset())
            yield chain

    def _onward(self, chain: Chain | None) -> Chain | None:
        """A chain that followed this one's outcome under the same lens, drawn; None where nothing did."""
        if chain is None:
            return None
        came = self.entries[chain.result]
        actions = sorted(action for action, lens in came.then if lens == chain.lens and action in self.entries)
        if not actions:
            return None
        action = self.draw.choices(actions, [came.then[name, chain.lens] for name in actions])[0]
        chains = sorted(
            then for then in self.entries[action].chains if then.lens == chain.lens and then.action == action
        )
        return self._pick(chains, came.stems) if chains else None

    def _pick(self, chains: list[Chain], context: frozenset[str]) -> Chain:
        """One of them, drawn by how often each was said, what it shares with the prompt, and whether its entity is
        what the walk came to."""
        weights = [
            self.counts[chain]
            * (1 + self._weigh(self._stems(chain)))
            * (1 + PATIENCE * bool(context & self.entries[chain.what].stems))
            for chain in chains
        ]
        return self.draw.choices(chains, weights)[0]

    def _near(self) -> list[Chain]:
        """Chains through nodes found, those that share most with the prompt first, at most MOST; then by name."""
        chains: set[Chain] = set()
        for name in sorted(self.found, key=lambda name: (-self._weigh(self.found[name]), name)):
            chains.update(itertools.islice(sorted(self.entries[name].chains - chains), MOST - len(chains)))
        return sorted(chains)

    def _telling(self, chains: list[Chain]) -> Generator[Chain]:
        """In turn the chain that adds most to the words told so far; of equals what shares most, then most said."""
        groups: dict[frozenset[str], list[Chain]] = defaultdict(list)
        for chain in chains:
            groups[self._stems(chain)].append(chain)
        for group in groups.values():
            group.sort(key=lambda chain: (self.counts[chain], chain))
        told = frozenset[str]()
        while groups:
            ahead = {
                stems: (self._weigh(stems - told), self._weigh(stems), self.counts[group[-1]], group[-1])
                for stems, group in groups.items()
            }
            best = max(ahead, key=ahead.__getitem__)
            yield groups[best].pop()
            told |= best
            if not groups[best]:
                del groups[best]

    def _stems(self, chain: Chain) -> frozenset[str]:
        """The prompt's words that a chain's labels hold."""
        return frozenset[str]().union(*(self.found.get(name, ()) for name in chain[:3]))

    def _weigh(self, stems: frozenset[str]) -> float:
        """Of words of the prompt; summed in a fixed order, so that equals are equal."""
        if stems not in self._weighed:
            self._weighed[stems] = sum(self.weights[stem] for stem in sorted(stems))
        return self._weighed[stems]

    def _importance(self, chain: Chain) -> float:
        return self._weigh(self._stems(chain)) * sum(self.entries[name].importance for name in chain[:3])
