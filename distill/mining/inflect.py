"""English word forms that miners need: third person, past participle, and stems for the grounding check."""

import re
from collections.abc import Iterable
from functools import lru_cache


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_IRREGULAR = """
be was were been|become became become|begin began begun|bend bent bent|bite bit bitten|blow blew blown|
break broke broken|bring brought brought|build built built|burn burnt burnt|burst burst burst|buy bought bought|
catch caught caught|choose chose chosen|come came come|cost cost cost|cut cut cut|dig dug dug|do did done|
draw drew drawn|drink drank drunk|drive drove driven|eat ate eaten|fall fell fallen|feed fed fed|feel felt felt|
fight fought fought|find found found|fly flew flown|forget forgot forgotten|freeze froze frozen|get got got|
give gave given|go went gone|grind ground ground|grow grew grown|hang hung hung|have had had|hear heard heard|
hide hid hidden|hit hit hit|hold held held|keep kept kept|know knew known|lay laid laid|lead led led|
leave left left|let let let|lie lay lain|light lit lit|lose lost lost|make made made|mean meant meant|
meet met met|pay paid paid|put put put|read read read|ride rode ridden|ring rang rung|rise rose risen|
run ran run|say said said|see saw seen|sell sold sold|send sent sent|set set set|shake shook shaken|
shine shone shone|shoot shot shot|shrink shrank shrunk|shut shut shut|sing sang sung|sink sank sunk|
sit sat sat|sleep slept slept|slide slid slid|speak spoke spoken|spend spent spent|spill spilt spilt|
spin spun spun|split split split|spread spread spread|spring sprang sprung|stand stood stood|steal stole stolen|
stick stuck stuck|sting stung stung|strike struck struck|sweep swept swept|swell swelled swollen|swim swam swum|
swing swung swung|take took taken|teach taught taught|tear tore torn|tell told told|think thought thought|
throw threw thrown|understand understood understood|wake woke woken|wear wore worn|weave wove woven|
win won won|wind wound wound|write wrote written
"""
_FORMS = [row.split() for row in _IRREGULAR.replace("\n", "").split("|")]
_PARTICIPLES = {forms[0]: forms[-1] for forms in _FORMS}
_BASES = {form: forms[0] for forms in _FORMS for form in forms[1:]} | {
    **dict.fromkeys(("is", "are", "am", "being", "'s", "'re"), "be"),
    **{"has": "have", "does": "do", "goes": "go", "dying": "die", "lying": "lie", "tying": "tie"},
    **{"feet": "foot", "teeth": "tooth", "men": "man", "women": "woman", "children": "child", "mice": "mouse"},
    **{"leaves": "leaf", "people": "person", "better": "good", "best": "good", "worse": "bad", "worst": "bad"},
}
# Two-syllable verbs with the stress on the second double their consonant too; these are the common ones.
_DOUBLING = {"admit", "begin", "control", "occur", "permit", "prefer", "refer", "transfer", "commit", "compel", "emit"}

STOP_WORDS = word_set(
    """a about all also am an and any are as at away back be been being both but by can cannot could did do does
    down each for from had has have he her him his how i if in into is it its may me might more most my no nor not of
    off on onto or our out over shall she should so some such than that the their them then there these they this
    those through to too under until up us very was we were what when where which while who why will with would you
    your"""
)


def third_person(lemma: str) -> str:
    """`fall` → `falls`, `carry` → `carries`, `be` → `is`."""
    special = {"be": "is", "have": "has"}.get(lemma)
    if special:
        return special
    if re.search(r"(s|x|z|ch|sh|o)$", lemma):
        return lemma + "es"
    return lemma[:-1] + "ies" if re.search(r"[^aeiou]y$", lemma) else lemma + "s"


def past_participle(lemma: str) -> str:
    """`drop` → `dropped`, `throw` → `thrown`."""
    if lemma in _PARTICIPLES:
        return _PARTICIPLES[lemma]
    if lemma.endswith("e"):
        return lemma + "d"
    if re.search(r"[^aeiou]y$", lemma):
        return lemma[:-1] + "ied"
    short = re.fullmatch(r"[^aeiou]*(qu)?[aeiou][^aeiouwxy]", lemma)
    return lemma + (lemma[-1] if short or lemma in _DOUBLING else "") + "ed"


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A word's forms brought together, roughly: for comparison only, not for show."""
    word = _BASES.get(word, word)
    if len(word) > 4 and word.endswith(("ies", "ied")):
        return word[:-3] + "i"
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith(("ss", "us", "is")):
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    if word.endswith("y"):
        return word[:-1] + "i"
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def content_stems(texts: Iterable[str]) -> set[str]:
    """Stems of all words that carry content."""
    words = (word for text in texts for word in re.findall(r"[^\W_]+", text.lower()))
    return {stem(word) for word in words if word not in STOP_WORDS}


def words_of(phrase: str) -> list[str]:
    """A phrase's words, owners without their 's."""
    return f"{phrase} ".replace("'s ", " ").split()


def telling(phrase: str) -> list[str]:
    """Those of a phrase's words that say something, in order."""
    return [word for word in words_of(phrase) if word not in STOP_WORDS]


def content(phrase: str) -> list[str]:
    """Their stems; where no word says anything, all words."""
    return [stem(word) for word in telling(phrase)] or words_of(phrase)


def grounded(phrase: str, known: set[str]) -> bool:
    """Whether every content word of a phrase is, in some form, among the `known` stems of prompt and response."""
    return content_stems([phrase]) <= known
