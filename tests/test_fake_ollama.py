"""The fake server against the recordings of a real one."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from support.fake_ollama import FakeOllama, engine, replay, timed
from support.recorded import exchange, recorded

VARYING = ("created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
LOGPROB_TOLERANCE = 1e-2
"""Between two builds of llama.cpp; within one it is about 1e-5."""


@pytest.fixture(scope="module")
def fake(smollm2: Path) -> Iterator[FakeOllama]:
    with engine({"smollm2:135m": smollm2}) as server:
        yield server


@pytest.fixture(scope="module")
def replayed() -> Iterator[FakeOllama]:
    with replay() as server:
        yield server


def ask(server: FakeOllama, request: dict[str, Any]) -> httpx.Response:
    content = json.dumps(request["json"]) if request["json"] is not None else request["body"]
    return httpx.request(request["method"], server.url + request["path"], content=content, timeout=60)


def ndjson(answer: httpx.Response) -> list[Any]:
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("name", [entry["name"] for entry in recorded()])
def test_every_recorded_exchange_is_replayed_equal(replayed: FakeOllama, name: str) -> None:
    entry = exchange(name)
    answer, known = ask(replayed, entry["request"]), entry["response"]
    assert answer.status_code == known["status"]
    assert answer.headers.get("content-type", "") == known["content_type"]
    if "ndjson" in known:
        assert ndjson(answer) == known["ndjson"]
    elif "json" in known:
        assert answer.json() == known["json"]
    else:
        assert answer.text == known["text"]


def test_what_was_never_recorded_is_not_made_up(replayed: FakeOllama) -> None:
    assert (
        httpx.post(replayed.url + "/api/generate", json={"model": "smollm2:135m", "prompt": "new"}).status_code == 404
    )


def compare(mine: Any, known: Any, where: str = "") -> float:
    """Same keys in the same order, same values; returns the largest difference of a logprob."""
    if isinstance(known, dict):
        assert list(mine) == list(known), where
        return max([compare(mine[k], known[k], f"{where}.{k}") for k in known if k not in VARYING], default=0.0)
    if isinstance(known, list):
        assert len(mine) == len(known), where
        return max(
            [compare(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(mine, known, strict=True))], default=0.0
        )
    if where.endswith(".logprob"):
        return abs(mine - known)
    assert mine == known, where
    return 0.0


@pytest.mark.parametrize(
    "name",
    [
        "generate_logprobs",
        "generate_logprobs_stream",
        "generate_stops_at_eos",
        "generate_multibyte",
        "generate_default_stop",
        "generate_raw",
        "chat_stream",
        "generate_missing_model",
        "generate_too_many_logprobs",
        "generate_think_unsupported",
        "show_missing",
        "delete_missing",
        "embed_unsupported",
        "create_unknown_blob",
        "blob_head_missing",
        "blob_digest_mismatch",
        "version",
        "ps",
    ],
)
def test_the_engine_answers_as_the_real_server_did(
    fake: FakeOllama, name: str, record_property: Callable[[str, object], None]
) -> None:
    entry = exchange(name)
    answer, known = ask(fake, entry["request"]), entry["response"]
    assert (answer.status_code, answer.headers.get("content-type", "")) == (known["status"], known["content_type"])
    mine = ndjson(answer) if "ndjson" in known else answer.json() if "json" in known else answer.text
    expected = known.get("ndjson", known.get("json", known.get("text")))
    worst = compare(drop_near_ties(mine, expected), expected)
    record_property("largest logprob difference", worst)
    assert worst < LOGPROB_TOLERANCE


def drop_near_ties(mine: Any, known: Any) -> Any:
    """Put alternatives whose logprobs differ by less than the tolerance into the recorded order."""
    entries = [(a, b) for a, b in zip(_entries(mine), _entries(known), strict=False)]
    for a, b in entries:
        order = [alternative["token"] for alternative in b["top_logprobs"]]
        a["top_logprobs"].sort(key=lambda x: order.index(x["token"]) if x["token"] in order else len(order))
    return mine


def _entries(answer: Any) -> list[dict[str, Any]]:
    chunks = answer if isinstance(answer, list) else [answer]
    return [entry for chunk in chunks if isinstance(chunk, dict) for entry in chunk.get("logprobs") or []]


@pytest.mark.parametrize("name", ["show", "show_verbose"])
def test_show_tells_what_the_real_server_told(fake: FakeOllama, name: str) -> None:
    entry = exchange(name)
    mine, known = ask(fake, entry["request"]).json(), entry["response"]["json"]
    assert list(mine) == list(known)
    assert mine["template"] == known["template"]
    assert mine["details"] == known["details"]
    assert mine["capabilities"] == known["capabilities"]
    assert mine["parameters"] == known["parameters"]
    assert mine["tensors"][0] == known["tensors"][0]
    mine_info, known_info = mine["model_info"], known["model_info"]
    assert {k for k in known_info if k.startswith(("tokenizer", "llama"))} <= set(mine_info)
    for key in set(known_info) & set(mine_info):
        assert mine_info[key] == known_info[key], key


def test_tags_tell_what_the_real_server_told(fake: FakeOllama) -> None:
    mine = httpx.get(fake.url + "/api/tags").json()["models"][0]
    known = next(m for m in exchange("tags")["response"]["json"]["models"] if m["name"] == "smollm2:135m")
    assert list(mine) == list(known)
    assert mine["details"] == known["details"]


def test_create_chat_and_delete_through_the_official_client(fake: FakeOllama, smollm2: Path) -> None:
    client = ollama.Client(host=fake.url, timeout=60)
    digest = client.create_blob(smollm2)
    assert httpx.head(f"{fake.url}/api/blobs/{digest}").status_code == 200
    template = exchange("show_thinking_model")["response"]["json"]["template"]
    steps = client.create(
        "thinker", files={"model.gguf": digest}, template=template, parameters={"temperature": 0}, stream=True
    )
    assert [step.status for step in steps][-1] == "success"
    try:
        assert "thinking" in (client.show("thinker").capabilities or [])
        seen = fake.asked("/api/chat")
        answer = client.chat("thinker", [{"role": "user", "content": "Hi"}], think=False, options={"num_predict": 4})
        assert answer.message.content
        assert answer.message.thinking is None
        assert len(fake.asked("/api/chat")) == len(seen) + 1
        with pytest.raises(ollama.ResponseError, match="quantization is only supported"):
            client.create("small", files={"model.gguf": digest}, quantize="q8_0")
    finally:
        client.delete("thinker")
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.show("thinker")


def test_posting_a_blob_that_is_there_breaks_the_connection_early(fake: FakeOllama) -> None:
    data = b"hello" * 1_000_000
    import hashlib

    path = f"{fake.url}/api/blobs/sha256:{hashlib.sha256(data).hexdigest()}"
    assert httpx.post(path, content=data).status_code == 201
    try:
        answer = httpx.post(path, content=data)
    except httpx.TransportError:
        return  # reset while sending: what the real server does
    assert answer.status_code == 200
    assert answer.headers["connection"] == "close"


def test_thinking_and_content_are_told_apart_in_any_chunks() -> None:
    from support.fake_answer import Answer

    text = "<think>\n⟨spatial⟩⟨a ball⟩\n</think>\nIt falls </the floor."
    for cut in range(1, len(text)):
        answer = object.__new__(Answer)
        answer.tags = ("<think>", "</think>")
        pieces = list(answer.split(iter([text[:cut], text[cut:]])))
        assert "".join(piece for kind, piece in pieces if kind == "thinking").rstrip() == "⟨spatial⟩⟨a ball⟩", cut
        assert "".join(piece for kind, piece in pieces if kind == "content") == "It falls </the floor.", cut


def test_timed_serves_so_many_at_once_in_the_given_time() -> None:
    body = {"model": "smollm2:135m", "stream": False, "logprobs": True, "top_logprobs": 20}
    with timed(slots=3, seconds=0.1) as server, ThreadPoolExecutor(9) as pool:
        start = time.perf_counter()
        answers = list(
            pool.map(
                lambda i: httpx.post(server.url + "/api/generate", json={**body, "prompt": f"p{i}"}).json(), range(9)
            )
        )
        seconds = time.perf_counter() - start
        again = httpx.post(server.url + "/api/generate", json={**body, "prompt": "p0"}).json()
    assert seconds >= 0.3  # three rounds, however slow this machine is
    assert len({answer["response"] for answer in answers}) == 9
    assert {k: v for k, v in again.items() if k not in VARYING} == {
        k: v for k, v in answers[0].items() if k not in VARYING
    }
    assert compare(answers[0]["logprobs"][0], exchange("generate_logprobs")["response"]["json"]["logprobs"][0]) == 0
    assert list(answers[0]) == list(exchange("generate_logprobs")["response"]["json"])


def test_failures_are_what_was_asked_for() -> None:
    body = {"model": "smollm2:135m", "prompt": "p", "stream": False, "logprobs": True, "top_logprobs": 2}
    with timed(slots=1, seconds=0.0) as server:
        server.fail("drop")
        server.fail("503")
        with pytest.raises(httpx.TransportError):
            httpx.post(server.url + "/api/generate", json=body)
        assert httpx.post(server.url + "/api/generate", json=body).status_code == 503
        assert "logprobs" in httpx.post(server.url + "/api/generate", json=body).json()
        server.old = True
        assert "logprobs" not in httpx.post(server.url + "/api/generate", json=body).json()
        assert len(server.asked("/api/generate")) == 4
