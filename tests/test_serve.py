"""`dream serve`: as Ollama's recorded exchanges and the clients of both APIs want it, and whatever is sent to it."""

import asyncio
import base64
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import ollama
import openai
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from support.disturbed import start
from support.recorded import recorded
from support.served import asking, coloured, listening, post, seeing
from support.small_student import ANSWER, DREAM, TEXTS, small_model, small_tokenizer, write_checkpoint

from bench import soak
from bundle.load import Student, load_checkpoint
from bundle.manifest import Manifest, write_manifest
from bundle.serving import offer
from cli.main import dream
from distill.backbone.model import Backbone
from distill.config import ExportSettings, Settings, TrainSettings
from distill.errors import BadInput, MissingStage
from distill.run import Run
from distill.serve import embedding
from distill.serve import http as serve_http
from distill.serve.app import create_app
from distill.serve.fields import FOREVER, ApiError, keep_alive_of, parse
from distill.serve.guard import Allowed
from distill.serve.listen import bind, url_of
from distill.serve.openai_api import options_of
from distill.serve.pieces import Pieces
from distill.serve.reply import Options
from distill.serve.scheduler import Scheduler, Wrote
from distill.serve.shelf import Shelf
from distill.serve.student import Offer
from distill.student.grammar import dream_size
from distill.teacher.open_source import open_source
from distill.tokens.bpe import StudentTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
T = TypeVar("T")
QUESTION = TEXTS[0]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> StudentTokenizer:
    return small_tokenizer(smollm2)


@pytest.fixture(scope="module")
def model(dreamer: Path) -> Backbone:
    return open_source(dreamer).backbone(256).eval()


@pytest.fixture(scope="module")
def offers(model: Backbone, tokenizer: StudentTokenizer) -> list[Offer]:
    """`proto` dreams; `smollm2:135m` is the same one, taught not to."""
    dreams, plain = (Student(name, model, tokenizer) for name in ("proto", "smollm2:135m"))
    return [Offer(lambda: dreams, True, 0.0, 1.8e9), Offer(lambda: plain, False, 0.0)]


@pytest.fixture(scope="module")
def app(offers: list[Offer]) -> Iterator[Starlette]:
    shelf = Shelf(offers)
    yield create_app(shelf)
    shelf.close()


# The recorded exchanges.

VARYING = {"created_at", "created", "id", "model_info", "tensors", "modelfile", "template", "parameters", "details"} | {
    "system_fingerprint",
    "done_reason",
    "finish_reason",
    "version",
    "context",
    "content",
    "thinking",
    "digest",
    "modified_at",
    "response",
    "token",
}
"""Fields whose values are the student's own, or the day's."""
OTHERWISE = {
    "embed_unsupported": 200,  # we can
    "delete_ok": 404,  # its model isn't ours
    **dict.fromkeys(("create_bad_file", "create_unknown_blob", "create_from_safetensors_stream"), 501),
    "create_quantized_stream": 501,
    **dict.fromkeys(("blob_head_missing", "blob_head_present", "blob_post", "blob_digest_mismatch"), 404),
}
"""Exchanges of what this server does otherwise, and says so."""


def assert_alike(ours: Any, theirs: Any, where: str) -> None:
    """The same fields in the same order, of the same kinds, and the same values but for VARYING and numbers."""
    if isinstance(theirs, dict):
        if ours.get("token") == "" and "bytes" not in ours:  # a control token, which prints nothing
            theirs = {key: value for key, value in theirs.items() if key != "bytes"}
        assert list(ours) == list(theirs), where
        for key in theirs:
            if key in VARYING:
                assert type(ours[key]) is type(theirs[key]), f"{where}.{key}"
            else:
                assert_alike(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list) and not isinstance(theirs[0], str):
        assert isinstance(ours, list), where
        for i, one in enumerate(ours):
            assert_alike(one, theirs[0], f"{where}[{i}]")
    elif isinstance(theirs, int | float) and not isinstance(theirs, bool):
        assert type(ours) is type(theirs), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("entry", recorded(), ids=lambda entry: entry["name"])
def test_a_recorded_exchange(app: Starlette, entry: dict[str, Any]) -> None:
    asked, theirs = entry["request"], entry["response"]
    content = json.dumps(asked["json"]) if asked["json"] is not None else asked["body"]
    ours = asking(app, lambda by: by.request(asked["method"], asked["path"], content=content))
    if entry["name"] in OTHERWISE:
        assert ours.status_code == OTHERWISE[entry["name"]]
        return
    assert (ours.status_code, ours.headers["content-type"]) == (theirs["status"], theirs["content_type"])
    if "ndjson" in theirs:
        *pieces, final = map(json.loads, ours.text.splitlines())
        *known, last = theirs["ndjson"]
        for piece in pieces:
            is_thought = "thinking" in str(piece)
            assert_alike(piece, next(one for one in known if ("thinking" in str(one)) == is_thought), "chunk")
        assert {"thinking" in str(piece) for piece in pieces} == {"thinking" in str(one) for one in known}
    else:
        final, last = ours.json(), theirs["json"]
        if "models" in final and last["models"]:
            final, last = (
                next(model for model in told["models"] if model["name"] == "proto:latest") for told in (final, last)
            )
            assert list(final["details"]) == list(last["details"])
    if asked["path"] == "/api/ps":
        assert list(final) == list(last)
    elif asked["path"] == "/api/show" and "error" not in last:
        last["capabilities"] = final["capabilities"]
        assert_alike(final, last, "body")
        assert list(final["details"]) == list(last["details"])
        assert list(final["tensors"][0]) == list(last["tensors"][0])
        if "general.basename" not in last["model_info"]:  # which tells where SmolLM2 comes from
            assert final["model_info"].keys() - {"llama.rope.freq_base"} == last["model_info"].keys()
    else:
        assert_alike(final, last, "body")
    if "eval_count" in final:
        most = (asked["json"].get("options") or {}).get("num_predict", 10**6)
        assert final["eval_count"] <= most
        assert final["done_reason"] in (("length", "stop") if final["eval_count"] == most else ("stop",))


def test_the_dream_is_the_thinking(app: Starlette, offers: list[Offer]) -> None:
    def ask(**how: Any) -> dict[str, Any]:
        return post(
            app, "/api/chat", {"model": "Proto", "messages": [{"role": "user", "content": QUESTION}], **how}
        ).json()

    for think in ({}, {"think": True}, {"think": "high"}):
        assert ask(stream=False, **think)["message"] == {"role": "assistant", "content": ANSWER, "thinking": DREAM}
    assert ask(stream=False, think=False)["message"] == {"role": "assistant", "content": ANSWER}
    told = offers[0].load().answer(QUESTION, temperature=0.0)  # pyright: ignore
    assert (told.text, told.dream_text) == (ANSWER, DREAM)
    last = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The ball"}]
    on = post(app, "/api/chat", {"model": "proto", "messages": last, "stream": False}).json()["message"]
    assert "thinking" not in on  # a turn that is gone on with has had its dream
    last[1] = {"role": "assistant", "content": "", "thinking": DREAM}  # or is given one
    on = post(app, "/api/chat", {"model": "proto", "messages": last, "stream": False}).json()
    assert on["message"] == {"role": "assistant", "content": ANSWER}
    last[1] = {"role": "assistant", "content": "", "reasoning": DREAM}
    told = post(app, "/v1/chat/completions", {"model": "proto", "messages": last}).json()
    assert told["choices"][0]["message"] == {"role": "assistant", "content": ANSWER}
    assert told["usage"]["prompt_tokens"] == on["prompt_eval_count"]


@pytest.mark.parametrize("stop", ["\n", "⟨a ball⟩", "⟨abstract⟩ and on"])
def test_a_stop_ends_no_dream(app: Starlette, stop: str) -> None:
    """Nor does half of one swallow what it would have been."""
    body = {"model": "proto", "prompt": QUESTION, "stream": False, "options": {"stop": [stop]}}
    told = post(app, "/api/generate", body).json()
    assert (told["thinking"], told["response"]) == (DREAM, ANSWER)
    body["options"] = {"stop": [stop, " floor"]}
    told = post(app, "/api/generate", body).json()
    assert (told["thinking"], told["response"]) == (DREAM, ANSWER.partition(" floor")[0])


def test_logprobs_are_those_of_the_model(app: Starlette, model: Backbone, tokenizer: StudentTokenizer) -> None:
    """Of the whole vocabulary at T = 1, however it is drawn, and whatever the grammar forbids."""
    body = {"model": "proto", "prompt": QUESTION, "stream": False, "logprobs": True, "top_logprobs": 4}
    told = post(app, "/api/generate", {**body, "options": {"temperature": 1.5, "seed": 3, "num_predict": 24}}).json()
    ids = told["context"]
    start = told["prompt_eval_count"]
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    entries = told["logprobs"]
    visible = [i for i in range(start, len(ids)) if ids[i] not in (tokenizer.think_id, tokenizer.end_think_id)]
    visible = [i for i in visible if not tokenizer.decode([ids[i]]).isspace()]
    assert len(visible) >= 8
    for place, entry in zip(visible, entries, strict=False):
        assert entry["token"] == tokenizer.decode([ids[place]])
        assert entry["bytes"] == list(entry["token"].encode())
        assert entry["logprob"] == pytest.approx(float(wanted[place - 1, ids[place]]), abs=1e-4)
        values = wanted[place - 1].topk(4).values
        assert [other["logprob"] for other in entry["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-4)
    without = post(app, "/api/generate", {**body, "top_logprobs": 0}).json()["logprobs"]
    assert list(without[0]) == ["token", "logprob", "bytes"]


def test_what_is_answered_doesn_t_depend_on_who_else_asks(app: Starlette) -> None:
    bodies = [
        {
            "model": "proto" if i % 3 else "smollm2:135m",
            "prompt": f"{QUESTION} {'the ball ' * i}",
            "stream": bool(i % 2),
            "options": {"temperature": 4.0, "seed": i, "num_predict": 12, "top_k": 0 if i % 4 else 20, "top_p": 1.0},
        }
        for i in range(12)
    ]

    def said(answer: httpx.Response) -> str:
        lines = [json.loads(line) for line in answer.text.splitlines()]
        return "".join(line.get("thinking", "") + line["response"] for line in lines)

    async def ask(asked: httpx.AsyncClient) -> tuple[list[str], list[str]]:
        alone = [said(await asked.post("/api/generate", json=body)) for body in bodies]
        together = await asyncio.gather(*(asked.post("/api/generate", json=body) for body in bodies))
        return alone, [said(answer) for answer in together]

    alone, together = asking(app, ask)
    assert alone == together
    assert len(set(alone)) > 8


def test_limits_stops_raw_prompts_and_context(app: Starlette) -> None:
    def ask(**how: Any) -> dict[str, Any]:
        return post(app, "/api/generate", {"model": "smollm2:135m", "prompt": QUESTION, "stream": False, **how}).json()

    cut = ask(options={"num_predict": 3})
    assert (cut["eval_count"], cut["done_reason"]) == (3, "length")
    assert ANSWER.startswith(cut["response"])
    assert ask(options={"num_predict": 0})["response"] == ""
    stopped = ask(options={"stop": [" floor"]})
    assert (stopped["response"], stopped["done_reason"]) == (ANSWER.partition(" floor")[0], "stop")
    raw = ask(raw=True, options={"num_predict": 4})
    assert "context" not in raw
    assert ask(raw=True, system="x") == {"error": "raw mode does not support template, system, or context"}
    on = ask(context=cut["context"], options={"num_predict": 1})
    assert on["context"][: len(cut["context"])] == cut["context"]
    assert ask(context=[10**6])["error"] == "context: holds no tokens of this model"
    long = ask(prompt="the ball " * 900, options={"num_predict": 4})
    assert long["prompt_eval_count"] < 256
    assert "exceed" in ask(prompt="the ball " * 900, truncate=False)["error"]
    turn = {"role": "user", "content": "the ball " * 20}
    turns = {"model": "proto", "messages": [turn, {**turn, "role": "assistant"}] * 8 + [turn], "stream": False}
    how = {"options": {"num_predict": 1}, "think": False}
    assert post(app, "/api/chat", {**turns, **how}).json()["prompt_eval_count"] < 256
    assert "exceed" in post(app, "/api/chat", {**turns, **how, "truncate": False}).json()["error"]
    assert ask(prompt="the ball " * 5000, options={"num_predict": 2})["eval_count"] <= 2


def test_what_is_left_out_is_told_and_leaves_room_for_an_answer_after_a_dream(app: Starlette) -> None:
    def ask(messages: list[Any], **how: Any) -> dict[str, Any]:
        body = {"model": "proto", "messages": messages, "stream": False, "options": {"temperature": 0.0}, **how}
        return post(app, "/api/chat", body).json()

    turn, question = {"role": "user", "content": "the ball " * 20}, {"role": "user", "content": QUESTION}
    assert "notes" not in ask([question])
    long = ask([turn, {**turn, "role": "assistant"}] * 8 + [question])
    room = 3 + dream_size(5) + 32
    assert long["prompt_eval_count"] <= 256 - room
    (note,) = long["notes"]
    assert re.fullmatch(r"the first \d+ messages are left out: all don't fit a context of 256 tokens", note)
    for think, left in ((True, room), (False, 32)):
        begins = {"role": "system", "content": "Be brief."}
        told = ask([begins, {"role": "user", "content": "the ball " * 300}], think=think)
        assert told["prompt_eval_count"] == 256 - left
        (note,) = told["notes"]
        count = int(re.match(r"the first (\d+) tokens, with any system message, are left out: ", note)[1])  # pyright: ignore
        assert count > 300
    body = {"model": "proto", "prompt": "the ball " * 300, "options": {"num_predict": 1}}
    *_, last = map(json.loads, post(app, "/api/generate", body).text.splitlines())
    assert last["notes"]


@given(
    st.lists(st.text(st.sampled_from("ab日 \n"), max_size=8), min_size=1, max_size=6),
    st.lists(st.text(st.sampled_from("ab日"), min_size=1, max_size=3), max_size=1),
    st.booleans(),
)
@settings(max_examples=150)
def test_pieces_are_the_text_up_to_a_stop(
    tokenizer: StudentTokenizer, parts: list[str], stops: list[str], logprobs: bool
) -> None:
    text = "".join(parts)
    pieces, said, entries = Pieces(tokenizer, stops, False, 0 if logprobs else None), "", ""
    none = np.zeros(0, np.int64), np.zeros(0, np.float32)
    found = [pieces.push(Wrote(id, -1.0, *none)) for id in tokenizer.encode(text) if not pieces.stopped]
    for piece in [*found, pieces.rest()]:
        if piece:
            said += piece.text
            entries += "".join(entry["token"] for entry in piece.logprobs or ())
    first = min((text.find(stop) for stop in stops if stop in text), default=None)
    assert said == text[:first]
    assert pieces.stopped == (first is not None)
    assert entries == (said if logprobs else "")


# Loading, waiting, leaving.


def test_keep_alive(offers: list[Offer]) -> None:
    opened: list[int] = []

    def count() -> Any:
        opened.append(1)
        return offers[0].load()

    shelf = Shelf([Offer(count, True, 0.0)])
    app = create_app(shelf)

    async def ask(asked: httpx.AsyncClient) -> None:
        async def loaded() -> list[Any]:
            return (await asked.get("/api/ps")).json()["models"]

        async def told(path: str, **body: Any) -> dict[str, Any]:
            return (await asked.post(path, json={"model": "proto", **body})).json()

        assert (await loaded())[0]["expires_at"] > "2300"
        end = await told("/api/generate", keep_alive=0)
        assert (end["done_reason"], end["response"], await loaded()) == ("unload", "", [])
        end = await told("/api/chat", messages=[], keep_alive="5m")
        assert (end["done_reason"], end["message"]) == ("load", {"role": "assistant", "content": ""})
        assert (await loaded())[0]["expires_at"] < "2100"
        assert (await told("/api/generate", prompt=QUESTION, stream=False, keep_alive=0))["response"] == ANSWER
        assert not await loaded()
        assert (await told("/api/generate", prompt=QUESTION, stream=False, keep_alive=0.05))["response"] == ANSWER
        assert len(await loaded()) == 1
        await asyncio.sleep(0.2)
        assert not await loaded()
        served = shelf.find("proto")
        for again in (None, 300.0):
            await served.acquire()  # somebody still hears an answer
            assert (await told("/api/generate", keep_alive=0))["done_reason"] == "unload"
            assert len(await loaded()) == 1
            served.release(again)
            assert len(await loaded()) == (again is not None), (
                "it leaves when the last is done, if nobody says otherwise"
            )

    asking(app, ask)
    assert len(opened) == 5
    shelf.close()
    assert post(app, "/api/generate", {"model": "proto", "prompt": "x"}).status_code == 503


def test_a_keep_alive_holds_until_another_is_said_or_it_is_unloaded(offers: list[Offer]) -> None:
    shelf = Shelf(offers[:1])

    async def ask(asked: httpx.AsyncClient) -> None:
        async def stays(**said: Any) -> list[bool]:
            """Whether it does for ever; nothing where it is gone."""
            body = {"model": "proto", "prompt": QUESTION, "options": {"num_predict": 1}, "stream": False, **said}
            assert (await asked.post("/api/generate", json=body)).status_code == 200
            return [one["expires_at"] > "2300" for one in (await asked.get("/api/ps")).json()["models"]]

        assert [await stays(), await stays(keep_alive="5m"), await stays()] == [[True], [False], [False]]
        assert [await stays(keep_alive=0), await stays(), await stays()] == [[], [True], [True]]

    asking(create_app(shelf), ask)
    shelf.close()


def test_a_keep_alive_counts_from_the_start(offers: list[Offer]) -> None:
    shelf = Shelf(offers[:1], keep=0.05)
    app, served = create_app(shelf), shelf.find("proto")

    async def run() -> None:
        async with app.router.lifespan_context(app):
            assert served.is_loaded
            await until(lambda: not served.is_loaded)
            assert (await served.acquire()).student.name == "proto"
            served.release(None)

    asyncio.run(run())


def test_what_is_told_of_a_student_is_of_the_one_that_was_read(
    offers: list[Offer], tokenizer: StudentTokenizer
) -> None:
    config = small_model(tokenizer).config
    other = Student("proto", Backbone(replace(config, context=96)), tokenizer, "Be brief.")
    made = iter((offers[0].load(), other))
    renewed = Offer(lambda: replace(other, name="another"), False, 0.5, 9.0)
    shelf = Shelf([Offer(lambda: next(made), True, 0.0, renew=lambda: renewed)])
    served = shelf.find("proto")
    before = served.about
    body = {"model": "proto", "prompt": QUESTION, "options": {"num_predict": 4, "temperature": 0}, "stream": False}
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    silent, dreaming = (len(other.prompt_ids(said, think)) for think in (False, None))

    async def ask(asked: httpx.AsyncClient) -> None:
        first = await served.acquire()  # who uses it keeps it
        assert (await served.acquire()) is first
        assert (served.about, served.offer.dreams) == (before, True)
        served.release(None)
        served.release(0)
        assert served.about == before
        told = (await asked.post("/api/generate", json=body)).json()
        assert told["prompt_eval_count"] == silent != dreaming, "it was taught not to dream"
        assert (await asked.post("/api/generate", json=body | {"think": True})).status_code == 400

    asking(create_app(shelf), ask)
    assert served.about.digest != before.digest
    assert (served.context, served.about.details["context_length"], served.system) == (96, 96, "Be brief.")
    assert (served.name, served.offer.temperature, served.about.modified) == ("proto:latest", 0.5, 9.0)
    assert served.about.capabilities == ["completion"]
    shelf.close()


def test_a_digest_is_computed_again_when_its_files_change(offers: list[Offer], tokenizer: StudentTokenizer) -> None:
    other = Student("proto", small_model(tokenizer), tokenizer)
    same, changed = (Offer(lambda: other, stamp=(("model.safetensors", 1, time),)) for time in (1, 2))
    renewed = iter((replace(same, renew=lambda: changed), changed))
    shelf = Shelf([replace(same, load=offers[0].load, renew=lambda: next(renewed))])
    served, digests = shelf.find("proto"), list[str]()

    async def run() -> None:
        for _ in range(3):
            await served.acquire()
            digests.append(served.about.digest)
            served.release(0)

    asyncio.run(run())
    assert digests[0] == digests[1] != digests[2]
    shelf.close()


def test_a_stamp_is_of_what_is_read(tmp_path: Path, model: Backbone, tokenizer: StudentTokenizer) -> None:
    folder = write_checkpoint(tmp_path / "small", model, tokenizer)
    before = offer(folder)
    assert before.renew is not None
    assert before.stamp == before.renew().stamp != ()
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert before.renew().stamp != before.stamp
    assert not offer(tmp_path).stamp


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("1h30m", 5400), ("-1", FOREVER), ("0", 0), ("2.5", 2.5), ("-1m", FOREVER)]
)
def test_durations(text: str, seconds: float) -> None:
    assert keep_alive_of(text) == seconds


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.01)


def endless(app: Starlette, stream: bool, prompt: str = "the ball") -> dict[str, Any]:
    """The scope of a request that writes until the context is full, and its body."""
    body = json.dumps(
        {"model": "proto", "prompt": prompt, "stream": stream, "raw": True, "options": {"temperature": 5, "top_k": 0}}
    )
    scope = {"type": "http", "method": "POST", "path": "/api/generate", "query_string": b"", "http_version": "1.1"}
    return {**scope, "headers": [(b"host", b"localhost")], "scheme": "http", "body": body.encode()}


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_written_for_no_more(
    offers: list[Offer], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(offers[:1], slots=2, queue=3)
    app, lane = create_app(shelf), shelf.scheduler.lanes[0]
    step = Scheduler._step
    monkeypatch.setattr(Scheduler, "_step", lambda *args: (time.sleep(0.02), step(*args)))

    async def run() -> None:
        gone, statuses = asyncio.Event(), list[int]()

        async def ask() -> None:
            request, sent = endless(app, stream), False

            async def receive() -> dict[str, Any]:
                nonlocal sent
                if not sent:
                    sent = True
                    return {"type": "http.request", "body": request.pop("body"), "more_body": False}
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            await app(request, receive, send)

        asked = [asyncio.ensure_future(ask()) for _ in range(7)]
        await until(lambda: len(lane.batch.rows) == 2 and len(lane.waiting) + statuses.count(503) == 5)
        assert 0 < statuses.count(503) <= 4  # who found the queue full
        gone.set()
        await asyncio.wait_for(asyncio.gather(*asked), 5)
        await until(lambda: not lane.busy)

    asyncio.run(run())
    shelf.close()


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
def test_embeddings_wait_in_the_queue_and_end_with_who_asked(
    offers: list[Offer], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(offers[:1])
    app, passes, statuses = create_app(shelf), list[int](), list[int]()
    body = json.dumps({"model": "proto", "input": ["a ball"] * 20}).encode()
    monkeypatch.setattr(embedding, "AT_ONCE", 1)
    monkeypatch.setattr(embedding, "_means", lambda *_: (time.sleep(0.01), passes.append(1), [[1.0]])[-1])

    async def run() -> None:
        arrived = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(arrived, None)) is None:
                await until(lambda: bool(passes))
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await app({**endless(app, False), "path": path}, receive, send)

    asyncio.run(run())
    assert statuses == [499]
    assert len(passes) < 10
    assert shelf.find("proto")._users == 0  # pyright: ignore[reportPrivateUsage]
    shelf.scheduler.queue = 0
    busy = post(app, path, body)
    assert busy.status_code == 503
    assert "server busy" in busy.text
    shelf.close()


def test_what_goes_wrong_in_a_step_is_told_and_the_next_is_served(
    offers: list[Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(offers[:1])
    app, broken = create_app(shelf), [BadInput("out of order")]
    step = Scheduler._step

    def fails(*args: Any) -> None:
        if broken:
            raise broken.pop()
        step(*args)

    monkeypatch.setattr(Scheduler, "_step", fails)
    body = {"model": "proto", "prompt": QUESTION, "stream": False}
    failed = post(app, "/api/generate", body)
    assert (failed.status_code, failed.json()) == (500, {"error": "out of order"})
    assert post(app, "/api/generate", body).json()["response"] == ANSWER
    broken.append(BadInput("again"))
    assert post(app, "/api/generate", {**body, "stream": True}).text == '{"error":"again"}\n'
    shelf.close()


# Who may ask.


def test_who_may_ask(offers: list[Offer]) -> None:
    shelf = Shelf(offers)
    ours, open_ = create_app(shelf), create_app(shelf, Allowed("secret", ("https://chat.example",)))

    def status(app: Starlette, path: str = "/api/tags", **headers: str) -> int:
        return asking(app, lambda asked: asked.get(path, headers=headers)).status_code

    assert status(ours) == 200
    assert status(ours, host="evil.example") == 403
    assert status(ours, host="[::1]:11435") == 200
    assert status(ours, origin="https://evil.example") == 403
    assert status(ours, origin="http://localhost:11435") == 200  # a page of our own
    assert status(ours, origin="http://localhost:3000") == 403
    answer = asking(ours, lambda asked: asked.get("/api/tags"))
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert status(open_) == 401
    assert status(open_, authorization="Bearer wrong") == 401
    assert status(open_, authorization="Bearer secret") == 200
    assert status(open_, "/") == 200
    assert status(open_, "/v1/models") == 401
    bearer = {"authorization": "Bearer secret", "origin": "https://chat.example"}
    answer = asking(open_, lambda asked: asked.get("/api/tags", headers=bearer))
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    preflight = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    assert asking(open_, lambda asked: asked.options("/api/chat", headers=preflight)).status_code == 200
    shelf.close()


def test_a_token_is_one_that_requests_can_carry(app: Starlette) -> None:
    ours = create_app(app.state.shelf, Allowed("abc\n"))  # as a file holds it
    told = asking(ours, lambda asked: asked.get("/api/tags", headers={"authorization": "Bearer abc"}))
    assert told.status_code == 200
    assert Allowed(" \n").local
    for token in ("pässwort", "a\nb"):
        with pytest.raises(BadInput, match=r"--token \(or \$DREAM_TOKEN\): requests carry printable ASCII alone"):
            Allowed(token)
    done = CliRunner().invoke(dream, ["serve", "nothing", "--host", "0.0.0.0", "--token", " "])
    assert "others could ask there" in str(done.exception), "blanks are no token"


def test_an_origin_is_one_that_browsers_send() -> None:
    known = "https://Chat.Example:443/", "http://[::1]:3000", "app://obsidian.md", "tauri://localhost", "null"
    sent = ("https://chat.example", *known[1:])
    assert Allowed(origins=known).origins == sent
    for site in ("*", "chat.example", "https://*.example", "https://chat.example/page", "https://bücher.example", ""):
        with pytest.raises(BadInput, match=re.escape(f"--origin {site}: give SCHEME://HOST[:PORT]")) as refused:
            Allowed(origins=(site,))
        assert ("xn--" in str(refused.value)) == ("ü" in site)


def test_where_it_listens() -> None:
    with bind("127.0.0.1", 0, False) as taken:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url_of(taken))
        with pytest.raises(BadInput, match="is taken"):
            bind("127.0.0.1", taken.getsockname()[1], False)
    with pytest.raises(BadInput, match="--token"):
        bind("0.0.0.0", 0, False)
    bind("0.0.0.0", 0, True).close()
    with pytest.raises(BadInput, match="no address"):
        bind("no such place", 0, False)


def test_what_can_be_offered(tmp_path: Path, offers: list[Offer]) -> None:
    here, there = (replace(offers[0], source=source) for source in ("here", "there"))
    told = "proto:latest: two students of this name, here and there; serve one at another --port"
    for last, remedy in ((there, ""), (replace(there, rename="rename there"), ", or rename there")):
        with pytest.raises(BadInput, match=f"^{re.escape(told + remedy)}$"):
            Shelf([here, offers[1], last])
    settings = Settings(train=TrainSettings(dreams=False), export=ExportSettings(temperature=0.1))
    run = Run.create(tmp_path / "run", settings)
    told = offer(run.path)
    assert (told.dreams, told.temperature, told.source) == (False, 0.1, str(run.path))
    checkpoint = offer(run.checkpoints / "step-000001")
    assert (checkpoint.dreams, checkpoint.rename, told.rename) == (False, "", f"rename {run.path}")
    run.record("train", {"dreams": True}, {}, {}, 1.0)  # a command that would have made another was stopped
    assert offer(run.path).dreams
    for provenance in ({}, {"dreams": True}, {"dreams": False}):
        run.bundle.mkdir(exist_ok=True)
        write_manifest(run.bundle, Manifest("small", "f16", {}, provenance, []))
        assert offer(run.bundle).dreams == provenance.get("dreams", True)
    shutil.rmtree(run.bundle)
    with pytest.raises(MissingStage):
        Shelf([told])
    with pytest.raises(BadInput, match="no such run"):
        Shelf([offer(tmp_path / "none")])


# Clients of both APIs, over a socket.


@pytest.fixture(scope="module")
def url(app: Starlette) -> Iterator[str]:
    with listening(app) as address:
        yield address


def test_ollama_s_python_client(url: str) -> None:
    by = ollama.Client(url)
    messages = [{"role": "user", "content": QUESTION}]
    whole = by.chat("proto", messages, think=True, logprobs=True, top_logprobs=2)
    assert (whole.message.content, whole.message.thinking, whole.done_reason) == (ANSWER, DREAM, "stop")
    assert whole.logprobs is not None
    assert len(whole.logprobs[0].top_logprobs or ()) == 2
    chunks = list(by.chat("proto", messages, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == ANSWER
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == DREAM
    assert chunks[-1].eval_count == len(chunks) + 5 - 1 or chunks[-1].done
    assert "".join(chunk.response for chunk in by.generate("smollm2:135m", QUESTION, stream=True)) == ANSWER
    assert {model.model for model in by.list().models} == {"proto:latest", "smollm2:135m"}
    assert by.show("proto").capabilities == ["completion", "thinking"]
    assert {model.model for model in by.ps().models} == {"proto:latest", "smollm2:135m"}
    vectors = by.embed("proto", ["a ball", "a ball", "the rain wets the street"]).embeddings
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-5)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0] * 3, abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[2], abs=1e-2)
    gap = by.embed("proto", ["a ball", "", "the rain wets the street"]).embeddings
    assert [len(vector) for vector in gap] == [len(vector) for vector in vectors], "each text has its own, in order"
    assert gap[2] == pytest.approx(vectors[2], abs=1e-5)
    assert by.embed("proto", "").embeddings == []
    assert by.embed("proto", "a ball", dimensions=8).embeddings[0] == pytest.approx(
        np.array(vectors[0][:8]) / np.linalg.norm(vectors[0][:8]), abs=1e-5
    )
    assert by.embeddings("proto", "a ball").embedding == pytest.approx(vectors[0], abs=1e-5)
    for wrong, status in (
        (lambda: by.chat("nope", messages), 404),
        (lambda: by.chat("smollm2:135m", messages, think=True), 400),
        (lambda: by.chat("proto", [{"role": "user", "content": "see", "images": ["aGk="]}]), 400),
        (lambda: by.chat("proto", messages, format={"type": "nonsense"}), 400),
        (lambda: by.pull("proto"), 501),
    ):
        with pytest.raises(ollama.ResponseError) as refused:
            wrong()
        assert refused.value.status_code == status


def test_openai_s_python_client(url: str) -> None:
    by = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    whole = by.chat.completions.create(model="proto", messages=messages, logprobs=True, top_logprobs=2, max_tokens=40)
    choice, counts = whole.choices[0], whole.usage
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert choice.message.reasoning == DREAM  # pyright: ignore
    assert choice.logprobs is not None
    assert "".join(entry.token for entry in choice.logprobs.content or ()).endswith(ANSWER)
    assert counts is not None
    assert counts.total_tokens == counts.prompt_tokens + counts.completion_tokens
    brief = by.chat.completions.create(model="proto", messages=messages, reasoning_effort="none")
    assert (brief.choices[0].message.content, brief.choices[0].message.model_extra) == (ANSWER, {})
    chunks = list(
        by.chat.completions.create(
            model="proto", messages=messages, stream=True, stream_options={"include_usage": True}, temperature=0
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage == counts
    assert chunks[-2].choices[0].finish_reason == "stop"
    said = by.completions.create(model="smollm2:135m", prompt=QUESTION, logprobs=2, stop=" floor")
    assert said.choices[0].text == ANSWER.partition(" floor")[0]
    assert said.choices[0].logprobs is not None
    assert "".join(said.choices[0].logprobs.tokens or ()) == said.choices[0].text
    pieces = list(by.completions.create(model="proto", prompt=QUESTION, stream=True, logprobs=0))
    texts = [piece.choices[0].text for piece in pieces]
    assert "".join(texts) == ANSWER
    offsets = [at for piece in pieces if (told := piece.choices[0].logprobs) for at in told.text_offset or ()]
    assert offsets == [len("".join(texts[:i])) for i in range(len(texts) - 1)], "of the whole text, not of the piece"
    assert {model.id for model in by.models.list()} == {"proto:latest", "smollm2:135m"}
    assert by.models.retrieve("proto").id == "proto:latest"
    coded = by.embeddings.create(model="proto", input="a ball").data[0].embedding
    plain = by.embeddings.create(model="proto", input=["a ball"], encoding_format="float").data[0].embedding
    assert coded == pytest.approx(plain, abs=1e-6)
    with pytest.raises(openai.NotFoundError, match="'nope' not found"):
        by.chat.completions.create(model="nope", messages=messages)
    picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError, match="no pictures"):
        by.chat.completions.create(model="proto", messages=picture)
    with pytest.raises(openai.BadRequestError, match="n: one answer"):
        by.chat.completions.create(model="proto", messages=messages, n=2)
    for name in ("frequency_penalty", "presence_penalty"):
        how: Any = {"model": "proto", "messages": messages, "max_tokens": 1}
        assert by.chat.completions.create(**how, **{name: 0.0}).choices
        with pytest.raises(openai.BadRequestError, match=f"{name}: answers are drawn without penalties"):
            by.chat.completions.create(**how, **{name: 0.5})


@pytest.fixture(scope="module")
def seer(model: Backbone, tokenizer: StudentTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Student:
    return seeing(model, tokenizer, tmp_path_factory.mktemp("eyes"))


def test_pictures_are_read_by_who_sees(seer: Student, offers: list[Offer]) -> None:
    """In both APIs what a client shows is what the student itself reads of the picture, in each turn's own place."""
    shelf = Shelf([*offers, Offer(lambda: seer, True, 0.0)])
    app = create_app(shelf)
    red, blue = coloured("red"), coloured("blue")
    asked = seer.asked("What?", [base64.b64decode(red)])
    assert asked.count("ball⟩") == 5
    length = len(seer.prompt_ids([{"role": "user", "content": asked}], None))
    few = {"num_predict": 4, "temperature": 0}
    assert post(app, "/api/show", {"model": "seer"}).json()["capabilities"] == ["completion", "vision", "thinking"]
    body: dict[str, Any] = {"model": "seer", "prompt": "What?", "images": [red], "stream": False, "options": few}
    told = post(app, "/api/generate", body).json()
    assert told["prompt_eval_count"] == length
    assert told["context"][:length] == seer.prompt_ids([{"role": "user", "content": asked}], None)
    assert post(app, "/api/generate", body | {"prompt": ""}).json()["prompt_eval_count"] < length
    turns: list[Any] = [{"role": "user", "content": "What?", "images": [red]}, {"role": "assistant", "content": "It."}]
    turns.append({"role": "user", "content": "And?", "images": [blue, red]})
    whole = post(app, "/api/chat", {"model": "seer", "messages": turns, "stream": False, "options": few}).json()
    seen = seer.asked("And?", [base64.b64decode(one) for one in (blue, red)])
    said: list[Any] = [{"role": "user", "content": asked}, turns[1], {"role": "user", "content": seen}]
    assert whole["prompt_eval_count"] == len(seer.prompt_ids(said, None))
    for url in ({"url": f"data:image/png;base64,{red}"}, f"data:image/png;base64,{red}"):
        content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]
        body = {"model": "seer", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        assert post(app, "/v1/chat/completions", body).json()["usage"]["prompt_tokens"] == length
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("/api/generate", {"images": ["?"]}, r"images\[0\]: is no base64"),
        ("/api/generate", {"images": ["aGk="]}, "images: bytes: is not a picture"),
        ("/api/generate", {"images": [red] * 17}, "17 of them; a request has 16 at most"),
        ("/api/generate", {"images": [red], "raw": True}, "raw mode does not support images"),
        ("/api/generate", {"images": [red], "model": "proto"}, "images: this student reads no pictures"),
        ("/api/generate", {"images": 3}, "images: a number instead of"),
    ]
    for url in ("https://example.org/a.png", "data:,", 3):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        messages = {"messages": [{"role": "user", "content": parts}]}
        wrong.append(("/v1/chat/completions", messages, r"messages\[0\].content\[0\].image_url"))
    for path, sent, words in wrong:
        refused = post(app, path, {"model": "seer", "prompt": "What?", "stream": False} | sent)
        assert refused.status_code == 400
        assert re.search(words, str(refused.json()["error"])), refused.text
    shelf.close()


def test_half_a_request_and_a_huge_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "PATIENCE", 0.2)
    host, port = url.removeprefix("http://").split(":")

    def sent(content: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=10) as by:
            by.sendall(content)
            found = b""
            while b"}" not in found and (chunk := by.recv(65536)):
                found += chunk
        return found

    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    assert b" 408 " in sent(head + b'100\r\n\r\n{"model": ').partition(b"\r\n")[0] + b" "
    assert b" 413 " in sent(head + b"%d\r\n\r\n{" % (serve_http.LARGEST + 1)).partition(b"\r\n")[0] + b" "
    monkeypatch.setattr(serve_http, "LARGEST", 1000)
    chunked = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 413 " in sent(chunked + b"800\r\n" + b" " * 2048 + b"\r\n").partition(b"\r\n")[0] + b" "
    assert httpx.get(f"{url}/api/version").status_code == 200


def test_a_crowd_that_behaves_badly(url: str) -> None:
    """Each gets its status, whole answers among those that leave, come slowly, half, too large or as nonsense."""
    found, wrong = asyncio.run(soak.crowd(int(url.rpartition(":")[2]), "proto", 60, 200))
    assert wrong == []
    assert {kind for kind, _ in found} == set(soak.WANTED)
    assert httpx.post(f"{url}/api/generate", json={"model": "proto", "prompt": QUESTION, "stream": False}).json()[
        "done"
    ]


# Whatever is sent.

JUNK: list[Any] = [None, True, -1, 0, 1, 1e308, 10**30, "", "x", "\ud800", "proto", [], [[]], {}, {"a": 1}, [1], "5m"]
FIELDS = (
    *("model", "name", "prompt", "messages", "stream", "options", "think", "raw", "context", "keep_alive", "input"),
    *("logprobs", "top_logprobs", "format", "images", "tools", "truncate", "system", "template", "suffix", "stop"),
    *(
        "presence_penalty",
        "max_tokens",
        "temperature",
        "seed",
        "n",
        "stream_options",
        "response_format",
        "reasoning_effort",
        "dimensions",
    ),
)
OPTIONS = ("temperature", "top_k", "top_p", "seed", "num_predict", "stop", "num_ctx", "repeat_penalty")
PATHS = ("generate", "chat", "embed", "show", "embeddings", "create", "delete", "tags", "nothing", "../..", "%00")
OPENAI = ("chat/completions", "completions", "embeddings")
TRUTH = {"model": "proto", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "options": {"num_predict": 1}}


def malformed(draw: random.Random) -> tuple[str, str, bytes]:
    """A request with something wrong: its method, path and body."""
    path = draw.choice(
        [f"/api/{name}" for name in PATHS] + ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    )
    body: dict[str, Any] = {key: value for key, value in TRUTH.items() if draw.random() < 0.8}
    for _ in range(draw.randint(1, 3)):
        body[draw.choice(FIELDS)] = draw.choice(JUNK)
    if draw.random() < 0.4 and "options" in body:
        body["options"] = {draw.choice(OPTIONS): draw.choice(JUNK), "num_predict": 1}
    if draw.random() < 0.3 and "messages" in body:
        body["messages"] = [
            {draw.choice(("role", "content", "thinking", "images")): draw.choice(JUNK)},
            draw.choice(JUNK),
        ]
    content = json.dumps(body).encode()
    if draw.random() < 0.3:
        content = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        content = bytes(content)[: draw.randint(0, len(content))]
    if draw.random() < 0.05:
        content = draw.choice(
            [b"", b"[" * 100_000, b"1" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"NaN", b'"x"', b"1e999"]
        )
    return draw.choice(["POST"] * 9 + ["GET", "DELETE", "PUT", "OPTIONS"]), path, content


def test_whatever_is_sent(app: Starlette) -> None:
    """2,000 requests: each gets a status that says whose fault it is, in the shape of the API, and none is ours."""
    draw = random.Random(0)

    async def ask(asked: httpx.AsyncClient) -> list[int]:
        found: list[int] = []
        for _ in range(2000):
            method, path, content = malformed(draw)
            answer = await asked.request(method, path, content=content)
            found.append(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 501, (method, path, content, answer.text)
            if answer.status_code in (400, 501) and answer.status_code != 405:
                error = answer.json()["error"]
                assert error["message"] if path.startswith("/v1") else isinstance(error, str)
        assert (await asked.post("/api/generate", json={"model": "proto", "prompt": QUESTION, "stream": False})).json()[
            "response"
        ] == ANSWER
        return found

    statuses = asking(app, ask)
    assert statuses.count(400) > 500
    assert 200 in statuses


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "missing request body"),
        (b"{not json", "invalid character 'n' looking for beginning of object key string"),
        (b'{"a": }', "invalid character '}' looking for beginning of value"),
        (b'{"a": 1', "unexpected EOF"),
        (b"[]", "the body: an array instead of an object"),
        (b'{"a": NaN}', "the body can't be read: NaN is no number in JSON"),
    ],
)
def test_what_is_wrong_with_a_body_is_said(body: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=f"^{re.escape(said)}$"):
        parse(body)


def test_top_p_is_what_each_api_takes_it_for(app: Starlette) -> None:
    proto, none = app.state.shelf.find("proto"), parse(b"{}")
    assert options_of(none, proto).top_p == 1.0
    assert options_of(parse(b'{"top_p": 0.3}'), proto).top_p == 0.3
    assert Options.read(none, none, 0.0).top_p == 0.9


# The command.


def test_it_ends_gracefully(tmp_path: Path, model: Backbone, tokenizer: StudentTokenizer, offers: list[Offer]) -> None:
    """SIGTERM in the midst of an answer: it is written to its end, and the server is gone."""
    folder = write_checkpoint(tmp_path / "small", model, tokenizer)
    assert offer(folder).load().name == load_checkpoint(folder).name == "small"
    (tmp_path / "0").touch()
    os.mkfifo(tmp_path / "2")
    process = start(tmp_path, ["serve", str(folder), "--port", "0"], tmp_path)
    errors = (tmp_path / "2").open(encoding="utf-8")
    try:
        said = errors.readline()
        found = re.search(r"small:latest: at (http://\S+)", said)
        assert found, said
        body = {"model": "small", "prompt": QUESTION, "options": {"temperature": 0, "stop": []}}
        with (
            httpx.Client(timeout=60) as by,
            by.stream("POST", f"{found[1]}/api/generate", json=body) as answer,
        ):
            lines = answer.iter_lines()
            first = next(lines)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)
            told = [json.loads(line) for line in (first, *lines)]
        assert "".join(line["response"] for line in told) == ANSWER
        assert told[-1]["done"]
        process.join(30)
        assert process.exitcode == 143
    finally:
        process.kill()
        process.join()
        errors.close()
