"""OllamaTeacher against the recorded exchanges, the fake server's failures, and a real engine behind it."""

import contextlib
import copy
import functools
import json
import math
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_ollama import NDJSON, FakeOllama, Reply, dumps, engine, error, replay, serve, timed
from support.recorded import Replay, Told, exchange

from distill.config import TeacherSettings
from distill.corpus.traces import Trace, TraceStore
from distill.errors import (
    AnswerBroken,
    BadInput,
    ModelNotFound,
    PromptRefused,
    RunMismatch,
    TeacherError,
    TeacherUnavailable,
)
from distill.events import Event, silent
from distill.serve import http
from distill.teacher import open_teacher
from distill.teacher.gguf_tokenizer import Vocabulary, tokenizer_from_metadata
from distill.teacher.names import fitting_name, is_name, name_key
from distill.teacher.ollama import OllamaTeacher
from distill.teacher.ollama_client import BYTES_FIELD, OllamaClient
from distill.teacher.ollama_words import Words
from distill.teacher.protocol import UNKNOWN_ID, GenerateOptions, Response
from distill.teacher.targets import apart

MODEL = "smollm2:135m"
OPTIONS = GenerateOptions(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def words() -> Any:
    info = exchange("show_verbose")["response"]["json"]["model_info"]
    return Words(Vocabulary(tokenizer_from_metadata(info)))


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with timed(slots=2, seconds=0.0) as fake:
        yield fake


def teacher(server: FakeOllama, **more: Any) -> OllamaTeacher:
    return OllamaTeacher(more.pop("model", MODEL), host=server.url, timeout=5, backoff=0.001, **more)


def recorded_answer(name: str) -> dict[str, Any]:
    return exchange(name)["response"]["json"]


@pytest.mark.parametrize(
    ("name", "soft"),
    [
        ("generate_logprobs", 24),
        ("generate_stops_at_eos", 22),
        ("generate_multibyte", 13),
        ("generate_default_stop", 28),
    ],
)
def test_ids_equal_the_ids_that_ollama_reports(words: Any, name: str, soft: int) -> None:
    answer = recorded_answer(name)
    targets = words.targets(answer, 20)
    told = answer["context"][answer["prompt_eval_count"] :]
    assert targets.ids[: len(told)].tolist() == told
    assert len(targets) == answer["eval_count"]
    assert int(targets.soft.sum()) == soft
    assert words.vocabulary.decode(targets.ids.tolist()) == answer["response"].encode()
    if answer["done_reason"] == "stop":
        assert targets.ids[-1] == words.vocabulary.tokenizer.eos_id
        assert not targets.soft[-1]


def test_alternatives_keep_their_logprobs_and_names(words: Any) -> None:
    answer = recorded_answer("generate_logprobs")
    targets = words.targets(answer, 20)
    eos = words.vocabulary.tokenizer.eos_id
    for row, entry in enumerate(answer["logprobs"]):
        assert targets.logprobs[row] == np.float32(entry["logprob"])
        assert targets.top_logprobs[row].tolist() == [np.float32(a["logprob"]) for a in entry["top_logprobs"]]
        for i, alternative in zip(targets.top_ids[row].tolist(), entry["top_logprobs"], strict=True):
            if alternative["token"]:
                assert words.vocabulary.bytes_of[i] == alternative["token"].encode()
            else:
                assert i == eos


def test_half_characters_are_not_named_and_only_one_silent_token_is_eos(words: Any) -> None:
    answer = recorded_answer("generate_multibyte")
    targets = words.targets(answer, 3)
    vocabulary = words.vocabulary
    assert UNKNOWN_ID in targets.top_ids[targets.soft]
    assert ((targets.top_ids == vocabulary.tokenizer.eos_id).sum(axis=1) <= 1).all()
    assert np.isnan(targets.logprobs[~targets.soft]).all()
    assert np.isneginf(targets.top_logprobs[~targets.soft]).all()


def test_without_context_ids_come_from_the_token_texts(words: Any) -> None:
    answer = recorded_answer("generate_multibyte")
    bare = words.targets({**answer, "context": None}, 3)
    full = words.targets(answer, 3)
    assert words.vocabulary.decode(bare.ids.tolist()) == answer["response"].encode()
    assert bare.ids[bare.soft].tolist() == full.ids[full.soft].tolist()


def test_without_logprobs_ids_come_from_context(words: Any) -> None:
    answer = {k: v for k, v in recorded_answer("generate_stops_at_eos").items() if k != "logprobs"}
    targets = words.targets(answer, 20)
    assert targets.ids.tolist() == [*answer["context"][answer["prompt_eval_count"] :], 2]
    assert not targets.soft.any()
    assert words.targets({**answer, "context": None}, 20) is None


def spoken(text: str, logprob: float = -0.3) -> dict[str, Any]:
    """An entry of `logprobs`."""
    return {"token": text, "logprob": logprob, "top_logprobs": [{"token": text, "logprob": logprob}]}


THINKER: dict[str, Any] = {
    "model": "thinker", "response": "", "thinking": "Okay, so", "done": True, "done_reason": "length", "eval_count": 3,
    "eval_duration": 10_000_000, "logprobs": [spoken("Okay"), spoken(","), spoken(" so")],
}  # fmt: skip
"""What Ollama answers of a model that thinks whatever it is told."""
ANSWER = {"response": "It falls", "done_reason": "stop", "eval_count": 9}
SAID = [spoken("It"), spoken(" falls")]


def heard(answer: dict[str, Any], listen: Any = silent, **more: Any) -> Response:
    """What becomes of an answer of /api/generate."""
    with serve(Told({"/api/generate": answer})) as server:
        return teacher(server, listen=listen, **more).generate("p", GenerateOptions())


@pytest.mark.parametrize(
    ("change", "thinking", "text", "tokens"),
    [
        ({}, "Okay, so", "", []),
        ({**ANSWER, "logprobs": [*THINKER["logprobs"], *SAID]}, "Okay, so", "It falls", ["It", " falls", ""]),
        (
            {**ANSWER, "logprobs": [*THINKER["logprobs"], spoken("</"), spoken("think"), spoken(">\n\n"), *SAID]},
            "Okay, so", "It falls", ["It", " falls", ""],
        ),
        (  # no server read its thinking
            {**ANSWER, "thinking": "", "response": "<think>Okay</think>\n\nIt falls",
             "logprobs": [*map(spoken, ("<", "think", ">", "Okay", "</", "think", ">", "\n\n")), *SAID]},
            "Okay", "It falls", ["It", " falls", ""],
        ),
        ({**ANSWER, "thinking": "", "response": "Okay\n</think>It falls", "logprobs": SAID}, "Okay", "It falls",
         ["It", " falls", ""]),
        ({"response": "<think>Okay, so", "thinking": "", "logprobs": SAID}, "Okay, so", "", []),
        ({**ANSWER, "logprobs": THINKER["logprobs"]}, "Okay, so", "It falls", None),
        ({**ANSWER, "thinking": "", "logprobs": [spoken("It"), spoken(" rises")]}, "", "It falls", None),
    ],
)  # fmt: skip
def test_thinking_is_no_answer_and_its_tokens_are_none_of_its(
    words: Any, change: dict[str, Any], thinking: str, text: str, tokens: list[str] | None
) -> None:
    events: list[Event] = []
    found = heard({**THINKER, **change}, events.append)
    assert (found.thinking, found.text) == (thinking, text)
    assert (found.tokens is None) == (not tokens)
    if found.tokens is not None and tokens is not None:
        assert [words.vocabulary.bytes_of[i].decode() for i in found.tokens.ids.tolist()] == tokens
        assert found.tokens.soft.tolist() == [True] * (len(tokens) - 1) + [False]
    assert ["don't spell its answer" in event.message for event in events] == [True] * (tokens is None)


@pytest.mark.parametrize("change", [{"done": False, "done_reason": None}, {"done_reason": None}, {"done_reason": ""}])
def test_what_breaks_off_is_no_answer(change: dict[str, Any]) -> None:
    whole = {**recorded_answer("generate_logprobs"), **change}
    with pytest.raises(AnswerBroken, match="breaks off /api/generate before its end"):
        heard(whole)
    with serve(Told({"/api/generate": whole})) as server, pytest.raises(AnswerBroken):
        teacher(server).generate_json("p", {}, OPTIONS)


def test_a_refusal_that_is_not_the_prompts_fault_is_no_refused_prompt() -> None:
    refusal = error(400, '"smollm2:135m" does not support chat')
    with serve(Told({"/api/generate": refusal})) as server, pytest.raises(TeacherError, match="not support") as raised:
        teacher(server).generate("p", OPTIONS)
    assert not isinstance(raised.value, PromptRefused)


def test_a_prompt_longer_than_the_context_is_refused_at_once() -> None:
    refusal = error(400, "the input length exceeds the context length")
    with serve(Told({"/api/generate": refusal})) as server:
        asker = teacher(server, context=512)
        with pytest.raises(PromptRefused, match=r"exceeds the context length; .* raise teacher.context"):
            asker.generate("p", OPTIONS)
        [body] = server.asked("/api/generate")
    assert (body["truncate"], body["shift"], body["options"]["num_ctx"]) == (False, False, 512)


def test_where_others_can_be_asked_only_the_busy_are_waited_for(server: FakeOllama) -> None:
    asker = teacher(server, alone=False)
    for kind in ("503", "loading"):
        server.fail(kind)
        assert asker.generate("p", OPTIONS).text
    server.fail("drop")
    before = len(server.asked("/api/generate"))
    with pytest.raises(TeacherUnavailable):
        asker.generate("p", OPTIONS)
    assert len(server.asked("/api/generate")) == before + 1


GONE = object()
WHOLE: dict[str, Any] = {
    **THINKER, "response": "It falls", "context": [1, 2, 2015, 7817],
    "logprobs": [spoken("It", -0.1), spoken(" falls"), spoken("", -2.0)],
}  # fmt: skip
JUNK = [
    GONE, None, True, False, 0, -1, 1, 7, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf, "", " ", "It", "\0",
    "\ud800", "\ufffd", "<think>", "</think>", "stop", [], [[]], [None], ["It"], {}, {"token": None}, [{}], [[1]],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The ways to all that is in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (key,)
        yield from ((key, *rest) for rest in places(value[key]))


def changed(value: Any, place: tuple[Any, ...], junk: object) -> Any:
    """With something else at a place, where it is still there."""
    with contextlib.suppress(LookupError, TypeError):
        parent = functools.reduce(lambda inner, key: inner[key], place[:-1], value)
        if junk is GONE:
            del parent[place[-1]]
        else:
            parent[place[-1]] = copy.deepcopy(junk)
    return value


@pytest.fixture(scope="module")
def raw() -> Iterator[Any]:
    """A teacher whose server answers each question with `raw.content`, and where its answers are stored."""

    class Raw:
        content = b""
        is_error = False
        stored = refused = 0

    told = Raw()
    with serve(Told({"/api/generate": lambda body: None})) as server, tempfile.TemporaryDirectory() as folder:
        asker = teacher(server)
        with TraceStore(Path(folder) / "traces.db") as store:
            store.put_teacher(asker.describe(), asker.tokenizer())
            told.asker, told.store, told.words = asker, store, asker._vocabulary()  # pyright: ignore
            asker._body("p", OPTIONS)  # pyright: ignore[reportPrivateUsage]
            asker._client._client.request = lambda *_, **__: told  # pyright: ignore
            yield told
    assert min(told.stored, told.refused) > 200


@given(
    changes=st.lists(st.tuples(st.sampled_from(list(places(WHOLE))), st.sampled_from(JUNK)), max_size=3),
    cut=st.sampled_from([None] * 6 + [b"[" * 100_000, b"[]", b"7", b"", b'{"done": tru', b"\xff\xfe"]),
)
@settings(max_examples=1200, deadline=None)
def test_whatever_a_server_answers_is_stored_or_refused(raw: Any, changes: Any, cut: Any) -> None:
    """An answer with something else in some places: no traceback, and no text but what was said."""
    answer = json.loads(json.dumps(WHOLE))
    for place, junk in changes:
        answer = changed(answer, place, junk)
    raw.content = json.dumps(answer).encode() if cut is None else cut
    try:
        found = raw.asker.generate("p", OPTIONS)
    except TeacherError:
        raw.refused += 1
        return
    assert found.text == apart(json.loads(raw.content)["response"])[1].rstrip("\ufffd")
    if found.tokens is not None:
        assert raw.words.vocabulary.decode(found.tokens.ids.tolist()).decode().strip() == found.text.strip()
        assert (found.tokens.logprobs[found.tokens.soft] <= 0.001).all()
    raw.store.put(Trace("k", "p", False, found, OPTIONS, "d"))
    assert raw.store.get("k").response.text == found.text
    raw.stored += 1


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_tokens_are_found_again(words: Any, data: st.DataObject) -> None:
    """Entries as Ollama makes them of any ids: whole characters one to one, broken ones merged."""
    vocabulary: Vocabulary = words.vocabulary
    ids = data.draw(st.lists(st.integers(3, len(vocabulary.bytes_of) - 1), min_size=1, max_size=12))
    entries: list[dict[str, Any]] = []
    kept: list[int] = []
    held = b""
    group: list[int] = []
    for i in ids:
        held += vocabulary.bytes_of[i]
        group.append(i)
        try:
            text = held.decode()
        except UnicodeDecodeError:
            continue
        if text and "\ufffd" not in text:
            entries.append({"token": text, "logprob": -1.0, "top_logprobs": []})
            kept += group
        held, group = b"", []
    text = "".join(entry["token"] for entry in entries)
    targets = words.targets(
        {"response": text, "context": [1, 2, *kept], "logprobs": entries, "done_reason": "length"}, 4
    )
    if entries:
        assert vocabulary.decode(targets.ids.tolist()) == text.encode()
        assert targets.soft.sum() <= len(entries)


@given(st.text())
def test_dropping_the_bytes_fields_changes_no_text(text: str) -> None:
    told = {"token": text + ',"bytes":[1,2]', "logprob": -1.0, "bytes": [1, 2], "x": ', "bytes": [3]'}
    for separators in ((",", ":"), (", ", ": ")):
        raw = json.dumps(told, separators=separators).encode()
        assert json.loads(BYTES_FIELD.sub(b"", raw)) == {k: v for k, v in told.items() if k != "bytes"}


def test_sentencepiece_vocabularies_are_read_too() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xE6>", "▁The", "▁ball", "\n", "x"]
    vocabulary = Vocabulary(
        tokenizer_from_metadata(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 1, 1, 1, 1],
                "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.bos_token_id": 1,
            }
        )
    )
    assert [vocabulary.id_of(text) for text in (b" The", b" ball", b"x", b"\n", b"\xe6", b"", b"y")] == [
        5, 6, 8, 7, 4, None, None,
    ]  # fmt: skip
    assert vocabulary.decode([1, 5, 6, 3, 2]) == b" The ball\n"


def test_every_request_says_what_the_facts_ask_for(server: FakeOllama) -> None:
    asker = teacher(server)
    response = asker.generate("p", GenerateOptions(max_tokens=5, seed=3, system="Be brief."))
    body = server.asked("/api/generate")[0]
    assert body["options"] == {
        "num_predict": 5, "temperature": 0.7, "top_k": 40, "top_p": 0.95, "seed": 3, "stop": [],
    }  # fmt: skip
    assert (body["logprobs"], body["top_logprobs"], body["stream"], body["system"]) == (True, 20, False, "Be brief.")
    assert "think" not in body
    assert response.tokens is not None
    assert response.tokens.soft.all()
    assert len(response.tokens) == 5
    assert response.done_reason == "length"
    assert response.timings["service"] == 0
    asker.generate_json("p", {"type": "object"}, OPTIONS)
    assert server.asked("/api/generate")[1]["format"] == {"type": "object"}


def test_a_thinking_teacher_is_told_not_to_think() -> None:
    with replay(["show_thinking_model"]) as server:
        body = teacher(server, model="proto")._body("p", OPTIONS)  # pyright: ignore[reportPrivateUsage]
    assert body["think"] is False


def test_describe_names_the_model_and_its_template(server: FakeOllama) -> None:
    info = teacher(server).describe()
    known = next(m for m in exchange("tags")["response"]["json"]["models"] if m["name"] == MODEL)
    assert (info.spec, info.name, info.digest) == (f"ollama:{MODEL}", MODEL, known["digest"])
    assert info.version == "ollama 0.33.0-rc2"
    assert info.logprobs
    assert info.details["quantization_level"] == "Q4_1"
    assert len(info.template_digest) == 64


@pytest.mark.parametrize("failures", [["drop"], ["503", "503"], ["loading"], ["drop", "503", "loading"]])
def test_what_can_pass_is_tried_again(server: FakeOllama, failures: list[str]) -> None:
    for kind in failures:
        server.fail(kind)
    assert teacher(server, retries=3).generate("p", OPTIONS).text
    assert len(server.asked("/api/generate")) == len(failures) + 1


def test_what_cannot_pass_is_not_tried_again() -> None:
    with replay() as server:
        with pytest.raises(TeacherError, match="top_logprobs must be between"):
            teacher(server)._client.post(  # pyright: ignore[reportPrivateUsage]
                "/api/generate", exchange("generate_too_many_logprobs")["request"]["json"]
            )
        assert len(server.requests) == 1


def test_a_busy_server_is_waited_for_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    replies = [httpx.Response(429, headers={"retry-after": told}) for told in ("60", "2", "200", "250", "Mon", "0")]
    asker = OllamaClient("http://127.0.0.1:1", retries=2, backoff=0.001)
    monkeypatch.setattr("distill.teacher.client.time.sleep", waits.append)
    monkeypatch.setattr(asker._client, "request", lambda *_, **__: replies.pop(0))
    with pytest.raises(TeacherError, match=r"answers 429 to /api/show .* after 3 tries"):
        asker.post("/api/show", {})
    assert [wait / told for wait, told in zip(waits, (60, 2, 200), strict=False)] == pytest.approx([1.05] * 3, abs=0.05)
    assert max(waits[3:]) <= 0.002, "no longer than it can be waited for in all"
    assert len(waits) == 5
    assert not replies


def test_giving_up_is_one_line(server: FakeOllama) -> None:
    server.fail("503", times=9)
    with pytest.raises(TeacherError, match=r"answers 503 to /api/generate .* after 3 tries") as caught:
        teacher(server, retries=2).generate("p", OPTIONS)
    assert "\n" not in str(caught.value)
    assert len(server.asked("/api/generate")) == 3


def test_a_server_that_is_too_slow(server: FakeOllama) -> None:
    asker = OllamaTeacher(MODEL, host=server.url, timeout=0.2, retries=0)
    server.fail("slow", seconds=1.0)
    with pytest.raises(TeacherUnavailable, match=r"no answer within 0.2 s; raise teacher.timeout"):
        asker._client.post("/api/generate", {"model": MODEL})  # pyright: ignore[reportPrivateUsage]


def test_something_else_at_the_address(server: FakeOllama) -> None:
    server.fail("html", path="/api/version")
    with pytest.raises(TeacherError, match="is it Ollama"):
        teacher(server).describe()


def test_nobody_at_the_address() -> None:
    with timed(1, 0) as server:
        gone = server.url
    asker = OllamaTeacher(MODEL, host=gone, timeout=2, backoff=0.001)
    with pytest.raises(TeacherUnavailable, match="ollama serve") as caught:
        asker.describe()
    assert gone in str(caught.value)


def test_a_model_that_is_not_installed_names_the_nearest(server: FakeOllama) -> None:
    with pytest.raises(ModelNotFound, match=r"ollama pull smollm2:360m.*smollm2:135m"):
        teacher(server, model="smollm2:360m").describe()
    with replay() as full:
        assert teacher(full, model="proto").describe().name == "proto:latest"


def test_a_host_that_lost_its_model_is_asked_who_it_is_again(
    server: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model may stand there under its name: its answers are its own."""
    asker = teacher(server)
    before = asker.describe()
    client = asker._client
    asked, models = list[dict[str, Any]](), client.models

    def another() -> list[dict[str, Any]]:
        asked.extend([{**entry, "digest": "e" * 64} for entry in models()])
        return asked

    def lost(*_: object) -> dict[str, Any]:
        raise ModelNotFound("http://x: has no such model")

    monkeypatch.setattr(client, "models", another)
    assert asker.describe() == before
    assert asked == []
    monkeypatch.setattr("distill.teacher.ollama.SAME_FOR", 0.0)
    asker._same_until = 0.0
    for _ in range(2):  # nor is an answer taken for that of the model that was there
        with pytest.raises(RunMismatch, match=rf"isn't the model any more that it was \(digest {'e' * 12}, was"):
            asker.generate("p", OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(client, "post", lost)
        with pytest.raises(ModelNotFound):
            asker.generate("p", OPTIONS)
    assert asker.describe().digest == "e" * 64
    monkeypatch.setattr(client, "models", models)
    asker.forget()
    assert asker.describe() == before


def test_lines_end_at_line_feeds_alone() -> None:
    values = [{"response": "a\u2028b\u2029c\x85d"}, {"done": True}]
    body = b"\n\n".join(map(dumps, values)) + b"\n"
    with serve(Told({"/api/generate": Reply(200, NDJSON, body)})) as fake, OllamaClient(fake.url) as client:
        assert list(client.lines("/api/generate", {})) == values
    ours = b"\n".join(map(http.dumps, values)).decode()
    assert list(map(json.loads, ours.splitlines())) == values, "whoever reads our lines"


def test_an_old_server_gives_hard_labels_and_one_warning(server: FakeOllama) -> None:
    server.old = True
    heard: list[Event] = []
    asker = teacher(server, listen=heard.append)
    assert not asker.describe().logprobs
    for i in range(3):
        tokens = asker.generate(f"p{i}", OPTIONS).tokens
        assert tokens is not None
        assert not tokens.soft.any()
        assert len(tokens) == 8
    assert [event.kind for event in heard] == ["warning"]
    assert "hard labels only" in heard[0].message


def test_embedding_with_a_chat_model_names_the_remedy() -> None:
    known = exchange("embed_unsupported")
    known = {**known, "request": {**known["request"], "json": {"model": MODEL, "input": ["a ball"]}}}
    with serve(Replay([known])) as server, pytest.raises(TeacherError, match="ollama pull all-minilm"):
        teacher(server).embed(["a ball"])


def test_many_threads_share_one_teacher(server: FakeOllama) -> None:
    asker = teacher(server)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: asker.generate(f"p{i}", GenerateOptions()).text, range(24)))
    assert len(set(texts)) == 24
    assert len([body for body in server.asked("/api/show") if body["verbose"]]) == 1


def test_one_teacher_a_host_and_no_others() -> None:
    with timed(1, 0) as one, timed(1, 0) as two:
        teachers = open_teacher(TeacherSettings(model=f"ollama:{MODEL}", hosts=[one.url, two.url]))
        assert [t.describe().name for t in teachers] == [MODEL, MODEL]
        assert [t.slots for t in teachers] == [None, None]
    for wrong in ("openai:", "llama3.2", "ollama:", "x:y"):
        with pytest.raises(BadInput, match="embedded:smollm2"):
            open_teacher(TeacherSettings(model=wrong))


def test_what_an_older_server_says_of_a_cut_character_is_dropped(words: Any) -> None:
    answer = {
        "response": "The\ufffd",
        "logprobs": [{"token": "The", "logprob": -1.0}, {"token": "\ufffd", "logprob": -2.0}],
    }
    assert words.targets(answer, 2).ids.tolist() == [words.vocabulary.id_of(b"The")]


def test_end_to_end_on_a_real_engine(smollm2: Path) -> None:
    with engine({MODEL: smollm2}) as server:
        asker = OllamaTeacher(MODEL, host=server.url, timeout=60)
        tokenizer = asker.tokenizer()
        assert tokenizer is not None
        response = asker.generate("Repeat exactly: 日本語 😀 naïve", GenerateOptions(max_tokens=24, temperature=0))
    tokens = response.tokens
    assert tokens is not None
    assert Vocabulary(tokenizer).decode(tokens.ids.tolist()) == response.text.encode()
    best = tokens.top_logprobs[tokens.soft][:, 0]
    assert np.allclose(best, tokens.logprobs[tokens.soft])  # greedy
    mass = np.exp(tokens.top_logprobs[tokens.soft].astype(float)).sum(axis=1)
    assert (mass <= 1 + 1e-5).all()
    assert math.isclose(response.timings["service"], sum(response.timings[k] for k in ("load", "prompt_eval", "eval")))


@pytest.mark.parametrize(
    "name",
    [
        MODEL,
        MODEL.upper(),
        f"library/{MODEL}",
        f"registry.ollama.ai/library/{MODEL}",
        f"Registry.Ollama.ai/Library/{MODEL}",
    ],
)
def test_models_are_known_by_every_name_that_ollama_takes(server: FakeOllama, name: str) -> None:
    found = OllamaTeacher(name, host=server.url, retries=0)
    found._details = lambda: {}  # what it shows is no matter of its name
    assert found.describe().name == MODEL


def test_names_are_told_apart_as_ollama_does() -> None:
    same = ["llama3.2", "Llama3.2:latest", "library/llama3.2", "registry.ollama.ai/library/llama3.2:LATEST"]
    assert len({name_key(name) for name in same}) == 1
    assert name_key("hf.co/You/Model-GGUF:Q4_K_M") == name_key("hf.co/you/model-gguf:q4_k_m")
    assert name_key("https://hf.co/you/m") == name_key("hf.co/you/m:latest") != name_key("you/m")
    assert name_key("me/m") != name_key("m") != name_key("m:1b")


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("my-student", "my-student"),
        ("me/student_1.5:v2", "me/student_1.5:v2"),
        ("Mein Schüler!", "Mein-Schuler"),
        (".hidden", "hidden"),
        ("-x-", "x"),
        ("学生", "student"),
        ("a" * 100, "a" * 80),
        ("a:", "a"),
        ("a//b", "a-b"),
    ],
)
def test_a_fitting_name_is_one_that_ollama_takes(name: str, fitting: str) -> None:
    assert fitting_name(name) == fitting
    assert is_name(fitting)
    assert is_name(name) == (name == fitting)
