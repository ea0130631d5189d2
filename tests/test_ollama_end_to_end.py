"""The whole way with an Ollama teacher and back into Ollama, as the README tells it, against the fake server."""

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ollama
import pytest
from support.disturbed import WANTED, contents, disturb
from support.fake_ollama import FakeOllama, engine
from test_end_to_end import PROMPTS, SETTINGS, dream

from distill.corpus.traces import TraceStore
from distill.errors import RunMismatch, TeacherError
from distill.events import Event
from distill.learning.consult import JOURNAL
from distill.learning.polish import polish, undo
from distill.run import Run
from distill.training import checkpoint

MODEL = "smollm2:135m"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def _briefly() -> Generator[None]:
    """A teacher that is asked goes on for as long as in support/preloaded.py."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("consult.ON", "polish.ON", "consult.TRIAL"):
            patch.setattr(f"distill.learning.{name}", 8)
        yield


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


# Polishing by a teacher that is asked.


@pytest.fixture
def polishing(folder: Path, tmp_path: Path, server: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the run, to be polished in rounds of 2 answers, without the teacher's file."""
    copy = Path(shutil.copytree(folder / "runs" / "mine", tmp_path / "runs" / "mine"))
    run = Run.open(copy)
    monkeypatch.setattr(server, "afar", True)
    with TraceStore(run.traces, readonly=True) as store:
        Path(store.teacher().details["blob"]).unlink(missing_ok=True)
    settings = run.settings.polish
    settings.answers, settings.rounds, settings.lr = 2, 2, 1e-3
    run.settings.teacher.retries = 0
    server.requests.clear()
    return Run.create(copy, run.settings)


def raw(server: FakeOllama) -> list[str]:
    """What it was asked to go on with, but for the trial. Who was killed while it asked has no body."""
    return [body["prompt"] for body in server.asked("/api/generate") if body and body.get("raw")][1:]


def kept(run: Run) -> tuple[list[int], Counter[tuple[int, int]]]:
    """Rounds in the journal, and how often it has each answer."""
    _, *written = (run.checkpoints / JOURNAL).read_text(encoding="utf-8").splitlines()
    lines: list[dict[str, Any]] = list(map(json.loads, written))
    said = Counter((line["round"], line["place"]) for line in lines if "place" in line)
    return [line["round"] for line in lines if "begun" in line], said


def test_a_teacher_that_only_answers_polishes(polishing: Run, server: FakeOllama) -> None:
    place = polishing.path.parents[1]
    done = dream(place, "polish", "runs/mine", "--json")
    summary = json.loads(done.stdout)["summary"]
    assert "polish: asking the teacher to go on with what the student begins (" in done.stderr
    assert "is not on this machine" in done.stderr
    assert (summary["rounds"], summary["answers"]) == (2, 4)
    assert kept(polishing) == ([0, 1], Counter({(n, i): 1 for n in range(2) for i in range(2)}))
    assert len(raw(server)) == 4
    assert all(text.startswith("<|im_start|>user\nWhat happens") for text in raw(server))
    assert any(not text.endswith("assistant\n") for text in raw(server)), "it goes on with words of the student's"
    polishing.settings.polish.rounds = 3
    assert polish(polishing)["answers"] == 6
    assert kept(polishing)[0] == [0, 1, 2]
    assert len(raw(server)) == 4 + 1 + 2, "and one more trial"
    events: list[Event] = []
    polish(polishing, events.append)
    assert events[-1].message == "nothing changed: kept"
    polishing.settings.polish.lr = 2e-3
    with pytest.raises(RunMismatch, match="polished with other settings; --force begins again"):
        polish(polishing)
    assert undo(polishing) == 1
    assert not (polishing.checkpoints / JOURNAL).exists()


def test_a_teacher_goes_on_with_what_is_begun_of_prompts_that_it_never_answered(
    polishing: Run, tmp_path: Path, server: FakeOllama
) -> None:
    file = tmp_path / "further.txt"
    file.write_text("\n".join(f"What happens to ball {number}?" for number in range(60)), encoding="utf-8")
    settings = polishing.settings.polish
    settings.prompts, settings.rounds, settings.answers = [str(file)], 1, 6
    assert polish(polishing)["answers"] == 6
    assert len([text for text in raw(server) if "What happens to ball" in text]) > 2


@pytest.mark.timeout(3600)  # with DREAM_MOMENTS; else it takes seconds
def test_a_polishing_that_is_killed_asks_nothing_twice_and_learns_from_all(polishing: Run, server: FakeOllama) -> None:
    """What was in flight when it was killed aside: that was never heard. Then all of it once more, undisturbed and out
    of the journal alone: the same weights come out, so nothing was learned from twice, or left out."""
    wanted, draw = WANTED or 3, random.Random(0)
    place, total = polishing.path.parents[1], max(4, wanted)
    again = Path(shutil.copytree(polishing.path, place / "runs" / "again"))
    args = ["polish", "runs/mine", "--rounds", str(total)]
    codes = disturb(place, args, [draw.uniform(0.5, 2.5) for _ in range(wanted)], seed=0)
    said = (place / "output.txt").read_text(encoding="utf-8")
    assert codes[-1] == 0, said
    assert set(codes) <= {0, 143, -signal.SIGTERM, -signal.SIGKILL}, (codes, said)
    assert "Traceback" not in said
    rounds, answers = kept(polishing)
    assert rounds == list(range(total))
    assert answers == Counter({(n, i): 1 for n in rounds for i in range(2)})
    assert len(raw(server)) <= len(answers) + len(codes) * (1 + server.most_in_flight), "trials, and what wasn't heard"
    shutil.copy(polishing.checkpoints / JOURNAL, again / "checkpoints")
    server.requests.clear()
    run = Run.open(again)
    run.settings.polish.rounds = total
    polish(run)
    assert raw(server) == []
    ours, expected = (contents(path) for path in (polishing.path, again))
    weights = [name for name in ours if name.endswith(("model.safetensors", "optimizer.safetensors"))]
    assert {name: ours[name] for name in weights} == {name: expected[name] for name in weights}


def test_a_teacher_that_goes_leaves_what_it_said(polishing: Run, server: FakeOllama) -> None:
    def leave(event: Event) -> None:
        if event.kind == "progress" and event.done == 1 and "kl" in event.data:
            server.fail("drop", times=1000)

    polishing.settings.polish.rounds = 3
    with pytest.raises(TeacherError, match="what was answered is kept, the same command goes on from there"):
        polish(polishing, leave)
    server.failures.clear()
    before, there = kept(polishing)[1], checkpoint.of_stage(polishing, "polish")
    assert (len(there), min(before.values())) == (1, 1)
    server.requests.clear()
    assert polish(polishing)["answers"] == 6
    assert len(raw(server)) == 6 - len(before)


def test_one_without_logprobs_is_refused(polishing: Run, server: FakeOllama) -> None:
    server.old = True
    try:
        with pytest.raises(TeacherError, match=r"tells no logprobs, .*; polish with its weights: --teacher-weights"):
            polish(polishing)
    finally:
        server.old = False
    assert checkpoint.of_stage(polishing, "polish") == []


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
