"""Examinations: what is kept of them, that a killed one goes on to the same numbers, and what is missing and why."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_examinee import FakeExaminee, Killed, fake_exam, score_of

from distill.config import EvaluateSettings, MineSettings, Settings, TeacherSettings
from distill.errors import BadInput, CorruptFile, DistillError
from distill.events import Event
from distill.exam import examine as examination
from distill.exam.examine import (
    dream_tokens_of,
    examine,
    safe_name,
    teacher_measured,
)
from distill.exam.examinees.protocol import PASSING
from distill.exam.measured import IN_WORDS, KNOWN, Measured, spread_over
from distill.exam.metrics.catalogue import METRICS
from distill.exam.metrics.statistics import Ratio
from distill.exam.metrics.text import chrf
from distill.exam.questions import Exam
from distill.exam.targets import How, Target
from distill.journal import Journal
from distill.report.doubts import cut_short
from distill.report.measure import Measurement
from distill.run import Run
from distill.teacher.protocol import TeacherTokenizer, TokenTargets

SETTINGS = EvaluateSettings(dreams=2, max_tokens=8, temperature=0.7)
Seat = Callable[..., FakeExaminee]


@pytest.fixture
def target(tmp_path: Path) -> Target:
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"weights")
    return Target("fake.gguf", "gguf", path)


@pytest.fixture
def seat(monkeypatch: pytest.MonkeyPatch) -> Seat:
    """Whoever is opened from now on, in chunks of three."""
    monkeypatch.setattr(examination, "CHUNK", 3)

    def place(**how: Any) -> FakeExaminee:
        examinee = FakeExaminee(**how)
        monkeypatch.setattr(examination, "open_examinee", lambda target, how: examinee)
        return examinee

    return place


def plain(measured: Measured) -> Any:
    metrics = {name: [m.numerator.tolist(), m.denominator.tolist()] for name, m in measured.metrics.items()}
    return json.loads(json.dumps({**vars(measured), "metrics": metrics, "card": vars(measured.card)}))


def journal_of(exam: Exam) -> Path:
    (path,) = exam.folder.glob("*/journal.jsonl")
    return path


def test_killed_at_any_chunk_it_goes_on_to_the_same_numbers(tmp_path: Path, target: Target, seat: Seat) -> None:
    whole = seat()
    want = plain(examine(target, fake_exam(tmp_path / "whole"), SETTINGS))
    asked = len(whole.calls)
    assert asked == 6 * 3  # none, own-1, own-2, mined, answers and greedy, three chunks each
    for dies_at in range(asked):
        exam = fake_exam(tmp_path / f"killed-{dies_at}")
        first = seat(dies_at=dies_at)
        with pytest.raises(Killed):
            examine(target, exam, SETTINGS)
        assert first.closed == 1
        second = seat()
        assert plain(examine(target, exam, SETTINGS)) == want
        assert first.calls + second.calls == whole.calls  # nothing is asked twice


def test_a_broken_tail_is_discarded_wherever_it_broke(tmp_path: Path, target: Target, seat: Seat) -> None:
    exam = fake_exam(tmp_path / "exam", size=4)
    seat()
    want = plain(examine(target, exam, SETTINGS))
    content = journal_of(exam).read_bytes()
    for end in range(0, len(content), 97):
        journal_of(exam).write_bytes(content[:end])
        examinee = seat()
        assert plain(examine(target, exam, SETTINGS)) == want
        assert journal_of(exam).read_bytes() == content
        lines = content[:end].count(b"\n")
        assert len(examinee.calls) == content.count(b"\n") - max(lines, 1)


def test_a_killed_process_loses_one_chunk_at_most(tmp_path: Path) -> None:
    """A real SIGKILL, in the middle of a phase."""
    program = """
import os, signal, sys
from pathlib import Path
from support.fake_examinee import FakeExaminee, fake_exam
from distill.config import EvaluateSettings, MineSettings, Settings
from distill.exam import examine as examination
from distill.exam.targets import Target

class Mortal(FakeExaminee):
    def score(self, questions, dream, draw=0):
        if len(self.calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(questions, dream, draw)

folder = Path(sys.argv[1])
(folder / "fake.gguf").write_bytes(b"weights")
examination.CHUNK = 3
examination.open_examinee = lambda target, how: Mortal()
target = Target("fake.gguf", "gguf", folder / "fake.gguf")
examination.examine(target, fake_exam(folder / "exam"), EvaluateSettings(dreams=2))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, cwd=Path(__file__).parent)
    assert done.returncode == -signal.SIGKILL
    lines = journal_of(fake_exam(tmp_path / "exam")).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 4
    assert [json.loads(line).get("phase") for line in lines] == [None, *["score-none"] * 3, "score-own-1"]


def test_what_is_known_by_heart_is_not_even_opened(
    tmp_path: Path, target: Target, seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    exam = fake_exam(tmp_path / "exam")
    seat()
    want = plain(examine(target, exam, SETTINGS))

    def refuse(target: Target, how: Any) -> FakeExaminee:
        raise AssertionError("opened again")

    monkeypatch.setattr(examination, "open_examinee", refuse)
    events: list[Event] = []
    assert plain(examine(target, exam, SETTINGS, listen=events.append)) == want
    assert events[-1].done == events[-1].total == 6 * 7
    # The intervals' resamples and the number of prompts wanted change nothing that is asked.
    assert plain(examine(target, exam, replace(SETTINGS, bootstrap=7, prompts=1))) == want


def test_no_speed_of_another_place_is_told(
    tmp_path: Path, target: Target, seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    exam = fake_exam(tmp_path / "exam")
    seat()
    here = examine(target, exam, SETTINGS)
    assert here.tokens_per_second
    again = seat()
    with monkeypatch.context() as patch:
        patch.setattr(examination, "place_of", lambda *_: "another")
        there = examine(target, exam, SETTINGS)
    assert there.tokens_per_second is None
    assert plain(replace(there, tokens_per_second=here.tokens_per_second)) == plain(here)
    lines = [json.loads(line) for line in journal_of(exam).read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps({k: v for k, v in line.items() if k != "where"}) + "\n" for line in lines)
    journal_of(exam).write_text(text, encoding="utf-8")
    assert plain(examine(target, exam, SETTINGS)) == plain(here), "an old journal doesn't tell"
    assert not again.calls


@pytest.mark.parametrize(
    "change", ["seed", "dreams", "temperature", "max_tokens", "weights", "exam", "force", "tokens"]
)
def test_whatever_the_numbers_depend_on_is_measured_anew(
    tmp_path: Path, target: Target, seat: Seat, change: str
) -> None:
    exam = fake_exam(tmp_path / "exam")
    seat()
    examine(target, exam, SETTINGS)
    again = seat()
    settings, options, seed = SETTINGS, dict[str, Any](), 0
    if change in ("dreams", "temperature", "max_tokens"):
        settings = replace(SETTINGS, **{change: 3})
    elif change == "seed":
        seed = 1
    elif change == "weights":
        assert target.path is not None
        target.path.write_bytes(b"others")
    elif change == "exam":
        exam = replace(exam, questions=[*exam.questions[:-1], replace(exam.questions[-1], text="rain")])
    elif change == "force":
        options["force"] = True
    else:
        options["dream_tokens"] = 10
    examine(target, exam, settings, seed, **options)
    assert len(again.calls) >= 6 * 3


def test_metrics_follow_from_the_scores(tmp_path: Path, target: Target, seat: Seat) -> None:
    """Against sums by hand, from the scores that the fake draws."""
    exam = fake_exam(tmp_path / "exam")
    seat()
    measured = examine(target, exam, SETTINGS)
    metrics = measured.metrics
    size = sum(len(question.text.encode()) for question in exam.questions)
    none = [score_of(question, "none", 0) for question in exam.questions]
    assert metrics["bits_per_byte"].value == pytest.approx(-sum(s.logprobs.sum() for s in none) / math.log(2) / size)
    soft = np.concatenate([score.kl for score in none])
    assert metrics["kl"].value == pytest.approx(float(np.nanmean(soft)))
    assert metrics["agreement"].value == pytest.approx(float(np.nanmean(np.concatenate([s.agrees for s in none]))))
    assert metrics["agreement_5"].value == pytest.approx(float(np.nanmean(np.concatenate([s.agrees_5 for s in none]))))
    own = [[score_of(question, "own", draw) for draw in (0, 1)] for question in exam.questions]
    marginal = [math.log(sum(math.exp(score.logprobs.sum()) for score in each) / 2) for each in own]
    assert metrics["bits_per_byte_dreams"].value == pytest.approx(-sum(marginal) / math.log(2) / size)
    mean = [np.mean([np.nansum(score.kl) for score in each]) for each in own]
    positions = sum(int(np.isfinite(each[0].kl).sum()) for each in own)
    assert metrics["kl_dreams"].value == pytest.approx(float(sum(mean)) / positions)
    assert measured.answer_tokens == sum(len(question.text.split()) for question in exam.questions)
    assert measured.tokens_per_second == pytest.approx(24 / 0.25)
    drawn = FakeExaminee().answer(exam.questions, think=True, temperature=0.7, max_tokens=8, draw=SETTINGS.dreams)
    assert metrics["malformed_dreams"].numerator.tolist() == [not each.form.dream for each in drawn]
    assert metrics["unclean_answers"].numerator.tolist() == [not each.form.clean for each in drawn]
    assert metrics["ended"].numerator.tolist() == [each.form.ended for each in drawn]
    assert metrics["broken_bytes"].value == 0
    said = FakeExaminee().answer(exam.questions, think=True, temperature=0.0, max_tokens=8, draw=0)
    hits = [q.truth is not None and q.truth.answer == each.answer for q, each in zip(exam.questions, said, strict=True)]
    assert metrics["exact_match"].numerator.tolist() == hits
    assert metrics["exact_match"].denominator.sum() == sum(question.truth is not None for question in exam.questions)
    assert {"exact_match_depth", "exact_match_familiar"} <= metrics.keys()


def test_measuring_twice_gives_the_same(tmp_path: Path, target: Target, seat: Seat) -> None:
    seat()
    one, two = (examine(target, fake_exam(tmp_path / name), SETTINGS) for name in "ab")
    assert plain(one) == plain(two)


def everything(measured: Measured) -> set[str]:
    return {*measured.metrics, *measured.missing} - {"exact_match", "exact_match_depth", "exact_match_familiar"}


def test_every_metric_is_there_or_says_why_it_is_missing(tmp_path: Path, target: Target, seat: Seat) -> None:
    seat()
    able = examine(target, fake_exam(tmp_path / "able"), SETTINGS)
    assert everything(able) == set(METRICS) - {"exact_match"}
    starts = ("concept_", "triplet_", "steering_", "bits_per_byte_sibling")
    assert set(able.missing) == {name for name in METRICS if name.startswith(starts)}
    assert "capture.samples" in able.missing["steering_chrf"]
    assert "dream tokenize" in able.missing["concept_similarity"]

    seat(cannot={"likelihood": "it only speaks", "targets": "it only speaks"}, dreams=False)
    speaker = examine(target, fake_exam(tmp_path / "speaker", truths=False), SETTINGS)
    assert everything(speaker) == set(METRICS) - {"exact_match"}
    said = {"repetition", "distinct_1", "distinct_2", "unclean_answers", "broken_bytes", "ended"}
    assert set(speaker.metrics) == said | {"chrf", "rouge_l", "length_ratio"}
    assert speaker.missing["bits_per_byte"] == speaker.missing["kl_oracle"] == "it only speaks"
    assert speaker.missing["malformed_dreams"] == speaker.missing["dream_recall"] == "it was not made to dream"

    seat(cannot={"dreams": "can't be dreamed for", "mined": "has no such words"})
    some = examine(target, fake_exam(tmp_path / "some"), SETTINGS)
    assert some.missing["bits_per_byte_dreams"] == some.missing["agreement_dreams"] == "can't be dreamed for"
    assert some.missing["kl_oracle"] == "has no such words"
    assert {"bits_per_byte", "kl", "malformed_dreams"} <= some.metrics.keys()

    seat()
    silent = examine(target, fake_exam(tmp_path / "silent", truths=False, answered=False), SETTINGS)
    assert set(silent.metrics) == said | {"malformed_dreams", "tokens_dreamed"}
    assert silent.missing["bits_per_byte"] == silent.missing["chrf"] == "nobody has answered these prompts"
    assert everything(silent) == set(METRICS) - {"exact_match"}

    seat()
    none = examine(target, fake_exam(tmp_path / "none"), replace(SETTINGS, dreams=0))
    assert none.missing["bits_per_byte_dreams"] == "evaluate.dreams is 0"


def test_steering_asks_whether_an_answer_follows_its_dream(tmp_path: Path, target: Target, seat: Seat) -> None:
    """By chrF: one that says what it read, against what sacrebleu makes of it; one that reads nothing has 0."""
    exam = fake_exam(tmp_path / "exam", truths=False, siblings=True)
    examinee = seat()
    found = examine(target, exam, SETTINGS)
    phases = [method for method, _ in examinee.calls[::3]]
    scored = ["score-none-0", "score-own-0", "score-own-1", "score-mined-0", "score-mined-0"]
    assert phases == [*scored, *["answer-0.7"] * 3]
    moved = found.metrics["steering_chrf"]
    told = [q.sibling is not None and bool(q.triplets) for q in exam.questions]
    assert moved.denominator.tolist() == [float(each) for each in told]
    for i, question in enumerate(exam.questions):
        if question.sibling is None or not question.triplets:
            continue
        one = " ".join(phrase for triplet in question.triplets for phrase in triplet.phrases)
        two, text, other = question.sibling.text, question.text, question.sibling.text
        near = chrf(one, text) - chrf(one, other) + chrf(two, other) - chrf(two, text)
        assert moved.numerator[i] == pytest.approx(near / 2)
    assert moved.value > 20
    after = found.metrics["bits_per_byte_sibling"]
    assert [bool(size) for size in after.denominator] == [q.sibling is not None for q in exam.questions]
    assert "dream tokenize" in found.missing["steering_concepts"]
    again = seat()
    assert plain(examine(target, exam, SETTINGS)) == plain(found)
    assert not again.calls, "kept in the journal"
    seat(reads=False)
    deaf = examine(target, replace(exam, folder=tmp_path / "deaf"), SETTINGS)
    assert deaf.metrics["steering_chrf"].value == pytest.approx(0)


def test_a_target_without_a_codebook_is_not_guessed_at(tmp_path: Path, target: Target, seat: Seat) -> None:
    seat(codebook=False)
    measured = examine(target, fake_exam(tmp_path / "exam"), SETTINGS)
    assert "ships no codebook" in measured.missing["dream_recall"]
    assert "malformed_dreams" in measured.metrics
    assert not [name for name in measured.metrics if name.startswith("dream_")]
    assert 0.5 < KNOWN <= 1


def test_one_that_thinks_in_words_has_no_dreams_to_measure(tmp_path: Path, target: Target, seat: Seat) -> None:
    class Thinker(FakeExaminee):
        def answer(self, questions: Any, **how: Any) -> Any:
            return [replace(said, dream="Let me think.") for said in super().answer(questions, **how)]

    for codebook in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(examination, "open_examinee", lambda *_, own=codebook: Thinker(codebook=own))
            measured = examine(target, fake_exam(tmp_path / f"exam-{codebook}"), SETTINGS)
        found = {name for name in measured.metrics if name.startswith("dream_")}
        why = {reason for name, reason in measured.missing.items() if name.startswith(("dream_", "malformed_"))}
        assert measured.cut_thinking == 0
        if codebook:  # it could have: that it did not is a result
            assert measured.metrics["dream_recall"].value == 0
        else:
            assert (found, why) == (set(), {IN_WORDS})


def test_who_was_cut_while_it_thought_is_told_of(tmp_path: Path, target: Target) -> None:
    class Cut(FakeExaminee):
        dream = "Let me think."

        def answer(self, questions: Any, **how: Any) -> Any:
            first, *others = (replace(said, dream=self.dream) for said in super().answer(questions, **how))
            form = replace(first.form, ended=False)
            return [replace(first, answer="", closed=False, form=form), *others]

    class Ours(Cut):
        dream = "⟨spatial⟩⟨a ball⟩"

    with pytest.MonkeyPatch.context() as patch:
        found: list[Measured] = []
        for kind in (Cut, Ours):
            patch.setattr(examination, "open_examinee", lambda *_, kind=kind: kind(codebook=False))
            found.append(examine(target, fake_exam(tmp_path / kind.__name__), SETTINGS))
    assert [each.cut_thinking for each in found] == [1, 0]
    (told,) = cut_short("thinker", found[:1])
    assert told == "thinker: 1 of 7 answers are empty, for it was still thinking when its tokens were spent."
    (told,) = cut_short("thinker", [replace(found[0], card=replace(found[0].card, kind="ollama"))])
    assert told.endswith("; raise teacher.thinking_tokens.")
    assert cut_short("ours", found[1:]) == []


def test_a_model_of_ollama_is_asked_anew_with_other_room_to_think(
    tmp_path: Path, target: Target, seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "digest", lambda self: "d")
    monkeypatch.setattr("distill.exam.examinees.ollama.thinks_in_words", lambda target, _: target.model == "x")
    thinker, other = (Target(f"ollama:{name}", "ollama", model=name) for name in "xy")
    for asked, anew in ((thinker, True), (other, False), (target, False)):
        exam = fake_exam(tmp_path / f"exam-{asked.name}")
        seat()
        examine(asked, exam, SETTINGS)
        again = seat()
        examine(asked, exam, SETTINGS, thinking_tokens=9)
        assert bool(again.calls) == anew


def test_evaluations_take_the_teachers_room_and_patience(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    hows: list[How] = []
    monkeypatch.setattr(examination, "open_examinee", lambda _, how: hows.append(how) or FakeExaminee())
    monkeypatch.setattr(
        "distill.report.measure.kept_cost", lambda _target, _exam, _settings, how, **_: hows.append(how)
    )
    settings = Settings(teacher=TeacherSettings(thinking_tokens=9, timeout=7))
    measurement = Measurement.of(fake_exam(tmp_path / "exam"), settings)
    measured, _ = measurement.measure({"s": [target]})
    measurement.results({"s": [target]}, measured, "s", cost=True)
    assert [(how.thinking_tokens, how.timeout) for how in hows] == [(9, 7)] * 2


def test_what_a_server_kept_from_it_is_measured_once_it_can_be(tmp_path: Path, target: Target, seat: Seat) -> None:
    exam, away = fake_exam(tmp_path / "exam"), {"mined": f"{PASSING}: no Ollama answers there"}
    seat(cannot=away)
    assert "no Ollama" in examine(target, exam, SETTINGS).missing["bits_per_byte_oracle"]
    still = seat(cannot=away)
    examine(target, exam, SETTINGS)
    assert not still.calls, "nothing is lost while it is away"
    back = seat()
    found = plain(examine(target, exam, SETTINGS))
    assert len(back.calls) == 6 * 3
    assert found == plain(examine(target, fake_exam(tmp_path / "other"), SETTINGS))


def test_soft_targets_that_came_later_are_measured(tmp_path: Path, target: Target, seat: Seat) -> None:
    words = TeacherTokenizer("gpt2", "default", ["a"], [], [1], 0)
    tokens = TokenTargets(*(np.zeros(shape) for shape in (1, 1, (1, 1), (1, 1), 1)))  # type: ignore[arg-type]
    soft = replace(fake_exam(tmp_path / "exam"), vocabulary=words)
    soft = replace(soft, questions=[replace(question, tokens=tokens) for question in soft.questions])
    hard = replace(soft, questions=[replace(soft.questions[0], tokens=None), *soft.questions[1:]])
    for exam, anew in ((hard, True), (soft, True), (soft, False)):
        examinee = seat()
        examine(target, exam, SETTINGS)
        assert bool(examinee.calls) == anew


def test_what_does_not_fit_is_undefined_in_every_metric(tmp_path: Path, target: Target, seat: Seat) -> None:
    exam = fake_exam(tmp_path / "exam")
    examinee = seat(too_long=frozenset({"k1", "k4"}))
    measured = examine(target, exam, SETTINGS)
    assert set(measured.left_out) == {"k1", "k4"}
    assert "does not fit its context of 512 tokens" in measured.left_out["k1"]
    assert all("k1" not in keys for _, keys in examinee.calls)
    assert measured.keys == [question.key for question in exam.questions]
    assert len(measured.answers) == len(measured.dreams) == 7
    assert measured.answers[1] == measured.dreams[4] == ""
    for ratio in measured.metrics.values():
        assert ratio.denominator[[1, 4]].tolist() == [0, 0]
        assert not ratio.numerator[[1, 4]].any()
    # The others' numbers are those of an exam without the two.
    fewer = replace(
        exam, questions=[q for q in exam.questions if q.key not in measured.left_out], folder=tmp_path / "b"
    )
    seat()
    for name, ratio in examine(target, fewer, SETTINGS).metrics.items():
        assert ratio.value == pytest.approx(measured.metrics[name].value, nan_ok=True)
    seat(too_long=frozenset(measured.keys))
    with pytest.raises(BadInput, match=r"fake\.gguf: none of the 7 .* raise student\.context"):
        examine(target, fake_exam(tmp_path / "none"), SETTINGS)


def test_phases_can_be_had_one_by_one(tmp_path: Path, target: Target, seat: Seat) -> None:
    exam = fake_exam(tmp_path / "exam")
    first = seat()
    start = examine(target, exam, SETTINGS, only=("score-none",))
    assert {name for name, _ in first.calls} == {"score-none-0"}
    assert set(start.metrics) == {"bits_per_byte", "kl", "agreement", "agreement_5"}
    assert start.answers == []
    second = seat()
    examine(target, exam, SETTINGS)
    assert "score-none-0" not in {name for name, _ in second.calls}


def test_all_have_the_limit_of_the_longest_dreams(tmp_path: Path) -> None:
    short, long = (Run.create(tmp_path / str(n), Settings(mine=MineSettings(steps=n))) for n in (2, 7))
    stranger = Target("ollama:tiny", "ollama", model="tiny")
    targets = [Target(run.name, "run", run.path, run=run) for run in (short, long)]
    assert dream_tokens_of(None) == dream_tokens_of(None, [stranger]) == 66
    assert dream_tokens_of(short) == dream_tokens_of(short, [stranger, targets[0]]) == 4 * 7 + 2
    assert dream_tokens_of(short, targets) == dream_tokens_of(None, targets) == 4 * 22 + 2
    long.record("mine", {"steps": 2}, {}, {}, 0.0)
    assert dream_tokens_of(long) == 4 * 7 + 2, "as it was made, whatever was set since"


@pytest.mark.parametrize("line", ['{"a": 1}', '{"phase": "score-none", "chunk": 0, "records": []}'])
def test_a_line_that_is_no_chunk_says_what_to_do(tmp_path: Path, target: Target, seat: Seat, line: str) -> None:
    exam = fake_exam(tmp_path / "exam")
    seat()
    examine(target, exam, SETTINGS)
    head, *_ = journal_of(exam).read_text(encoding="utf-8").splitlines()
    journal_of(exam).write_text(f"{head}\n{line}\n", encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"journal\.jsonl: can't be read .* delete it to examine anew"):
        examine(target, exam, SETTINGS)


@pytest.mark.parametrize("name", ["generation_config.json", "merges.txt", "spiece.model", "chat_template.jinja"])
def test_all_that_a_transformers_model_reads_is_in_its_digest(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    folder = Target("x", "transformers", tmp_path)
    before = folder.digest()
    (tmp_path / "README.md").write_text("read me", encoding="utf-8")
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"moments")
    assert folder.digest() == before
    (tmp_path / name).write_text("{}", encoding="utf-8")
    assert folder.digest() != before


@given(st.text(max_size=40))
def test_any_name_is_a_folder(name: str) -> None:
    found = safe_name(name)
    assert found
    assert "/" not in found
    assert not found.startswith(".")


def test_the_teachers_row_is_by_its_own_account(tmp_path: Path) -> None:
    teacher = teacher_measured(fake_exam(tmp_path))
    assert set(teacher.metrics) == {"repetition", "distinct_1", "distinct_2", "ended"}
    assert "no probabilities" in teacher.missing["bits_per_byte"]


@given(st.lists(st.integers(0, 9), unique=True, max_size=10).map(sorted))
def test_a_spread_metric_keeps_its_value(places: list[int]) -> None:
    ratio = Ratio(np.random.default_rng(len(places)).normal(size=len(places)), np.ones(len(places)))
    wide = spread_over(ratio, places, 10)
    assert wide.numerator.shape == (10,)
    if places:
        assert wide.value == pytest.approx(ratio.value)


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "a" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"a": "ü"})
        with pytest.raises(DistillError, match="another dream command is at the same work"):
            Journal(path)
    with Journal(path) as journal:
        assert journal.lines == [{"a": "ü"}]
    path.write_bytes(b'{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(CorruptFile, match=r"journal\.jsonl, line 2: is broken, and others follow it"):
        Journal(path)
    path.write_bytes(b'{"a": 1}\n{"b":')
    with Journal(path) as journal:
        assert journal.lines == [{"a": 1}]
    with Journal(path, force=True) as journal:
        assert journal.lines == []


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DistillError, match=r"file/journal\.jsonl: can't write it"):
        Journal(tmp_path / "file" / "journal.jsonl")
