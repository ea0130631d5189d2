"""The whole way with an Ollama teacher and back into Ollama, as the README tells it, against the fake server."""

import json
from collections.abc import Generator
from pathlib import Path

import ollama
import pytest
from support.fake_ollama import FakeOllama, engine
from test_end_to_end import PROMPTS, SETTINGS, dream

from distill.corpus.traces import TraceStore
from distill.run import Run

MODEL = "smollm2:135m"


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Generator[FakeOllama]:
    with engine({MODEL: smollm2}) as running:
        yield running


@pytest.fixture(scope="module")
def folder(server: FakeOllama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `dream run` has asked the server."""
    folder = tmp_path_factory.mktemp("ollama")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (folder / "tiny.yaml").write_text(SETTINGS, encoding="utf-8")
    args = ["--teacher", f"ollama:{MODEL}", "--host", server.url, "--prompts", "prompts.txt", "--config", "tiny.yaml"]
    args += ["--name", "mine", "--steps", "120", "--set", "train.lr=8e-3"]
    dream(folder, "run", *args)
    return folder


def test_its_soft_targets_and_tokens_are_the_teachers(folder: Path, smollm2: Path) -> None:
    from distill.teacher.gguf_tokenizer import read_tokenizer

    run = Run.open(folder / "runs" / "mine")
    assert run.require("tokenize").summary["kind"] == "aligned"
    with TraceStore(run.traces, readonly=True) as store:
        assert store.tokenizer().tokens == read_tokenizer(smollm2).tokens  # type: ignore[union-attr]
        traces = list(store.traces())
        assert store.stats().bytes_per_token <= 90
    assert len(traces) == len(PROMPTS)
    for trace in traces:
        assert trace.response.tokens is not None
        assert trace.response.tokens.soft.mean() > 0.8
        assert (trace.response.tokens.top_ids[trace.response.tokens.soft] >= 0).mean() > 0.9


def test_the_student_dreams_in_ollama(folder: Path, server: FakeOllama) -> None:
    done = dream(folder, "install", "runs/mine", "--host", server.url, "--json")
    assert json.loads(done.stdout)
    client = ollama.Client(host=server.url, timeout=60)
    assert "thinking" in (client.show("mine").capabilities or [])
    messages = [{"role": "user", "content": "What happens when you drop a cup?"}]
    options = {"temperature": 0, "num_predict": 40}
    quiet = client.chat("mine", messages, think=False, options=options)
    assert not quiet.message.thinking
    loud = client.chat("mine", messages, think=True, options=options)
    assert (loud.message.thinking or "").startswith("⟨spatial⟩")


def test_verify_asks_ollama_too(folder: Path, server: FakeOllama) -> None:
    done = dream(folder, "verify", "runs/mine", "--host", server.url, "--ollama", "mine")
    assert "Ollama" in done.stdout


def test_a_model_that_is_not_there_is_named_with_its_neighbours(folder: Path, server: FakeOllama) -> None:
    args = ["--teacher", "ollama:smolm2:135m", "--host", server.url, "--prompts", "prompts.txt"]
    done = dream(folder, "capture", "other", *args, code=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "smolm2:135m" in line
    assert MODEL in line


def test_a_server_that_is_not_there_is_named_with_the_remedy(folder: Path) -> None:
    args = ["--teacher", f"ollama:{MODEL}", "--host", "http://127.0.0.1:9", "--prompts", "prompts.txt"]
    done = dream(folder, "capture", "nowhere", *args, "--set", "teacher.retries=0", code=1)
    assert "http://127.0.0.1:9" in done.stderr
    assert "ollama serve" in done.stderr
