"""Conversations and answers that were given: from a file of chats into traces, documents and exams."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from support.small_student import small_tokenizer

from cli.main import main
from distill.config import Settings, TrainSettings
from distill.corpus.capture import capture
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, RunMismatch
from distill.exam.questions import load_exam
from distill.run import Run
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.aligner import Aligner
from distill.tokens.packing import build_documents, split_traces
from distill.tokens.recall import Recall
from distill.turns import opening, turns
from tests.support.stub_teacher import StubTeacher

THINGS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("ball", "cup", "key", "coin", "book", "shoe")]


def chats() -> list[dict[str, object]]:
    said = [("system", "Be brief."), ("user", "What if I drop a {}?"), ("assistant", "The {} falls.")]
    said += [("user", "And then?"), ("assistant", "<think>\nit lies\n</think>\nYou pick the {} up.")]
    return [{"messages": [{"role": role, "content": text.format(thing)} for role, text in said]} for thing in THINGS]


def chat_run(tmp_path: Path, **how: object) -> Run:
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, chats())), encoding="utf-8")
    settings = Settings()
    settings.student.init = "chance"  # no weights are looked for
    settings.capture.prompts = [str(file)]
    settings.capture.system = "Be kind."
    settings.capture.held_out = 0.3
    for name, value in how.items():
        setattr(settings.capture, name, value)
    return Run.create(tmp_path / "run", settings)


def test_given_answers_become_hard_labels_after_their_turns(tmp_path: Path, smollm2: Path) -> None:
    run = chat_run(tmp_path, answers="given", turns="all")
    summary = capture(run)
    assert (summary["prompts"], summary["responses"], summary["empty"]) == (24, 24, 0)
    with TraceStore(run.traces, readonly=True) as store:
        traces = list(store.traces())
        assert store.teacher().is_given
        train, validation = split_traces(store)
    sides: dict[str, set[str]] = {}
    for side, some in (("train", train), ("validation", validation), ("out", [t for t in traces if t.held_out])):
        for trace in some:
            sides.setdefault(opening(trace.prompt), set()).add(side)
    assert len(sides) == len(THINGS)
    assert all(len(side) == 1 for side in sides.values()) or validation == train[:1]  # none is on two
    tokenizer = small_tokenizer(smollm2, [text for trace in traces for text in (trace.prompt, trace.response.text)])
    recall = Recall(TrainSettings(), 0, {}, {}, [])
    documents = build_documents(traces, {}, {}, tokenizer, Aligner(tokenizer, None), "Be kind.", recall, {})
    for i, trace in enumerate(traces):
        thing = next(thing for thing in THINGS if f"a {thing}?" in trace.prompt)
        head = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat if I drop a {thing}?<|im_end|>\n"
        later = f"<|im_start|>assistant\nThe {thing} falls.<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n"
        is_second = len(turns(trace.prompt)) == 4
        text = head + (later if is_second else "") + "<|im_start|>assistant\n"
        assert tokenizer.decode(documents.prompt(i).tolist()) == text
        said = f"You pick the {thing} up." if is_second else f"The {thing} falls."
        # What a loss is taken of: the last answer alone, without what was thought.
        assert tokenizer.decode(documents.answer(i).tolist()) == f"{said}<|im_end|>"
        assert trace.response.thinking == ("it lies" if is_second else "")
    assert np.isnan(documents.slot_logprobs[:, 0]).all()
    assert len(turns(load_exam(run).questions[0].prompt)) in (2, 4)


def test_given_answers_are_kept_once_and_altered_ones_taken_anew(tmp_path: Path) -> None:
    run = chat_run(tmp_path, answers="given")
    first = capture(run)
    assert capture(run) == first
    file = tmp_path / "chats.jsonl"
    rows = [*chats(), {"prompt": "Why?", "answer": "So."}, {"prompt": "Why?", "answer": "Thus."}]
    file.write_text("\n".join(map(json.dumps, rows)).replace("the red ball up", "it up"), encoding="utf-8")
    assert capture(run)["responses"] == len(THINGS) + 2
    with sqlite3.connect(run.traces) as db:
        (kept,) = db.execute("SELECT COUNT(*) FROM responses WHERE held_out IS NULL").fetchone()
        samples = db.execute("SELECT text, sample FROM responses WHERE prompt = 'Why?' ORDER BY sample").fetchall()
    assert (kept, samples) == (1, [("So.", 0), ("Thus.", 1)])
    run.settings.capture.answers = "teacher"
    with pytest.raises(RunMismatch, match="holds answers of given"):
        capture(run, teachers=[StubTeacher()])
    run.settings.capture.answers = "mine"
    with pytest.raises(BadInput, match=r"capture\.answers=mine: choose one of teacher, given"):
        capture(run)


def test_given_answers_are_taken_anew_for_another_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, digests = chat_run(tmp_path, answers="given"), set[str]()
    run.settings.student.init = "teacher"
    for name in ("", "a.gguf", "b.gguf"):
        words = TeacherTokenizer("gpt2", "", [name], [], [1], 0)
        monkeypatch.setattr("distill.corpus.given._words", lambda run, listen, words=words: words)
        run.settings.teacher.weights = name
        capture(run)
        digests.add(run.require("capture").outputs["traces.db"])
    assert len(digests) == 3
    monkeypatch.setattr(TraceStore, "content_digest", pressed)
    with pytest.raises(KeyboardInterrupt):
        capture(run, force=True)
    assert "capture" not in run.records(), "some of the answers are no capture"


def pressed(*_: object) -> str:
    """Ctrl-C."""
    raise KeyboardInterrupt


def test_a_teacher_is_asked_the_last_question_of_each(tmp_path: Path) -> None:
    teacher = StubTeacher()
    capture(chat_run(tmp_path), teachers=[teacher])
    assert len({*teacher.asked}) == len(THINGS)
    assert {tuple(role for role, _ in turns(prompt)) for prompt in teacher.asked} == {
        ("system", "user", "assistant", "user")
    }


def test_the_command_says_what_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*map(json.dumps, chats()), '{"messages": []}']
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    args = ["capture", "x", "--prompts", "chats.jsonl", "--answers", "given", "--set", "student.init=chance"]
    for command in (args, ["status", "x"]):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(command)
    shown = capsys.readouterr()
    assert "chats.jsonl:13: holds no prompt; its columns are messages" in shown.err
    assert "12 rows; asked is what stands in messages; answered in messages" in shown.err
    assert "given" in shown.out
