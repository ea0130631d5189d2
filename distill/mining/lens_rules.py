"""Which lens a clause belongs to: the words that tell of place, time and cause, and the rules that read them."""

import re

from spacy.tokens import Token

from distill.mining.inflect import word_set
from distill.mining.phrases import child

PLACE = word_set(
    "on onto in into inside to toward towards through across over under above below beneath beside behind between"
    " around along against off out from up down near at past upon within outside onto among beyond away"
)
MOTION = word_set(
    "fall go move run roll return travel flow drop rise send throw bring come carry push pull pour transfer attach"
    " stick spread drift head fly jump bounce float sink hit walk turn lift raise add escape leave remove release"
    " separate drain drip splash leak climb get put place take blow swing slide tie connect expose"
)
DIRECTIONS = word_set("down up back away out apart downward upward downwards upwards off forward around over")
TIME = word_set("after before until till during since")
TIME_NOUNS = word_set(
    "second minute hour day night week month year morning evening afternoon time moment while summer winter autumn"
    " fall spring season age century period end beginning stage today tomorrow"
)
VAGUE = word_set(
    "way case order fact addition term process response result contrast general form effect conclusion part example"
    " short manner account sense instance place word context regard realm field mathematics physics"
)
CAUSING = word_set(
    "cause lead result make produce create force allow let help trigger prevent enable generate keep stop"
    " reduce increase raise affect influence change transform damage destroy improve weaken strengthen pull push"
)
LASTING = word_set("become remain last continue stay begin start")
"""Verbs that tell of a change or a state over time."""
CHANGING = word_set("turn change transform convert develop grow freeze melt form evolve break dissolve")
"""Verbs whose `into` is what becomes of a thing, in time."""
REACHING = word_set("hit reach enter cross touch strike leave approach")
"""Verbs whose object is a place."""
FIGURATIVE = word_set(
    "root base see know design explore interest believe define specialize engage participate find use vary"
)
"""Verbs whose `in` and `on` are no places."""
FILLERS = word_set("actually really simply typically usually generally essentially basically likely probably")
SEQUENCE = word_set("then first next finally eventually soon later afterwards afterward last lastly once")
CONSEQUENCE = word_set("therefore thus hence consequently so")
# Connective → (lens, whether its clause comes first: the condition, the cause, the earlier).
JOINING = {
    **dict.fromkeys(("if", "because", "since"), ("causal", True)),
    **dict.fromkeys(("when", "once", "after", "as", "while", "whenever"), ("temporal", True)),
    **dict.fromkeys(("until", "before", "till"), ("temporal", False)),
}
TALK = word_set(
    "mention note discuss explain consider refer ask say know want happen depend recommend imagine remember think"
    " believe understand hope learn describe mean follow suggest wonder"
)
IDLE = word_set("be have need see look notice get call try")
"""What `you` do that is no step of a dream."""
CLAUSES = word_set("ROOT conj advcl ccomp xcomp relcl acl parataxis pcomp")


def connective(verb: Token) -> tuple[str, bool] | None:
    """Lens and direction of the word that joins an adverbial clause to its main clause."""
    if verb.dep_ != "advcl":
        return None
    for token in verb.children:
        if token.dep_ in ("mark", "advmod") and token.lower_ in JOINING and token.i < verb.i:
            return JOINING[token.lower_]
    return None


def lenses_of(verb: Token) -> tuple[str, ...]:
    """The lenses that a clause may go under whatever completes it; `abstract` is always the last."""
    adverbs = {t.lower_ for t in verb.children if t.dep_ in ("advmod", "mark", "cc")}
    found: list[str] = []
    if verb.lemma_ in CAUSING or adverbs & CONSEQUENCE:
        found.append("causal")
    if adverbs & SEQUENCE or verb.lemma_ in LASTING or (verb.dep_ == "xcomp" and verb.head.lemma_ in LASTING):
        found.append("temporal")
    if verb.lemma_ in REACHING and child(verb, "dobj") is not None:
        found.append("spatial")
    return (*found, "abstract")


def prep_lens(verb: Token, prep: Token, noun: Token) -> str | None:
    """Where a prepositional phrase belongs; None where it only carries talk (`in fact`, `in order`)."""
    word, lemma = prep.lower_, noun.lemma_.lower()
    if word in ("due", "because") or (word == "by" and prep.dep_ == "agent"):
        return "causal"
    if word in ("to", "in", "from") and verb.lemma_ in ("lead", "result", "contribute"):
        return "causal"
    if lemma in VAGUE or word in ("as", "like", "than", "of"):
        return None
    if word == "into" and verb.lemma_ in CHANGING:
        return "temporal"
    if word in TIME or lemma in TIME_NOUNS:
        return "temporal"
    figurative = verb.lemma_ in FIGURATIVE or re.search(r"(tion|ness|ment|ity|ism|ence|ance|ship)$", lemma)
    if word in PLACE and not figurative and (word not in ("to", "from", "at") or verb.lemma_ in MOTION):
        return "spatial"
    return "abstract"
