"""Retrieval in training and evaluation: what the other training answers say of a prompt, as image tokens after it."""

from collections.abc import Mapping, Sequence

from distill.config import TrainSettings
from distill.errors import BadInput
from distill.knowledge.graph import build_graph
from distill.knowledge.retrieval import WAYS, Labels, Retriever
from distill.mining.triplets import Triplet
from distill.tokens.chat import with_context


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
        if self.how not in ("", *WAYS):
            raise BadInput(f"train.retrieve={self.how}: choose one of {', '.join(WAYS)}, or '' for none")
        if self.how:
            self.retriever = Retriever(build_graph(t for group in triplets.values() for t in group))

    def prompt(self, text: str) -> str:
        """A prompt and what is known of it. The triplets of its own answers are left out as if they had never been
        said."""
        if not self.how:
            return text
        with self.retriever.without(build_graph(self.triplets.get(text, ()))):
            found = self.retriever.retrieve(text, self.how, self.limit, self.seed)
        return with_context(text, [labels for chain in found if (labels := self._labels(chain))])

    def _labels(self, chain: Labels) -> Labels | None:
        """The image tokens that a chain's phrases stand for; None where one has none."""
        what, action, result = (self.codes.get(phrase, -1) for phrase in chain)
        return None if min(what, action, result) < 0 else (self.labels[what], self.labels[action], self.labels[result])
