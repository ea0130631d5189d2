"""What a target is credited with: the training up to its own checkpoint, and nothing where that can't be read."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distill.config import Settings
from distill.exam.targets import Target, find_target
from distill.exam.trained_on import trained_on
from distill.report.doubts import mixed
from distill.run import Run
from distill.training.checkpoint import LoopState


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Trained for 40 steps of 100 tokens, the best checkpoint at step 20."""
    run = Run.create(tmp_path / "run", Settings())
    for step in (0, 20, 40):
        folder = run.checkpoints / f"step-{step:06d}"
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "tokenizer" / "dream_tokenizer.json").write_text("{}", encoding="utf-8")
        state = LoopState(step, 100 * step, epoch=step // 10, best_step=20)
        (folder / "loop.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    run.data.mkdir(exist_ok=True)
    counts = {"train": {"documents": 12, "answer_tokens": 345}}
    (run.data / "data.json").write_text(json.dumps({"counts": counts, "fingerprint": "f" * 64}), encoding="utf-8")
    run.record("train", {}, {}, {"steps": 40, "tokens": 4000, "epochs": 4, "parameters": 7}, 12.5)
    return run


def bundled(run: Run, told: str) -> Target:
    run.bundle.mkdir(exist_ok=True)
    (run.bundle / "bundle.json").write_text(told, encoding="utf-8")
    return find_target(str(run.bundle))


@pytest.mark.parametrize(
    ("where", "step", "seconds"),
    [("", 20, None), ("checkpoints/step-000020", 20, None), ("checkpoints/step-000040", 40, 12.5)],
)
def test_a_checkpoint_is_credited_with_its_own_steps(run: Run, where: str, step: int, seconds: float | None) -> None:
    target = find_target(str(run.path / where))
    told = trained_on(target)
    assert told is not None
    assert (told["steps"], told["tokens"], told["epochs"], told["seconds"]) == (step, 100 * step, step // 10, seconds)
    assert (told["answers"], told["answer_tokens"], told["data"]) == (12, 345, "f" * 16)


def test_settings_are_those_of_the_training_whatever_was_set_since(run: Run) -> None:
    target = find_target(str(run.path / "checkpoints/step-000040"))
    file = target.path / "loop.json"  # type: ignore[operator]
    state = json.loads(file.read_text(encoding="utf-8"))
    state["settings"] = {"lr": 0.003, "seed": 5, "student": {"layers": 3}, "data": "f" * 64}
    file.write_text(json.dumps(state), encoding="utf-8")
    run.settings.train.lr, run.settings.train.steps, run.settings.student.layers = 0.1, 40, 9
    told = trained_on(replace(target, run=run))
    assert told is not None
    kept = {name: told["settings"].get(name) for name in ("train.lr", "seed", "student.layers", "train.steps")}
    assert kept == {"train.lr": 0.003, "seed": 5, "student.layers": 3, "train.steps": 40}


def test_what_went_on_from_a_training_is_told(run: Run) -> None:
    target = find_target(str(run.path / "checkpoints/step-000040"))
    abouts = [trained_on(target)]
    file = run.checkpoints / "step-000040" / "loop.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    state["settings"] = {"reward": {}, "polish": {"round": 3}}
    file.write_text(json.dumps(state), encoding="utf-8")
    abouts.append(trained_on(target))
    assert [told and told["onward"] for told in abouts] == ["", "polish, reward"]
    (told,) = mixed("soft", abouts)
    assert told.startswith("soft: its trainings differ in what they went on by, not in the seed alone")


def test_a_bundle_is_credited_with_the_checkpoint_that_it_was_made_of(run: Run) -> None:
    made = bundled(run, json.dumps({"provenance": {"checkpoint": "step-000020", "teacher": {"name": "Lehrerin Ä"}}}))
    told = trained_on(made)
    assert told is not None
    assert (told["steps"], told["tokens"], told["seconds"]) == (20, 2000, None)
    gone = bundled(run, json.dumps({"provenance": {"checkpoint": "step-000030"}}))
    told = trained_on(gone)
    assert told is not None
    assert (told["steps"], told["tokens"], told["answers"]) == (None, None, 12)


def test_a_bundle_is_credited_with_nothing_of_a_training_after_it(run: Run) -> None:
    """Its run was trained anew: a checkpoint of as many steps has other weights."""
    sums = run.checkpoints / "step-000020" / "checksums.json"
    target = bundled(run, json.dumps({"provenance": {"checkpoint": "step-000020", "weights": "a"}}))
    for weights, known in (("a", True), ("b", False)):
        sums.write_text(json.dumps({"model.safetensors": weights}), encoding="utf-8")
        assert (trained_on(target) is not None) == known
    sums.unlink()
    assert trained_on(target) is None
    shutil.rmtree(run.checkpoints)  # nothing is left to compare with
    assert trained_on(target) is not None


@pytest.mark.parametrize("broken", ["", "{", "[]", "5", '{"provenance": 5}', '{"provenance": {"checkpoint": 5}}'])
def test_what_is_broken_ends_nothing(run: Run, broken: str) -> None:
    target = bundled(run, broken)
    (run.data / "data.json").write_text(broken, encoding="utf-8")
    told = trained_on(target)
    assert told is not None
    assert (told["tokens"], told["answers"], told["data"]) == (None, None, None)
    (run.checkpoints / "step-000020" / "loop.json").write_text(broken, encoding="utf-8")
    of_checkpoint = Target("it", "checkpoint", run.checkpoints / "step-000020", run=run)
    told = trained_on(of_checkpoint)
    assert told is not None
    assert told["tokens"] is None
