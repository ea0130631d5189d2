"""Whether what a target says is spelled as it should be: dreams by their grammar, answers of words, whole characters.

Tokens are read as letters, one for each kind: 0 to 3 a lens by its place in a dream, i an image token, n a line break
by itself, t and e the think tags, c a control token, w anything else. Where only text comes, it is read likewise, but
which lens has which place isn't known.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.exam.metrics.statistics import Ratio
from distill.mining.triplets import LENSES
from distill.teacher.gguf_tokenizer import CONTROL, USER_DEFINED, Vocabulary
from distill.teacher.protocol import HALF
from distill.tokens.bpe import CONTROL_TOKENS, END_THINK, THINK, image_text

OPENS = [image_text(lens) for lens in LENSES]
TAGS = {THINK: "t", END_THINK: "e", **{text: str(place) for place, text in enumerate(OPENS)}}
_MARKS = re.compile("|".join([*map(re.escape, (THINK, END_THINK, *CONTROL_TOKENS)), "⟨[^⟨⟩]+⟩"]))
_UNCLEAN = re.compile("[0-3itec]")


@dataclass(frozen=True)
class Form:
    """How one reply was spelled.

    dream: whether its dream is spelled as the grammar wants; None where it dreamed nothing. clean: its answer holds no
    image token, lens, control token or think tag. whole: all its bytes are UTF-8. ended: it ended its answer itself.
    """

    dream: bool | None
    clean: bool
    whole: bool
    ended: bool


class Letters:
    """A vocabulary's ids as letters."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        words = vocabulary.tokenizer
        self._letter = {id: "n" for id, spelled in enumerate(vocabulary.bytes_of) if spelled == b"\n"}
        places = TAGS | {text: str(place) for place, text in enumerate(t for t in words.tokens if t in OPENS)}
        for id, (text, kind) in enumerate(zip(words.tokens, words.types, strict=True)):
            if kind in (CONTROL, USER_DEFINED):
                letter = _letter(text, places)
                self._letter[id] = "c" if letter == "w" and kind == CONTROL else letter

    def __call__(self, ids: Sequence[int]) -> str:
        return "".join(self._letter.get(id, "w") for id in ids)


def _letter(text: str, places: Mapping[str, str] = TAGS) -> str:
    """Of an added token: an image token is whatever stands in its brackets."""
    return places.get(text, "i" if re.fullmatch("⟨[^⟨⟩]+⟩", text) else "w")


def letters_of(text: str) -> str:
    """A text as letters, a run of anything else as one w."""
    found, end = "", 0
    for match in _MARKS.finditer(text):
        mark = match.group()
        found += "w" * (match.start() > end) + ("c" if mark in CONTROL_TOKENS else _letter(mark))
        end = match.end()
    return found + "w" * (len(text) > end)


def is_dream(letters: str, steps: int) -> bool:
    """Whether all between `<think>⏎` and the answer, `</think>` included, is a dream: each lens in order, with at most
    `steps` whole triplets, one at least in all. Nothing at all is a dream, too."""
    lenses = "".join(f"{place}(iii){{0,{steps}}}" for place in range(len(LENSES)))
    return re.fullmatch(f"((?!0123n){lenses}n)?e", letters) is not None


def is_printed_dream(text: str, steps: int) -> bool:
    """The same of a closed dream's text, whose line breaks and tags are not told; its lenses may come in any order."""
    letters = letters_of(text.strip())
    found = dict.fromkeys(letter for letter in letters if letter.isdigit())
    in_order = letters.translate(str.maketrans({letter: str(place) for place, letter in enumerate(found)}))
    return is_dream(in_order + "ne", steps)


def is_clean(letters: str) -> bool:
    """Whether an answer, its end token left out, is of words alone."""
    return _UNCLEAN.search(letters) is None


def is_whole(text: str, ended: bool) -> bool:
    """Whether no byte had to be replaced by U+FFFD; what was cut off may stop within a character."""
    return HALF not in (text if ended else text.rstrip(HALF))


def form_of(
    dream: str, answer: str, *, dream_text: str, answer_text: str, closed: bool, ended: bool, steps: int
) -> Form:
    """Of a reply whose ids are known. dream: letters of all that was written after `<think>⏎`, `</think>` included, ""
    where it wasn't asked to dream; answer: letters of the answer without its end token."""
    nothing = closed and not dream.removesuffix("e").strip("n")
    return Form(
        dream=None if nothing else is_dream(dream, steps),
        clean=is_clean(answer),
        whole=is_whole(dream_text, closed) and is_whole(answer_text, ended),
        ended=ended,
    )


def speech_metrics(forms: Sequence[Form]) -> dict[str, Ratio]:
    """malformed_dreams (over replies with a dream), unclean_answers, broken_bytes and ended."""
    return {
        "malformed_dreams": Ratio.of([f.dream is False for f in forms], [f.dream is not None for f in forms]),
        "unclean_answers": Ratio.of([not f.clean for f in forms]),
        "broken_bytes": Ratio.of([not f.whole for f in forms]),
        "ended": Ratio.of([f.ended for f in forms]),
    }
