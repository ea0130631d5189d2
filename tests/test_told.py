"""What soft targets are after a dream, word by word, and in the batches."""

from pathlib import Path

import numpy as np
import pytest
from support.small_student import DREAM, small_tokenizer

from distill.training.told import AGAIN, ASKED, END, FAR, NEAR, WITHIN, Told, tilted

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
        [0, 0, FAR, FAR * ASKED, 0, END[4]],
        [FAR, 0, FAR, FAR * ASKED, 0, END[4]],
        [NEAR, 0, AGAIN, floor, 0, END[3]],
        [0, 0, AGAIN, floor, 0, END[2]],
        [0, 0, AGAIN, floor, 0, END[2]],
        [floor, 0, AGAIN, floor, 0, END[2]],
        [0, 0, AGAIN, AGAIN, 0, END[1]],
    ]
    assert gains[: len(expected)] == pytest.approx(np.array(expected))
    assert gains[-1, 0] == pytest.approx(END[1]), "one word is still to be said"


def test_a_word_of_several_tokens_is_likelier_from_each_to_the_next(smollm2: Path) -> None:
    tokenizer = small_tokenizer(smollm2, [ANSWER])
    dream, word = tokenizer.encode(DREAM, special=True), tokenizer.encode(" release")
    assert len(word) > 2
    answer = np.array([*word, *word, tokenizer.eos_id])
    gains = Told(tokenizer).gains(np.zeros(0, np.int64), dream, answer, np.zeros((len(answer), 0), np.int64))
    rest = [WITHIN] * (len(word) - 1)
    assert gains[:, 0].tolist() == pytest.approx([FAR, *rest, AGAIN, *rest, END[3]])


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
