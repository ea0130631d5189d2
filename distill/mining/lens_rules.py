"""Which lens a clause belongs to: the words that tell of place, time and cause, and the rules that read them."""

from spacy.tokens import Token

from distill.mining.inflect import word_set
from distill.mining.phrases import child, is_abstract

PLACE = word_set(
    "on onto in into inside to toward towards through throughout across over under above below beneath beside behind"
    " between around along against off out from up down near at past upon within outside among beyond away"
)
MOTION = word_set(
    "fall go move run roll return travel flow drop rise send throw bring come carry push pull pour transfer attach"
    " stick spread drift head fly jump bounce float sink hit walk turn lift raise add escape leave remove release"
    " separate drain drip splash leak climb get put place take blow swing slide tie connect expose drive ride swim"
    " crash land spill scatter descend ascend crawl hop kick toss pass"
)
DIRECTIONS = word_set("down up back away out apart downward upward downwards upwards off forward around over together")
TIME = word_set("after before until till during since")
TIME_NOUNS = word_set(
    "second minute hour day night week month year morning evening afternoon time moment while summer winter autumn"
    " fall spring season age century period end beginning stage today tomorrow"
)
VAGUE = word_set(
    "case order fact addition term response general conclusion short account instance word regard realm field"
    " mathematics physics way result turn contrast"
)
"""Nouns of prepositional phrases that only carry talk."""
CAUSING = word_set(
    "cause lead result make produce create force allow let help trigger prevent enable generate keep stop"
    " reduce increase raise affect influence change transform damage destroy improve weaken strengthen pull push"
)
CHANGING = word_set(
    "turn change transform convert develop grow freeze melt form evolve break dissolve become get boil evaporate"
    " expand shrink contract dry rot spoil fade cool warm heat harden soften thaw bloom wither age ripen burn mature"
    " crack shatter decompose condense swell begin start continue remain stay last end finish happen occur wait open"
    " close vibrate react disappear appear die live survive sleep wake increase decrease rise shift adapt adjust"
)
"""Verbs that, of a thing alone, tell of a change or a state over time."""
BECOMING = word_set("become get turn grow remain stay")
"""Verbs whose complement is what becomes of a thing."""
MAKING = word_set("cause create make produce form generate lead result trigger yield experience undergo")
"""Verbs of which, as an effect, only what they bring is worth telling."""
TOUCHING = word_set(
    "hit reach enter cross touch strike leave approach surround cover fill contain hold meet pass follow face climb"
    " occupy line block enclose carry bring move lift drop throw"
)
"""Verbs whose object tells of a place or a movement."""
RELATING = word_set(
    "be have do need see look notice call try include involve mean represent describe define require like love want"
    " know understand seem appear feel consider suggest symbolize reflect provide offer demonstrate show highlight"
    " emphasize depend belong tend differ resemble regard identify name perceive enjoy prefer share own value"
    " recognize believe deserve lack concern relate refer serve act play pose present possess gain learn study"
)
"""Verbs that do nothing to their object: they tell what something is or is like, what is felt or known."""
FIGURATIVE = word_set(
    "root base see know design explore interest believe define specialize engage participate find use vary"
)
"""Verbs whose `in` and `on` are no places."""
FILLERS = word_set("actually really simply typically usually generally essentially basically likely probably")
SEQUENCE = word_set("then first next finally eventually soon later afterwards afterward last lastly once gradually")
CONSEQUENCE = word_set("therefore thus hence consequently so")
# Connective → (lens, whether its clause comes first: the condition, the cause, the earlier).
JOINING = {
    **dict.fromkeys(("if", "because", "since"), ("causal", True)),
    **dict.fromkeys(("when", "once", "after", "as", "while", "whenever"), ("temporal", True)),
    **dict.fromkeys(("until", "before", "till"), ("temporal", False)),
    "so": ("causal", False),
}
TALK = word_set(
    "mention note discuss explain consider refer ask say know want happen depend recommend imagine remember think"
    " believe understand hope learn describe mean follow suggest wonder"
)
IDLE = word_set("be have need see look notice get call try do find")
"""What a person does that is no step of a dream."""
CLAUSES = word_set("ROOT conj advcl ccomp xcomp relcl acl parataxis pcomp")


def joins(verb: Token) -> tuple[str, bool] | None:
    """Lens and direction of the word that joins a clause to its main clause."""
    for token in verb.children:
        if token.dep_ in ("mark", "advmod") and token.lower_ in JOINING and token.i < verb.i:
            return JOINING[token.lower_]
    return None


def lenses_of(verb: Token) -> tuple[str, ...]:
    """The lenses that a clause may go under whatever completes it, the most fitting first."""
    adverbs = {t.lower_ for t in verb.children if t.dep_ in ("advmod", "mark", "cc")}
    thing, lemma = child(verb, "dobj"), verb.lemma_.lower()
    found: list[str] = []
    if lemma in CAUSING or adverbs & CONSEQUENCE:
        found.append("causal")
    if thing is not None and lemma in TOUCHING:
        found.append("spatial")
    if adverbs & SEQUENCE or (lemma in CHANGING and thing is None) or lemma in BECOMING:
        found.append("temporal")
    if thing is not None and lemma not in RELATING:
        found.append("causal")  # something does something to another
    if thing is None and lemma in MOTION:
        found.append("spatial")
    return tuple(dict.fromkeys(found)) or ("abstract",)


def prep_lenses(verb: Token, prep: Token, noun: Token) -> tuple[str, ...]:
    """Where a clause with a prepositional phrase belongs; () where the phrase only carries talk (`in fact`)."""
    word, lemma, of = prep.lower_, noun.lemma_.lower(), verb.lemma_.lower()
    if word in ("due", "because") or (word in ("to", "in", "from") and of in ("lead", "result", "contribute")):
        return ("causal",)
    if lemma in VAGUE or word in ("as", "like", "than", "of"):
        return ()
    if word == "into" and of in CHANGING:
        return ("temporal",)
    if word in TIME or lemma in TIME_NOUNS:
        return ("temporal",)
    figurative = of in FIGURATIVE or is_abstract(lemma)
    if word in PLACE and not figurative and (word not in ("to", "from", "at") or of in MOTION):
        return ("spatial", *(lens for lens in lenses_of(verb) if lens not in ("spatial", "abstract")))
    if word in ("without", "by", "from", "for") and of not in RELATING:
        return ("causal",)  # a condition, a means, a source, a purpose
    return lenses_of(verb)
