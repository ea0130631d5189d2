"""From a dependency parse to short phrases: what a noun, a verb or a prepositional phrase is called in a dream.

The same concept gets the same phrase: lower-case, no article, no quantifier, nouns in the singular, actions as
the verb's lemma (`fall`, `drop`, `not break`) and, where a place or the like ends the clause, its preposition (`fall
to`). What becomes of a thing, if it is a clause, is told in the third person (`falls to ground`): an action never is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spacy.tokens import Token

from distill.mining.inflect import past_participle, third_person, word_set
from distill.mining.triplets import clean_phrase, fits

GENERIC = word_set("you we one someone somebody anyone anybody everyone everybody us")
"""Who stands for whoever acts."""
PERSON = "person"
"""What those are called."""

EMPTY = word_set(
    "ability action addition amount array aspect bit blessing case challenge chance characteristic choice"
    " circumstance collection combination concept consequence context couple degree delight device difference effect"
    " element entity event example experience extent fact factor feature form idea impact importance inability"
    " instance issue joke kind lack lesson level lot majority manifestation manner matter member metaphor mode moment"
    " nature need number object one opportunity outcome part phenomenon place plenty point possibility potential"
    " practice presence problem process property purpose quality question range reason reference reminder"
    " representation rest result risk role scenario scene sense series set sight sign significance situation something"
    " sort source state story symbol tendency term testament thing time topic type use variety way"
)
"""Nouns that name nothing; with `of` behind it, what it is of is meant."""
JUDGING = word_set(
    "able actual additional amazing appropriate available aware beautiful beneficial better big broad capable certain"
    " challenging classic clear common complete complex considerable critical crucial delicate desired different"
    " difficult due each easy effective entire equivalent essential every existing fascinating few first full general"
    " good great helpful high huge important impossible incredible interesting key large last less likely little low"
    " main major many massive more most much natural necessary new next notable numerous only other overall own"
    " particular perfect poignant popular possible potential powerful predictable proper real relevant remarkable"
    " responsible right same second serious several severe significant similar simple small special specific strong"
    " such sure surprising third total tricky true typical unique unlikely unpredictable unusual useful usual valuable"
    " various vital well whole wonderful wrong"
)
"""Adjectives that judge or measure, and can't be pictured."""
_ABSTRACT = re.compile(r"..(tion|sion|ness|ment|ity|ism|ence|ance|ship|logy|ing)$")
_PICTURED = word_set(
    "station plantation explosion electricity gravity cement apartment garment pavement basement document instrument"
    " equipment monument harness wilderness ambulance fence audience spaceship organism appliance substance entrance"
    " building ceiling evening morning painting railing clothing ring string spring wing opening lightning pudding"
)
_VAGUE = word_set(
    "appearance atmosphere attitude balance behavior benefit chaos chemistry component condition control culture"
    " damage design effort emotion energy environment failure fate fear flavor freedom goal growth harm health help"
    " history hope identity individual influence information insight journey joy knowledge law life loss love luxury"
    " magic material meaning memory mess mind mistake mood mystery norm ordeal origin past pattern performance"
    " perspective power pressure product progress reality reflection relationship security service size skill society"
    " space speed spirit strength stress structure struggle style success support system tapestry task tension theory"
    " time tradition truth understanding unit usage value velocity view work"
)
_PLURAL_ONLY = word_set("clothes glasses goods jeans news pants scissors shorts trousers")
_PASSIVE = ("nsubjpass", "auxpass")


@dataclass(frozen=True)
class Entity:
    """What a noun phrase is called, and whether `they` may stand for it."""

    phrase: str
    plural: bool = False


def children(token: Token, *deps: str) -> list[Token]:
    return [child for child in token.children if child.dep_ in deps]


def child(token: Token, *deps: str) -> Token | None:
    found = children(token, *deps)
    return found[0] if found else None


def others(token: Token) -> list[Token]:
    """What stands beside it later, after `and`, `or` or a comma."""
    return [other for other in token.conjuncts if other.i > token.i]


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


def of_what(noun: Token) -> Token | None:
    """The noun behind `of`."""
    of = next((c for c in noun.children if c.dep_ == "prep" and c.lower_ == "of"), None)
    inner = child(of, "pobj") if of is not None else None
    return inner if inner is not None and inner.pos_ in ("NOUN", "PROPN") else None


def is_empty(noun: Token) -> bool:
    return noun.lemma_.lower() in EMPTY and child(noun, "compound") is None


def is_abstract(phrase: str) -> bool:
    """Whether its noun can be neither a place nor a picture: by its ending, or as one of the commonest."""
    noun = phrase.partition(" of ")[0].rpartition(" ")[2]
    return noun in _VAGUE or (noun not in _PICTURED and _ABSTRACT.search(noun) is not None)


def singular(noun: Token) -> str:
    return noun.lower_ if noun.lower_ in _PLURAL_ONLY else noun.lemma_.lower()


def noun_words(noun: Token) -> list[tuple[str, bool]]:
    """The words of a noun phrase without determiners, each with whether the phrase stands without it."""
    inner = of_what(noun)
    if inner is not None and is_empty(noun):
        return noun_words(inner)
    words: list[tuple[str, bool]] = []
    for left in noun.lefts:
        if left.dep_ in ("amod", "compound", "nmod") and left.lower_ not in JUDGING and _is_word(left):
            nested = [(t.lower_, True) for t in left.lefts if t.dep_ == "compound"]
            words += [*nested, (left.lower_, left.dep_ != "compound")]
        elif left.dep_ == "poss" and left.pos_ in ("NOUN", "PROPN") and child(left, "case") is not None:
            words.append((f"{left.lower_}'s", True))
    words.append((singular(noun), False))
    if inner is not None and not is_empty(inner) and len(words) + 1 + len(tail := noun_words(inner)) <= 4:
        words += [("of", False), *tail]
    return words


def _is_word(token: Token) -> bool:
    return token.text.replace("-", "").isalnum()


def noun_entity(noun: Token) -> Entity | None:
    """What a noun is called, `oil and water` included; None where it is no noun or names nothing."""
    if noun.pos_ not in ("NOUN", "PROPN") or not any(c.isalpha() for c in noun.text):
        return None
    if is_empty(noun):
        inner = of_what(noun)
        return noun_entity(inner) if inner is not None else None
    phrase = shorten(noun_words(noun))
    plural = noun.tag_ in ("NNS", "NNPS")
    other, linked = child(noun, "conj"), child(noun, "cc")
    if other is not None and linked is not None and linked.lower_ == "and" and not children(other, "conj"):
        both = shorten([(phrase, False), ("and", False), *noun_words(other)]) if phrase else ""
        if both and other.pos_ in ("NOUN", "PROPN") and not is_empty(other):
            return Entity(both, True)
    return Entity(phrase, plural) if phrase else None


def is_passive(verb: Token) -> bool:
    """`is dropped`: by its auxiliary, or a bare participle that modifies a noun (`the ball dropped by you`)."""
    return bool(children(verb, *_PASSIVE)) or (verb.dep_ == "acl" and verb.tag_ == "VBN")


def is_negated(verb: Token) -> bool:
    return bool(children(verb, "neg")) or any(c.lower_ in ("never", "no") for c in children(verb, "advmod"))


def _particle(verb: Token) -> str:
    return "".join(f" {t.lower_}" for t in children(verb, "prt"))


def verb_phrase(verb: Token, *, particle: bool = True) -> str:
    """An action: `fall`, `drop` whether something drops or is dropped, `not break`, `break down`, `stop melting`.

    `particle` False leaves `down` out.
    """
    lemma = verb.lemma_.lower()
    if not lemma.isalpha():
        return ""
    tail = _particle(verb) if particle else ""
    if verb.dep_ == "xcomp" and verb.head.lemma_ == "stop":
        return f"stop {verb.lower_}{tail}"
    return f"{'not ' if is_negated(verb) else ''}{lemma}{tail}"


def told(verb: Token) -> str:
    """A verb as what becomes of a thing: `falls`, `broken` where something breaks it, `does not mix`, "" for `be`."""
    lemma, no = verb.lemma_.lower(), is_negated(verb)
    if lemma == "be" or not lemma.isalpha():
        return ""
    if is_passive(verb):
        done = verb.lower_ if verb.tag_ == "VBN" else past_participle(lemma)
        return f"{'not ' if no else ''}{done}{_particle(verb)}"
    return (f"does not {lemma}" if no else third_person(lemma)) + _particle(verb)


def prep_phrase(prep: Token) -> tuple[str, str, Token] | None:
    """`to` and `ground`, `out of` and `bottle`: the preposition, what its noun is called, and the noun."""
    noun = child(prep, "pobj")
    if noun is None:
        inner = child(prep, "prep", "pcomp")
        noun = child(inner, "pobj") if inner is not None and inner.pos_ == "ADP" else None
    if noun is None or noun.i < prep.i or noun_entity(noun) is None:
        return None
    words = [t.lower_ for t in prep.doc[prep.i : max(noun.left_edge.i, prep.i + 1)]]
    phrase = shorten(noun_words(noun))
    return (" ".join(words), phrase, noun) if phrase else None


def ends_at(verb: Token) -> tuple[str, str] | None:
    """The preposition and the noun of the first place that a clause names."""
    return next((found[:2] for prep in children(verb, "prep") if (found := prep_phrase(prep))), None)


def gerund(verb: Token) -> Entity | None:
    """`heating water` as a subject."""
    direct = child(verb, "dobj")
    thing = noun_entity(direct) if direct is not None else None
    phrase = shorten([(verb.lower_, False), *([(thing.phrase, False)] if thing is not None else [])])
    return Entity(phrase) if verb.tag_ == "VBG" and phrase else None
