"""Reading the clauses of a response: each gives candidates for triplets, in the order of the text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from spacy.tokens import Doc, Span, Token

from distill.mining.lens_rules import (
    CAUSING,
    CLAUSES,
    DIRECTIONS,
    FILLERS,
    IDLE,
    MOTION,
    PLACE,
    SEQUENCE,
    TALK,
    connective,
    lenses_of,
    prep_lens,
)
from distill.mining.phrases import (
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


@dataclass(frozen=True)
class Candidate:
    """A triplet before it has its place: `lenses` in order of preference, all of them honest."""

    what: str
    action: str
    result: str
    lenses: tuple[str, ...]
    sentence: int


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
        if child(verb, "expl") is not None:
            self._existence(verb)
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
        self._places(verb, subject, thing)
        places, self.found[before:] = self.found[before:], []
        # What `you` do to a thing is said already where the thing goes somewhere, or by the connective.
        if subject.phrase != "you" or not (places or linked):
            self._object(verb, subject, thing)
            self._complement(verb, subject)
            self._effect(verb, subject)
        self.found += places
        if len(self.found) == before and not linked:
            self._last_resort(verb, subject, thing)
        self._remember(thing if subject.phrase == "you" else subject)

    # Each of these adds what it finds.

    def _add(self, what: Entity, action: str, result: str, lenses: Sequence[str]) -> None:
        action = shorten([(action, False)])
        if what.phrase == "you" and action.startswith("are "):
            return
        if what.phrase and action and result and what.phrase != result and (what.phrase != "you" or result != "you"):
            self.found.append(Candidate(what.phrase, action, result, tuple(dict.fromkeys(lenses)), self.sentence))

    def _object(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        if thing is None or _has_effect(verb):
            return
        particle = child(verb, "prt")
        if particle is not None and particle.lower_ in PLACE and verb.lemma_ in MOTION and subject.phrase != "you":
            # `drips down the wall`: the parser takes the place for an object.
            where = shorten([(particle.lower_, False), ("the", True), (thing.phrase, False)])
            self._add(subject, verb_phrase(verb, subject.plural, particle=False), where, ("spatial",))
        else:
            self._add(subject, verb_phrase(verb, subject.plural), thing.phrase, lenses_of(verb))

    def _existence(self, verb: Token) -> None:
        """`there is a cat on the mat`."""
        there = child(verb, "attr", "dobj")
        entity = noun_entity(there) if there is not None else None
        if there is None or entity is None:
            return
        for prep in (*children(there, "prep"), *children(verb, "prep")):
            found = prep_phrase(prep)
            if found is not None and prep_lens(verb, prep, found[1]) == "spatial":
                self._add(entity, verb_phrase(verb, entity.plural), found[0], ("spatial",))
        self._remember(entity)

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
        carrier = [verb.head] if verb.dep_ == "xcomp" and _is_carrier(verb.head) else []
        for prep in [prep for place in (verb, *carrier) for prep in children(place, "prep", "agent")][:2]:
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
            if thing is not None and verb.lemma_ in IDLE:
                continue
            if thing is not None and thing.phrase != phrase:
                self._add(thing, verb_phrase(verb, thing.plural, passive=True), phrase, lenses)
            elif thing is None:
                self._add(subject, verb_phrase(verb, subject.plural), phrase, lenses)

    def _last_resort(self, verb: Token, subject: Entity, thing: Entity | None) -> None:
        """`falls down`, `begins to boil`, `does not mix`, `bounces quickly`: all that is said besides the subject."""
        if verb.lemma_ == "be" or thing is not None:
            return
        said = verb_phrase(verb, subject.plural, particle=False)
        end = next((t for t in verb.children if t.dep_ in ("prt", "advmod") and t.lower_ in DIRECTIONS), None)
        how = next((t for t in children(verb, "advmod") if t.i > verb.i and t.lower_.endswith("ly")), None)
        words = said.split()
        if end is not None and not is_passive(verb):
            self._add(subject, said, end.lower_, ("spatial", *lenses_of(verb)[:-1]))
        elif verb.dep_ == "xcomp" and len(words) > 1:
            self._add(subject, words[0], " ".join(words[1:]), lenses_of(verb))
        elif how is not None and how.lower_ not in FILLERS | SEQUENCE:
            self._add(subject, said, how.lower_, lenses_of(verb))
        elif words[1:2] == ["not"] and len(words) > 2:
            self._add(subject, " ".join(words[:2]), " ".join(words[2:]), lenses_of(verb))

    def _join(self, verb: Token, subject: Entity, thing: Entity | None) -> bool:
        """Where a connective joins this clause to its main clause: one step out of two clauses."""
        joined = connective(verb)
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
        pronoun = own is not None and own.lower_ in ("it", "they") and own.i > main.left_edge.i
        if pronoun and own is not None and topic is not None and topic.plural == (own.lower_ == "they"):
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
