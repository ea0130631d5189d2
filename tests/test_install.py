"""Installing into Ollama's API, answered by llama.cpp behind Ollama's wire format."""

import shutil
import socket
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import ollama
import pytest
import torch
from support.fake_ollama import FakeOllama, engine
from support.small_student import ANSWER, DREAM, dreaming_model, small_model, small_tokenizer

from bundle.export import Origin, write_bundle
from bundle.gguf import write_gguf
from bundle.install import install
from bundle.load import Student, load_student
from bundle.manifest import read_manifest, write_manifest
from bundle.verify import verify
from distill.config import ExportSettings
from distill.errors import BadInput, CorruptFile, DistillError, TeacherError, TeacherUnavailable
from distill.events import Event
from distill.teacher.licenses import License
from distill.tokens.bpe import GgufVocabulary, StudentTokenizer

PROMPTS = ["What happens when you drop a ball?", "How do plants grow in the garden?"]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> StudentTokenizer:
    return small_tokenizer(smollm2)


@pytest.fixture(scope="module")
def published(tokenizer: StudentTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a student that learned to dream. Don't alter it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    student = Student("tiny", dreaming_model(tokenizer, PROMPTS), tokenizer)
    answers = [[prompt, ANSWER] for prompt in PROMPTS]
    origin = Origin("tiny", {"began_as": "teacher"}, None, PROMPTS, answers, license=License("mit", text="MIT License"))
    write_bundle(folder, student, ExportSettings(temperature=0.0), origin)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


@pytest.fixture
def server() -> Generator[FakeOllama]:
    with engine({}) as running:
        yield running


def blobs(server: FakeOllama) -> list[str]:
    """Methods of the requests about blobs, in order."""
    return [request.method for request in server.requests if request.path.startswith("/api/blobs/")]


def test_an_installed_student_dreams_and_is_told_not_to(published: Path, server: FakeOllama) -> None:
    events: list[Event] = []
    done = install(published, host=server.url, listen=events.append)
    assert (done["model"], done["prompt"]) == ("tiny", PROMPTS[0])
    assert "thinking" in done["capabilities"]
    assert (done["thinking"], done["answer"]) == (DREAM, ANSWER)
    assert blobs(server) == ["HEAD", "POST"]
    assert [event.message for event in events if event.kind == "note"][-1] == "Ollama: success"
    assert [event.done for event in events if event.kind == "progress"] == [
        0,
        (published / "model.gguf").stat().st_size,
    ]

    client = ollama.Client(host=server.url)
    question = [{"role": "user", "content": PROMPTS[1]}]
    for think, dream in ((True, DREAM), (False, ""), (None, DREAM)):
        message = client.chat("tiny", question, think=think).message
        assert ((message.thinking or "").strip(), message.content) == (dream, ANSWER)
    created = server.asked("/api/create")[0]
    assert created["license"] == "MIT License\n"
    assert created["parameters"] == {"stop": ["<|im_end|>"], "temperature": 0.0, "num_ctx": 256}

    report = verify(published, ollama_host=server.url)
    assert report.ok
    assert report.rows()[-2:] == [
        ("prompt ids, Ollama tiny", "ok", "10 of 10 identical"),
        ("greedy text, Ollama tiny", "ok", "2 of 2 prompts identical"),
    ]


def test_prompts_that_an_ollama_reads_with_other_ids_are_told(
    published: Path, server: FakeOllama, tokenizer: StudentTokenizer, copy: Path
) -> None:
    """As after importing the folder's safetensors, where the tokenizer's way of splitting words isn't known."""

    class Drifted(StudentTokenizer):
        def gguf(self) -> GgufVocabulary:
            whole = super().gguf()
            return replace(whole, merges=[merge for merge in whole.merges if merge != "Ġb all"])

    model = load_student(published).model
    drifted = Drifted(tokenizer.hf, tokenizer.origin)
    write_gguf(model.state_dict(), model.config, drifted, copy / "model.gguf", "f16")
    write_manifest(copy, read_manifest(copy))
    install(copy, "folder", server.url)
    report = verify(published, ollama_host=server.url, model="folder")
    assert not report.ok
    assert f"prompt ids, Ollama folder: 8 of 10 identical; other ids for {PROMPTS[0]!r}" in report.summary


def test_a_name_is_taken_only_by_force_and_a_blob_sent_once(published: Path, server: FakeOllama) -> None:
    install(published, "first", server.url)
    with pytest.raises(BadInput, match=r"first: is in Ollama at .* --force"):
        install(published, "first", server.url)
    assert blobs(server) == ["HEAD", "POST"]
    install(published, "first", server.url, force=True)
    install(published, "second", server.url, quantize="q8_0")
    assert blobs(server) == ["HEAD", "POST", "HEAD", "HEAD"]
    assert server.asked("/api/create")[-1]["quantize"] == "q8_0"


def test_a_name_that_ollama_refuses_is_told_one_that_would_do(published: Path, server: FakeOllama) -> None:
    with pytest.raises(BadInput, match=r"my run!: Ollama takes no such name for a model; --name my-run would do"):
        install(published, "my run!", server.url)
    assert server.requests == []
    assert install(published, "my-run", server.url)["model"] == "my-run"


def test_another_model_of_that_name_is_not_taken_for_the_student(
    published: Path, server: FakeOllama, tokenizer: StudentTokenizer, tmp_path: Path
) -> None:
    stranger = Student("tiny", small_model(tokenizer, seed=9), tokenizer)
    write_bundle(tmp_path / "other", stranger, ExportSettings(), Origin("tiny", verification_prompts=PROMPTS))
    install(tmp_path / "other", host=server.url)
    report = verify(published, ollama_host=server.url, model="tiny")
    assert not report.ok
    assert report.summary == "greedy text, Ollama tiny: 0 of 2 prompts identical"
    assert "not found" in verify(published, ollama_host=server.url, model="nobody").summary


def test_a_template_without_thinking_is_found_out(copy: Path, server: FakeOllama) -> None:
    manifest = read_manifest(copy)
    plain = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    write_manifest(copy, replace(manifest, ollama={**manifest.ollama, "template": plain}))
    with pytest.raises(DistillError, match="doesn't see that it thinks"):
        install(copy, host=server.url)


def test_what_cannot_be_installed_is_one_line(copy: Path, server: FakeOllama) -> None:
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, dtype="q8_0"))
    with pytest.raises(BadInput, match="can't quantize a q8_0"):
        install(copy, host=server.url, quantize="q4_K_M")
    (copy / "model.gguf").write_bytes(b"no GGUF")
    with pytest.raises(CorruptFile, match=r"model\.gguf"):
        install(copy, host=server.url)
    write_manifest(copy, manifest)
    with pytest.raises(TeacherError, match="supplied file was not in GGUF format") as raised:
        install(copy, host=server.url)
    assert "\n" not in str(raised.value)
    with pytest.raises(BadInput, match="no bundle"):
        install(copy / "nowhere", host=server.url)


def test_no_ollama_and_a_broken_connection_are_said(published: Path, server: FakeOllama) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TeacherUnavailable, match="ollama serve"):
        install(published, host=host)
    server.fail("drop", path="/api/create")
    with pytest.raises(TeacherUnavailable, match="the connection broke"):
        install(published, host=server.url)
    assert not verify(published, ollama_host=host).ok
