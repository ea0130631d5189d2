"""`dream watch`: a dream on a terminal, in a pipe, in files and as JSON; and how it ends when it is stopped."""

import json
import os
import pty
import re
import select
import shutil
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.disturbed import start

from bundle.load import recalling
from cli import main as entry
from distill.config import DreamingConfig
from distill.dream.record import DreamRecord
from distill.dream.view.lanes import LiveLanes
from distill.dream.view.records import winner
from distill.dream.view.viewer import DreamViewer
from distill.errors import BadInput, DistillError

PROMPT = "What happens when you drop a ball?"
CUT = "(cut: it didn't end within {} tokens, or within the context)\n"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained student and its engine: it dreams and answers, and means nothing by it."""
    from distill.dream.model import DreamingReasoningLLM

    folder = tmp_path_factory.mktemp("watch") / "student"
    with pytest.warns(UserWarning, match="untrained"):
        DreamingReasoningLLM(seed=3, device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`dream watch …` in this process → (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            entry.main(["watch", *map(str, args)])
        code = ended.value.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_into_a_pipe_go_lines_then_the_answer(call: Call, student: Path) -> None:
    code, out, err = call(student, PROMPT, "--max-tokens", 8, "--temperature", 0)
    assert (code, err) == (0, CUT.format(8))
    assert "\x1b" not in out
    dream, _, answer = out.partition("\n\n")
    lines = dream.splitlines()
    assert lines[0] == PROMPT
    assert [line.split(":")[0] for line in lines[-4:]] == ["spatial", "temporal", "causal", "abstract"]
    whole = json.loads(call(student, PROMPT, "--max-tokens", 8, "--temperature", 0, "--json")[1])
    record = DreamRecord.from_json(whole)
    assert answer.strip() == record.answer.strip()
    told = [line for line in lines if "⟨" in line]
    assert len(told) == sum(len(branch.steps) for branch in record.branches) > 0
    for branch in record.branches:
        own = [line for line in told if line.startswith(f"{branch.lens} ")]
        labels = [f"⟨{'⟩ ⟨'.join(slot.label for slot in step.slots)}⟩" for step in branch.steps]
        assert own == [f"{branch.lens} {t + 1}: {text}" for t, text in enumerate(labels)]
    best = winner(record)
    assert ("★ won" in dream) == (best is not None)


def test_quiet_is_the_answer_alone_and_a_seed_repeats_it(call: Call, student: Path) -> None:
    def answer(seed: int) -> str:
        code, out, err = call(student, PROMPT, "--quiet", "--max-tokens", 12, "--temperature", 1, "--seed", seed)
        assert (code, err) == (0, CUT.format(12))
        assert not out.startswith(PROMPT)
        return out

    first = answer(1)
    assert answer(1) == first
    assert answer(2) != first


def test_a_guide_begins_each_path(call: Call, student: Path) -> None:
    for dreamer in ("engine", "backbone"):
        code, out, _ = call(student, PROMPT, "--dreamer", dreamer, "--guide", "⟨a ball⟩", "--max-tokens", 4, "--json")
        assert code == 0
        record = json.loads(out)
        assert record["dreamer"] == dreamer
        begun = [branch["steps"][0]["what"]["label"] for branch in record["branches"] if branch["steps"]]
        assert set(begun) <= {"a ball"}
    code, out, err = call(student, PROMPT, "--guide", "⟨a bal⟩")
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert "a ball" in err
    assert err.count("\n") == 1


def test_a_dream_is_replaced_or_given_and_the_answer_follows(call: Call, student: Path) -> None:
    how = (student, PROMPT, "--max-tokens", 12, "--temperature", 1, "--dreamer", "backbone")
    own = DreamRecord.from_json(json.loads(call(*how, "--json")[1]))
    assert len(own.words) > 0
    again = DreamRecord.from_json(json.loads(call(*how, "--json", "--dream", own.dream)[1]))
    assert (again.answer, again.dreamer, again.dream) == (own.answer, "given", own.dream)
    code, out, _ = call(*how, "--replace", "1=⟨a ball⟩", "--replace", "3 drop")
    tokens = re.findall(r"⟨[^⟨⟩]*⟩", own.dream)
    first = tokens.index("⟨spatial⟩") + 1
    tokens[first], tokens[first + 2] = "⟨a ball⟩", "⟨drop⟩"
    given = call(*how, "--dream", "".join(tokens))
    assert code == 0
    dream, answer = out.split("\n\n", 1)
    assert given[1].split("\n\n", 1)[1] == answer, "replacing a token is giving the dream with it"
    assert f"spatial 1: ⟨a ball⟩ {tokens[first + 1]} ⟨drop⟩" in dream.splitlines()
    assert "[1] spatial" in answer
    assert f"1 ⟨a ball⟩  2 {tokens[first + 1]}  3 ⟨drop⟩" in answer
    none = call(*how, "--dream", "none", "--quiet")
    assert none[1] != call(*how, "--quiet")[1]
    for flags, says in [
        (("--replace", "3"), "as in 3=⟨water⟩"),
        (("--replace", "1=⟨a bal⟩"), "token 1: ⟨a bal⟩ is no image token; the nearest are ⟨a ball⟩"),
        (("--replace", "999=⟨a ball⟩"), "token 999: there is none to replace; the dream has the tokens 1 to"),
        (("--dream", "⟨causal⟩⟨spatial⟩"), "in the order ⟨spatial⟩⟨temporal⟩⟨causal⟩⟨abstract⟩"),
    ]:
        code, out, err = call(*how, *flags, "--quiet")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert says in err


def test_a_student_that_gives_images_is_watched_too(call: Call, student: Path, tmp_path: Path) -> None:
    from distill.dream.model import DreamingReasoningLLM

    model = DreamingReasoningLLM.load_pretrained(student, config=DreamingConfig(output_mode="both"), device="cpu")
    model.save_pretrained(tmp_path / "both")
    how = (PROMPT, "--quiet", "--max-tokens", 8)
    assert call(tmp_path / "both", *how) == call(student, *how)


def test_what_the_graph_knows_is_retrieved(call: Call, student: Path, tmp_path: Path) -> None:
    from distill.knowledge.graph import build_graph, save_graph
    from distill.knowledge.retrieval import WAYS
    from distill.mining.triplets import Triplet

    folder = Path(shutil.copytree(student, tmp_path / "knowing"))
    known = Triplet("a ball", "drop", "breaks", lens="causal", step=0, trace="t", sentence=0, miner="")
    save_graph(build_graph([known]), folder / "knowledge.graphml", 10)
    for way in WAYS:
        how = ("--quiet", "--max-tokens", 12, "--temperature", 1)
        told = call(folder, PROMPT, "--retrieve", way, *how)
        assert told == call(student, f"{PROMPT}\n⟨a ball⟩⟨drop⟩⟨breaks⟩", *how)
        assert told != call(student, PROMPT, *how)
    code, _, err = call(student, PROMPT, "--retrieve", "walk")
    assert code == 1
    assert "retrieve='walk': there is no knowledge graph; give a run that has one" in err
    with pytest.raises(BadInput, match=r"^there is no knowledge graph; give a run .* or retrieve nothing$"):
        recalling(student, "walk")


def test_dreams_are_exported(call: Call, student: Path, tmp_path: Path) -> None:
    names = ("dream.html", "dream.png", "dream.json")
    flags = [flag for name in names for flag in ("--export", tmp_path / name)]
    code, out, err = call(student, PROMPT, "--max-tokens", 4, "--json", *flags)
    assert code == 0
    assert err.splitlines() == [f"wrote {tmp_path / name}" for name in names]
    (record,) = DreamViewer.load(tmp_path / "dream.json").records
    assert record == DreamRecord.from_json(json.loads(out))
    assert (record.prompt, record.dreamer) == (PROMPT, "engine")
    page = (tmp_path / "dream.html").read_text(encoding="utf-8")
    assert page.count('class="node"') == sum(len(branch.steps) for branch in record.branches)
    assert Image.open(tmp_path / "dream.png").format == "PNG"
    (tmp_path / "file").touch()
    code, out, _ = call(student, PROMPT, "--max-tokens", 4, "--json", "--export", tmp_path / "file" / "dream.json")
    assert code == 1
    assert DreamRecord.from_json(json.loads(out)).prompt == PROMPT, "it is printed before"


def test_a_picture_that_fails_takes_nothing_else_along(
    call: Call, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise DistillError("the disk is full")

    monkeypatch.setattr("distill.dream.model.canvas", lambda path, *_: Path(path))
    monkeypatch.setattr("distill.dream.model.draw", fail)
    files = ("--export", tmp_path / "dream.json", "--picture", tmp_path / "x.png")
    code, out, err = call(student, PROMPT, "--max-tokens", 4, "--json", *files)
    assert code == 1
    assert err.splitlines() == [f"wrote {tmp_path / 'dream.json'}", "Error: the disk is full"]
    (record,) = DreamViewer.load(tmp_path / "dream.json").records
    assert record == DreamRecord.from_json(json.loads(out))


def test_what_cannot_be_done_is_one_line(call: Call, student: Path, tmp_path: Path) -> None:
    for args, says in [
        ((student, PROMPT, "--export", tmp_path / "dream.gif"), "choose one of json, png, html"),
        ((tmp_path / "nowhere", PROMPT), "nowhere"),
        ((tmp_path, PROMPT), str(tmp_path)),
    ]:
        code, out, err = call(*args)
        assert (code, out) == (1, "")
        assert says in err
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
    code, _, err = call(student, PROMPT, "--dreamer", "cat")
    assert code == 2
    assert "'cat' is not one of 'engine', 'checked', 'backbone'" in err


def test_ctrl_c_is_clean(call: Call, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[DreamRecord] = []

    def interrupted(self: LiveLanes, record: DreamRecord) -> None:
        drawn.append(record)
        if len(drawn) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LiveLanes, "draw", interrupted)
    code, _, err = call(student, PROMPT)
    assert code == entry.INTERRUPTED
    assert err.split() == ["Stopped."]
    assert len(drawn) == 2


def test_on_a_terminal_the_lanes_are_drawn_over_themselves(student: Path, tmp_path: Path) -> None:
    """A real pseudo-terminal, and a process of its own."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (30, 100))
    for number in "01":
        (tmp_path / number).symlink_to(os.ttyname(follower))
    process = start(tmp_path, ["watch", str(student), PROMPT, "--max-tokens", "8"], tmp_path)
    while not (tmp_path / "2").exists():  # opened last: it has the terminal
        assert process.exitcode is None
        time.sleep(0.01)
    os.close(follower)
    said = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            part = os.read(leader, 1 << 14)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not part:
            break
        said += part
    os.close(leader)
    process.join(30)
    assert process.exitcode == 0, (tmp_path / "2").read_text(encoding="utf-8")
    text = said.decode()
    frames = re.findall(r"\x1b\[\d+F", text)
    assert len(frames) >= 4  # five steps and the verdict, each over the one before
    assert "\x1b[1;36mspatial\x1b[0m" in text
    assert "│" in text
