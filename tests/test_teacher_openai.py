"""`openai:MODEL`: llama.cpp's own server, and servers that refuse, hide or break what they are asked for."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from cli.main import dream
from distill.address import Address
from distill.config import RuntimeSettings, TeacherSettings
from distill.corpus.traces import TraceStore
from distill.errors import AnswerBroken, BadInput, ModelNotFound, TeacherError
from distill.events import Event
from distill.teacher import open_teacher
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.open_source import open_source
from distill.teacher.openai import OpenAIClient, OpenAITeacher
from distill.teacher.preview import PreviewTeacher
from distill.teacher.protocol import GenerateOptions
from distill.turns import joined

QUESTION = "What happens when you drop a ball?"


@pytest.fixture(scope="module")
def vocabulary(smollm2: Path) -> Vocabulary:
    return Vocabulary(open_source(smollm2).tokenizer)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[str]:
    """The address of llama.cpp's server."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(smollm2), {"smol"}
    params.n_ctx, params.n_parallel, params.port = 1024, 2, 0
    params.cpuparams.n_threads = 1
    server: Any = xllamacpp.Server(params)
    yield server.listening_address
    del server


def test_soft_targets_of_a_real_server_are_its_own(engine: str, smollm2: Path, tmp_path: Path) -> None:
    """llama.cpp says ids, too, which OpenAI's API knows nothing of: those found by text must be they."""
    settings = TeacherSettings(model="openai:smol", hosts=[Address(engine)], weights=str(smollm2))
    (teacher,) = open_teacher(settings)
    heard = teacher.generate("Repeat exactly: 日本語 😀 naïve", GenerateOptions(max_tokens=16, temperature=0))
    asked = {"messages": [{"role": "user", "content": "Repeat exactly: 日本語 😀 naïve"}], "max_tokens": 16}
    told = httpx.post(f"{engine}/v1/chat/completions", json={**asked, "temperature": 0, "logprobs": True}, timeout=60)
    choice = told.json()["choices"][0]
    assert heard.tokens is not None
    ids = [entry["id"] for entry in choice["logprobs"]["content"]]
    assert heard.text == choice["message"]["content"]
    assert heard.tokens.ids.tolist()[: len(ids)] == ids
    assert heard.tokens.soft[: len(ids)].all()
    best = heard.tokens.top_logprobs[heard.tokens.soft][:, 0]
    assert np.allclose(best, heard.tokens.logprobs[heard.tokens.soft])  # greedy
    mass = np.exp(heard.tokens.top_logprobs[heard.tokens.soft].astype(float)).sum(axis=1)
    assert (mass > 0.4).all()
    assert (mass < 1.001).all()
    teacher.close()
    (tmp_path / "questions.txt").write_text(f"{QUESTION}\nWhat happens when it rains?\n", encoding="utf-8")
    where = ["--host", f"{engine}/v1", "--teacher-weights", str(smollm2), "--prompts", str(tmp_path / "questions.txt")]
    said = ["capture", str(tmp_path / "run"), "--teacher", "openai:smol", *where, "--set", "capture.max_tokens=12"]
    done = CliRunner().invoke(dream, said)
    assert done.exit_code == 0, done.output
    with TraceStore(tmp_path / "run" / "traces.db") as store:
        traces = list(store.traces())
    assert len(traces) == 2
    assert all(trace.response.tokens is not None and trace.response.tokens.soft.any() for trace in traces)


# Servers that are otherwise.


@contextmanager
def stub(say: Callable[[dict[str, Any]], tuple[int, Any]], models: Any = None) -> Iterator[str]:
    """A server that says of each body what `say` does: a status and JSON."""

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, content: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self) -> None:
            self._send(200, models or {"data": [{"id": "gpt"}, {"id": "gpt-mini"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["path"], body["key"] = self.path, self.headers.get("Authorization")
            self._send(*say(body))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(text: str, reason: str | None = "stop", **more: Any) -> tuple[int, Any]:
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": reason, **more}]}


def asker(
    url: str, vocabulary: Vocabulary | None = None, heard: list[Event] | None = None, weights: Path = Path()
) -> OpenAITeacher:
    client = OpenAIClient(url, retries=0)
    return OpenAITeacher("gpt", client, vocabulary, (heard if heard is not None else []).append, weights)


def test_what_a_server_refuses_is_left_out_and_said_once(vocabulary: Vocabulary) -> None:
    seen = list[dict[str, Any]]()

    def say(body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body)
        for key, why in (("max_tokens", "use max_completion_tokens"), ("logprobs", "unsupported"), ("seed", "unknown")):
            if key in body:
                return 400, {"error": {"message": f"{key}: {why}", "type": "invalid_request_error"}}
        return answer("It falls.", message={"reasoning_content": " Gravity. "})

    heard = list[Event]()
    with stub(say) as url:
        teacher = asker(url, vocabulary, heard)
        for _ in range(2):
            found = teacher.generate(QUESTION, GenerateOptions(max_tokens=9, system="Be brief."))
            assert (found.text, found.thinking, found.tokens) == ("It falls.", "Gravity.", None)
    assert [event.message.partition(": ")[2] for event in heard] == [
        "takes no logprobs for gpt; going on without (logprobs: unsupported)",
        "takes no seed for gpt; going on without (seed: unknown)",
        "its answers come without logprobs, or with some that don't spell them; those get hard labels only",
    ]
    assert [body.get("top_logprobs") for body in seen[1:6]] == [20, 10, 5, 2, 1]
    assert len(seen) == 9  # seven refusals, two answers
    assert seen[-1]["max_completion_tokens"] == 9
    assert [turn["role"] for turn in seen[-1]["messages"]] == ["system", "user"]
    assert not {"logprobs", "top_logprobs", "seed", "max_tokens"} & set(seen[-1])
    with stub(say) as url:
        talk = [("user", "Why?"), ("assistant", "So."), ("user", "Really?")]
        asker(url, vocabulary).generate(joined(talk), GenerateOptions(system="Be brief."))
    assert [(turn["role"], turn["content"]) for turn in seen[-1]["messages"]] == [("system", "Be brief."), *talk]


def test_tokens_are_named_by_their_bytes(vocabulary: Vocabulary) -> None:
    """Half characters are whole in `bytes`; thinking before the answer is left out; nonsense is a hard label."""

    def entry(text: str, printed: bytes | None, logprob: float, *top: tuple[str, float]) -> dict[str, Any]:
        others = [{"token": other, "bytes": list(other.encode()), "logprob": value} for other, value in top]
        told = {} if printed is None else {"bytes": list(printed)}
        return {"token": text, "logprob": logprob, "top_logprobs": others, **told}

    half = [vocabulary.bytes_of[i] for i in vocabulary.spell("日".encode())]
    assert len(half) > 1
    entries = [
        entry("Hmm", b"Hmm", -0.1),
        entry("It", b"It", -0.5, ("It", -0.5), ("<|im_end|>", -1.5)),
        *(entry("�", printed, -0.2) for printed in half),
        entry("", None, -0.1),
        entry(" falls", None, 3.0),
    ]
    with stub(lambda body: answer("It日 falls", logprobs={"content": entries})) as url:
        found = asker(url, vocabulary).generate(QUESTION, GenerateOptions())
    assert found.tokens is not None
    eos = vocabulary.tokenizer.eos_id
    assert vocabulary.decode(found.tokens.ids.tolist()[:-1]) == "It日 falls".encode()
    assert found.tokens.ids[-1] == eos
    assert found.tokens.soft.tolist() == [True] * (1 + len(half)) + [False, False]
    assert found.tokens.top_ids[0, :2].tolist() == [vocabulary.id_of(b"It"), eos]


def test_fewer_alternatives_are_better_than_none(vocabulary: Vocabulary) -> None:
    def say(body: dict[str, Any]) -> tuple[int, Any]:
        if body["top_logprobs"] > 5:
            return 422, {"detail": "top_logprobs: at most 5"}
        top = [{"token": "It", "bytes": [73, 116], "logprob": -0.5}]
        told = {"token": "It", "bytes": [73, 116], "logprob": -0.5, "top_logprobs": top}
        end = {"token": "<|im_end|>", "bytes": None, "logprob": -0.3, "top_logprobs": []}
        return answer("It", logprobs={"content": [told, end]})

    heard = list[Event]()
    with stub(say) as url:
        found = asker(url, vocabulary, heard).generate(QUESTION, GenerateOptions())
    assert found.tokens is not None
    assert found.tokens.soft.tolist() == [True, True]
    assert found.tokens.ids[-1] == vocabulary.tokenizer.eos_id
    assert not heard


def test_an_address_is_whole() -> None:
    with pytest.raises(BadInput, match="'gpu-box:8000': write the whole address"):
        open_teacher(TeacherSettings(model="openai:gpt", hosts=[Address("gpu-box:8000")]))


@pytest.mark.parametrize(
    ("reply", "error", "says"),
    [
        (answer("It", None), AnswerBroken, "breaks off"),
        ((200, {"choices": []}), TeacherError, "wouldn't say"),
        (answer("It", "stop", logprobs={"content": [{"token": "It", "logprob": "x"}]}), TeacherError, "wouldn't say"),
        ((400, {"error": {"message": "The model is gpt-seedless"}}), TeacherError, "gpt-seedless"),
        ((401, {"error": {"message": "Incorrect API key provided"}}), TeacherError, "Incorrect API key"),
        ((404, {"error": {"message": "model gpt not found"}}), ModelNotFound, "/v1/models lists"),
    ],
)
def test_what_is_no_answer_is_told_in_one_line(
    reply: tuple[int, Any], error: type[Exception], says: str, vocabulary: Vocabulary
) -> None:
    with stub(lambda body: reply) as url, pytest.raises(error, match=says) as raised:
        asker(url, vocabulary).generate(QUESTION, GenerateOptions())
    assert "\n" not in str(raised.value)


def test_the_key_goes_along_and_is_kept_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = list[str | None]()

    def say(body: dict[str, Any]) -> tuple[int, Any]:
        keys.append(body["key"])
        return answer("It falls.")

    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    (tmp_path / "questions.txt").write_text(QUESTION, encoding="utf-8")
    with stub(say) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        said = ["capture", str(tmp_path / "run"), "--prompts", str(tmp_path / "questions.txt"), "--teacher"]
        wrong = CliRunner().invoke(dream, [*said, "openai:gtp"])
        assert wrong.exit_code == 1
        assert "has no model 'gtp' (it lists: gpt" in str(wrong.exception)
        done = CliRunner().invoke(dream, [*said, "openai:gpt"])
    assert done.exit_code == 0, done.output
    assert "hard labels only (--teacher-weights names one)" in done.output
    assert keys == ["Bearer sk-hidden"]
    assert not any(b"sk-hidden" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("flag", "listed", "status", "said"),
    [
        ("--preview", True, 200, ["preview", "preview"]),
        ("--preview", True, 429, ["later", "later"]),
        ("--preview", True, 403, ["later", "later"]),
        ("--preview", False, 200, ["later", "later"]),
        ("--no-preview", True, 200, ["later", "later"]),
    ],
)
def test_a_preview_has_a_fallback(flag: str, listed: bool, status: int, said: list[str], tmp_path: Path) -> None:
    """Each answer tells whose it is; a preview that can't is asked once, and then left alone for a while."""
    asked = list[str]()

    def say(body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(body["model"])
        if body["model"] == "preview" and status != 200:
            return status, {"error": {"message": "not now"}}
        return answer(f"{body['model']} says that it falls.")

    (tmp_path / "questions.txt").write_text(f"{QUESTION}\nWhat happens when it rains?\n", encoding="utf-8")
    names = ["later", "preview"][: 1 + listed]
    with stub(say, {"data": [{"id": name} for name in names]}) as url:
        where = ["--base-url", url, "--prompts", str(tmp_path / "questions.txt"), "--set", "teacher.in_flight=1"]
        models = ["--set", "runtime.preview_model=preview", "--set", "runtime.fallback_model=later"]
        command = ["capture", str(tmp_path / "run"), *where, *models, flag, "--teacher"]
        wrong = CliRunner().invoke(dream, [*command, "openai:later"])
        assert "--no-preview: is for --teacher openai:preview, not openai:later" in str(wrong.exception)
        done = CliRunner().invoke(dream, [*command, "openai:preview"])
        assert done.exit_code == 0, done.output
        assert done.output.count("later answers in its place") == (said[0] == "later" and flag == "--preview")
        assert asked.count("preview") == (2 if said[0] == "preview" else listed and flag == "--preview")
        again = CliRunner().invoke(dream, [*command, "openai:preview", "--no-preview", "--set", "capture.max_tokens=9"])
        assert again.exit_code == 0, again.output  # of the same run
    with TraceStore(tmp_path / "run" / "traces.db") as store:
        assert [trace.response.model for trace in store.traces()] == ["later", "later"]
        kept = [json.loads(row[0])["model"] for row in store._db.execute("SELECT timings FROM responses")]  # pyright: ignore[reportPrivateUsage]
        assert sorted(kept) == sorted([*said, "later", "later"])
        assert store.teacher().spec == "openai:preview"


def test_a_session_switches_its_preview() -> None:
    with stub(lambda body: answer(body["model"])) as url:
        settings = TeacherSettings(model="openai:gpt", hosts=[Address(url)])
        runtime = RuntimeSettings(preview_model="gpt", fallback_model="gpt-mini")
        ours, theirs = (open_teacher(settings, runtime=runtime)[0] for _ in range(2))
        assert isinstance(ours, PreviewTeacher)
        ours.preview = False
        assert [who.generate(QUESTION, GenerateOptions()).model for who in (ours, theirs)] == ["gpt-mini", "gpt"]
        ours.preview = True
        assert ours.generate(QUESTION, GenerateOptions()).text == "gpt"


def test_answers_keep_to_a_schema_where_the_server_can(engine: str) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    teacher = OpenAITeacher("smol", OpenAIClient(f"{engine}/v1"), None)
    assert json.loads(teacher.generate_json("Say 7.", schema, GenerateOptions(max_tokens=20))) == {"n": 7}
