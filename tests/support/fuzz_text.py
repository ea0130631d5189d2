"""Text that tokenizers disagree about: scripts, digits, contractions, runs of white space, marks, emoji."""

import random
import unicodedata

_WORDS = ["the", "What", "happens", "ball's", "it'll", "WE'RE", "don't", "4567", "hello_world", "x=1;", "f(a){b}"]


def _characters(*bounds: tuple[int, int]) -> list[str]:
    return [chr(code) for low, high in bounds for code in range(low, high)]


_POOLS = [
    _characters((0x20, 0x7F)),
    list("  \n\t\r  \u00a0\u2003\u3000"),
    list("0123456789"),
    list("'’stremlvd'S'T"),
    _characters((0xA0, 0x250)),
    _characters((0x370, 0x378), (0x37A, 0x380), (0x400, 0x500)),
    _characters((0x4E00, 0x4F00)),
    [*_characters((0x1F300, 0x1F600)), "\u200d", "\ufe0f"],
    _characters((0x300, 0x330)),
    list("²½Ⅷ٣१"),
]


def _anything(rng: random.Random) -> str:
    while True:
        character = chr(rng.randrange(1, 0x110000))
        if unicodedata.category(character) not in ("Cs", "Cn", "Co"):
            return character


def fuzz_text(seed: int, count: int) -> list[str]:
    """`count` texts of 1 to 14 fragments, the same for the same seed. Without "▁" and NUL."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        fragments: list[str] = []
        for _ in range(rng.randint(1, 14)):
            draw = rng.random()
            if draw < 0.4:
                fragments.append(rng.choice(_WORDS) + rng.choice([" ", "", "\n", "  ", "'s "]))
            elif draw < 0.97:
                pool = rng.choice(_POOLS)
                fragments.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 5))))
            else:
                fragments.append(_anything(rng))
        texts.append("".join(fragments).replace("▁", "_"))
    return texts
