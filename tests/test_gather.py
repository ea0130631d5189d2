"""`dream gather`: programs get what Ollama says, byte for byte, and what can be learned of it is kept, and no more."""

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.disturbed import HANGS, start
from support.fake_ollama import NDJSON, FakeOllama, Reply, dumps, replay, reply, serve
from support.recorded import Told, exchange, recorded
from support.small_student import ANSWER, small_tokenizer

from bundle.load import Student
from cli.main import dream
from distill.address import Address
from distill.config import Settings
from distill.corpus.private import luhn, masked
from distill.corpus.prompts import load_prompts, prompt_sets
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.run import Run
from distill.serve.cascade import Calibration, Cascade, answered, calibrated, threshold
from distill.serve.exchange import ANY, Question, without_logprobs
from distill.serve.fields import parse
from distill.serve.gathering import Keeper
from distill.serve.guard import Allowed
from distill.serve.relay import Relay
from distill.serve.shelf import Served, Shelf
from distill.serve.student import Offer
from distill.teacher.ollama import OllamaTeacher
from distill.teacher.ollama_client import OllamaClient
from distill.teacher.ollama_words import Words
from distill.teacher.open_source import open_source
from distill.teacher.protocol import GenerateOptions
from distill.turns import turns

T = TypeVar("T")
MODEL = "smollm2:135m"
QUESTION = "What happens when you drop a ball?"
WORDS: dict[str, Words] = {}
"""The recorded model's, read once."""

# What is personal.


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Write to Bob.Smith+x@mail.example.co.uk, or müller@gmx.de.", "Write to [mail], or [mail]."),
        ("Call +49 (0)171 234-5678 or +1 415 555 2671!", "Call [phone] or [phone]!"),
        ("030 1234567, (030) 123 45 67, 01 23 45 67 89, 01711234567", "[phone], [phone], [phone], [phone]"),
        (
            "(555) 123-4567 and 555-123-4567; my phone number is 12 34 56",
            "[phone] and [phone]; my phone number is [phone]",
        ),
        ("Pay with 4111 1111 1111 1111 12/26 or 5500-0000-0000-0004.", "Pay with [card] 12/26 or [card]."),
        ("order 12 4111111111111111", "order 12 [card]"),
        ("sk-proj-abcDEF0123456789abcd and ghp_0123456789abcdefghij0123", "[key] and [key]"),
        ('password=hunter2 api_key: "a1b2c3d4"', 'password=[key] api_key: "[key]"'),
        ("Authorization: Bearer abcdefghij.klmnop-qr", "Authorization: Bearer [key]"),
        ("git clone https://me:s3cret@host.example/x", "git clone https://[key]@host.example/x"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def is a token", "[key] is a token"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIB\nxx\n-----END RSA PRIVATE KEY-----\nbye", "[key]\nbye"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nxx\n-----END PGP PRIVATE KEY BLOCK-----\nbye", "[key]\nbye"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "AWS_SECRET_ACCESS_KEY=[key]"),
        ("SECRET_KEY = 'django-insecure-4@x!abc-def'", "SECRET_KEY = '[key]'"),
        ("PASSWORD=hunt;er2secret and pwd=p[ss1234, (pwd=my;own)", "PASSWORD=[key] and pwd=[key], (pwd=[key])"),
        ('password = "correct horse battery", e', 'password = "[key]", e'),
        ("d41d8cd98f00b204e9800998ecf8427e", "[key]"),
    ],
)
def test_what_is_personal_is_replaced(text: str, kept: str) -> None:
    assert masked(text) == kept == masked(kept)


@pytest.mark.parametrize(
    "text",
    [
        "On 2024-01-15 at 10:30 1,000,000 people of 192.168.100.254 paid 3.14159265358979 for 978-3-16-148410-0.",
        "A token: a word or a part of one. The secret: practice. 1763971200000 ms; 4111 1111 1111 1112.",
        "05/11/2024 and 0.0012345678; version 10.20.30; @home; e = mc^2; 12345678901234567890",
    ],
)
def test_what_isnt_stays(text: str) -> None:
    assert masked(text) == text


def test_nothing_is_personal_in_what_ships_and_what_was_recorded() -> None:
    for prompt in load_prompts(prompt_sets(), 0.1):
        assert masked(prompt.text) == prompt.text
    said = exchange("generate_logprobs")["response"]["json"]["response"]
    assert masked(said) == said


@given(st.lists(st.integers(0, 9), min_size=12, max_size=18))
def test_luhns_digit(digits: list[int]) -> None:
    """By the rule as it is taught: from the right every second digit doubled, its digits added."""
    total = sum(sum(map(int, str(2 * d if i % 2 == 0 else d))) for i, d in enumerate(reversed(digits)))
    right = (10 - total % 10) % 10
    text = "".join(map(str, digits))
    assert [check for check in range(10) if luhn(f"{text}{check}")] == [right]


@settings(max_examples=300, deadline=1000)
@given(st.text("a1 .-+@:/=()[]4sk_0", max_size=80) | st.text(max_size=80))
def test_twice_is_once(text: str) -> None:
    assert masked(masked(text)) == masked(text)


# What passes.


def hidden(value: Any) -> Any:
    """As Ollama says it to whom asks for no logprobs."""
    if isinstance(value, list):
        return [hidden(each) for each in value]
    return {k: hidden(v) for k, v in value.items() if k != "logprobs"} if isinstance(value, dict) else value


def told(request: Any, path: str) -> Reply:
    """The recorded answer, streamed or whole, in the shape of a path, with logprobs where they are asked for."""
    lines = exchange("generate_logprobs_stream")["response"]["ndjson"]
    whole, text = lines[-1], "".join(line["response"] for line in lines)
    entries = [entry for line in lines for entry in line.get("logprobs", [])]
    stream = request.get("stream", path != "/v1/chat/completions")
    kind = NDJSON
    if path == "/v1/chat/completions":
        ends = {"object": "chat.completion.chunk", "model": MODEL}

        def choice(line: dict[str, Any]) -> dict[str, Any]:
            said = {"index": 0, "delta": {"content": line["response"]}, "finish_reason": line.get("done_reason")}
            soft = {"logprobs": {"content": line["logprobs"]}} if "logprobs" in line else {}
            return {**ends, "choices": [{**said, **soft}]}

        values = [choice(line) for line in lines]
        answer = {"message": {"content": text}, "finish_reason": "length", "logprobs": {"content": entries}}
        whole = {**ends, "choices": [answer]}
    elif path == "/api/chat":
        values = [{**line, "message": {"role": "assistant", "content": line["response"]}} for line in lines]
        for value in values:
            del value["response"]
        whole = {**values[-1], "message": {"role": "assistant", "content": text}, "logprobs": entries}
    else:
        values, whole = lines, {**whole, "response": text, "logprobs": entries}
    if not request.get("logprobs"):
        values, whole = hidden(values), hidden(whole)
    if not stream:
        return reply(whole)
    if path != "/v1/chat/completions":
        return Reply(200, kind, stream=values)
    sse = b"".join(b"data: " + dumps(value) + b"\n\n" for value in values) + b"data: [DONE]\n\n"
    return Reply(200, "text/event-stream", sse)


def echo(asked: Any) -> Reply:
    return reply({"heard": asked})


PATHS = ("/api/generate", "/api/chat", "/v1/chat/completions")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOllama]:
    replies: dict[str, Any] = {path: partial(told, path=path) for path in PATHS}
    with serve(Told(replies)) as state:
        yield state


@asynccontextmanager
async def relayed(
    url: str, folder: Path, listen: Listener = silent, cascade: Cascade | None = None
) -> AsyncGenerator[tuple[httpx.AsyncClient, Keeper]]:
    """A program's client before the proxy, and what is kept."""
    tree = Settings()
    tree.capture.gathered = True
    run = Run.create(folder / "run", tree)
    with Keeper(run, OllamaTeacher(MODEL, host=url, retries=0, shared=WORDS), listen) as keeper:
        app = Relay(Address(url), keeper, Allowed(), cascade).app()
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:11436", timeout=60) as client:
                yield client, keeper


def through(url: str, folder: Path, ask: Callable[[httpx.AsyncClient], Awaitable[T]], **how: Any) -> tuple[T, Keeper]:
    async def run() -> tuple[T, Keeper]:
        async with relayed(url, folder, **how) as (client, keeper):
            return await ask(client), keeper

    return asyncio.run(run())


def traces(folder: Path) -> list[Trace]:
    """What was kept: the next capture selects of it."""
    with TraceStore(folder / "run" / "traces.db", readonly=True) as store:
        return [store.get(key) for key, _, _ in store.asked()]


def request(path: str, **more: Any) -> dict[str, Any]:
    asked = {"prompt": QUESTION} if path == "/api/generate" else {"messages": [{"role": "user", "content": QUESTION}]}
    return {"model": MODEL, **asked, **more}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_soft_targets_are_asked_for_and_hidden(path: str, stream: bool, server: FakeOllama, tmp_path: Path) -> None:
    """With the same bytes as without the proxy, and the same traces whichever way was asked."""
    body = request(path, stream=stream)
    straight = httpx.post(f"{server.url}{path}", json=body)
    found, keeper = through(server.url, tmp_path, lambda client: client.post(path, json=body))
    assert (found.status_code, found.content) == (200, straight.content)
    assert found.headers["content-type"] == straight.headers["content-type"]
    assert found.headers["x-dream-gather"] == "on"
    assert (keeper.kept, not keeper.passed) == (1, True)
    assert server.asked(path)[-1]["top_logprobs"] == 20
    (trace,) = traces(tmp_path)
    assert (trace.prompt, trace.response.text) == (QUESTION, "When a ball is dropped, it falls")
    tokens = trace.response.tokens
    assert tokens is not None
    assert tokens.soft.all()
    ids = exchange("generate_logprobs_stream")["response"]["ndjson"][-1]["context"][-8:]
    assert tokens.ids.tolist() == ids


def test_what_a_program_asks_for_it_gets(server: FakeOllama, tmp_path: Path) -> None:
    body = request("/api/generate", logprobs=True, top_logprobs=5)
    straight = httpx.post(f"{server.url}/api/generate", json=body)
    found, keeper = through(server.url, tmp_path, lambda client: client.post("/api/generate", json=body))
    assert found.content == straight.content
    assert b"logprobs" in found.content
    assert server.asked("/api/generate")[-1]["top_logprobs"] == 5
    assert keeper.kept == 1


def test_every_recorded_exchange_passes_unchanged(tmp_path: Path) -> None:
    """This server refuses what it doesn't know: also what we ask for besides, so that all is asked again."""

    async def all_of(ask: Callable[..., Awaitable[httpx.Response]]) -> list[tuple[Any, ...]]:
        found = list[tuple[Any, ...]]()
        for entry in recorded():
            asked = entry["request"]
            content = dumps(asked["json"]) if asked["json"] is not None else (asked["body"] or "").encode()
            got = await ask(asked["method"], asked["path"], content=content)
            found.append((entry["name"], got.status_code, got.headers.get("content-type"), got.content))
        return found

    async def straight(url: str) -> list[tuple[Any, ...]]:
        async with httpx.AsyncClient(base_url=url) as client:
            return await all_of(client.request)

    with replay() as server:
        expected = asyncio.run(straight(server.url))
        found, _ = through(server.url, tmp_path, lambda client: all_of(client.request))
    assert found == expected


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/api/generate", request("/api/generate", images=["x"]), "with pictures"),
        ("/api/generate", request("/api/generate", raw=True), "raw, or going on with something"),
        ("/api/generate", request("/api/generate", format="json"), "held to a format"),
        ("/api/generate", request("/api/generate", options={"stop": ["x"]}), "with ends of the program's own"),
        ("/v1/chat/completions", request("/v1/chat/completions", stop="x"), "with ends of the program's own"),
        ("/api/generate", request("/api/generate", model="other"), "another model"),
        ("/api/generate", request("/api/generate", prompt=""), "without a prompt"),
        ("/api/generate", request("/api/generate", options=3), "not to be read"),
        ("/api/generate", [1], "not to be read"),
        ("/api/chat", request("/api/chat", tools=[{}]), "with tools"),
        (
            "/api/chat",
            request("/api/chat", messages=[{"role": "user", "content": "a"}] * 3),
            "turns out of order",
        ),
        ("/v1/chat/completions", request("/v1/chat/completions", response_format={"type": "x"}), "held to a format"),
        ("/v1/chat/completions", request("", messages=[{"role": "user", "content": [{}]}]), "in parts"),
        ("/off/api/generate", request("/api/generate"), "switched off by the program"),
    ],
)
def test_what_isnt_kept_passes(path: str, body: Any, why: str, tmp_path: Path) -> None:
    with serve(Told(dict.fromkeys(PATHS, echo))) as state:
        found, keeper = through(state.url, tmp_path, lambda client: client.post(path, json=body))
    assert found.json() == {"heard": body}
    assert (keeper.kept, dict(keeper.passed)) == (0, {why: 1})
    assert found.headers.get("x-dream-gather") == ("off" if path.startswith("/off") else None)
    assert not traces(tmp_path)


def test_conversations_are_kept_with_what_was_said(server: FakeOllama, tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "I am bob@example.com."), ("assistant", "Hello."), ("user", QUESTION)]
    body = request("/api/chat", messages=[{"role": role, "content": text} for role, text in said])
    _, keeper = through(server.url, tmp_path, lambda client: client.post("/api/chat", json=body))
    (trace,) = traces(tmp_path)
    assert turns(trace.prompt, trace.options.system) == [said[0], ("user", "I am [mail]."), *said[2:]]
    assert (keeper.kept, trace.response.text) == (1, "When a ball is dropped, it falls")


def test_a_program_switches_it_off(server: FakeOllama, tmp_path: Path) -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/api/chat", json=request("/api/chat"), headers={"X-Dream-Gather": "off"})

    found, keeper = through(server.url, tmp_path, ask)
    assert b"logprobs" not in found.content
    assert "logprobs" not in server.asked("/api/chat")[-1]
    assert (keeper.kept, found.headers["x-dream-gather"]) == (0, "off")


def test_nothing_personal_is_written(tmp_path: Path) -> None:
    """Of tokens of an answer that held some of it, none is kept."""

    def say(asked: dict[str, Any]) -> Reply:
        said = told(asked, "/api/generate")
        whole = json.loads(said.body)
        whole["response"] = asked["prompt"].partition("Say: ")[2] or whole["response"]
        return reply(whole)

    async def ask(client: httpx.AsyncClient) -> list[str]:
        bodies = [
            request(
                "/api/generate", stream=False, prompt="I am bob@example.com, why?", system="Key: sk-abcdefgh12345678x"
            ),
            request("/api/generate", stream=False, prompt="Who? Say: eve@example.com knows."),
        ]
        return [(await client.post("/api/generate", json=body)).json()["response"] for body in bodies]

    with serve(Told({"/api/generate": say})) as state:
        said, _ = through(state.url, tmp_path, ask)
    assert said[1] == "eve@example.com knows."
    first, second = sorted(traces(tmp_path), key=lambda trace: trace.prompt)
    assert (first.prompt, first.options.system) == ("I am [mail], why?", "Key: [key]")
    assert first.response.tokens is not None
    assert (second.prompt, second.response.text) == ("Who? Say: [mail] knows.", "[mail] knows.")
    assert second.response.tokens is None
    files = [path.read_bytes() for path in (tmp_path / "run").iterdir()]
    assert not any(secret in data for data in files for secret in (b"example.com", b"sk-abc"))


def test_the_same_answer_is_one_trace_and_another_is_two(tmp_path: Path) -> None:
    said = iter(["It falls.", "It falls.", "Down."])

    def say(_: Any) -> Reply:
        return reply({"model": MODEL, "response": next(said), "done": True, "done_reason": "stop"})

    async def ask(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            await client.post("/api/generate", json=request("/api/generate"))

    with serve(Told({"/api/generate": say})) as state:
        through(state.url, tmp_path, ask)
    assert sorted(trace.response.text for trace in traces(tmp_path)) == ["Down.", "It falls."]
    with TraceStore(tmp_path / "run" / "traces.db", readonly=True) as store:
        assert not list(store.traces()), "a mining beside it reads nothing before the next capture selects it"


def test_where_keeping_fails_the_answer_comes_all_the_same(
    server: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TraceStore, trace: Trace, chosen: bool = True) -> None:
        raise OSError("the disk is full")

    async def ask(client: httpx.AsyncClient) -> list[bytes]:
        return [(await client.post("/api/chat", json=request("/api/chat"))).content for _ in range(2)]

    heard = list[Event]()
    monkeypatch.setattr(TraceStore, "put", full)
    found, keeper = through(server.url, tmp_path, ask, listen=heard.append)
    assert set(found) == {httpx.post(f"{server.url}/api/chat", json=request("/api/chat")).content}
    assert [event.message for event in heard] == ["an answer can't be kept: the disk is full"]
    assert (keeper.kept, keeper.passed.total()) == (0, 2)


def test_nothing_is_kept_of_a_model_that_came_in_anothers_place(
    server: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        await client.post("/api/chat", json=request("/api/chat"))
        monkeypatch.setattr(OllamaClient, "models", lambda self: [{"name": MODEL, "digest": "e" * 64}])
        for _ in range(2):
            await client.post("/api/generate", json=request("/api/generate"))

    monkeypatch.setattr("distill.teacher.ollama.SAME_FOR", 0.0)
    heard = list[Event]()
    _, keeper = through(server.url, tmp_path, ask, listen=heard.append)
    assert (keeper.kept, keeper.passed.total(), len(heard)) == (1, 2, 1)
    assert "isn't the model any more that it was" in heard[0].message


@pytest.mark.parametrize(
    "lines", [[b"no json\n"], [b'{"response": 7, "done": true, "done_reason": "stop"}\n'], [b"[]\n", b"\n"]]
)
def test_nonsense_passes_as_it_is(lines: list[bytes], tmp_path: Path) -> None:
    body = b"".join(lines)
    with serve(Told({"/api/generate": Reply(200, NDJSON, body)})) as state:
        found, keeper = through(state.url, tmp_path, lambda c: c.post("/api/generate", json=request("/api/generate")))
    assert (found.content, keeper.kept) == (body, 0)


def test_an_ollama_that_is_gone_is_told(server: FakeOllama, tmp_path: Path) -> None:
    with replay() as other:
        url = other.url

        async def ask() -> httpx.Response:
            async with relayed(url, tmp_path) as (client, _):
                other.fail("drop", path="/api/generate", times=9)
                return await client.post("/api/generate", json=request("/api/generate"))

        found = asyncio.run(ask())
    assert found.status_code == 502
    assert f"no Ollama answers at {url}" in found.json()["error"]


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5) | st.just("logprobs"), st.text(max_size=20) | st.lists(st.integers())),
    st.text('",:[]logprobs\\{} ', max_size=30),
)
def test_only_what_was_asked_besides_is_cut_out(value: dict[str, Any], text: str) -> None:
    value |= {"response": text, "inner": {"x": 1, "logprobs": [text]}, "logprobs": [{"token": text}]}
    wanted = {key: each for key, each in value.items() if key != "logprobs"}
    raw = dumps(value).decode()
    assert json.loads(without_logprobs(raw, value, "/api/generate")) == wanted
    if next(iter(value)) != "logprobs":
        assert without_logprobs(raw, value, "/api/generate") == dumps(wanted)


# A student first.


def test_the_wanted_agreement_is_reached_as_often_as_promised() -> None:
    """Of students whose answers agree as often as they are sure, more or less: how sure they must be, is known."""
    draw, failed, found = np.random.default_rng(0), 0, 0
    for _ in range(300):
        sure = draw.uniform(size=600)
        chance = np.where(sure > 0.6, 0.98, 0.6)
        least = threshold(sure.tolist(), (draw.uniform(size=600) < chance).tolist(), 0.95)
        if least <= 1:
            found += 1
            mean = (0.98 * (1 - max(least, 0.6)) + 0.6 * max(0.6 - least, 0)) / (1 - least)
            failed += mean < 0.95
    assert failed <= 0.1 * 300 + 3 * (0.09 * 300) ** 0.5
    assert found > 100
    assert threshold([0.9] * 50, [True] * 50, 0.95) > 1  # too few to tell
    assert threshold([0.9] * 100, [False] * 100, 0.95) > 1
    assert threshold([0.9] * 100, [True] * 100, 0.95) == 0.9


@pytest.fixture(scope="module")
def student(dreamer: Path, smollm2: Path) -> Iterator[Served]:
    """It dreams DREAM of QUESTION, and answers it with ANSWER, quite sure."""
    found = Student("proto", open_source(dreamer).backbone(256).eval(), small_tokenizer(smollm2))
    shelf = Shelf([Offer(lambda: found, True, 0.0)])
    yield next(iter(shelf.students.values()))
    shelf.close()


@pytest.mark.usefixtures("one_thread")
def test_a_student_answers_what_it_is_sure_of(student: Served, server: FakeOllama, tmp_path: Path) -> None:
    """In Ollama's words, and its teacher everything else; nothing that a student said is kept for one to learn."""
    other = "Why do the stars of a song taste like seven?"

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/api/generate", {"stream": False}),
            ("/api/chat", {}),
            ("/api/generate", {"stream": False, "prompt": other}),
            ("/api/generate", {"stream": False, "system": "Another."}),
            ("/api/generate", {"stream": False, "logprobs": True}),
            ("/api/generate", {"stream": False, "options": {"num_predict": 3}}),
        ]
        return [await client.post(path, json=request(path, **more)) for path, more in bodies]

    async def run() -> tuple[list[httpx.Response], Keeper, float]:
        sure = await answered(student, QUESTION)
        assert sure is not None
        cascade = Cascade(student, Calibration(0.95, 0.999 * sure.sure, 100, 0.5, 1.0))
        async with relayed(server.url, tmp_path, cascade=cascade) as (client, keeper):
            found = await ask(client)
        assert "answered 2 of 4 questions (50%)" in cascade.report(keeper.run)
        student.system, own = "Be brief.", student.system
        try:  # a program that says no system message asks a teacher who isn't told the student's
            plain = Question(QUESTION, GenerateOptions(max_tokens=ANY), False)
            assert await cascade.answer("/api/chat", parse(b"{}"), plain) is None
        finally:
            student.system = own
        return found, keeper, sure.sure

    found, keeper, sure = asyncio.run(run())
    assert sure > 0.1
    whole, lines = found[0].json(), [json.loads(line) for line in found[1].text.splitlines()]
    assert (whole["response"], whole["done"], whole["done_reason"]) == (ANSWER, True, "stop")
    assert [line["message"]["content"] for line in lines] == [ANSWER, ""]
    assert [response.headers["x-dream-gather"] for response in found] == ["student"] * 2 + ["on"] * 4
    assert keeper.passed == {"answered by the student": 2}
    assert sorted(trace.prompt for trace in traces(tmp_path)) == sorted([QUESTION] * 3 + [other])
    told = json.loads((tmp_path / "run" / "cascade.json").read_text(encoding="utf-8"))
    assert (told["asked"], told["answered"], told["teacher_tokens_saved"]) == (
        4,
        2,
        14,
    )  # of 8, 8, 8 and 3 tokens on average
    assert json.loads(found[2].text)["response"] == "When a ball is dropped, it falls"


def test_what_no_student_can_promise_is_refused(student: Served, small_run: Run) -> None:
    for wanted, says in (
        (1.0, "is a share of at least 0.5"),
        (0.95, "held-out answers; an agreement of 0.95 needs 118"),
    ):
        with pytest.raises(BadInput, match=says):
            asyncio.run(calibrated(student, small_run, wanted))


# As people use it.


def test_gathering_asks_for_consent_and_whose_answers(
    tmp_path: Path, server: FakeOllama, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["gather", "--to", str(tmp_path / "run"), "--ollama", server.url, "--port", "0"]
    for args, says in (
        ([], "say whose answers are kept, --teacher ollama:NAME (installed: proto:latest, st:latest, smollm2:135m)"),
        (["--teacher", f"ollama:{MODEL}"], "nobody is there to agree; say --yes"),
        (["--teacher", f"ollama:{MODEL}", "--ollama", server.url, "--yes"], "one proxy stands before one Ollama"),
        (["--teacher", "ollama:none", "--yes"], "has no model 'none'"),
        (["--host", "0.0.0.0", "--yes"], "others could ask there"),
    ):
        done = CliRunner().invoke(dream, [*where, *args])
        assert done.exit_code == 1, done.output
        assert says in str(done.exception)
        assert not (tmp_path / "run").exists()
    args = ["--teacher", f"ollama:{MODEL}", "--yes", "--cascade", str(small_run.path)]
    done = CliRunner().invoke(dream, [*where, *args])
    assert f"learned from embedded:smollm2; how often it agrees with ollama:{MODEL} isn't known" in str(done.exception)
    assert "is only passed on" in CliRunner().invoke(dream, [*where, "--teacher", f"ollama:{MODEL}"]).output
    monkeypatch.setattr("cli.commands.gather._watched", lambda: True)
    shutil.copytree(small_run.path, tmp_path / "there")
    settings = (tmp_path / "there" / "config.yaml").read_bytes()
    for name in ("new", "there"):
        there = ["gather", "--to", str(tmp_path / name), *where[3:], "--teacher", f"ollama:{MODEL}"]
        done = CliRunner().invoke(dream, there, input="n\n")
        assert "not agreed: nothing is gathered" in str(done.exception)
    assert (tmp_path / "there" / "config.yaml").read_bytes() == settings
    assert not (tmp_path / "new").exists()


def test_what_was_given_outlives_a_kill_and_is_learned(tmp_path: Path, server: FakeOllama) -> None:
    """Killed after each answer; whoever got one whole finds it in the run, and a student is trained on all."""
    asked = [f"What happens when {who} drops {what}?" for who in ("a cat", "Ann") for what in ("a cup", "a ball", "it")]
    where = ["--to", "run", "--runs-dir", ".", "--ollama", server.url, "--teacher", f"ollama:{MODEL}", "--port", "0"]
    output = tmp_path / "output.txt"
    for number in range(3):
        output.write_text("", encoding="utf-8")
        process = start(tmp_path, ["gather", *where, "--yes"])
        url = address(output)
        for question in asked[number::3]:
            body = request("/api/generate", prompt=question)
            assert b'"done":true' in httpx.post(f"{url}/api/generate", json=body, timeout=60).content
        os.kill(process.pid or 0, signal.SIGKILL if number < 2 else signal.SIGTERM)
        process.join(HANGS)
    assert "2 answers kept in run/traces.db" in output.read_text(encoding="utf-8")
    small = ["--preset", "nano", "--steps", "2", "--phase", "backbone", "--set", "student.context=64"]
    small += [
        "--set",
        "tokenize.vocab_size=600",
        "--set",
        "tokenize.image_tokens=16",
        "--set",
        "train.precision=float32",
    ]
    done = CliRunner().invoke(dream, ["train", str(tmp_path / "run"), *small, "-q"])
    assert done.exit_code == 0, done.output
    assert sorted(trace.prompt for trace in traces(tmp_path)) == sorted(asked)
    assert Run.open(tmp_path / "run").records()["capture"].summary["soft_share"] == 1
    assert (tmp_path / "run" / "checkpoints").is_dir()


def address(output: Path) -> str:
    """Where it listens, once it does."""
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        text = output.read_text(encoding="utf-8")
        if "Gathering" in text and (found := re.search(r"at (http://\S+) goes", text)):
            return found[1]
        time.sleep(0.02)
    raise AssertionError(output.read_text(encoding="utf-8"))
