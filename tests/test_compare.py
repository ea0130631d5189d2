"""`dream compare` as a user runs it: students trained for a moment on a real teacher's answers, side by side."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from support.evaluation_run import trained_run
from support.fake_ollama import serve
from support.recorded import Replay, exchange

from cli.main import dream
from cli.runs import RUNS_DIR
from cli.targets import find
from distill.config import Settings
from distill.errors import CorruptFile, TeacherError
from distill.events import silent
from distill.exam import contamination
from distill.exam.baselines import train_child
from distill.exam.questions import Exam, load_exam
from distill.exam.targets import common_run, find_target
from distill.report import measure as measurement
from distill.report.measure import read_results
from distill.run import Run
from distill.training.checkpoint import best

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")

TIMES = ("finished", "cost", "seconds", "tokens_per_second")
"""Keys whose values differ from call to call."""


def child(base: Run, folder: Path, seed: int, **train: Any) -> Run:
    settings: Settings = copy.deepcopy(base.settings)
    settings.seed = seed
    settings.train.log_every, settings.train.validate_every = 2, 3
    for name, value in train.items():
        setattr(settings.train, name, value)
    return train_child(base, folder, settings, 6, "train", silent)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/base, and soft0, soft1, hard0, hard1 trained on its data. Copied by tests that write into it."""
    runs = tmp_path_factory.mktemp("compare") / "runs"
    base = trained_run(runs / "base")
    for seed in range(2):
        child(base, runs / f"soft{seed}", seed)
        child(base, runs / f"hard{seed}", seed, soft_weight=0.0)
    return runs


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def invoke(runs: Path, *args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(dream, ["compare", *args, "--runs-dir", str(runs), "--quiet"])
    if code == 0 and result.exception is not None:
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def test_two_runs_side_by_side(runs: Path) -> None:
    """Files are written, the values are those of the samples, the differences those of the values."""
    folder = runs / "base" / "comparisons" / "soft0-vs-hard0"
    result = invoke(runs, "soft0", "hard0", "--on", "base", "--json", "--no-cost")
    assert {path.name for path in folder.iterdir()} == {"results.json", "samples.jsonl", "report.md", "report.html"}
    results = json.loads(result.stdout)
    assert results.pop("folder") == str(folder)
    assert results == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    exam = load_exam(Run.open(runs / "base"))
    assert results["exam"]["prompts"] == len(exam.questions) >= 2
    assert results["baseline"] == "soft0"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sample["key"] for sample in samples] == [question.key for question in exam.questions]
    sizes = [question.bytes for question in exam.questions]
    values: dict[str, float] = {}
    for name in ("soft0", "hard0"):
        per_byte = [sample["systems"][name][0]["metrics"]["bits_per_byte"] for sample in samples]
        values[name] = float(np.dot(per_byte, sizes) / np.sum(sizes))
        entry = results["systems"][name]["metrics"]["bits_per_byte"]
        assert entry["value"] == pytest.approx(values[name], rel=1e-9)
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert results["systems"][name]["trained_on"]["steps"] == 6
    found = {(d["system"], d["metric"]): d for d in results["differences"]}
    difference = found["hard0", "bits_per_byte"]
    assert difference["value"] == pytest.approx(values["hard0"] - values["soft0"], rel=1e-9, abs=1e-12)
    assert difference["wins"] + difference["ties"] + difference["losses"] == len(samples)
    assert 0 < difference["p"] <= difference["p_corrected"] <= 1
    assert results["systems"]["soft0"]["contamination"]["checked"] is True
    assert any("one training each" in text for text in results["warnings"])
    assert any(f"Only {len(samples)} prompts were asked" in text for text in results["warnings"])


def test_tokens_of_equal_recipes_are_equal_and_told_where_not(runs: Path) -> None:
    results = json.loads(invoke(runs, "soft0", "hard0", "base", "--on", "base", "--json", "--no-cost").stdout)
    tokens = {name: system["trained_on"]["tokens"] for name, system in results["systems"].items()}
    assert tokens["soft0"] == tokens["hard0"] != tokens["base"]
    assert any("not trained for as many tokens" in text for text in results["warnings"])


def test_seeds_of_one_recipe_are_one_system(runs: Path) -> None:
    args = ("soft=soft0,soft1", "hard=hard0,hard1", "--on", "base", "--json", "--no-cost", "--baseline", "hard")
    results = json.loads(invoke(runs, *args).stdout)
    assert list(results["systems"]) == ["soft", "hard"]
    for system in results["systems"].values():
        entry = system["metrics"]["bits_per_byte"]
        assert system["seeds"] == len(system["targets"]) == len(entry["seeds"]) == 2
        assert entry["value"] == pytest.approx(float(np.mean(entry["seeds"])))
    assert {d["against"] for d in results["differences"]} == {"hard"}
    assert not any("one training each" in text or "differ in" in text for text in results["warnings"])
    args = ("soft=soft0,soft1", "mixed=hard0,soft1", "--on", "base", "--json", "--no-cost")
    [told] = [text for text in json.loads(invoke(runs, *args).stdout)["warnings"] if "differ in" in text]
    assert told.startswith("mixed: its trainings differ in train.soft_weight, not in the seed alone")


def test_names_with_commas_and_a_target_twice(runs: Path) -> None:
    """A sweep's cells are named by what they change."""
    for seed in range(2):
        (runs / f"soft{seed}").rename(runs / f"lr=0.001,preset=nano-seed{seed}")
    args = ("soft=lr=0.001,preset=nano-seed0,lr=0.001,preset=nano-seed1", "one=lr=0.001,preset=nano-seed1", "hard0")
    results = json.loads(invoke(runs, *args, "--on", "base", "--json", "--no-cost", "--prompts", "1").stdout)
    assert {name: system["seeds"] for name, system in results["systems"].items()} == {"soft": 2, "one": 1, "hard0": 1}
    assert "hard0 is named twice" in refusal(runs, "hard=hard0,hard0", "hard1")
    text = refusal(runs, f"hard=hard0,{best(Run.open(runs / 'hard0'))}", "hard1")
    assert "are one target: it is named twice" in text


def test_a_misspelt_judge_is_told_before_anything_is_measured(runs: Path) -> None:
    with serve(Replay([exchange(name) for name in ("tags", "version", "show")])) as server:
        refusal(runs, "soft0", "hard0", "--on", "base", "--judge", "ollama:smolm2", "--host", server.url)
    assert not (runs / "base" / "evaluation" / "targets").exists()


def test_a_judge_that_fails_takes_nothing_along(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **options: Any) -> Any:
        assert options["force"]
        raise TeacherError("the judge left")

    monkeypatch.setattr("distill.report.judge.judge", fails)
    out = tmp_path / "out"
    with serve(Replay([exchange(name) for name in ("tags", "version", "show")])) as server:
        judge = ("--judge", "ollama:smollm2:135m", "--host", server.url, "--force")
        text = refusal(runs, "soft0", "hard0", "--on", "base", "--out", str(out), *judge)
    assert "the judge left" in text
    assert read_results(out / "results.json")["judge"] is None
    assert (out / "report.html").is_file()


def test_what_it_was_trained_on_may_be_unreadable(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise CorruptFile("traces.db: is broken")

    monkeypatch.setattr(measurement, "of_target", broken)
    monkeypatch.setattr(measurement, "trained_on", broken)
    results = json.loads(invoke(runs, "soft0", "hard0", "--on", "base", "--json", "--no-cost").stdout)
    assert results["systems"]["hard0"]["contamination"] == {"checked": False, "reason": "traces.db: is broken"}
    assert results["systems"]["hard0"]["trained_on"] is None


def test_the_same_weights_as_run_checkpoint_and_bundle_differ_in_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ways to the same student: no difference, and no claim of one. Their training set is searched once."""
    searches = list[Exam]()
    own = contamination.check
    monkeypatch.setattr(contamination, "check", lambda exam, *rest: searches.append(exam) or own(exam, *rest))
    checkpoint = best(Run.open(runs / "base"))
    results = json.loads(invoke(runs, "base", str(checkpoint), "--json", "--no-cost").stdout)
    first, second = results["systems"].values()
    assert len(searches) == 1
    assert first["contamination"] == second["contamination"]
    assert first["metrics"] == second["metrics"]
    for difference in results["differences"]:
        assert difference["value"] == 0
        assert difference.get("p") in (None, 1.0)
    assert (
        "no clear difference"
        in (runs / "base" / "comparisons").glob("*/report.md").__next__().read_text(encoding="utf-8").lower()
    )


def test_an_interrupted_comparison_goes_on_where_it_was(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(invoke(runs, "soft0", "hard0", "--on", "base", "--json", "--no-cost").stdout)
    shutil.rmtree(runs / "base" / "evaluation" / "targets")
    shutil.rmtree(runs / "base" / "comparisons")
    perform, asked = measurement.examine, list[str]()

    def interrupted(target: Any, *args: Any, **options: Any) -> Any:
        asked.append(target.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return perform(target, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(measurement, "examine", interrupted)
        assert (
            CliRunner()
            .invoke(dream, ["compare", "soft0", "hard0", "--on", "base", "--no-cost", "--runs-dir", str(runs)])
            .exit_code
        )
    assert asked == ["soft0", "hard0"]
    assert not (runs / "base" / "comparisons").exists()
    # What is measured is known by heart: its weights aren't even opened again.
    from distill.exam import examine as examination

    opened, really = list[str](), examination.open_examinee
    monkeypatch.setattr(
        examination, "open_examinee", lambda target, how: opened.append(target.name) or really(target, how)
    )
    again = json.loads(invoke(runs, "soft0", "hard0", "--on", "base", "--json", "--no-cost").stdout)
    assert opened == ["hard0"]
    assert timeless(again) == timeless(whole)


def test_a_target_that_fails_keeps_what_the_others_did(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    command = ["compare", "ollama:nobody", "soft0", "--on", "base", "--no-cost", "--runs-dir", str(runs)]
    result = CliRunner().invoke(dream, command)
    assert result.exit_code
    assert "ollama:nobody" in str(result.exception)
    assert "goes on from there" in str(result.exception)
    assert list((runs / "base" / "evaluation" / "targets").glob("soft0-*/journal.jsonl"))
    assert not (runs / "base" / "comparisons").exists()


def test_reports_are_written_again_from_results_alone(runs: Path, tmp_path: Path) -> None:
    invoke(runs, "soft0", "hard0", "--on", "base", "--no-cost", "--out", str(tmp_path / "out"))
    before = {name: (tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")}
    for name in before:
        (tmp_path / "out" / name).unlink()
    invoke(runs, "--from", str(tmp_path / "out" / "results.json"))
    assert before == {name: (tmp_path / "out" / name).read_text(encoding="utf-8") for name in before}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no comparison's results.json"),
        ("{", "no comparison's results.json"),
        ('{"version": 1, "systems": {}}', "no comparison's"),
    ],
)
def test_no_results_are_one_clear_line(runs: Path, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    result = CliRunner().invoke(dream, ["compare", "--from", str(path), "--runs-dir", str(runs)])
    assert result.exit_code
    assert said in str(result.exception)
    assert str(path) in str(result.exception)
    assert path.read_text(encoding="utf-8") == content
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["results.json"]


def refusal(runs: Path, *args: str) -> str:
    result = CliRunner().invoke(dream, ["compare", *args, "--no-cost", "--runs-dir", str(runs)])
    assert result.exit_code != 0
    return str(result.exception) if result.exception and not isinstance(result.exception, SystemExit) else result.output


def test_bad_input_names_what_to_mend(runs: Path, tmp_path: Path) -> None:
    assert "two targets or more" in refusal(runs, "soft0")
    assert "--baseline nobody: is none of the systems soft0, hard0" in refusal(
        runs, "soft0", "hard0", "--on", "base", "--baseline", "nobody"
    )
    assert "names no target" in refusal(runs, "soft=", "hard0")
    assert "already" in refusal(runs, "a=soft0", "a=hard0", "--on", "base")
    assert "no number of prompts" in refusal(runs, "soft0", "hard0", "--prompts", "-3")
    assert "nothing reads it here" in refusal(runs, "soft0", "hard0", "--on", "base", "--set", "train.lr=1")
    assert "no --baseline" in refusal(runs, "--from", str(tmp_path / "results.json"), "--baseline", "hard0")
    assert "no such teacher" in refusal(runs, "soft0", "hard0", "--on", "base", "--judge", "nonsense")
    (tmp_path / "notes.txt").write_text("no weights", encoding="utf-8")
    assert "no .gguf" in refusal(runs, str(tmp_path / "notes.txt"), "soft0")


def test_a_part_of_a_run_is_found_by_its_name_and_fewer_prompts_have_a_folder_of_their_own(runs: Path) -> None:
    """NAME/checkpoints/step-… below --runs-dir; a quick look doesn't replace the whole comparison."""
    checkpoint = best(Run.open(runs / "base")).name
    args = ("soft0", f"base/checkpoints/{checkpoint}", "--on", "base", "--prompts", "2", "--no-cost", "--json")
    results = json.loads(invoke(runs, *args).stdout)
    assert results["exam"]["prompts"] == 2
    assert results["folder"].endswith("-2-prompts")
    assert any("Only 2 prompts were asked" in text for text in results["warnings"])
    for system in results["systems"].values():
        for name, entry in system["metrics"].items():
            if entry["low"] is not None and name != "length_ratio" and not name.startswith("concept_similarity"):
                assert entry["low"] >= 0, name


def test_a_folder_of_its_name_hides_no_run(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "soft0").mkdir()
    shutil.copytree(runs / "soft1" / "checkpoints", tmp_path / "mine" / "checkpoints")
    step = f"mine/checkpoints/{best(Run.open(runs / 'soft1')).name}"
    with click.Context(dream) as ctx:
        ctx.meta[RUNS_DIR] = str(runs)
        assert find("soft0").path == best(Run.open(runs / "soft0"))
        assert find(step).path == Path(step)


def test_whose_prompts_are_asked_is_found_without_triplets(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be hundreds of thousands, and they are read once the exam is."""
    monkeypatch.setattr("distill.exam.questions.read_triplets", lambda *_: pytest.fail("read in vain"))
    targets = [find_target(str(runs / name)) for name in ("soft0", "hard0")]
    assert common_run(targets).path == common_run(targets[:1]).path == runs / "soft0"


def test_two_held_out_sets_are_refused_and_one_can_be_chosen(runs: Path) -> None:
    """Another run whose held-out answers are others."""
    import sqlite3

    shutil.copytree(runs / "soft0", runs / "other")
    with sqlite3.connect(runs / "other" / "traces.db") as db:
        columns = {row[1] for row in db.execute("PRAGMA table_info(responses)")}
        assert "held_out" in columns, columns
        db.execute(
            "UPDATE responses SET held_out = 0 WHERE key = (SELECT key FROM responses WHERE held_out = 1 LIMIT 1)"
        )
    text = refusal(runs, "soft0", "other")
    assert "held-out sets differ" in text
    assert "--on RUN" in text
    results = json.loads(invoke(runs, "soft0", "other", "--on", "base", "--json", "--no-cost").stdout)
    # What is held out here was trained on there.
    assert results["systems"]["other"]["contamination"]["exact"] == 1
    assert any("so many were in a training word for word: other 1" in text for text in results["warnings"])
