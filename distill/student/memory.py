"""What was dreamed before, as image tokens after a prompt: how the knowledge graph gives context back."""

from distill.corpus.retrieval import WAYS, Retriever
from distill.student.pretrained import Parts
from distill.tokens.bpe import image_text

RETRIEVALS = ("", *WAYS)
LIMIT = 4
"""Triplets put after a prompt."""


def recall(parts: Parts, retriever: Retriever, prompt: str, how: str, seed: int) -> str:
    """Image tokens of what the graph knows about a prompt, most fitting first; "" where it knows nothing.

    A phrase of the graph that is no label is written as the image token that stands for it, or left out with its
    triplet where there is no codebook to tell.
    """
    code_of = {label: code for code, label in enumerate(parts.labels)}
    found = retriever.retrieve(prompt, how, LIMIT, seed)
    strange = sorted({phrase for triple in found for phrase in triple} - code_of.keys())
    if strange and parts.codebook is not None and len(parts.codebook):
        code_of |= {phrase: int(code) for phrase, code in zip(strange, parts.codebook.encode(strange), strict=True)}
    known = [triple for triple in found if all(phrase in code_of for phrase in triple)]
    return "".join(image_text(parts.labels[code_of[phrase]]) for triple in known for phrase in triple)
