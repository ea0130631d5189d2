"""What was dreamed before: how a knowledge graph gives context back to a prompt, in the student's image tokens."""

from distill.dream.pretrained import Parts
from distill.knowledge.retrieval import WAYS, Labels, Retriever

RETRIEVALS = ("", *WAYS)
LIMIT = 4
"""Triplets put after a prompt."""


def recall(parts: Parts, retriever: Retriever, prompt: str, how: str, seed: int) -> list[Labels]:
    """What the graph knows about a prompt, most fitting first, as labels of image tokens.

    A phrase of the graph that is no label becomes that of the image token that stands for it; where there is no
    codebook to tell, its triplet is left out.
    """
    found = retriever.retrieve(prompt, how, LIMIT, seed)
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
