"""From a dependency parse to short phrases: what a noun, a verb or a prepositional phrase is called in a dream.

The same concept gets the same phrase: lower-case, no leading article, no quantifier, modal verbs left out, verbs in
the present (`falls`, `is dropped`, `does not fall`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spacy.tokens import Token

from distill.mining.inflect import past_participle, third_person, word_set
from distill.mining.triplets import clean_phrase, fits

GENERIC = frozenset({"you", "we", "one", "someone", "anyone", "us"})
"""Subjects that stand for whoever acts."""

_EMPTY_HEADS = word_set(
    "lot kind type amount variety number series couple sort range set majority most plenty bit rest"
)
_QUANTIFIERS = word_set(
    "same such other certain several many various different own entire whole more most much less any some all both"
    " first next last second third another each every available numerous"
)
_PASSIVE = ("nsubjpass", "auxpass")


@dataclass(frozen=True)
class Entity:
    """What a noun phrase is called, and whether verbs agree with it in the plural."""

    phrase: str
    plural: bool = False


def children(token: Token, *deps: str) -> list[Token]:
    return [child for child in token.children if child.dep_ in deps]


def child(token: Token, *deps: str) -> Token | None:
    found = children(token, *deps)
    return found[0] if found else None


def shorten(parts: Sequence[tuple[str, bool]]) -> str:
    """The words as a phrase; those marked optional (True) go, first first, until it fits. "" if it never does."""
    words = list(parts)
    while True:
        phrase = clean_phrase(" ".join(word for word, _ in words))
        if fits(phrase):
            return phrase
        spare = next((i for i, (_, optional) in enumerate(words) if optional), None)
        if spare is None:
            return ""
        del words[spare]


def _of(noun: Token) -> Token | None:
    return next((c for c in noun.children if c.dep_ == "prep" and c.lower_ == "of"), None)


def _content_of(noun: Token) -> Token | None:
    """`water` of `a lot of water`: what a head that only counts stands for."""
    of = _of(noun) if noun.lemma_.lower() in _EMPTY_HEADS else None
    inner = child(of, "pobj") if of is not None else None
    return inner if inner is not None and inner.pos_ in ("NOUN", "PROPN") else None


def noun_words(noun: Token) -> list[tuple[str, bool]]:
    """The words of a noun phrase without determiners, each with whether the phrase stands without it."""
    content = _content_of(noun)
    if content is not None:
        return noun_words(content)
    of = _of(noun)
    inner = child(of, "pobj") if of is not None else None
    words: list[tuple[str, bool]] = []
    for left in noun.lefts:
        if left.dep_ in ("amod", "nummod", "compound", "nmod") and left.lower_ not in _QUANTIFIERS and _is_word(left):
            nested = [(t.lower_, True) for t in left.lefts if t.dep_ == "compound"]
            words += [*nested, (left.lower_, left.dep_ != "compound")]
        elif left.dep_ == "poss" and left.pos_ in ("NOUN", "PROPN") and child(left, "case") is not None:
            words.append((f"{left.lower_}'s", True))
    words.append((noun.lower_, False))
    if inner is not None and of is not None and inner.pos_ in ("NOUN", "PROPN"):
        tail = [*noun_words(inner)]
        if len(words) + 1 + len(tail) <= 4:
            words += [("of", False), *tail]
    return words


def _is_word(token: Token) -> bool:
    return token.text.replace("-", "").isalnum()


def noun_entity(noun: Token) -> Entity | None:
    """What a noun is called, `oil and water` included; None where it is no noun or says nothing."""
    if noun.pos_ not in ("NOUN", "PROPN", "NUM") or not any(c.isalpha() for c in noun.text):
        return None
    inner = _content_of(noun)
    if inner is not None:
        return noun_entity(inner)
    phrase = shorten(noun_words(noun))
    plural = noun.tag_ in ("NNS", "NNPS")
    other, linked = child(noun, "conj"), child(noun, "cc")
    if other is not None and linked is not None and linked.lower_ == "and" and not children(other, "conj"):
        both = shorten([(phrase, False), ("and", False), *noun_words(other)]) if phrase else ""
        if both and other.pos_ in ("NOUN", "PROPN"):
            return Entity(both, True)
    return Entity(phrase, plural) if phrase else None


def is_passive(verb: Token) -> bool:
    """`is dropped`: by its auxiliary, or a bare participle that modifies a noun (`the ball dropped by you`)."""
    return bool(children(verb, *_PASSIVE)) or (verb.dep_ == "acl" and verb.tag_ == "VBN")


def is_negated(verb: Token) -> bool:
    return bool(children(verb, "neg")) or any(c.lower_ in ("never", "no") for c in children(verb, "advmod"))


def verb_phrase(verb: Token, plural: bool, *, passive: bool | None = None, particle: bool = True) -> str:
    """`falls`, `fall` for a plural subject, `is dropped`, `does not break`, `breaks down`, `begins to melt`.

    `passive` overrules what the text has; `particle` False leaves `down` out.
    """
    passive = is_passive(verb) if passive is None else passive
    lemma = verb.lemma_.lower()
    if not lemma.isalpha():
        return ""
    no = " not" if is_negated(verb) else ""
    tail = "".join(f" {t.lower_}" for t in children(verb, "prt")) if particle else ""
    if passive:
        done = verb.lower_ if verb.tag_ == "VBN" else past_participle(lemma)
        return f"{'are' if plural else 'is'}{no} {done}{tail}"
    if lemma == "be":
        return f"{'are' if plural else 'is'}{no}"
    begun = verb.head if verb.dep_ == "xcomp" and verb.head.lemma_ in ("begin", "start", "stop", "continue") else None
    if begun is not None:
        starts = begun.lemma_ if plural else third_person(begun.lemma_)
        return f"{starts}{' to' if verb.tag_ == 'VB' else ''} {verb.lower_}{tail}"
    if no:
        return f"{'do' if plural else 'does'} not {lemma}{tail}"
    return (lemma if plural else third_person(lemma)) + tail


def prep_phrase(prep: Token) -> tuple[str, Token] | None:
    """`to the ground`, `out of the bottle`, and the noun at its end. Articles inside stay; `its` becomes `the`."""
    noun = child(prep, "pobj")
    if noun is None:
        inner = child(prep, "prep", "pcomp")
        noun = child(inner, "pobj") if inner is not None and inner.pos_ == "ADP" else None
    if noun is None or noun.pos_ not in ("NOUN", "PROPN") or noun.i < prep.i:
        return None
    words = [(t.lower_, False) for t in prep.doc[prep.i : max(noun.left_edge.i, prep.i + 1)]]
    article = next((t for t in noun.lefts if t.dep_ in ("det", "poss") and t.lower_ not in _QUANTIFIERS), None)
    if article is not None:
        keeps = article.lower_ in ("a", "an", "the")
        if child(article, "case") is None:
            words.append((article.lower_ if keeps else "the", len(words) > 1))
    # Adjectives go before the article does: it is what makes the phrase read well.
    phrase = shorten([*words, *noun_words(noun)])
    return (phrase, noun) if phrase else None
