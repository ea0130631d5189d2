"""Where a teacher's weights lie and whose they are: embedded, in an Ollama of this machine, or given."""

import hashlib
import json
import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_ollama import FakeOllama, engine, serve
from support.recorded import Replay, exchange
from support.small_student import small_model, small_tokenizer

from bundle.gguf import write_gguf
from cli.main import main
from distill.address import Address
from distill.config import CaptureSettings, Settings, TeacherSettings
from distill.corpus.capture import capture
from distill.errors import BadInput, CorruptFile
from distill.events import Event
from distill.run import Run, sha256_file
from distill.teacher.embedded import EmbeddedTeacher
from distill.teacher.find_weights import find_weights, license_of
from distill.teacher.gguf_tokenizer import read_tokenizer
from distill.teacher.licenses import License
from distill.teacher.ollama import OllamaTeacher
from distill.teacher.ollama_client import blob_of
from distill.teacher.protocol import TeacherInfo

MODEL = "smollm2:135m"
ELSE = "--teacher-weights FILE|DIR"


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as a GGUF in q4_0, of a licence with a name of its own. Don't alter it."""
    return tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", smollm2, "q4_0")


def tiny_gguf(path: Path, smollm2: Path, dtype: str, seed: int = 0, **sizes: int) -> Path:
    tokenizer = small_tokenizer(smollm2)
    model = small_model(tokenizer, seed, **sizes)
    about = {"general.name": "tiny", "general.license": "other", "general.license.name": "Tiny terms"}
    write_gguf(model.state_dict(), model.config, tokenizer, path, dtype, about)
    return path


def embedded(path: Path) -> TeacherInfo:
    """What capture keeps of an embedded teacher."""
    teacher = EmbeddedTeacher(str(path), threads=1, slots=1, context=64)
    try:
        return teacher.describe()
    finally:
        teacher.close()


@pytest.fixture
def server(tiny: Path) -> Generator[FakeOllama]:
    with engine({MODEL: tiny}) as running:
        yield running


def test_an_embedded_teacher_is_its_own_file(tiny: Path) -> None:
    settings = TeacherSettings(model=f"embedded:{tiny}")
    assert find_weights(settings).path == tiny
    answered = embedded(tiny)
    assert {"layers": 2, "hidden": 64, "architecture": "llama"}.items() <= answered.details.items()
    found = find_weights(settings, answered, read_tokenizer(tiny))
    assert (found.path, found.reason, str(found.license)) == (tiny, "", "Tiny terms")


def test_what_cannot_be_read_is_a_reason_with_a_way_out(tmp_path: Path, tiny: Path) -> None:
    found = find_weights(TeacherSettings(model=f"embedded:{tmp_path}/gone.gguf"))
    assert found.path is None
    assert found.reason.startswith(f"{tmp_path}/gone.gguf: ")
    assert ELSE in found.reason
    cut = tmp_path / "cut.gguf"
    for end in (2000, -100):  # within its description, and within its weights
        cut.write_bytes(tiny.read_bytes()[:end])
        found = find_weights(TeacherSettings(model=f"embedded:{cut}"))
        assert found.path is None
        assert found.reason.startswith(f"{cut}: ")
        assert found.reason.endswith(ELSE)
        assert "\n" not in found.reason
        with pytest.raises(CorruptFile, match=r"cut\.gguf: "):
            find_weights(TeacherSettings(weights=str(cut)))
    info = TeacherInfo("dataset:causal-world", "causal-world", "1", "", "1", False)
    assert "no model gave the answers" in find_weights(TeacherSettings(), info).reason


def test_ollamas_blob_is_found_where_it_runs(server: FakeOllama, tiny: Path) -> None:
    settings = TeacherSettings(model=f"ollama:{MODEL}", hosts=[server.url])
    teacher = OllamaTeacher(MODEL, host=server.url, retries=0)
    answered, tokenizer = teacher.describe(), teacher.tokenizer()
    for who in (None, answered):
        found = find_weights(settings, who, tokenizer)
        assert found.reason == ""
        assert found.path is not None
        assert found.path.name == f"sha256-{sha256_file(tiny)}"
        assert found.path.samefile(tiny)
    server.requests.clear()
    find_weights(settings, answered, tokenizer)
    assert not server.requests, "what is kept with the answers is enough"
    old = replace(answered, details={})  # traces of before the blob was kept
    assert find_weights(settings, old, tokenizer).path == found.path
    elsewhere = f"/usr/share/ollama/.ollama/models/blobs/{found.path.name}"  # told by another host
    theirs = replace(answered, details={**answered.details, "blob": elsewhere})
    assert find_weights(settings, theirs, tokenizer).path == found.path
    other = find_weights(settings, replace(old, digest="f" * 64), tokenizer)
    assert "another model has that name" in other.reason


def test_an_ollama_elsewhere_and_a_blob_that_is_not_here(server: FakeOllama) -> None:
    away = TeacherSettings(model=f"ollama:{MODEL}", hosts=["http://gpu-box:11434"])
    reason = find_weights(away).reason
    assert reason.startswith(f"ollama:{MODEL}: runs at http://gpu-box:11434")
    assert ELSE in reason
    settings = replace(away, hosts=[server.url])
    answered = OllamaTeacher(MODEL, host=server.url).describe()
    for blob, words in (
        (f"/nowhere/sha256-{'0' * 64}", "is not on this machine"),
        ("/nowhere/model.gguf", "no whole model"),
        ("", "what Ollama names is no whole model"),
    ):
        found = find_weights(settings, replace(answered, details={"blob": blob}))
        assert found.path is None
        assert words in found.reason
        assert ELSE in found.reason
    with serve(Replay([])) as silent:
        pass
    assert "no Ollama answers there" in find_weights(replace(settings, hosts=[silent.url])).reason


def test_a_blob_without_the_right_to_read_it_says_how_to_point_elsewhere(
    server: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = OllamaTeacher(MODEL, host=server.url).describe()
    real = Path.open

    def refused(path: Path, *how: Any) -> Any:
        if path.name.startswith("sha256-"):
            raise PermissionError(13, os.strerror(13), str(path))
        return real(path, *how)

    monkeypatch.setattr(Path, "open", refused)  # root, as whom tests may run, may read anything
    found = find_weights(TeacherSettings(model=f"ollama:{MODEL}", hosts=[server.url]), answered)
    assert found.path is None
    assert "can't be read (Permission denied)" in found.reason
    assert ELSE in found.reason


def test_the_recorded_modelfile_names_the_blob() -> None:
    show = exchange("show")["response"]["json"]
    digest = "941f309b54caaad6747569ba43712bcde44a2be3bae16c3282ff499c37c54af5"
    assert blob_of(show["modelfile"]) == f"/usr/share/ollama/.ollama/models/blobs/sha256-{digest}"
    sees = "# FROM llava\nFROM /m/sha256-1\nFROM /m/sha256-projector\nSYSTEM FROM here\n"
    assert blob_of(sees) == "/m/sha256-1"
    assert blob_of("FROM /m/sha256-1\nADAPTER /m/sha256-2\n") == ""
    assert blob_of("") == ""


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("http://127.0.0.1:11434", True),
        ("localhost:11434", True),
        (' "127.0.0.2" ', True),
        ("http://[::1]:1", True),
        ("0.0.0.0", True),
        (":11434", True),
        ("http://gpu-box:11434", False),
        ("192.168.1.7:11434", False),
    ],
)
def test_loopback_is_this_machine(host: str, here: bool) -> None:
    assert Address(host).is_loopback == here


# Given weights.


def test_given_weights_of_another_model_are_refused(tiny: Path, smollm2: Path, tmp_path: Path) -> None:
    answered, tokenizer = embedded(tiny), read_tokenizer(tiny)

    def given(path: Path) -> TeacherSettings:
        return TeacherSettings(model=f"embedded:{tiny}", weights=str(path))

    for path, words in (
        (smollm2, r"its vocabulary \(49152 tokens\) is not that of the teacher that answered \(435\)"),
        (tiny_gguf(tmp_path / "deep.gguf", smollm2, "q4_0", layers=3), r"layers 3, and embedded:.* has 2"),
        (tiny_gguf(tmp_path / "seed.gguf", smollm2, "q4_0", seed=1), r"is not the model that answered .*SHA-256"),
        (tmp_path / "gone.gguf", r"can't be read \(No such file"),
    ):
        with pytest.raises(BadInput, match=words) as raised:
            find_weights(given(path), answered, tokenizer)
        assert str(raised.value).startswith(f"{path}: ")
        assert "\n" not in str(raised.value)
    (tmp_path / "text.gguf").write_text("no model", encoding="utf-8")
    with pytest.raises(CorruptFile, match="is not a GGUF"):
        find_weights(given(tmp_path / "text.gguf"), answered, tokenizer)

    heard: list[Event] = []
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    assert find_weights(given(copy), answered, tokenizer, heard.append).path == copy
    assert not heard, "the same file"
    finer = tiny_gguf(tmp_path / "f16.gguf", smollm2, "f16")
    assert find_weights(given(finer), answered, tokenizer, heard.append).path == finer
    assert [event.message for event in heard] == [f"{finer}: taken for embedded:{tiny}; no digest tells whether it is"]


def test_given_weights_for_an_ollama_elsewhere_are_known_by_its_digest(tiny: Path, smollm2: Path) -> None:
    settings = TeacherSettings(model=f"ollama:{MODEL}", hosts=["http://gpu-box:1"], weights=str(tiny))
    kept = {"layers": 2, "hidden": 64, "file_type": 2, "blob": f"/there/sha256-{sha256_file(tiny)}"}
    answered = TeacherInfo(f"ollama:{MODEL}", MODEL, "d" * 64, "t", "ollama 0.33.0", True, kept)
    assert find_weights(settings, answered, read_tokenizer(tiny)).path == tiny
    other = replace(answered, details={**kept, "blob": f"/there/sha256-{'0' * 64}"})
    with pytest.raises(BadInput, match="SHA-256 000000000000"):
        find_weights(settings, other)


def test_capture_and_run_refuse_them_before_anything_is_asked(
    tiny: Path, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TeacherSettings(model=f"embedded:{tiny}", threads=1, weights=str(smollm2))
    run = Run.create(tmp_path / "run", Settings(teacher=settings, capture=CaptureSettings(limit=2)))
    with pytest.raises(BadInput, match="its vocabulary"):
        capture(run)
    assert not run.traces.exists()
    with pytest.raises(SystemExit) as ended:
        main(["run", "--name", str(tmp_path / "x"), "--teacher-weights", str(tmp_path / "gone"), "--quiet"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path / 'gone'}: the teacher's weights can't be read")
    assert not (tmp_path / "x").exists()


def test_a_path_of_given_weights_is_found_from_any_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli.runs import open_run

    monkeypatch.chdir(tiny.parent)
    run = open_run(tmp_path / "run", None, [], {"teacher.weights": tiny.name}, create=True)
    assert run.settings.teacher.weights == str(tiny)


# Whose they are.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "                                 Apache License\n                           Version 2.0, January 2004",
            "apache-2.0",
        ),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024", "llama3.2"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("**Llama 3.1 Version Release Date: July 23, 2024**\nLLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "llama3.1"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("Gemma Terms of Use \n\nLast modified: February 21, 2024", "gemma"),
        ("MIT License\n\nCopyright (c) Microsoft Corporation.", "mit"),
        ("Permission is hereby granted, free of charge, to any person", "mit"),
        ("Attribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("GNU GENERAL PUBLIC LICENSE\n  Version 3, 29 June 2007", "gpl-3.0"),
        ("Qwen RESEARCH LICENSE AGREEMENT", "qwen-research"),
        ("Wonderful Model Terms\nDo good.", "other"),
        ("  \n", ""),
    ],
)
def test_a_licence_is_known_by_its_first_lines(text: str, name: str) -> None:
    found = License.of_text(text)
    assert found.name == name
    assert found.text == text.strip()
    assert str(found) == {"other": "Wonderful Model Terms", "": "unknown"}.get(name, name)


def test_ollama_tells_the_licence_by_its_file_or_by_its_text() -> None:
    show = exchange("show")["response"]["json"]
    assert License.of_ollama(show) == License("apache-2.0")
    text = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nYou may…"
    assert License.of_ollama({"license": text}) == License("llama3.2", text=text)
    assert License.of_ollama({**show, "license": text}) == License("apache-2.0", text=text)
    assert License.of_ollama({"model_info": {"general.license": "other"}, "license": text}).name == "llama3.2"
    assert str(License.of_ollama({})) == "unknown"


def test_a_folder_tells_it_in_its_card_or_beside_it(tmp_path: Path) -> None:
    assert str(License.of_folder(tmp_path)) == "unknown"
    (tmp_path / "LICENSE").write_text("MIT License\n", encoding="utf-8")
    assert License.of_folder(tmp_path) == License("mit", text="MIT License")
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x\n---\n# Q\n", encoding="utf-8"
    )
    assert License.of_weights(tmp_path) == License("other", "qwen", "https://x", "MIT License")
    (tmp_path / "README.md").write_text("---\n: {\n---\n", encoding="utf-8")
    assert License.of_folder(tmp_path).name == "mit"


def test_what_was_told_when_it_answered_counts_and_old_traces_ask_the_file(tiny: Path, tmp_path: Path) -> None:
    settings = TeacherSettings(model=f"embedded:{tiny}")
    answered = embedded(tiny)
    told = json.loads(json.dumps(answered.details))["license"]
    assert License.from_json(told) == License("other", "Tiny terms")
    assert str(license_of(settings, replace(answered, details={}))) == "Tiny terms"
    assert str(license_of(settings, replace(answered, details={"license": {"name": "mit"}}))) == "mit"
    assert str(license_of(TeacherSettings(model="embedded:/gone.gguf"), None)) == "unknown"
    assert str(license_of(TeacherSettings(model="ollama:x", weights=str(tiny)), None)) == "Tiny terms"


def test_ollamas_licence_comes_with_the_answers(tiny: Path) -> None:
    with engine({}) as server:
        import ollama

        client = ollama.Client(host=server.url)
        digest = client.create_blob(tiny)
        assert digest == f"sha256:{hashlib.sha256(tiny.read_bytes()).hexdigest()}"
        client.create("mine", files={"tiny.gguf": digest}, license="Gemma Terms of Use\n\nLast modified")
        info = OllamaTeacher("mine", host=server.url).describe()
    assert info.details["license"]["text"].startswith("Gemma Terms")
    assert info.details["license"]["title"] == "Tiny terms"
