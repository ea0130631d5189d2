"""Reading the clauses of a response: each gives candidates for triplets, in the order of the text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from spacy.tokens import Doc, Span, Token

from distill.mining.lens_rules import (
    BECOMING,
    CAUSING,
    CLAUSES,
    DIRECTIONS,
    FILLERS,
    IDLE,
    MAKING,
    MOTION,
    PLACE,
    RELATING,
    SEQUENCE,
    TALK,
    joins,
    lenses_of,
    prep_lenses,
)
from distill.mining.phrases import (
    GENERIC,
    JUDGING,
    PERSON,
    Entity,
    child,
    children,
    ends_at,
    gerund,
    is_abstract,
    is_empty,
    is_passive,
    noun_entity,
    of_what,
    others,
    prep_phrase,
    shorten,
    singular,
    told,
    verb_phrase,
)

_PRONOUNS = {"it": False, "he": False, "she": False, "him": False, "her": False, "they": True, "them": True}
"""Pronoun → whether it stands for several."""
_EMPTY_VERBS = ("be", "have", "do")


@dataclass(frozen=True)
class Candidate:
    """A triplet before it has its place: `lenses` in order of preference, all of them honest."""

    what: str
    action: str
    result: str
    lenses: tuple[str, ...]
    sentence: int

    @property
    def phrases(self) -> tuple[str, str, str]:
        return self.what, self.action, self.result


@dataclass
class ClauseReader:
    """Reads the clauses of one response in order, and remembers what `it` and `they` may stand for."""

    mentioned: list[Entity] = field(default_factory=list[Entity])
    found: list[Candidate] = field(default_factory=list[Candidate])
    sentence: int = 0
    event: tuple[Entity, str, str] | None = None
    """What a question says happens: to what, which action, and the lens of what comes of it."""
    details: bool = False
    """Keep the weak ones beside what is strong, and what nouns say of themselves."""
    _weak: list[Candidate] = field(default_factory=list[Candidate])

    def prompt(self, doc: Doc) -> None:
        """Take the thing that a question is about as the first antecedent, and what happens to it as the first step."""
        for dep in ("pobj", "nsubj", "dobj"):
            nouns = [entity for token in doc if token.dep_ == dep and (entity := noun_entity(token))]
            self.mentioned += nouns[:1]
        for verb in doc:
            joined = joins(verb) if verb.pos_ == "VERB" else None
            thing = child(verb, "dobj", "nsubjpass") or child(verb, "nsubj")
            if joined is not None and thing is not None and (entity := self._entity(thing)) is not None:
                self.event = entity, verb_phrase(verb), joined[0]
                return

    def read(self, sentence: Span) -> None:
        """Take what a sentence says: what is no event, or can't be seen, only where it says nothing else."""
        if sentence.text.rstrip().endswith("?"):
            return
        before = len(self.found)
        for token in sentence:
            if token.pos_ in ("VERB", "AUX") and token.dep_ in CLAUSES:
                self._clause(token)
            elif self.details and token.pos_ in ("NOUN", "PROPN"):
                self._qualities(token)
        if self.details:
            self.found += self._weak
        elif len(self.found) == before:
            self.found += self._weak[:1]
        self._weak.clear()
        self.sentence += 1

    def _entity(self, token: Token, exclude: str = "") -> Entity | None:
        """What a subject or object is called; pronouns by their antecedent."""
        word = token.lower_
        if word in GENERIC:
            return Entity(PERSON)
        if word in ("that", "which", "who") and token.head.dep_ == "relcl":
            return self._entity(token.head.head)
        if word == "this" and token.head.lemma_ in CAUSING:
            word = "it"
        if word not in _PRONOUNS:
            return noun_entity(token)
        fitting = (e for e in reversed(self.mentioned) if e.plural == _PRONOUNS[word] and e.phrase != exclude)
        return next(fitting, None)

    def _remember(self, entity: Entity | None) -> None:
        if entity is not None and entity.phrase != PERSON:
            self.mentioned.append(entity)

    def _subject(self, verb: Token) -> Entity | None:
        """The grammatical subject, inherited where the clause has none of its own."""
        for _ in range(6):
            own = child(verb, "nsubj", "nsubjpass")
            if own is not None:
                return None if _is_extraposed(verb, own) else self._entity(own)
            if child(verb, "expl") is not None:
                return None
            doing = child(verb, "csubj")
            if doing is not None:
                return gerund(doing)
            if verb.dep_ in ("acl", "relcl"):
                return self._entity(verb.head) if verb.tag_ in ("VBG", "VBN") or verb.dep_ == "relcl" else None
            if verb.dep_ == "ROOT" or (verb.dep_ == "ccomp" and not children(verb, "aux", "mark")):
                return Entity(PERSON) if verb.tag_ == "VB" or verb.tag_ == "VBP" else None
            verb = verb.head.head if verb.dep_ == "pcomp" else verb.head
            if verb.pos_ not in ("VERB", "AUX"):
                return None
        return None

    def _clause(self, verb: Token) -> None:
        if _is_carrier(verb):
            return
        if child(verb, "expl") is not None:
            self._existence(verb)
            return
        subject = self._subject(verb)
        by_person = subject is not None and subject.phrase == PERSON
        if verb.lemma_.lower() in TALK:
            topic = child(verb, "dobj")
            self._remember(noun_entity(topic) if topic is not None and by_person else None)
            return
        if subject is None or (by_person and verb.lemma_ in IDLE):
            return
        direct = child(verb, "dobj")
        thing = self._entity(direct, subject.phrase) if direct is not None else None
        linked = self._join(verb, subject, thing)
        before = len(self.found)
        self._places(verb, subject, thing)
        places, self.found[before:] = self.found[before:], []
        # What a person does to a thing is said already where the thing goes somewhere, or by the connective.
        if not by_person or not (places or linked):
            self._object(verb, subject, thing)
            self._complement(verb, subject)
            self._effect(verb, subject)
        self._agent(verb, subject)
        self._purpose(verb, subject, thing)
        self.found += places
        if len(self.found) == before and not linked:
            self._last_resort(verb, subject)
        self._remember(thing if by_person else subject)

    # Each of these adds what it finds.

    def _add(self, what: Entity, action: str, result: str, lenses: Sequence[str], *, weak: bool = False) -> None:
        action = shorten([(action, False)])
        if what.phrase and action and result and lenses and result not in (what.phrase, PERSON):
            empty = what.phrase == PERSON or is_abstract(what.phrase) or is_abstract(result)
            weak = weak or empty or "abstract" in lenses
            place = self._weak if weak else self.found
            place.append(Candidate(what.phrase, action, result, tuple(lenses), self.sentence))

    def _beside(self, token: Token) -> list[str]:
        """What `and`, `or` or a comma put beside a thing or a state: details."""
        return [phrase for other in others(token) if (phrase := self._state(other))] if self.details else []

    def _object(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        direct = child(verb, "dobj")
        if direct is None or thing is None or _has_effect(verb):
            return
        particle = child(verb, "prt")
        if particle is not None and particle.lower_ in PLACE and verb.lemma_ in MOTION and subject.phrase != PERSON:
            # `drips down the wall`: the parser takes the place for an object.
            self._add(subject, verb_phrase(verb), thing.phrase, ("spatial",))
        else:
            weak = verb.lemma_ in _EMPTY_VERBS
            for phrase in (thing.phrase, *self._beside(direct)):
                self._add(subject, verb_phrase(verb), phrase, lenses_of(verb), weak=weak)

    def _existence(self, verb: Token) -> None:
        """`there is a cat on the mat`."""
        there = child(verb, "attr", "dobj")
        entity = noun_entity(there) if there is not None else None
        if there is None or entity is None:
            return
        for prep in (*children(there, "prep"), *children(verb, "prep")):
            found = prep_phrase(prep)
            if found is not None and prep_lenses(verb, prep, found[2])[:1] == ("spatial",):
                self._add(entity, f"{verb_phrase(verb)} {found[0]}", found[1], ("spatial",))
        self._remember(entity)

    def _complement(self, verb: Token, subject: Entity) -> None:
        """`becomes a gas`, `gets wet`; `is cold` and `is a gas`, which are weak."""
        for token in children(verb, "acomp", "attr", "oprd")[:1]:
            weak = verb.lemma_ not in BECOMING
            if not (weak and is_abstract(token.lemma_.lower())):
                for state in (self._state(token), *self._beside(token)):
                    self._add(subject, verb_phrase(verb), state, lenses_of(verb), weak=weak)

    def _state(self, token: Token) -> str:
        """What a complement says of a thing: `cold`, `not wet`, `gas`; "" where it only judges."""
        if token.pos_ in ("NOUN", "PROPN", "PRON"):
            entity = None if is_empty(token) else self._entity(token)
            return entity.phrase if entity is not None else ""
        if token.lower_ in JUDGING or token.pos_ not in ("ADJ", "VERB"):
            return ""
        return shorten([*((t.lower_, True) for t in token.lefts if t.dep_ == "neg"), (token.lower_, False)])

    def _effect(self, verb: Token, subject: Entity) -> None:
        """`causes the ball to fall`: the effect is a clause, and reads `ball falls`."""
        for effect in children(verb, "ccomp", "xcomp"):
            sufferer = child(effect, "nsubj", "nsubjpass")
            if verb.lemma_ in CAUSING and sufferer is not None:
                entity = self._entity(sufferer, subject.phrase)
                if entity is not None:
                    self._add(subject, verb_phrase(verb), self._outcome(effect, entity, ""), ("causal",))

    def _agent(self, verb: Token, sufferer: Entity) -> None:
        """`are eaten by insects`: insects eat them."""
        for prep in children(verb, "agent"):
            doer = child(prep, "pobj")
            entity = self._entity(doer, sufferer.phrase) if doer is not None else None
            if entity is not None:
                self._add(entity, verb_phrase(verb), sufferer.phrase, ("causal",))

    def _purpose(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        """`use a knife to cut the bread`."""
        what = thing or subject
        if verb.lemma_ in _EMPTY_VERBS:
            return
        for aim in children(verb, "advcl", "xcomp"):
            to = child(aim, "aux")
            if to is None or to.lower_ != "to" or child(aim, "nsubj") or what.phrase == PERSON:
                continue
            if aim.dep_ == "advcl" or verb.lemma_ == "use":
                self._add(what, verb_phrase(verb), self._outcome(aim, what, what.phrase), ("causal",))

    def _places(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        """Each prepositional phrase; with an object, it is the object that goes there."""
        if child(verb, "acomp", "attr", "oprd") is not None:
            return  # `is a force in nature`: it tells of the complement
        if thing is not None and verb.lemma_ in IDLE | MAKING | RELATING:
            return  # `causes damage to the car`: it tells of the object
        carrier = [verb.head] if verb.dep_ == "xcomp" and _is_carrier(verb.head) else []
        for prep in [prep for place in (verb, *carrier) for prep in children(place, "prep")][:2]:
            found = prep_phrase(prep)
            if found is None or (thing is None and child(verb, "dobj") is not None):
                continue
            word, phrase, noun = found
            lenses = prep_lenses(verb, prep, noun)
            weak = verb.lemma_ in _EMPTY_VERBS and "spatial" not in lenses
            for place in (phrase, *self._beside(noun)):
                self._add(thing or subject, f"{verb_phrase(verb)} {word}", place, lenses, weak=weak)

    def _qualities(self, noun: Token) -> None:
        """`heavy steel load`: a load is heavy, and steel; `debris of the atmosphere`: an atmosphere has debris."""
        name = Entity(shorten([(singular(noun), False)]))
        for quality in children(noun, "amod", "compound"):
            for state in (self._state(quality), *self._beside(quality)):
                self._add(name, "be", state, ("abstract",))
        for owner in (*children(noun, "poss"), of_what(noun)):
            if owner is not None and not is_empty(noun) and (whose := noun_entity(owner)) is not None:
                self._add(whose, "have", name.phrase, ("abstract",))

    def _last_resort(self, verb: Token, subject: Entity) -> None:
        """`falls down`, `bounces quickly`: all that is said besides the subject. `it shatters`: of what a question says
        happens to it, it is the result."""
        if verb.lemma_ in (*_EMPTY_VERBS, *MAKING) or child(verb, "dobj", "acomp", "attr", "ccomp") is not None:
            return
        ends = ("prt", "advmod") if verb.lemma_ in MOTION else ("advmod",)
        end = next((t for t in verb.children if t.dep_ in ends and t.lower_ in DIRECTIONS), None)
        how = next((t for t in children(verb, "advmod") if t.i > verb.i and t.lower_.endswith("ly")), None)
        if end is not None:
            lenses = dict.fromkeys(("spatial", *lenses_of(verb)))
            self._add(subject, verb_phrase(verb, particle=False), end.lower_, [x for x in lenses if x != "abstract"])
        elif self.event is not None and subject.phrase == self.event[0].phrase and verb.lemma_ != self.event[1]:
            self._add(subject, self.event[1], told(verb), (self.event[2],))
        elif how is not None and how.lower_ not in FILLERS | SEQUENCE:
            self._add(subject, verb_phrase(verb), how.lower_, lenses_of(verb), weak=True)

    def _join(self, verb: Token, subject: Entity, thing: Entity | None) -> bool:
        """Where a connective joins this clause to its main clause: one step out of two clauses."""
        joined = joins(verb) if verb.dep_ == "advcl" else None
        if joined is None:
            return False
        lens, first = joined
        main = verb.head
        if main.pos_ not in ("VERB", "AUX") or main.lemma_ in TALK:
            return False
        agent = self._main_subject(main, thing if subject.phrase == PERSON else subject)
        if agent is None:
            return False
        earlier, later = (verb, main) if first else (main, verb)
        doer, sufferer = (subject, agent) if first else (agent, subject)
        done_to = child(earlier, "dobj")
        acted = (thing if first else self._entity(done_to)) if done_to is not None else None
        what, action = doer, self._said(earlier, acted)
        if doer.phrase == PERSON:
            if acted is None or acted.phrase == PERSON:
                return False
            what, action = acted, verb_phrase(earlier)
        before = len(self.found)
        self._add(what, action, self._outcome(later, sufferer, what.phrase), (lens,))
        return len(self.found) > before

    def _main_subject(self, main: Token, topic: Entity | None) -> Entity | None:
        """The main clause's subject; `it` there is what the clause before it is about."""
        own = child(main, "nsubj", "nsubjpass")
        pronoun = own is not None and own.lower_ in ("it", "they") and own.i > main.left_edge.i
        if pronoun and own is not None and topic is not None and topic.plural == (own.lower_ == "they"):
            return topic
        return self._subject(main)

    def _said(self, verb: Token, thing: Entity | None) -> str:
        """A clause's verb with what completes it, as far as that fits: `hit ground`, `freeze`."""
        action, state = verb_phrase(verb), child(verb, "acomp")
        more = thing.phrase if thing is not None else self._state(state) if state is not None else ""
        if more and (said := shorten([(action, False), (more, False)])):
            return said
        return "" if verb.lemma_ in _EMPTY_VERBS else action

    def _outcome(self, verb: Token, subject: Entity, known: str) -> str:
        """What a clause says becomes of the thing that is `known`: `falls to ground`, `wet`, `explosion`, or of another
        subject, `pieces scatter`."""
        if _is_carrier(verb):
            verb = children(verb, "xcomp")[0]
        who = [] if subject.phrase == known else [(subject.phrase, False)]
        if subject.phrase == PERSON:
            return ""
        direct = child(verb, "dobj", "acomp", "attr", "oprd")
        thing = self._state(direct) if direct is not None else ""
        if verb.lemma_ in BECOMING or (verb.lemma_ == "be" and direct is not None and direct.pos_ == "ADJ"):
            into = None if direct is not None else ends_at(verb)
            thing = into[1] if into is not None and into[0] == "into" else thing
            return shorten([*who, (thing, False)]) if thing else ""
        if is_passive(verb) and verb.lemma_ in TALK | IDLE:
            return ""  # `is called`, `is seen`
        if verb.pos_ not in ("VERB", "AUX"):
            return shorten([*who, (self._state(verb), False)]) if self._state(verb) else ""
        place = ends_at(verb) if direct is None else None
        if verb.lemma_ in MAKING and not _has_effect(verb):
            return thing or (place[1] if place is not None else "")
        more = thing or (f"{place[0]} {place[1]}" if place is not None else "")
        if (action := told(verb)) and more and (said := shorten([*who, (action, False), (more, False)])):
            return said
        if verb.lemma_ in (*_EMPTY_VERBS, *MAKING) or (thing and verb.lemma_ in CAUSING) or (direct and not thing):
            return ""
        return shorten([*who, (action, False)]) if action else ""


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
