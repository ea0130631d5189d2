"""Graph retrieval that has learned what answers need: attention over the chains around a prompt, over several hops.

Entrances to the graph are the nodes that share a word with the prompt, and those whose vectors are nearest to the
prompt's (vectors.py). Around them lie some hundred chains: edges what → result between concepts (the labels of nodes,
whatever their roles), each with its action, lens and count. Concepts read the prompt's words; then in each of several
layers concepts attend to the edges around them, multi-head, and edges read their ends (message passing with edge
embeddings, arXiv:1710.10903). Last each edge is scored, a softmax over the prompt's.

Labels are embedded by their letters and words, so that what joins the graph later is retrieved, too.

Shape legend: B prompts, T words, N concepts, E chains, M = 2E + N messages, W width, H heads, D numbers of a vector.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from distill.config import ImageTokenizerConfig
from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener, silent
from distill.knowledge.graph import build_graph
from distill.knowledge.retrieval import Chain, Labels, Question, Retriever
from distill.knowledge.subgraph import BUCKETS, MAX_WORDS, Batch, batch_of, flat, side_by_side, words_in
from distill.knowledge.vectors import Kind, VectorIndex, index_of
from distill.mining.triplets import LENSES, Triplet
from distill.run import write_atomic

VERSION = 1
RETRIEVAL = "retrieval.safetensors"
"""Beside the knowledge graph that it was learned from."""
MOST = 512
"""Chains around a prompt that are weighed."""
NEAR = 8
"""Entrances by vector."""
STEPS, BATCH, LR = 100, 16, 3e-3
LEAST, EPOCHS = 60, 30
"""Steps, and passes over the examples from there on: few are not learned for STEPS."""
RENEW = 50
"""Steps after which the vectors of nodes are computed anew."""
TEMPERATURE = 0.1
"""Of the softmax over nodes, by cosine."""


def segment_softmax(scores: Tensor, segments: Tensor, count: int) -> Tensor:
    """Softmax of scores (M, …) within each of `count` segments (M,)."""
    where = segments.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    shape = (count, *scores.shape[1:])
    most = scores.new_full(shape, -math.inf).scatter_reduce(0, where, scores.detach(), "amax")
    raised = (scores - most[segments]).exp()
    return raised / raised.new_zeros(shape).index_add(0, segments, raised)[segments]


class GraphAttention(nn.Module):
    """One round of messages: each concept attends to the edges that touch it, either way, and to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.edge = nn.Linear(width, 2 * width, bias=False)
        self.direction = nn.Parameter(0.02 * torch.randn(3, width))
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, nodes: Tensor, edges: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """nodes (N, W), edges (E, W), ends (E, 2) → nodes (N, W), attention (M, H): each edge forward, then back, then
        each node to itself."""
        own = torch.arange(len(nodes), device=nodes.device)
        sources, targets = torch.cat([ends[:, 0], ends[:, 1], own]), torch.cat([ends[:, 1], ends[:, 0], own])
        forward, back, itself = self.direction
        q, k, v = self.qkv(self.norm(nodes)).chunk(3, -1)
        along = self.edge(torch.cat([edges + forward, edges + back, itself.expand_as(nodes)]))
        key, value = (
            (part[sources] + of_edge).unflatten(-1, (self.heads, -1))
            for part, of_edge in zip((k, v), along.chunk(2, -1), strict=True)
        )
        scores = (q[targets].unflatten(-1, (self.heads, -1)) * key).sum(-1) * key.shape[-1] ** -0.5
        attention = segment_softmax(scores, targets, len(nodes))
        read = torch.zeros_like(nodes).index_add(0, targets, (attention[..., None] * value).flatten(1))
        nodes = nodes + self.out(read)
        return nodes + self.feed(nodes), attention


class GraphRAGEnhanced(nn.Module):
    """Retrieves chains of a knowledge graph by attention. `fit` teaches it; untrained, what it finds means nothing.

    config: anything with an `embedding_dim`, such as ImageTokenizerConfig: D, of the space that prompts and nodes meet
    in. index: how that is searched (vectors.py). Raises BadInput for a width that heads can't share evenly.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        width: int = 64,
        heads: int = 4,
        layers: int = 3,
        hops: int = 3,
        index: Kind = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"a width of {width} can't be shared evenly by {heads} heads of the graph's attention")
        dim = int(getattr(config, "embedding_dim", 0)) or width
        self.sizes = {"dim": dim, "width": width, "heads": heads, "layers": layers, "hops": hops}
        self.hops, self.heads = hops, heads
        self.index: Kind = index
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.text = nn.EmbeddingBag(BUCKETS, width, mode="mean")
            self.place = nn.Embedding(MAX_WORDS, width)
            self.ask, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.matching = nn.Parameter(torch.full((heads,), 5.0))
            self.seen = nn.Linear(2, width)
            self.edge = nn.Linear(3 * width + 1, width)
            self.lens = nn.Embedding(len(LENSES), width)
            self.rounds = nn.ModuleList(GraphAttention(width, heads) for _ in range(layers))
            self.edges = nn.ModuleList(self._mixed(4 * width, width) for _ in range(layers))
            self.score = self._mixed(4 * width, 1)
            self.prompt_vector, self.node_vector = self._mixed(width, dim), self._mixed(width, dim)
        self._entrances: tuple[Retriever, list[str], VectorIndex] | None = None
        self.retriever: Retriever | None = None

    @staticmethod
    def _mixed(given: int, wanted: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(given), nn.Linear(given, 64), nn.GELU(), nn.Linear(64, wanted))

    # The graph by itself, as a store that can be asked.

    def add(self, triplets: Iterable[Triplet]) -> "GraphRAGEnhanced":
        """Grow the graph that `retrieve` asks."""
        graph = build_graph(triplets)
        if self.retriever is None:
            self.retriever = Retriever(graph, self)
        else:
            self.retriever.add(graph)
        self._entrances = None
        return self

    def retrieve(self, prompt: str, limit: int = 4) -> list[Labels]:
        """As `Retriever.retrieve`, of the graph of `add`."""
        return [] if self.retriever is None else self.retriever.retrieve(prompt, "attention", limit)

    # Asking.

    def rank(self, retriever: Retriever, prompt: str, draw: random.Random | None = None) -> list[Chain]:
        """The chains around a prompt, likeliest first; with `draw` in an order drawn by their probabilities, without
        putting back (Gumbel noise, arXiv:1903.06059)."""
        found = self.weigh(retriever, prompt)
        noise = {chain: -math.log(draw.expovariate(1.0) or 1e-300) if draw else 0.0 for chain in sorted(found)}
        return sorted(found, key=lambda chain: (-math.log(max(found[chain], 1e-30)) - noise[chain], chain))

    @torch.inference_mode()
    def weigh(self, retriever: Retriever, prompt: str) -> dict[Chain, float]:
        """The chains around a prompt, each with its probability."""
        words = words_in(prompt)
        around = self._around(retriever, prompt, words)
        if not around:
            return {}
        return dict(zip(around, self(batch_of(retriever, words, around)).softmax(0).tolist(), strict=True))

    def forward(self, batch: Batch) -> Tensor:
        """Logits (E,) of each chain's probability among its prompt's."""
        texts = self.text(batch.features, batch.starts)
        return self._scored(texts, batch)

    def _scored(self, texts: Tensor, batch: Batch) -> Tensor:
        labels = texts[batch.concepts]
        nodes = labels + self._read(texts, labels, batch)
        chains, ends = batch.chains, batch.chains[:, [0, 2]]
        said = torch.cat([nodes[chains].flatten(1), batch.counts[:, None]], -1)
        edges = self.edge(said) + self.lens(batch.lenses)
        for attend, mix in zip(self.rounds, self.edges, strict=True):
            nodes, _ = attend(nodes, edges, ends)
            edges = edges + mix(torch.cat([nodes[chains].flatten(1), edges], -1))
        return self.score(torch.cat([nodes[chains].flatten(1), edges], -1))[:, 0]

    def _read(self, texts: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """(N, W): what concepts read in their prompt: words like them, and where these stand; or nothing."""
        real = batch.words >= 0
        words = texts[batch.words.clamp_min(0)]
        placed = words + self.place.weight[: words.shape[1]]
        heads = (self.heads, -1)
        ask = self.ask(labels).unflatten(-1, heads)
        key, value = (part.unflatten(-1, heads)[batch.whose] for part in (self.key(words), self.value(placed)))
        scores = torch.einsum("nhe,nthe->nht", ask, key) * ask.shape[-1] ** -0.5
        scores = scores + self.matching[:, None] * batch.matches[:, None]
        scores = scores.masked_fill(~real[batch.whose][:, None], -math.inf)
        shares = F.pad(scores, (1, 0)).softmax(-1)[..., 1:]  # the first is to read nothing
        told = torch.stack([batch.matches.amax(-1), batch.matches.sum(-1)], -1)
        return torch.einsum("nht,nthe->nhe", shares, value).flatten(1) + self.seen(told)

    def _around(self, retriever: Retriever, prompt: str, words: Sequence[str]) -> list[Chain]:
        """The chains within `hops` of the prompt's entrances."""
        by_word = Question(retriever, prompt, 0, random.Random(0)).found
        return retriever.near({*by_word, *self._near(retriever, words)}, self.hops, MOST)

    # Entrances by vector.

    def _near(self, retriever: Retriever, words: Sequence[str]) -> list[str]:
        if self._entrances is None or self._entrances[0] is not retriever:
            self.enter(retriever)
        assert self._entrances is not None
        _, names, index = self._entrances
        if not names or not words:
            return []
        with torch.inference_mode():
            _, found = index.search(self.prompt_vectors([words]).numpy(), NEAR)
        return [names[int(number)] for number in found[0] if number >= 0]

    @torch.inference_mode()
    def enter(self, retriever: Retriever) -> None:
        """Compute the vectors of a graph's nodes."""
        names = sorted(retriever.entries)
        vectors = self.node_vectors([retriever.entries[name].label for name in names])
        self._entrances = retriever, names, index_of(vectors.numpy(), self.index)

    def prompt_vectors(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """(B, D) of prompts as words: of the mean of their vectors."""
        return self.prompt_vector(self.text(*flat(" ".join(words) for words in prompts)))

    def node_vectors(self, labels: Sequence[str]) -> Tensor:
        """(n, D)."""
        return self.node_vector(self.text(*flat(labels))) if labels else torch.zeros(0, self.sizes["dim"])

    # Learning.

    def fit(
        self,
        retriever: Retriever,
        examples: Mapping[str, Sequence[Triplet]],
        steps: int | None = None,
        seed: int = 0,
        listen: Listener = silent,
    ) -> int:
        """Learn from prompts and the triplets of their answers, which `retriever` holds; returns how many taught it.

        Contrastive, over the chains around a prompt: −Σ w log p over those that its answer says, too, w = log(1 + all
        mentions / its own): what is rarely said is least likely to be known. In every other draw the answer's own
        mentions are taken out of the graph first, if then anything of it is left: what only it says has to be found,
        too. Prompt and node vectors learn the same over the nodes. Raises BadInput where no prompt has a triplet.
        """
        taught = [prompt for prompt, own in examples.items() if own]
        if not taught:
            raise BadInput("nothing to learn retrieval from: no answer has a triplet; choose another way to retrieve")
        draw = random.Random(seed)
        steps = steps or min(STEPS, max(LEAST, EPOCHS * len(taught) // BATCH))
        optimizer = torch.optim.AdamW(self.parameters(), LR, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=max(2, steps), pct_start=0.1)
        self.train()
        for step in range(steps):
            if step % RENEW == 0:
                self.enter(retriever)
            drawn = draw.choices(taught, k=BATCH)
            loss = self._loss([self._example(retriever, one, examples[one], i % 2 > 0) for i, one in enumerate(drawn)])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            data = {"loss": float(loss.detach())}
            listen(Event("retrieval", "progress", done=step + 1, total=steps, unit="steps", data=data))
        self.eval()
        self.enter(retriever)
        return len(taught)

    def _example(
        self, retriever: Retriever, prompt: str, own: Sequence[Triplet], without: bool
    ) -> tuple[Batch, Tensor, list[str]]:
        """A prompt, what each of its chains weighs (E,) in the loss, and its words. without: the answer's mentions."""
        words = words_in(prompt)
        said = {Chain(f"what:{t.what}", f"action:{t.action}", f"result:{t.result}", t.lens): None for t in own}

        def seen() -> tuple[Batch, Tensor, list[str]] | None:
            right = {chain for chain in said if chain in retriever.chains}
            if not right:
                return None
            around = list(dict.fromkeys([*self._around(retriever, prompt, words), *sorted(right)]))
            total = sum(retriever.chains[chain] for chain in around)
            rare = [math.log1p(total / retriever.chains[chain]) if chain in right else 0.0 for chain in around]
            return batch_of(retriever, words, around), torch.tensor(rare), words

        with retriever.without(build_graph(own if without else ())):
            found = seen()
        found = found or seen()
        assert found is not None, "the retriever holds what its answers say"
        return found

    def _loss(self, examples: Sequence[tuple[Batch, Tensor, list[str]]]) -> Tensor:
        """Of chains, and of the vectors: of a prompt against its nodes."""
        batch, weights = side_by_side([own for own, _, _ in examples]), torch.cat([rare for _, rare, _ in examples])
        texts = self.text(batch.features, batch.starts)
        chains = self._contrast(self._scored(texts, batch), weights, batch.asked, len(examples))
        prompts = F.normalize(self.prompt_vectors([words for _, _, words in examples]), dim=-1)
        nodes = F.normalize(self.node_vector(texts[batch.concepts]), dim=-1)
        cosines = (prompts[batch.whose] * nodes).sum(-1) / TEMPERATURE
        needed = torch.zeros(len(nodes)).index_fill(0, batch.chains[weights > 0].flatten(), 1.0)
        return chains + self._contrast(cosines, needed, batch.whose, len(examples))

    @staticmethod
    def _contrast(logits: Tensor, weights: Tensor, segments: Tensor, count: int) -> Tensor:
        """−Σ w log p within each segment, where the weights sum to 1; the mean of `count`."""
        shares = weights / torch.zeros(count).index_add(0, segments, weights)[segments]
        return -(shares * segment_softmax(logits, segments, count).clamp_min(1e-12).log()).sum() / count

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """Write weights, sizes and what is to be remembered of them, atomically."""
        sizes = {name: str(size) for name, size in self.sizes.items()}
        write_atomic(path, save(dict(self.state_dict()), {**about, **sizes, "version": str(VERSION)}))

    @classmethod
    def load(cls, path: Path) -> "tuple[GraphRAGEnhanced, dict[str, str]]":
        """Itself, and what was to be remembered. Raises BadInput where there is no file, CorruptFile for another."""
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, str] = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            dim, width, heads, layers, hops = (int(about[name]) for name in ("dim", "width", "heads", "layers", "hops"))
            made = cls(ImageTokenizerConfig(embedding_dim=dim), width=width, heads=heads, layers=layers, hops=hops)
            made.load_state_dict(weights)
        except FileNotFoundError as error:
            raise BadInput(
                f"{path}: no such file; a run learns it where `--retrieve attention` is asked for"
            ) from error
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise CorruptFile(f"{path}: no weights of retrieval ({reason}); delete it") from error
        return made.eval(), about
