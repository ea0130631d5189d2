"""What soft targets are after a dream, word by word, and in the batches."""

from pathlib import Path

import numpy as np
import pytest
from support.small_student import DREAM, small_tokenizer

from distill.training.told import AGAIN, ASKED, END, FAR, NEAR, Told, tilted

ANSWER = "The balls fall to the floor, and the ball falls."


def test_words_of_the_dream_are_likelier_until_they_are_said(smollm2: Path) -> None:
    """Written down by hand: forms of one word are one, what only joins words is none, and the end waits for all."""
    tokenizer = small_tokenizer(smollm2, [ANSWER, "The balls rain"])
    dream = tokenizer.encode(DREAM, special=True)
    answer = np.array([*tokenizer.encode(ANSWER), tokenizer.eos_id])
    rivals = [tokenizer.encode(text)[0] for text in (" rain", " ball", " floor", " the")]
    alternatives = np.tile([*rivals, tokenizer.eos_id], (len(answer), 1))
    prompt = np.array(tokenizer.encode("To the floor?"))
    gains = Told(tokenizer).gains(prompt, dream, answer, alternatives)
    words = [tokenizer.token_bytes(int(id)).decode() for id in answer]
    assert words[:6] == ["The", " balls", " fall", " to", " the", " floor"]
    floor = NEAR * ASKED  # in the step of ball, asked for
    expected = [
        [0, 0, FAR, FAR * ASKED, 0, END[3]],
        [FAR, 0, FAR, FAR * ASKED, 0, END[3]],
        [NEAR, 0, AGAIN, floor, 0, END[2]],
        [0, 0, AGAIN, floor, 0, END[1]],
        [0, 0, AGAIN, floor, 0, END[1]],
        [floor, 0, AGAIN, floor, 0, END[1]],
        [0, 0, AGAIN, AGAIN, 0, END[0]],
    ]
    assert gains[: len(expected)] == pytest.approx(np.array(expected))
    assert gains[-1, 0] == pytest.approx(END[0])


def test_gains_make_a_distribution_of_a_distribution() -> None:
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(12), 40)
    gains = np.where(random.random((40, 12)) < 0.3, NEAR, 0.0)
    gains[:, 6:] = 0  # the tail, of which nothing is known
    expected = p * np.exp(gains) / (p * np.exp(gains)).sum(1, keepdims=True)
    found = tilted(np.log(p[:, :6]).astype(np.float32), gains[:, :6].astype(np.float32))
    assert np.exp(found) == pytest.approx(expected[:, :6], rel=1e-5)
    unused = np.full((1, 3), -np.inf, np.float32)
    unused[0, 0] = 0.0  # a hard label
    assert tilted(unused, np.full((1, 3), NEAR, np.float32)).tolist() == [[0.0, -np.inf, -np.inf]]
