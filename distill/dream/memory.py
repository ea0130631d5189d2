"""What was dreamed before: how a knowledge graph gives context back to a prompt, in the student's image tokens."""

import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from distill.dream.pretrained import Parts
from distill.errors import BadInput
from distill.knowledge.graph import Graph, load_graph
from distill.knowledge.graph_rag import RETRIEVAL, GraphRAGEnhanced
from distill.knowledge.growing_graph import KnowledgeGraph
from distill.knowledge.retrieval import ATTENTION, Attention, Labels, Retriever
from distill.run import sha256_file

REMEDY = "name another graph; `dream mine --force` writes a run's anew"
"""Where a graph can't be read."""
NO_GRAPH = (
    "there is no knowledge graph; give a run that has one (`dream mine` makes it) or its bundle, or retrieve nothing"
)


class Memory:
    """The knowledge graph that a model retrieves from: one that grows, or else a file that stays as it is and is read
    when first needed. A file is what is saved with the student, as the other has its own.

    learn: gives what retrieves by attention; by default the file beside the graph is read.
    """

    def __init__(
        self,
        grown: KnowledgeGraph | None = None,
        source: Path | None = None,
        learn: Callable[[], Attention] | None = None,
    ) -> None:
        self.grown, self.source, self._learn = grown, source, learn

    def __bool__(self) -> bool:
        """Whether there is a graph."""
        return self.grown is not None or self.source is not None

    def grow(self, graph: KnowledgeGraph) -> None:
        """From now on retrieve from this one."""
        if self.source is not None:
            told = f"what is retrieved comes from it alone, and no more from {self.source}, which stays as it is"
            warnings.warn(f"{graph.path}: {told}", stacklevel=3)
        self.grown = graph

    def graph(self) -> Graph | None:
        """What is saved with the student, beside `file`: a copy, None where there is none. Raises BadInput,
        CorruptFile."""
        if self.source is not None:
            return load_graph(self.source, remedy=REMEDY)
        return None if self.grown is None else self.grown.graph()

    def retriever(self) -> Retriever:
        """Of what the graph holds now."""
        return self._settled if self.grown is None else Retriever(self.grown.graph())

    @cached_property
    def _settled(self) -> Retriever:
        graph = self.graph()
        if graph is None:
            raise BadInput(NO_GRAPH)
        return Retriever(graph)

    @property
    def file(self) -> Path | None:
        """Where retrieval by attention is kept, beside the graph."""
        path = self.source or (self.grown.path if self.grown is not None else None)
        return None if path is None else path.with_name(RETRIEVAL)

    @cached_property
    def attention(self) -> Attention:
        """What retrieves by attention; warns where the graph is another than it learned from. Raises BadInput,
        CorruptFile."""
        if self._learn is not None:
            return self._learn()
        assert self.file is not None, "there is a graph"
        attention, about = GraphRAGEnhanced.load(self.file)
        if self.grown is None and self.source is not None and about.get("graph") != sha256_file(self.source):
            told = "changed since retrieval by attention was learned from it, which may find less of what is new"
            warnings.warn(f"{self.source}: {told}", stacklevel=2)
        return attention

    def recall(self, parts: Parts, prompt: str, how: str, seed: int, drawn: bool = False) -> list[Labels]:
        """What the graph knows about a prompt, most fitting first, as labels of image tokens.

        A phrase of the graph that is no label becomes that of the image token that stands for it; where there is no
        codebook to tell, its triplet is left out. drawn: see `Retriever.retrieve`.
        """
        retriever = self.retriever()
        if how == ATTENTION:
            retriever.attention = self.attention
        found = retriever.retrieve(prompt, how, parts.facts, seed, drawn)
        label_of = {label: label for label in parts.labels}
        strange = sorted({phrase for triple in found for phrase in triple} - label_of.keys())
        if strange and parts.codebook is not None and len(parts.codebook):
            codes = parts.codebook.encode(strange).tolist()
            label_of |= {phrase: parts.labels[code] for phrase, code in zip(strange, codes, strict=True)}
        return [
            (label_of[what], label_of[action], label_of[result])
            for what, action, result in found
            if {what, action, result} <= label_of.keys()
        ]
