"""Retrieval in training and evaluation: what the other training answers say of a prompt, as image tokens after it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from distill.config import TrainSettings
from distill.errors import BadInput, CorruptFile, DistillError
from distill.events import Event, Listener, silent
from distill.knowledge.graph import build_graph
from distill.knowledge.retrieval import ATTENTION, Labels, Retriever
from distill.mining.triplets import FACT, Triplet
from distill.ranges import check_choice
from distill.run import Run, fingerprint
from distill.tokens.chat import with_context
from distill.turns import words

if TYPE_CHECKING:
    from distill.knowledge.graph_rag import GraphRAGEnhanced


class Recall:
    """The knowledge graph of training traces, asked as `train.retrieve` says; "" leaves every prompt as it is."""

    def __init__(
        self,
        settings: TrainSettings,
        seed: int,
        triplets: Mapping[str, Sequence[Triplet]],
        codes: Mapping[str, int],
        labels: Sequence[str],
    ) -> None:
        """triplets: of training traces alone, by prompt. codes: phrase → image token; labels: of these, by code.

        Raises BadInput for a way that there isn't.
        """
        self.how, self.limit, self.seed = settings.retrieve, settings.retrieve_limit, seed
        self.triplets, self.codes, self.labels = triplets, codes, labels
        check_choice("train.retrieve", self.how)
        if self.how:
            self.retriever = Retriever(build_graph(t for group in triplets.values() for t in group))

    def prompt(self, text: str) -> str:
        """A prompt and what is known of it. The triplets of its own answers are left out as if they had never been
        said."""
        if not self.how:
            return text
        with self.retriever.without(build_graph(self.triplets.get(text, ()))):
            found = self.retriever.retrieve(words(text), self.how, self.limit, self.seed)
        return with_context(text, [labels for chain in found if (labels := self._labels(chain))])

    def _labels(self, chain: Labels) -> Labels | None:
        """The image tokens that a chain's phrases stand for; None where one has none."""
        what, action, result = (self.codes.get(phrase, -1) for phrase in chain)
        return None if min(what, action, result) < 0 else (self.labels[what], self.labels[action], self.labels[result])


def training_recall(
    run: Run,
    train: Iterable[tuple[str, str]],
    triplets: Mapping[str, list[Triplet]],
    codes: Mapping[str, int],
    labels: Sequence[str],
    listen: Listener = silent,
    keep: bool = True,
) -> Recall:
    """What is known from training traces alone (of each its key and prompt), and facts: neither held-out ones nor those
    of validation are in its graph. Attention is learned where it has to be: see `kept_attention`.
    keep: raise DistillError where it can't be written, and don't only warn of it."""
    if not run.settings.train.retrieve:
        return Recall(run.settings.train, run.settings.seed, {}, codes, labels)
    known: dict[str, list[Triplet]] = {}
    for key, prompt in train:
        known.setdefault(prompt, []).extend(triplets.get(key, []))
    facts = {trace: group for trace, group in triplets.items() if trace.startswith(FACT)}
    recall = Recall(run.settings.train, run.settings.seed, {**known, **facts}, codes, labels)
    if recall.how == ATTENTION:
        recall.retriever.attention = kept_attention(run) or _learned(run, recall.retriever, known, listen, keep)
    return recall


def kept_attention(run: Run) -> "GraphRAGEnhanced | None":
    """The run's retrieval.safetensors; None where there is none, or where it was learned from other answers."""
    from distill.knowledge.graph_rag import RETRIEVAL, GraphRAGEnhanced

    try:
        attention, about = GraphRAGEnhanced.load(run.path / RETRIEVAL)
    except (BadInput, CorruptFile):
        return None  # what can be learned anew is no loss
    return attention if about.get("learned") == _learned_from(run) else None


def _learned_from(run: Run) -> str:
    from distill.knowledge.graph_rag import VERSION

    return fingerprint([VERSION, run.settings.seed, *(run.require(stage).outputs for stage in ("capture", "mine"))])


def _learned(
    run: Run, retriever: Retriever, known: Mapping[str, Sequence[Triplet]], listen: Listener, keep: bool
) -> "GraphRAGEnhanced":
    """Learn it from the training prompts, and keep it."""
    from distill.knowledge.graph_rag import RETRIEVAL, GraphRAGEnhanced

    attention = GraphRAGEnhanced(seed=run.settings.seed)
    listen(Event("retrieval", "start", f"learning what {len(known):,} answers need of the graph"))
    taught = attention.fit(retriever, known, seed=run.settings.seed, listen=listen)
    graph = run.require("mine").outputs[run.knowledge.name]
    try:
        attention.save(run.path / RETRIEVAL, {"learned": _learned_from(run), "graph": graph})
    except DistillError as error:
        if keep:
            raise
        listen(Event("retrieval", "warning", f"{error}; it is learned anew next time"))
        return attention
    listen(Event("retrieval", "done", f"{run.path / RETRIEVAL}: learned from {taught:,} answers"))
    return attention
