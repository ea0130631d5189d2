"""`dream evaluate TARGET…` end to end: one student in every form that it can have, asked the same questions."""

import itertools
import json
import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import fake_ollama
from support.evaluation_run import trained_run
from support.fake_examinee import FakeExaminee, fake_exam

from bundle.export import export
from cli.main import dream
from distill.config import EvaluateSettings
from distill.errors import DistillError
from distill.events import Event
from distill.exam import cost
from distill.exam import examine as examination
from distill.exam.cost import Timed, kept_cost, measure_cost, summarize
from distill.exam.examinees.native import MASKED
from distill.exam.questions import Exam, Question, load_exam
from distill.exam.targets import How, Target, find_target
from distill.report.compare import compare
from distill.report.doubts import cautions
from distill.report.findings import missing_reasons
from distill.report.measure import Measurement
from distill.report.page import render_markdown
from distill.report.tables import metric_rows
from distill.run import Run
from distill.training.checkpoint import best

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, exported."""
    folder = tmp_path_factory.mktemp("runs")
    run = trained_run(folder / "soft")
    run.settings.evaluate.prompts, run.settings.evaluate.dreams = 3, 1
    run.settings.evaluate.max_tokens, run.settings.evaluate.bootstrap = 6, 50
    run.settings.export.dtype = "f32"  # with half precision it might draw other dreams
    Run.create(run.path, run.settings)
    export(run)
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Generator[str]:
    with fake_ollama.engine({"tiny:latest": runs / "soft" / "bundle" / "model.gguf"}) as running:
        yield running.url


def test_when_a_student_dreams_is_a_part_of_what_it_is(runs: Path) -> None:
    run = Run.open(runs / "soft")
    target = find_target("soft", runs / "soft")
    assert target.run is not None
    plain = target.digest()
    target.run.settings.dreaming.sure = 0.9
    surer = target.digest()
    target.run.settings.dreaming.sure = 0.8
    assert len({plain, surer, target.digest()}) == 3
    target.run.settings.dreaming.sure = 1.0
    assert target.digest() == plain == find_target("soft", run.path).digest()


def call(runs: Path, *args: str) -> Result:
    return CliRunner().invoke(dream, ["evaluate", *args, "--runs-dir", str(runs), "-q"])


@pytest.fixture(scope="module")
def together(runs: Path, server: str) -> tuple[dict[str, Any], Path]:
    """The five of them, measured once."""
    soft, out = runs / "soft", runs.parent / f"{runs.name}-out"
    targets = ["soft", str(best(Run.open(soft))), str(soft / "bundle"), str(soft / "bundle" / "model.gguf")]
    result = call(runs, *targets, "ollama:tiny", "--host", server, "--out", str(out), "--no-cost", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out


def test_one_student_in_every_form_has_the_same_numbers(together: tuple[dict[str, Any], Path]) -> None:
    results, _ = together
    names = list(results["systems"])
    assert names == ["soft", names[1], "soft/bundle", "soft/model.gguf", "tiny"]
    run, checkpoint, bundle, gguf, tiny = results["systems"].values()
    assert [system["kind"] for system in results["systems"].values()] == [
        "run",
        "checkpoint",
        "bundle",
        "gguf",
        "ollama",
    ]
    assert run["metrics"] == checkpoint["metrics"] == bundle["metrics"]
    assert run["missing"] == checkpoint["missing"] == bundle["missing"]
    assert set(run["missing"]) == {"bits_per_byte_sibling", "steering_chrf", "steering_concepts"}  # one answer a prompt
    # llama.cpp computes otherwise: likelihoods agree to five digits, what it draws is another's.
    for metric in ("bits_per_byte", "agreement"):
        want = run["metrics"][metric]["value"]
        assert gguf["metrics"][metric]["value"] == pytest.approx(want, rel=1e-5, abs=1e-5), metric
    assert "which image tokens stand for a triplet" in gguf["missing"]["bits_per_byte_oracle"]
    assert "no likelihood" in tiny["missing"]["bits_per_byte"]
    assert {"chrf", "rouge_l", "distinct_2", "length_ratio"} <= tiny["metrics"].keys()
    for masked in (run, checkpoint, bundle):
        assert MASKED in masked["card"]["note"]
        assert masked["metrics"]["unclean_answers"]["value"] == 0
        assert (masked["metrics"]["malformed_dreams"] or {"value": 0})["value"] == 0
    assert {"malformed_dreams", "unclean_answers", "broken_bytes", "ended"} <= {*gguf["metrics"], *gguf["missing"]}
    assert run["contamination"]["checked"]
    assert not tiny["contamination"]["checked"]


def test_the_files_hold_what_was_said(runs: Path, together: tuple[dict[str, Any], Path]) -> None:
    results, out = together
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    exam = load_exam(Run.open(runs / "soft"))
    assert [sample["key"] for sample in samples] == [question.key for question in exam.questions]
    assert all(set(sample["systems"]) == set(results["systems"]) for sample in samples)
    assert (out / "report.md").read_text(encoding="utf-8") == render_markdown(results)
    assert (out / "report.html").is_file()
    heading, *rows = metric_rows(results)
    cells = {row[0]: dict(zip(heading, row, strict=True)) for row in rows}
    assert cells["bits per byte, no dream ↓"]["tiny"] == "missing"
    value = results["systems"]["soft"]["metrics"]["bits_per_byte"]["value"]
    assert cells["bits per byte, no dream ↓"]["soft (baseline)"].startswith(f"{value:.3f} [")
    assert any(
        line.startswith("tiny: no bits per byte") and "no likelihood" in line for line in missing_reasons(results)
    )


def test_asked_again_nothing_is_asked(
    runs: Path, together: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("opened again")

    monkeypatch.setattr(examination, "open_examinee", refuse)
    again = call(runs, "soft", str(runs / "soft" / "bundle"), "--no-cost", "--json")
    assert again.exit_code == 0, again.output
    for name, system in json.loads(again.stdout)["systems"].items():
        assert system["metrics"] == together[0]["systems"][name]["metrics"]
    # The run's own stage knows it by heart as well, all but its start.
    assert (runs / "soft" / "config.yaml").read_text(encoding="utf-8").count("prompts: 3") == 1


def test_settings_are_for_this_call_only(runs: Path) -> None:
    before = (runs / "soft" / "config.yaml").read_bytes()
    result = call(runs, "soft", "--prompts", "1", "--set", "evaluate.dreams=0", "--json", "--no-cost")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["exam"]["prompts"] == 1
    assert found["systems"]["soft"]["missing"]["bits_per_byte_dreams"] == "evaluate.dreams is 0"
    assert (runs / "soft" / "config.yaml").read_bytes() == before


def test_a_gguf_alone_says_how_its_replies_are_spelled(runs: Path, tmp_path: Path) -> None:
    gguf = str(runs / "soft" / "bundle" / "model.gguf")
    how = ("--prompts", "3", "--temperature", "1.2", "--max-tokens", "7", "--set", "evaluate.dreams=0", "--no-cost")
    result = call(runs, gguf, *how, "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["decoding"]["temperature"], found["decoding"]["max_tokens"]) == (1.2, 7)
    metrics = found["systems"]["soft/model.gguf"]["metrics"]
    for name in ("malformed_dreams", "unclean_answers", "broken_bytes", "ended"):
        assert 0 <= metrics[name]["value"] <= 1
    exam = load_exam(Run.open(runs / "soft"), 3)
    assert (
        found["exam"]["teacher_ended"] == exam.teacher_ended == sum(q.done_reason == "stop" for q in exam.questions) / 3
    )
    assert " % of the answers ended by themselves" in (tmp_path / "report.md").read_text(encoding="utf-8")
    table = call(runs, gguf, *how).output
    assert "malformed dreams ↓" in table
    assert "answers that end by themselves ↑" in table


def test_a_prompt_file_is_answered_and_what_needs_a_teacher_is_missing(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("What is rain?\nWhy do cats purr?\n", encoding="utf-8")
    out = tmp_path / "out"
    result = call(runs, "soft", "--prompts", str(tmp_path / "mine.txt"), "--out", str(out), "--no-cost")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 prompts of mine.txt.")
    assert "nobody has answered these prompts" in result.stdout
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {sample["prompt"] for sample in samples} == {"What is rain?", "Why do cats purr?"}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["sofd"], "sofd: no such run, checkpoint, bundle, GGUF or folder; did you mean soft?"),
        (["soft", "nowhere/at.gguf"], "no such run, checkpoint, bundle, GGUF or folder"),
        (["soft", "--on", "none"], "--on none: is no run folder"),
        (["soft", "--prompts", "0"], "--prompts 0: is no prompt"),
        (["soft", "--prompts", "missing.txt"], "missing.txt: no such prompt file or set"),
        (["soft", "--prompts", "stories"], "give one with --out FOLDER"),
        (["ollama:tiny"], "name a run with --on RUN"),
        (["soft", "soft", "--baselines", "hard"], "--baselines go with one run alone"),
        ([], "Missing argument 'TARGET…'"),
    ],
)
def test_bad_inputs_say_what_to_do(runs: Path, args: list[str], told: str) -> None:
    result = call(runs, *args)
    assert result.exit_code != 0
    assert told in (result.output + str(result.exception)).replace("\n", " ")


HOW: dict[str, Any] = {"cost": False, "strict": False}


def named(targets: list[Target]) -> dict[str, list[Target]]:
    return {target.spec: [target] for target in targets}


def test_one_that_fails_is_told_and_the_others_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [Target(f"{name}.gguf", "gguf", tmp_path / f"{name}.gguf") for name in "ab"]
    for target in targets:
        assert target.path is not None
        target.path.write_text(target.spec, encoding="utf-8")

    def sit(target: Target, how: Any) -> FakeExaminee:
        if target.spec == "b.gguf":
            raise DistillError("http://somewhere: no Ollama answers there")
        return FakeExaminee()

    monkeypatch.setattr(examination, "open_examinee", sit)
    exam = fake_exam(tmp_path / "exam")
    events = list[Event]()
    results = compare(Measurement(exam, EvaluateSettings(dreams=1), events.append), named(targets), None, **HOW)
    assert list(results["systems"]) == ["a.gguf"]
    assert results["failed"] == {"b.gguf": "http://somewhere: no Ollama answers there"}
    assert [event.kind for event in events].count("warning") == 1
    assert "b.gguf failed: http://somewhere: no Ollama answers there" in cautions(results)
    with pytest.raises(DistillError, match="no Ollama answers there"):
        compare(Measurement(exam, EvaluateSettings(dreams=1)), named(targets[1:]), None, **HOW)
    both = compare(Measurement(exam, EvaluateSettings(dreams=1)), {"s": targets[::-1]}, None, **HOW)
    assert both["systems"]["s"]["targets"] == ["a.gguf"], "what is told of a system is of those that were measured"
    assert both["systems"]["s"]["seeds"] == 1


# What it costs.


def test_cost_is_measured_of_students_and_of_models_in_ollama(runs: Path, server: str) -> None:
    run = Run.open(runs / "soft")
    for target in (find_target(str(run.path)), find_target("ollama:tiny", host=server)):
        found = measure_cost(target, load_exam(run), run.settings.evaluate, How(dream_tokens=20))
        assert found["prompts"] == 2  # one of the three to warm up
        for name in ("tokens_per_second", "first_token_seconds"):
            assert 0 < found[name]["low"] <= found[name]["median"] <= found[name]["high"]


def test_the_prompt_that_warms_up_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    class Listening(FakeExaminee):
        def answer(self, questions: Any, **how: Any) -> Any:
            asked.append(f"{questions[0].key} {how['max_tokens']}")
            return super().answer(questions, **how)

    monkeypatch.setattr(cost, "open_examinee", lambda target, how: Listening())
    target = Target("ollama:x", "ollama", model="x")
    for size, warm, timed in ((20, 8, 8), (3, 2, 2), (1, 0, 1)):
        exam = Exam("prompts", tmp_path, [Question(str(i), "?") for i in range(size)])
        asked.clear()
        found = measure_cost(target, exam, EvaluateSettings(max_tokens=9), How())
        assert found["prompts"] == timed
        want = [f"{warm} 1", f"{warm} 9", *(f"{i} {tokens}" for i in range(timed) for tokens in (1, 9))]
        assert asked == want


def test_no_first_token_where_none_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Silent(FakeExaminee):
        def begin(self, question: Question) -> bool:
            return False

    monkeypatch.setattr(cost, "open_examinee", lambda target, how: Silent())
    exam = Exam("prompts", tmp_path, [Question(str(i), "?") for i in range(3)])
    found = measure_cost(Target("ollama:x", "ollama", model="x"), exam, EvaluateSettings(), How())
    assert found["tokens_per_second"] is not None
    assert found["first_token_seconds"] is None


def test_what_was_dropped_took_its_time_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Dropping(FakeExaminee):
        def answer(self, questions: Any, **how: Any) -> Any:
            return [replace(spoken, tokens=2, dropped=98) for spoken in super().answer(questions, **how)]

    clock = itertools.count()
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(cost, "open_examinee", lambda target, how: Dropping())
    exam = Exam("prompts", tmp_path, [Question(str(i), "?") for i in range(3)])
    found = measure_cost(Target("ollama:x", "ollama", model="x"), exam, EvaluateSettings(), How())
    assert found["tokens_per_second"]["median"] == 100


def test_kept_costs_are_of_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(target: Target, exam: Exam, settings: EvaluateSettings, how: How) -> dict[str, Any]:
        measured.append(how.device)
        return summarize([Timed(1.0, 10, 2.0)])

    monkeypatch.setattr(cost, "measure_cost", measure)
    monkeypatch.setattr(Target, "digest", lambda self: "d")
    monkeypatch.setattr("distill.exam.examinees.ollama.thinks_in_words", lambda *_: False)
    exam, settings = fake_exam(tmp_path), EvaluateSettings()
    student, model = Target("x", "checkpoint", tmp_path), Target("ollama:x", "ollama", model="x")

    def kept(target: Target, device: str = "cpu") -> int:
        measured.clear()
        kept_cost(target, exam, settings, How(dream_tokens=20, device=device))
        return len(measured)

    assert [kept(student), kept(student), kept(model), kept(model)] == [1, 0, 1, 0]
    monkeypatch.setitem(os.environ, "OLLAMA_HOST", "http://elsewhere:11434")
    assert [kept(model), kept(student)] == [1, 0]
    monkeypatch.setattr(cost, "device_of", lambda target, device: "cuda")
    assert kept(student) == 1
    monkeypatch.setattr(cost, "machine", lambda: {"threads": 3})
    assert [kept(student), kept(student)] == [1, 0]


def test_one_that_answered_nothing_was_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_text("a", encoding="utf-8")
    monkeypatch.setattr(examination, "open_examinee", lambda target, how: FakeExaminee())
    targets, exam = [Target("a.gguf", "gguf", tmp_path / "a.gguf")], fake_exam(tmp_path / "exam")
    results = compare(Measurement(exam, EvaluateSettings(dreams=1)), named(targets), None, **HOW)
    results["systems"]["a.gguf"]["cost"] = summarize([Timed(0.5, 0, 0.5)])
    assert "a.gguf: speed not measured: it answered nothing." in cautions(results)
    assert "one prompt at a time" not in render_markdown(results)


def test_what_cannot_be_timed_says_why(runs: Path, tmp_path: Path) -> None:
    run = Run.open(runs / "soft")
    exam, broken = load_exam(run), tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    found = measure_cost(find_target(str(broken)), exam, run.settings.evaluate, How())
    assert found["tokens_per_second"] is None
    assert "broken.gguf" in found["note"]


def test_median_and_range_over_prompts() -> None:
    found = summarize([Timed(1.0, 10, 2.0), Timed(3.0, 30, 3.0), Timed(2.0, 40, 20.0)])
    assert found["tokens_per_second"] == {"median": 5.0, "low": 2.0, "high": 10.0}
    assert found["first_token_seconds"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert found["prompts"] == 3
    assert summarize([Timed(None, 10, 2.0), Timed(3.0, 30, 3.0)])["first_token_seconds"]["low"] == 3.0
    assert summarize([Timed(None, 10, 2.0)])["first_token_seconds"] is None, "no answer came"
    assert summarize([Timed(0.0, 0, 0.0)])["tokens_per_second"] is None
