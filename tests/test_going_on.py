"""A teacher that is handed the beginning of an answer goes on with it, whichever way it is asked."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import ollama
import pytest
from support.fake_ollama import engine
from test_teacher_openai import asker, stub
from test_teacher_openai import engine as llama_server  # noqa: F401  # pyright: ignore[reportUnusedImport]

from distill.address import Address
from distill.config import TeacherSettings
from distill.errors import BadInput, TeacherError
from distill.learning.consult import check
from distill.teacher import open_teacher
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.ollama import OllamaTeacher
from distill.teacher.open_source import open_source
from distill.teacher.protocol import GenerateOptions, Teacher

QUESTION = "What happens when you drop a ball?"
GREEDY = GenerateOptions(max_tokens=20, temperature=0, system="You answer in one short sentence.")
MUTE = "<|im_start|>user\nSay something.<|im_end|>\n<|im_start|>assistant\n"
"""A template that leaves the question out."""


@pytest.fixture(scope="module", params=["ollama", "openai", "embedded"])
def teacher(request: pytest.FixtureRequest, smollm2: Path) -> Generator[Teacher]:
    kind = str(request.param)
    if kind == "embedded":
        settings = TeacherSettings(model=f"embedded:{smollm2}", engine="llama.cpp", threads=1)
        (found,) = open_teacher(settings)
        yield found
        return found.close()
    if kind == "openai":
        url = request.getfixturevalue("llama_server")
        (found,) = open_teacher(TeacherSettings(model="openai:smol", hosts=[Address(url)], weights=str(smollm2)))
        yield found
        return found.close()
    with engine({"smol": smollm2}) as server:
        (found,) = open_teacher(TeacherSettings(model="ollama:smol", hosts=[Address(server.url)]))
        yield found
        found.close()


def test_it_goes_on_as_if_it_had_not_stopped(teacher: Teacher) -> None:
    teacher.describe()
    whole, words = teacher.generate(QUESTION, GREEDY), teacher.tokenizer()
    assert whole.tokens is not None
    assert words is not None
    text, ids = whole.text, whole.tokens.ids.tolist()
    count = next(n for n in range(len(ids) // 2, len(ids)) if Vocabulary(words).bytes_of[ids[n]].startswith(b" "))
    begun = Vocabulary(words).decode(ids[:count]).decode()
    rest = teacher.go_on(QUESTION, begun, replace(GREEDY, max_tokens=20 - count))
    assert rest.tokens is not None
    assert (begun + rest.text, rest.tokens.ids.tolist()) == (text, ids[count:])
    soft = rest.tokens.soft & whole.tokens.soft[count:]
    assert soft.sum() > 3
    assert rest.tokens.logprobs[soft] == pytest.approx(whole.tokens.logprobs[count:][soft], abs=0.02)
    check(teacher, QUESTION, GREEDY)


def test_one_that_reads_its_own_answer_otherwise_is_refused(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine({"smol": smollm2}) as server:
        found = OllamaTeacher("smol", host=Address(server.url))
        monkeypatch.setattr(found, "_frames", {GREEDY.system: ("", "<|im_end|>\n")})
        with pytest.raises(TeacherError, match=r"goes on with an answer of its own otherwise.* --teacher-weights"):
            check(found, QUESTION, GREEDY)
        client = ollama.Client(server.url)
        client.create("untold", files={"x.gguf": client.create_blob(smollm2)}, template=MUTE)
        untold = OllamaTeacher("untold", host=Address(server.url))
        with pytest.raises(TeacherError, match="doesn't tell what untold's template puts around a question"):
            untold.go_on(QUESTION, "It", GREEDY)


def test_lists_side_by_side_are_read_and_a_template_is_needed(smollm2: Path) -> None:
    """vLLM's way of telling logprobs; and a server whose weights nobody has."""
    vocabulary = Vocabulary(open_source(smollm2).tokenizer)
    told = {
        "tokens": [" falls", "."],
        "token_logprobs": [-0.1, -0.2],
        "top_logprobs": [{" falls": -0.1, " a": -3.0}, None],
    }
    seen = list[dict[str, object]]()

    def say(body: dict[str, object]) -> tuple[int, object]:
        seen.append(body)
        return 200, {"choices": [{"text": " falls.", "finish_reason": "length", "logprobs": told}]}

    with stub(say) as url:
        with pytest.raises(BadInput, match="nobody knows its chat template; name its GGUF with --teacher-weights"):
            asker(url).go_on(QUESTION, "It", GREEDY)
        found = asker(url, vocabulary, weights=smollm2).go_on(QUESTION, "It", GREEDY)
    assert found.tokens is not None
    assert [vocabulary.bytes_of[i] for i in found.tokens.top_ids[0, :2]] == [b" falls", b" a"]
    assert str(seen[0]["prompt"]).endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\nIt")
    assert (seen[0]["path"], seen[0]["logprobs"]) == ("/v1/completions", 20)
