"""Installing into Ollama's API, answered by llama.cpp behind Ollama's wire format, and giving bundles to others."""

import base64
import hashlib
import json
import shutil
import socket
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import ollama
import pytest
import torch
from click.testing import CliRunner
from support.fake_ollama import FakeOllama, Reply, Request, engine, error, reply, serve
from support.small_student import ANSWER, DREAM, dreaming_model, small_model, small_tokenizer

from bundle.export import Origin, write_bundle
from bundle.gguf import write_gguf
from bundle.install import install
from bundle.load import Student, load_student
from bundle.manifest import read_manifest, write_manifest
from bundle.push import push
from bundle.verify import verify
from cli import main as entry
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


def test_a_bundle_is_asked_for_by_a_name_that_ollama_takes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(copy, replace(read_manifest(copy), name="my run"))
    asked: list[str] = []
    monkeypatch.setattr("bundle.verify._Verification._ollama", lambda _, host, model, ours: asked.append(model))
    assert verify(copy, prompts=PROMPTS[:1], ollama_host="nowhere").ok
    assert asked == ["my-run"]


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


class Hub:
    """What the hub's library asks a hub for on its way to one commit."""

    state: FakeOllama | None = None

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        """Path → SHA-256 of what was committed."""
        self.large: dict[str, bytes] = {}
        self.made: list[dict[str, object]] = []
        self.full = False

    def knows_blob(self, path: str) -> bool:
        return False

    def close(self) -> None: ...

    def answer(self, request: Request) -> Reply:
        assert self.state
        page = f"{self.state.url}/ada/tiny"
        match request.path.rsplit("/", 1)[1]:
            case "create":
                self.made.append(request.json)
                return reply({"url": page})
            case "main" if "preupload" in request.path:
                modes = {True: {"uploadMode": "lfs"}, False: {"uploadMode": "regular"}}
                asked = [(file["path"], modes[file["size"] > 9999]) for file in request.json["files"]]
                return reply({"files": [{"path": path, **mode, "shouldIgnore": False} for path, mode in asked]})
            case "batch":
                urls = [(one, f"{self.state.url}/put/{one['oid']}") for one in request.json["objects"]]
                told = [{**one, "actions": {"upload": {"href": url}}} for one, url in urls]
                return reply({"transfer": "basic", "objects": told})
            case name if "/tree/" in request.path:
                return reply([{"type": "file", "path": path, "oid": "0", "size": 1} for path in self.files])
            case "main" if self.full:
                return error(403, "You have used up your storage")
            case "main":
                for line in map(json.loads, request.body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        self.files[value["path"]] = hashlib.sha256(base64.b64decode(value["content"])).hexdigest()
                    elif line["key"] == "deletedFile":
                        del self.files[value["path"]]
                    elif line["key"] == "lfsFile":
                        self.files[value["path"]] = hashlib.sha256(self.large[value["oid"]]).hexdigest()
                return reply({"commitUrl": f"{page}/commit/1", "commitOid": "1"})
            case name if request.method == "PUT":
                self.large[name] = request.body
                return Reply(200)
            case _:
                return reply({})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    fake = Hub()
    with serve(fake) as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # another protocol, in a library
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield fake


def test_the_hub_gets_the_bundle_and_nothing_beside_it(copy: Path, hub: Hub) -> None:
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    told = push(copy, "hf:ada/tiny", dry_run=True)
    assert (told["sent"], hub.made, told["license"]) == (False, [], "mit")
    done = push(copy, "hf:ada/tiny")
    wanted = {name: entry["sha256"] for name, entry in read_manifest(copy).files.items()}
    wanted["bundle.json"] = hashlib.sha256((copy / "bundle.json").read_bytes()).hexdigest()
    assert hub.files == wanted
    assert set(done["files"]) == set(wanted)
    assert done["url"].endswith("/ada/tiny")
    assert hub.large
    assert [one["visibility"] for one in hub.made] == ["private"]
    theirs = {"their-notes.md": "1", ".gitattributes": "2"}
    hub.files |= {"engine.safetensors": "0", "pictures/old.jpg": "0", **theirs}
    push(copy, "hf:ada/tiny")
    assert hub.files == wanted | theirs, "what the bundle before had besides is gone"


def test_what_the_hub_refuses_is_one_line(copy: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.full = True
    with pytest.raises(DistillError, match="used up your storage") as raised:
        push(copy, "hf:ada/tiny")
    assert "\n" not in str(raised.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DistillError, match="didn't take it"):
        push(copy, "hf:ada/tiny")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(BadInput, match="HF_TOKEN"):
        push(copy, "hf:ada/tiny")
    for wrong in ("ada/tiny", "hf:tiny", "hf:ada/tiny:1", "ollama:tiny"):
        with pytest.raises(BadInput, match="hf:USER/NAME"):
            push(copy, wrong)
    for how in ({"force": True}, {"quantize": "q8_0"}, {"host": "http://127.0.0.1:9"}):
        with pytest.raises(BadInput, match=r"--host, --quantize and --force are of ollama:USER/NAME alone"):
            push(copy, "hf:ada/tiny", **how)
    (copy / "model.gguf").write_bytes(b"no GGUF")
    with pytest.raises(CorruptFile, match=r"model\.gguf"):
        push(copy, "hf:ada/tiny")
    assert hub.files == {}


def test_ollama_pushes_what_was_installed_under_that_name(published: Path, server: FakeOllama) -> None:
    events: list[Event] = []
    dry = push(published, "ollama:ada/tiny", dry_run=True)
    assert dry["files"] == {"model.gguf": (published / "model.gguf").stat().st_size}
    assert "quantize" not in dry
    smaller = push(published, "ollama:ada/tiny", quantize="q8_0", dry_run=True)
    assert smaller == {**dry, "quantize": "q8_0"}, "of what size it will be is known to Ollama alone"
    how = ("--quantize", "q8_0", "--dry-run")
    told = CliRunner().invoke(entry.dream, ["push", str(published), "ollama:ada/tiny", *how])
    assert "MB before Ollama makes it q8_0\n" in told.output
    done = push(published, "ollama:ada/tiny", host=server.url, listen=events.append)
    assert done["url"] == "https://ollama.com/ada/tiny"
    size = (published / "model.gguf").stat().st_size
    sent = [(event.done, event.total) for event in events if (event.stage, event.kind) == ("push", "progress")]
    assert sent == [(0, size), (size, size)]
    assert [request.json for request in server.requests if request.path == "/api/push"] == [
        {"model": "ada/tiny", "stream": True}
    ]
    with pytest.raises(BadInput, match="is in Ollama"):
        push(published, "ollama:ada/tiny", host=server.url)
    with pytest.raises(BadInput, match="--public"):
        push(published, "ollama:ada/tiny", host=server.url, public=True)
