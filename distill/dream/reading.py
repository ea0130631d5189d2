"""What an answer read of its dream: attention, noted in a pass of its own over what was read and said.

The fused kernels that generate never hold the weights. Once an answer stands, one forward pass computes them: mean
over all heads of all layers, as none of them is known to be the one that matters. A token is chosen where the one
before it is read, so that is where it is asked what was attended to. A first token draws much attention whatever it
says (arXiv:2309.17453): compare steps with each other, and words, before question with dream.

Shape legend: L layers, H heads, A tokens of the answer, T tokens in all.
"""

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.dream.output_decoder import Speaker, Splitter
from distill.dream.pretrained import Parts
from distill.dream.record import Word
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_places

DIGITS = 5
"""Of a share, as it is kept."""


@torch.inference_mode()
def read_words(parts: Parts, speaker: Speaker, question: int, start: int) -> list[Word]:
    """The words of an answer that a speaker has just said. question: tokens of the prompt; start: with its dream."""
    ids, tokenizer = speaker.ids, parts.tokenizer
    said = [*ids[start:], speaker.peek()]
    weights = mean_attention(parts, ids, start - 1)
    places = dream_places(tokenizer, ids[question:start])
    tokens = [question + place for steps in places.values() for step in steps for place in step]
    words: list[Word] = []
    for text, columns in split_words(tokenizer, said):
        row = weights[columns].mean(0)
        within = row[tokens] / row[tokens].sum()
        question_share, dream_share, answer_share, *shares = (
            round(share, DIGITS)
            for share in (
                *(row[a:b].sum().item() for a, b in pairwise((0, question, start, len(ids)))),
                *within.tolist(),
            )
        )
        words.append(Word(text, question_share, dream_share, answer_share, shares))
    return words


def mean_attention(parts: Parts, ids: Sequence[int], start: int) -> Tensor:
    """(T − start, T) float64: how much each token from `start` on attends to each, mean over heads and layers."""
    layers = parts.model.attention(torch.tensor([ids], device=parts.device), start)
    return torch.stack([weights[0].double().mean(0) for weights in layers]).mean(0).cpu()


def split_words(tokenizer: StudentTokenizer, said: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer's tokens, and which tokens each is made of. Together the texts are what was printed.

    A word begins with white space, or with a character of a script that is written without any.
    """
    splitter = Splitter(tokenizer, answering=True)
    words: list[tuple[str, list[int]]] = []
    waiting: list[int] = []
    for place, token in enumerate(said):
        waiting.append(place)
        piece = splitter.push(token)
        if piece is None:
            continue
        text = piece[1]
        if not words or text[0].isspace() or unicodedata.east_asian_width(text[0]) in "WF":
            words.append((text, waiting))
        else:
            words[-1] = words[-1][0] + text, words[-1][1] + waiting
        waiting = []
    return words
