"""What soft targets are after a dream, word by word, and in the batches."""

from pathlib import Path

import numpy as np
import pytest
from support.small_student import DREAM, small_tokenizer

from distill.training.told import AGAIN, FIRST, Told, tilted

ANSWER = "The balls fall to the floor, and the ball falls."


def test_words_of_the_dream_are_likelier_until_they_are_said(smollm2: Path) -> None:
    """Brute force over the words: forms of one word are one, what only joins words is none."""
    tokenizer = small_tokenizer(smollm2, [ANSWER, "The balls rain"])
    dream = tokenizer.encode(DREAM, special=True)
    answer = np.array([*tokenizer.encode(ANSWER), tokenizer.eos_id])
    rivals = [tokenizer.encode(text)[0] for text in (" rain", " ball", " the", "balls")]
    alternatives = np.tile(rivals, (len(answer), 1))
    gains = Told(tokenizer).gains(dream, answer, alternatives)
    words = [tokenizer.token_bytes(int(id)).decode() for id in answer]
    assert words[1:5] == [" balls", " fall", " to", " the"]
    roots = {" balls": "ball", " ball": "ball", " fall": "fall", " falls": "fall", " floor": "floor"}
    said: set[str] = set()
    for place, word in enumerate(words):
        root = roots.get(word, "")
        expected = 0.0 if not root else AGAIN if root in said else FIRST
        assert gains[place].tolist() == pytest.approx([expected, 0, AGAIN if "ball" in said else FIRST, 0, 0])
        said.add(root)


def test_gains_make_a_distribution_of_a_distribution() -> None:
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(12), 40)
    gains = np.where(random.random((40, 12)) < 0.3, FIRST, 0.0)
    gains[:, 6:] = 0  # the tail, of which nothing is known
    expected = p * np.exp(gains) / (p * np.exp(gains)).sum(1, keepdims=True)
    found = tilted(np.log(p[:, :6]).astype(np.float32), gains[:, :6].astype(np.float32))
    assert np.exp(found) == pytest.approx(expected[:, :6], rel=1e-5)
    unused = np.full((1, 3), -np.inf, np.float32)
    unused[0, 0] = 0.0  # a hard label
    assert tilted(unused, np.full((1, 3), FIRST, np.float32)).tolist() == [[0.0, -np.inf, -np.inf]]
