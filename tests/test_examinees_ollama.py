"""A model of Ollama in the exam: the fake server, with a real model that dreams behind it."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_ollama import FakeOllama, Reply, dreaming_ollama, replay, serve
from support.recorded import Told, exchange
from support.small_student import ANSWER, DREAM

from distill.errors import ModelNotFound, PromptRefused, TeacherUnavailable
from distill.exam.examinees.ollama import OWN_SYSTEM, OllamaExaminee, _card, cut
from distill.exam.examinees.opening import limits_of
from distill.exam.metrics.speech import Form
from distill.exam.questions import Question
from distill.exam.targets import How, Target
from distill.teacher.ollama import OllamaTeacher, model_digest
from distill.teacher.protocol import GenerateOptions
from distill.turns import joined

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "What happens when you drop a ball?"
SHOWN: dict[str, Any] = exchange("show_thinking_model")["response"]["json"]
"""One that thinks, whose vocabulary isn't told."""


def telling(*words: str) -> dict[str, Any]:
    """It, with this vocabulary."""
    return {**SHOWN, "model_info": {**SHOWN["model_info"], "tokenizer.ggml.tokens": list(words)}}


STUDENT = {"/api/show": telling("Hm", "⟨spatial⟩")}
QUESTIONS = [Question("a", PROMPT), Question("b", "How do plants grow?"), Question("c", PROMPT, system="Be short.")]


@pytest.fixture(scope="module")
def server(dreamer: Path) -> Generator[FakeOllama]:
    """ "dreamer", a student that dreams, and "plain", the same weights behind a template that knows no thinking."""
    with dreaming_ollama(dreamer) as server:
        yield server


def opened(server: FakeOllama, model: str, dream_tokens: int = 66) -> OllamaExaminee:
    return OllamaExaminee(Target(f"ollama:{model}", "ollama", model=model, host=server.url), How(7, dream_tokens))


def test_a_dreamer_dreams_and_answers(server: FakeOllama) -> None:
    examinee = opened(server, "dreamer")
    [spoken] = examinee.answer(QUESTIONS[:1], think=True, temperature=0, max_tokens=20, draw=0)
    assert (spoken.dream, spoken.answer, spoken.closed) == (DREAM, ANSWER, True)
    assert spoken.form == Form(dream=True, clean=True, whole=True, ended=True)
    asked = server.asked("/api/chat")[-1]
    assert asked["think"] is True
    assert asked["stream"] is False
    assert asked["options"] == {
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "temperature": 0,
        "seed": QUESTIONS[0].seed(7, 0) % (2**31 - 1),
        "num_predict": 86,
    }
    [silent] = examinee.answer(QUESTIONS[:1], think=False, temperature=0, max_tokens=20, draw=0)
    assert (silent.dream, silent.answer, silent.closed) == ("", ANSWER, True)
    assert spoken.tokens > silent.tokens > 0
    asked = server.asked("/api/chat")[-1]
    assert asked["think"] is False
    assert asked["options"]["num_predict"] == 20
    examinee.close()


TALK = [("system", "Be kind."), ("user", PROMPT), ("assistant", "It falls."), ("user", "How do plants grow?")]


def test_conversations_are_asked_turn_by_turn(server: FakeOllama) -> None:
    examinee = opened(server, "dreamer")
    examinee.answer([Question("d", joined(TALK), system="Be short.")], think=False, temperature=0, max_tokens=4, draw=0)
    teacher = OllamaTeacher("dreamer", host=server.url)
    found = teacher.generate(joined(TALK), GenerateOptions(max_tokens=20, temperature=0, system="Be short."))
    assert found.text
    assert found.tokens is not None
    assert found.tokens.soft[:-1].all()
    for body in server.asked("/api/chat")[-2:]:
        assert [(turn["role"], turn["content"]) for turn in body["messages"]] == TALK
        assert "prompt" not in body
        assert "system" not in body
    with pytest.raises(PromptRefused, match="doesn't tell how dreamer's template writes several turns"):
        teacher.go_on(joined(TALK), "It", GenerateOptions())
    examinee.close()
    teacher.close()


def test_what_a_dream_leaves_over_is_not_the_answers(server: FakeOllama) -> None:
    examinee = opened(server, "dreamer")
    [whole] = examinee.answer(QUESTIONS[:1], think=True, temperature=0, max_tokens=20, draw=0)
    [short] = examinee.answer(QUESTIONS[:1], think=True, temperature=0, max_tokens=3, draw=0)
    assert short.answer == "The ball falls"
    assert not short.form.ended
    assert short.closed
    assert short.tokens < whole.tokens
    assert (short.written, whole.written) == (short.tokens + short.dropped, whole.tokens)
    assert short.dropped > 0, "it took the time of these too"
    examinee.close()
    hurried = opened(server, "dreamer", dream_tokens=2)
    [spoken] = hurried.answer(QUESTIONS[:1], think=True, temperature=0, max_tokens=1, draw=0)
    assert DREAM.startswith(spoken.dream)
    assert (spoken.answer, spoken.closed) == ("", False)
    hurried.close()


@given(
    st.lists(st.text(max_size=4), max_size=6), st.lists(st.text(min_size=1, max_size=4), max_size=6), st.integers(0, 8)
)
def test_cut_against_counting(dream: list[str], answer: list[str], limit: int) -> None:
    content = "".join(answer)
    text, dropped = cut(content, [*dream, *answer], limit)
    assert text == "".join(answer[:limit])
    assert dropped == max(0, len(answer) - limit)


def test_cut_leaves_alone_what_it_can_not_count() -> None:
    assert cut("It falls.", [], 1) == ("It falls.", 0)
    assert cut("caf\u00e9 x", ["c", "af", "\ufffd", " x"], 1) == ("caf\u00e9 x", 0)
    assert cut("It falls.", ["</think>", "\n\nIt", " falls", "."], 2) == ("It falls", 1)


def test_answers_come_in_order_and_again_the_same(server: FakeOllama) -> None:
    examinee = opened(server, "dreamer")

    def say(questions: list[Question], draw: int) -> list[tuple[str, str]]:
        said = examinee.answer(questions, think=True, temperature=1.0, max_tokens=12, draw=draw)
        return [(spoken.dream, spoken.answer) for spoken in said]

    server.most_in_flight = 0
    once = say(QUESTIONS, 0)
    assert 1 < server.most_in_flight <= 4
    assert say(QUESTIONS, 0) == once
    assert say(QUESTIONS[::-1], 0) == once[::-1]
    assert say([], 0) == []
    seeds = {body["options"]["seed"] for body in server.asked("/api/chat")[-3:]}
    assert len(seeds) == 3
    assert server.asked("/api/chat")[-1]["messages"][-1]["role"] == "user"
    assert any(body["messages"][0] == {"role": "system", "content": "Be short."} for body in server.asked("/api/chat"))
    examinee.close()


def test_the_first_token_of_an_answer_ends_the_request() -> None:
    read: list[str] = []

    def parts() -> Generator[dict[str, Any]]:
        for kind, text in (
            ("thinking", "A "),
            ("thinking", "ball"),
            ("content", "It"),
            *[("content", " falls")] * 9999,
        ):
            read.append(kind)
            yield {"message": {"role": "assistant", "content": "", kind: text}, "done": False}

    said = {"/api/chat": Reply(stream=parts())}
    with serve(Told(STUDENT | said, ["tags", "version"])) as server:
        examinee = opened(server, "proto")
        assert examinee.begin(QUESTIONS[0])
        asked = server.asked("/api/chat")[-1]
        examinee.close()
    assert (asked["stream"], asked["options"]["num_predict"], asked["options"]["temperature"]) == (True, 67, 0.0)
    assert 3 <= len(read) < 9999


def test_one_that_thinks_in_words_has_room_for_it() -> None:
    thought = {"message": {"role": "assistant", "content": "", "thinking": "Hm"}, "done": True, "done_reason": "length"}
    for shown, room in ((telling("Hm", "⟨spatial⟩"), 66), (telling("Hm", "It"), 1024), (SHOWN, 1024)):
        said = {"/api/show": shown, "/api/chat": lambda body: Reply(stream=[thought]) if body["stream"] else thought}
        with serve(Told(said, ["tags", "version"])) as server:
            examinee = opened(server, "proto")
            [spoken] = examinee.answer(QUESTIONS[:1], think=True, temperature=0, max_tokens=40, draw=0)
            assert not examinee.begin(QUESTIONS[0]), "no answer came"
            examinee.close()
            assert [body["options"]["num_predict"] for body in server.asked("/api/chat")] == [room + 40, room + 1]
        assert examinee.card.note == ("it thinks in words, in at most 1,024 tokens" if room > 66 else "")
        assert (spoken.closed, spoken.answer, spoken.form.ended) == (False, "", False)


def test_room_to_think_bounds_only_who_thinks_in_words() -> None:
    plain = {**telling("Hm", "It"), "capabilities": ["completion"]}
    for shown, limits in ((STUDENT["/api/show"], [66]), (plain, [66]), (SHOWN, [66, 1024])):
        with serve(Told({"/api/show": shown}, ["tags", "version"])) as server:
            assert limits_of(Target("ollama:proto", "ollama", model="proto", host=server.url), How()) == limits


def test_a_model_without_thinking_is_not_told_to_think(server: FakeOllama) -> None:
    examinee = opened(server, "plain")
    [spoken] = examinee.answer(QUESTIONS[:1], think=True, temperature=0, max_tokens=4, draw=0)
    asked = server.asked("/api/chat")[-1]
    assert "think" not in asked
    assert "logprobs" not in asked
    assert asked["options"]["num_predict"] == 4
    assert spoken.tokens <= 4
    assert not examinee.card.dreams
    assert set(examinee.cannot) == {"likelihood", "targets", "kl", "mined", "dreams"}
    assert examinee.fits(QUESTIONS[0], 66)
    assert examinee.labels([]) is None
    examinee.close()


def test_what_passes_is_tried_again(server: FakeOllama) -> None:
    examinee = opened(server, "plain")
    server.fail("503", path="/api/chat")
    [spoken] = examinee.answer(QUESTIONS[:1], think=False, temperature=0, max_tokens=4, draw=0)
    assert spoken.tokens > 0
    examinee.close()


def test_cards_of_recorded_models() -> None:
    with replay() as server:
        examinee = opened(server, "smollm2:135m")
        card = examinee.card
        assert (card.kind, card.name, card.quantization) == ("ollama", "smollm2:135m", "Q4_1")
        assert (card.parameters, card.bytes, card.context) == (134515008, 98362745, 8192)
        assert not card.dreams
        assert card.note == ""
        assert _card("x", {}, {"system": "Be brief."}, False).note == OWN_SYSTEM
        examinee.close()
    with serve(Told(STUDENT, ["tags", "version"])) as server:
        proto = opened(server, "proto")
        assert proto.card.dreams
        assert (proto.card.parameters, proto.card.bytes, proto.card.context) == (3535872, 7128393, 1024)
        assert proto.card.quantization == "float16"
        assert "dreams" not in proto.cannot
        proto.close()
    with replay() as server:
        assert model_digest("smollm2:135m", server.url).startswith("fd5f44c0b5af")
        assert model_digest("proto", server.url).startswith("9b0277d182ab")
        with pytest.raises(ModelNotFound, match="smollm2:135m"):
            model_digest("smollm2:360m", server.url)


def test_the_recorded_dream_is_read(server: FakeOllama) -> None:
    """The request that was recorded had no options: here its answer alone is read."""
    from distill.exam.examinees.ollama import _spoken

    spoken = _spoken(exchange("chat_think_true")["response"]["json"], True, 40, 0.5, 5)
    assert spoken.dream == "⟨spatial⟩⟨a ball⟩⟨release⟩⟨falls⟩"
    assert spoken.answer == "The ball falls due to gravity, bounces, and settles."
    assert (spoken.closed, spoken.tokens, spoken.seconds) == (True, 24, 0.5)
    assert spoken.form == Form(dream=False, clean=True, whole=True, ended=True), "one lens of four"


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({}, Form(dream=True, clean=True, whole=True, ended=True)),
        ({"thinking": ""}, Form(dream=None, clean=True, whole=True, ended=True)),
        ({"thinking": DREAM.replace("⟨release⟩", "")}, Form(dream=False, clean=True, whole=True, ended=True)),
        ({"content": ""}, Form(dream=False, clean=True, whole=True, ended=True)),
        (
            {"content": "", "logprobs": [{"token": "\n"}, {"token": "</think>\n"}]},
            Form(dream=True, clean=True, whole=True, ended=True),
        ),
        ({"content": "It ⟨falls⟩."}, Form(dream=True, clean=False, whole=True, ended=True)),
        ({"content": "It falls.</think>"}, Form(dream=True, clean=False, whole=True, ended=True)),
        ({"content": "<think>\nso\n</think>\nIt"}, Form(dream=True, clean=False, whole=True, ended=True)),
        ({"content": "It \ufffd"}, Form(dream=True, clean=True, whole=False, ended=True)),
        ({"thinking": DREAM + "\ufffd"}, Form(dream=False, clean=True, whole=False, ended=True)),
        ({"done_reason": "length"}, Form(dream=True, clean=True, whole=True, ended=False)),
    ],
)
def test_texts_alone_tell_how_a_reply_was_spelled(change: dict[str, Any], form: Form) -> None:
    from distill.exam.examinees.ollama import _spoken

    message = {"thinking": DREAM, "content": ANSWER}
    answer = {"done": True, "done_reason": "stop", "eval_count": 20}
    answer |= {key: value for key, value in change.items() if key not in message}
    message |= {key: value for key, value in change.items() if key in message}
    assert _spoken({**answer, "message": message}, True, 40, 0.5, 5).form == form


@pytest.mark.parametrize("change", [{"done": False}, {"done_reason": ""}, {"done_reason": None}])
def test_a_reply_that_breaks_off_is_no_answer(change: dict[str, Any]) -> None:
    whole = exchange("chat_think_true")["response"]["json"]
    with serve(Told(STUDENT | {"/api/chat": {**whole, **change}}, ["tags", "version"])) as server:
        examinee = opened(server, "proto")
        [spoken] = examinee.answer(QUESTIONS[:1], think=True, temperature=0, max_tokens=40, draw=0)
        examinee.close()
    assert (spoken.dream, spoken.answer, spoken.tokens) == ("", "", 0)
    assert not spoken.form.whole


def test_a_prompt_longer_than_the_context_is_no_question(server: FakeOllama) -> None:
    examinee = opened(server, "plain")
    questions = [Question("long", "word " * 3000), QUESTIONS[0]]
    long, short = examinee.answer(questions, think=False, temperature=0, max_tokens=4, draw=0)
    assert all(body["truncate"] is False for body in server.asked("/api/chat")[-2:])
    assert (long.answer, long.tokens) == ("", 0)
    assert short.tokens > 0
    examinee.close()


def test_nobody_there() -> None:
    with pytest.raises(TeacherUnavailable, match="no Ollama answers there"):
        model_digest("x", "http://127.0.0.1:9")
