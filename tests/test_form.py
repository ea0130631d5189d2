"""`format` and `response_format`: answers that are JSON, and JSON of a schema, after dreams that are free."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from starlette.applications import Starlette
from support.served import asking, listening, post
from support.small_student import ANSWER, DREAM, TEXTS, small_model, small_tokenizer

from bundle.load import Student
from distill.serve.app import create_app
from distill.serve.fields import ApiError
from distill.serve.form import Forms, closed, schema_of
from distill.serve.shelf import Shelf
from distill.serve.student import Offer
from distill.student.grammar import ANSWER as ANSWERING
from distill.student.grammar import START, DreamGrammar
from distill.teacher.open_source import open_source
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.utf8 import after

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTION = TEXTS[0]
FALLS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "what": {"enum": ["a ball", "the rain", "naïve 🙂"]},
        "times": {"type": "integer", "minimum": 1, "maximum": 40},
        "sure": {"type": "boolean"},
        "why": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
    },
    "required": ["what", "times", "sure", "why"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> StudentTokenizer:
    return small_tokenizer(smollm2)


@pytest.fixture(scope="module")
def app(dreamer: Path, tokenizer: StudentTokenizer) -> Iterator[Starlette]:
    """`learned` learned its answer; `chance` says whatever comes."""
    learned = Student("learned", open_source(dreamer).backbone(256).eval(), tokenizer)
    chance = Student("chance", small_model(tokenizer), tokenizer, steps=1)
    shelf = Shelf([Offer(lambda: learned, True, 0.0), Offer(lambda: chance, True, 3.0)])
    yield create_app(shelf)
    shelf.close()


def ask(app: Starlette, model: str = "chance", seed: int = 0, **how: Any) -> dict[str, Any]:
    options = {"seed": seed, "top_k": 0, "top_p": 1.0}
    return post(
        app, "/api/generate", {"model": model, "prompt": QUESTION, "stream": False, "options": options, **how}
    ).json()


@pytest.mark.parametrize("seed", range(6))
def test_what_comes_by_chance_is_of_the_schema(app: Starlette, seed: int) -> None:
    for how in ({}, {"think": False}, {"raw": True}):
        told = ask(app, seed=seed, format=FALLS, **how)
        assert told["done_reason"] == "stop", told
        jsonschema.validate(json.loads(told["response"]), FALLS)
        assert not how or "thinking" not in told


def test_the_dream_stays_free(app: Starlette) -> None:
    body = {"model": "learned", "messages": [{"role": "user", "content": QUESTION}], "stream": False, "format": FALLS}
    message = post(app, "/api/chat", body | {"options": {"temperature": 0}}).json()["message"]
    assert message["thinking"] == DREAM
    jsonschema.validate(json.loads(message["content"]), FALLS)
    free = post(app, "/api/chat", body | {"format": "", "options": {"temperature": 0}}).json()["message"]
    assert free["content"] == ANSWER
    assert ask(app, format={"type": "object", "properties": {}})["response"] == "{}"


def test_objects_are_closed_unless_they_say_otherwise() -> None:
    inner: dict[str, Any] = {"properties": {"properties": {"type": "integer"}}}
    no_more = inner | {"additionalProperties": False}
    assert closed({"items": inner}) == {"items": no_more}
    assert closed({"anyOf": [inner, {"type": "null"}]}) == {"anyOf": [no_more, {"type": "null"}]}
    assert closed({"$defs": {"one": inner}}) == {"$defs": {"one": no_more}}
    for kept in (inner | {"additionalProperties": True}, {"allOf": [inner]}, {"type": "object"}, True, 3):
        assert closed(kept) == kept


def test_choices_beside_properties_can_be_held_to(tokenizer: StudentTokenizer) -> None:
    one, other, third = ({"properties": {name: {"type": "string"}}, "required": [name]} for name in "abc")
    choice = {"type": "object", **one, "anyOf": [other, third]}
    assert closed(choice) == choice
    assert not Forms(tokenizer).of(choice).error
    inner = {"properties": {"b": one}, "oneOf": [{"properties": {"c": one}}]}
    shut = one | {"additionalProperties": False}
    assert closed(inner) == {"properties": {"b": shut}, "oneOf": [{"properties": {"c": shut}}]}
    names = {"properties": {}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    assert closed(names) == names | {"additionalProperties": False}, "these name no others"


def test_json_begins_an_object_and_only_room_can_cut_it(app: Starlette) -> None:
    for seed in range(4):
        told = ask(app, seed=seed, format="json", think=False)
        assert told["response"].startswith("{")
        if told["done_reason"] == "stop":
            assert isinstance(json.loads(told["response"]), dict)


def test_who_else_asks_makes_no_difference(app: Starlette) -> None:
    import asyncio

    hows: list[dict[str, Any]] = [
        {},
        {"format": FALLS},
        {"raw": True},
        {"format": FALLS, "raw": True},
        {"format": "json"},
    ]
    bodies = [
        {
            "model": "chance",
            "prompt": f"{QUESTION} {i}",
            "stream": False,
            "options": {"seed": i, "num_predict": 30},
            **how,
        }
        for i, how in enumerate(2 * hows)
    ]

    async def run(asked: Any) -> tuple[list[str], list[str]]:
        alone = [(await asked.post("/api/generate", json=body)).json()["response"] for body in bodies]
        together = await asyncio.gather(*(asked.post("/api/generate", json=body) for body in bodies))
        return alone, [answer.json()["response"] for answer in together]

    alone, together = asking(app, run)
    assert alone == together


def test_the_mask_is_what_brute_force_finds(tokenizer: StudentTokenizer) -> None:
    """Of a few strings, a token may follow where it goes on with one of them, and the end where one is whole."""
    words = ["rain", "rains", "naïve 🙂", "a ball falls"]
    texts = [json.dumps(word, ensure_ascii=False).encode() for word in words]
    base, grammar = range(tokenizer.base_size), DreamGrammar(tokenizer, 1)
    for text in texts:
        form, said = Forms(tokenizer).of({"enum": words}), b""
        assert form.allowed(START) is None
        while True:
            wanted = {
                id
                for id in base
                if (part := tokenizer.token_bytes(id)) and any(t.startswith(said + part) for t in texts)
            }
            wanted |= {tokenizer.eos_id} if said in texts else set()
            lacking = after(said)  # of a character: it's still the answer, and the grammar allows all of it
            assert lacking is not None
            allowed = form.allowed(ANSWERING + lacking)
            assert allowed is not None
            found = set(allowed.nonzero()[0].tolist())
            logits, here = torch.zeros(1, tokenizer.vocab_size), torch.tensor([ANSWERING + lacking])
            assert bool(grammar.mask(logits, here)[0, allowed].isfinite().all())
            going_on = {t[len(said) : len(said) + 1] for t in texts if t.startswith(said)}
            # Where all of them go on alike, it may be in the student's own tokens alone.
            assert found == wanted if len(going_on) > 1 else found <= wanted, said
            if said == text:
                break
            token = max(
                (id for id in found if text.startswith(said + tokenizer.token_bytes(id))),
                key=lambda id: len(tokenizer.token_bytes(id)),
            )
            form.advance(token)
            said += tokenizer.token_bytes(token)
        assert form.error == ""


def test_openai_s_response_format(app: Starlette) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "falls", "strict": True, "schema": FALLS}}
    with listening(app) as url:
        by = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        told = by.chat.completions.create(model="chance", messages=messages, response_format=wanted, seed=1)
        jsonschema.validate(json.loads(told.choices[0].message.content or ""), FALLS)
        anything: Any = {"type": "json_object"}
        told = by.chat.completions.create(model="learned", messages=messages, response_format=anything, max_tokens=40)
        assert (told.choices[0].message.content or "").startswith("{")
        free = by.chat.completions.create(model="learned", messages=messages, response_format={"type": "text"})
        assert free.choices[0].message.content == ANSWER
        with pytest.raises(openai.BadRequestError, match=r"response_format\.type: is text"):
            by.chat.completions.create(model="chance", messages=messages, response_format={"type": "xml"})  # pyright: ignore


def test_what_can_t_be_held_to_is_refused(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(app, format="xml") == {"error": 'format: expected "json" or a valid JSON Schema object'}
    assert ask(app, format=3) == {"error": 'format: expected "json" or a valid JSON Schema object'}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    wrong: list[dict[str, Any]] = [
        {"type": "nonsense"},
        {"type": "object", "properties": 3},
        {"type": "array", "uniqueItems": True, "items": {"type": "string"}},
        {"$ref": "https://example.org/schema"},
        {"enum": []},
        {"type": "string", "pattern": "("},
        {"$ref": "#"},
        {"const": "\ud800"},
        {"minimum": -(10**30)},
        deep,
    ]
    for schema in wrong:
        refused = post(app, "/api/generate", {"model": "chance", "prompt": "x", "format": schema})
        assert refused.status_code == 400, (schema, refused.text)
        assert refused.json()["error"].startswith("format: "), schema
    with pytest.raises(ApiError):
        schema_of([])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "pip install" in ask(app, format="json")["error"]
