"""A dream as a user writes it: its tokens numbered, any of them replaced, all of it held to the form of a dream.

Lenses stand in their order, each once at most, and after each whole triplets; what breaks that is refused.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from distill.dream.record import NONE
from distill.dream.view.lanes import visible
from distill.errors import BadInput, DistillError
from distill.mining.triplets import LENSES, clean_phrase
from distill.tokens.bpe import StudentTokenizer, image_text
from distill.tokens.chat import Dream, parse_dream

if TYPE_CHECKING:
    from distill.tokens.image_tokens import Codebook

OFFERED = 3
"""Image tokens offered where a label is none's."""


@dataclass(frozen=True)
class DreamEditor:
    """steps: triplets that a lens has at most. codebook: where there is one, labels that mean the like are offered."""

    tokenizer: StudentTokenizer
    steps: int
    codebook: "Codebook | None" = None

    def code(self, what: str, label: str) -> int:
        """Of the image token with a label. Raises BadInput, beginning with `what`, offering the nearest."""
        code = self._code_of.get(label, self._code_of.get(clean_phrase(label)))
        if code is None:
            raise BadInput(f"{what}: {image_text(visible(label))} is no image token; {self._offer(label)}")
        return code

    def written(self, text: str) -> Dream:
        """The dream that a user wrote, "⟨causal⟩⟨ball⟩⟨fall⟩⟨ground⟩", or "none"; a lens that isn't there has no steps.

        Raises BadInput, saying what breaks its form.
        """
        if text.strip() == NONE:
            return {}
        paths: list[tuple[str, list[str]]] = []
        for phrase in image_phrases("dream", text):
            if phrase in LENSES:
                paths.append((phrase, []))
            elif not paths:
                begins = image_text(visible(phrase))
                raise BadInput(f"dream: begins with {begins}; a lens stands first, one of {self._order}")
            else:
                paths[-1][1].append(phrase)
        lenses = [lens for lens, _ in paths]
        if lenses != sorted(set(lenses), key=self.tokenizer.lenses.index):
            found = "".join(map(image_text, lenses))
            raise BadInput(f"dream: its lenses are {found}; each stands once at most, in the order {self._order}")
        for lens, phrases in paths:
            if len(phrases) % 3:
                raise BadInput(
                    f"dream: {image_text(lens)} has {len(phrases)} image tokens; give whole triplets of what, action "
                    "and result"
                )
            if len(phrases) > 3 * self.steps:
                raise BadInput(
                    f"dream: {image_text(lens)} has {len(phrases) // 3} triplets; this student dreams at most "
                    f"{self.steps}"
                )
        return _dream({lens: [self.code("dream", phrase) for phrase in phrases] for lens, phrases in paths})

    def replacements(self, tokens: Mapping[int, str]) -> dict[int, int]:
        """Numbers of tokens → codes of what takes their place, for labels with brackets or without. Raises BadInput."""
        codes: dict[int, int] = {}
        for number, text in tokens.items():
            phrases = image_phrases(what := f"token {number}", text)
            if len(phrases) > 1:
                raise BadInput(f"{what}: {len(phrases)} image tokens in its place; give one")
            codes[number] = self.code(what, phrases[0])
        return codes

    def replaced(self, dream: Dream, codes: Mapping[int, int]) -> Dream:
        """The dream with other image tokens at some numbers, from 1 on. Raises BadInput for a number that it lacks."""
        lenses = self.tokenizer.lenses
        paths = {lens: [code for step in dream.get(lens, ()) for code in step] for lens in lenses}
        places = [(lens, i) for lens in lenses for i in range(len(paths[lens]))]
        for number, code in codes.items():
            if not 1 <= number <= len(places):
                has = f"has the tokens 1 to {len(places)}" if places else "is empty"
                raise BadInput(f"token {number}: there is none to replace; the dream {has}")
            lens, i = places[number - 1]
            paths[lens][i] = code
        return _dream(paths)

    def changed(self, dream: Dream, text: str) -> Dream:
        """What a line of a chat makes of a dream: `3 ⟨water⟩`, several of those, a whole dream, or `none`."""
        if text[:1].isdigit():
            return self.replaced(dream, self.replacements(parse_replacements(text)))
        return self.written(text)

    def said(self, text: str) -> Dream:
        """The dream that a student wrote; see `parse_dream`."""
        return parse_dream(self.tokenizer, self.tokenizer.encode(text, special=True))

    def text(self, dream: Dream) -> str:
        """As a student writes it: all lenses, those without steps too."""
        tokens = self.tokenizer.labels
        return "".join(
            image_text(lens) + "".join(image_text(tokens[code]) for step in dream.get(lens, ()) for code in step)
            for lens in self.tokenizer.lenses
        )

    def numbered(self, dream: Dream) -> str:
        """A line for each lens with steps, a number before each token."""
        lines: list[str] = []
        number = 0
        for lens in (lens for lens in self.tokenizer.lenses if dream.get(lens)):
            tokens: list[str] = []
            for code in (code for step in dream[lens] for code in step):
                number += 1
                tokens.append(f"{number} {image_text(self.tokenizer.labels[code])}")
            lines.append(f"{lens:10}{'  '.join(tokens)}")
        return "\n".join(lines)

    @cached_property
    def _order(self) -> str:
        return "".join(map(image_text, self.tokenizer.lenses))

    @cached_property
    def _code_of(self) -> dict[str, int]:
        return {label: code for code, label in enumerate(self.tokenizer.labels)}

    def _offer(self, label: str) -> str:
        labels = list(self._code_of)
        if not labels:
            return "this student has none at all"
        return f"the nearest are {', '.join(map(image_text, self._nearest(label, labels) or labels[:OFFERED]))}"

    def _nearest(self, label: str, labels: list[str]) -> list[str]:
        """First labels that are spelled like it, then those that mean the like."""
        phrase = clean_phrase(label)
        found = difflib.get_close_matches(phrase, labels, OFFERED)
        if self.codebook is not None:
            try:
                (vector,) = self.codebook.encoder.encode([phrase])
            except DistillError:  # an encoder that asks a server, and none answers: spelling must do
                return found
            if vector.any():
                order = np.argsort(-(self.codebook.centroids @ vector), kind="stable")[:OFFERED]
                found += [labels[int(code)] for code in order]
        return list(dict.fromkeys(found))[:OFFERED]


def _dream(paths: Mapping[str, list[int]]) -> Dream:
    """Lens → triplets, from lens → codes."""
    return {lens: list(zip(*[iter(codes)] * 3, strict=True)) for lens, codes in paths.items()}


def image_phrases(what: str, text: str) -> list[str]:
    """What stands in the brackets of "⟨a ball⟩⟨release⟩"; a single image token may be without them.

    Raises BadInput, beginning with `what`, for anything between the tokens, and for one without words.
    """
    bracketed = re.findall(r"⟨([^⟨⟩]*)⟩", text)
    rest = re.sub(r"⟨[^⟨⟩]*⟩", "", text).strip()
    if rest and (bracketed or set(rest) & set("⟨⟩")):
        raise BadInput(f"{what}: {text!r} is not written as image tokens alone; write it as ⟨a ball⟩⟨release⟩")
    phrases = [phrase.strip() for phrase in bracketed or [rest]]
    if not all(phrases):
        raise BadInput(f"{what}: {text!r} has an image token without words; write it as ⟨a ball⟩⟨release⟩")
    return phrases


def parse_replacements(text: str) -> dict[int, str]:
    """Number → label of "3=⟨water⟩", "3 water" or "3 ⟨water⟩ 5 ⟨ice⟩". Raises BadInput for anything else."""
    head, *pairs = re.split(r"(?:^|(?<=⟩))\s*(\d{1,6})(?:\s*=\s*|\s+)", text.strip())
    if head or not pairs:
        raise BadInput(f"{text!r}: say which token, and what takes its place, as in 3=⟨water⟩")
    return {int(number): label.strip() for number, label in zip(pairs[::2], pairs[1::2], strict=True)}
