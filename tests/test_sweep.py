"""Sweeps as a user runs them: planned, trained, killed, gone on with, changed, and told of."""

import json
import os
import shutil
import signal
import time
from collections.abc import Generator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from support.ablation_run import STEPS, small_world
from support.disturbed import start
from support.gone_on import went_on

from cli.main import dream
from distill.config import Settings
from distill.corpus.datasets import stage
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, DistillError, NothingHeldOut, RunMismatch
from distill.events import Event, silent
from distill.exam.baselines import copy_file, train_child
from distill.exam.examine import examine
from distill.knowledge.mine import mine
from distill.run import Run, sha256_file
from distill.sweep import cells as sweep_cells
from distill.sweep.plan import Cell, Plan, read_plan
from distill.sweep.sweep import overview
from distill.sweep.sweep import sweep as whole_sweep
from distill.sweep.table import rows, values_of
from distill.tokens.build import build_tokenizer
from distill.training.checkpoint import best, list_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")

VARIANTS: dict[str, Any] = {
    "name": "lenses",
    "settings": {"train.checkpoint_every": 2, "evaluate": {"prompts": 6}},
    "variants": {"soft": None, "nodream": {"train.dreams": False}},
    "seeds": 2,
    "metric": "bits_per_byte",
}
NAMES = ["soft-seed0", "soft-seed1", "nodream-seed0", "nodream-seed1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The base: tokenized, not trained. Don't alter it."""
    return small_world(tmp_path_factory.mktemp("world") / "small")


COST = {"tokens_per_second": None, "first_token_seconds": None, "peak_bytes": None, "note": "not asked"}


@pytest.fixture(scope="module", autouse=True)
def _no_processes() -> Generator[None]:
    """What a target costs is found out in a process of its own: see test_evaluate_targets.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.report.measure.kept_cost", lambda *_, **__: COST)
        yield


@pytest.fixture(scope="module")
def swept(world: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Event]]:
    """VARIANTS, finished; don't alter it."""
    folder, events = tmp_path_factory.mktemp("swept"), list[Event]()
    state = whole_sweep(plan_of(folder, VARIANTS, base=world), folder / "lenses", events.append)
    return folder / "lenses", state, events


@pytest.fixture
def copied(swept: tuple[Path, dict[str, Any], list[Event]], tmp_path: Path) -> Path:
    shutil.copytree(swept[0], tmp_path / "lenses")
    return tmp_path / "lenses"


def write(folder: Path, content: Any, base: Run | None = None) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(
        content
        if isinstance(content, str)
        else yaml.safe_dump(content | ({"base": str(base.path)} if base else {}), sort_keys=False),
        encoding="utf-8",
    )
    return path


def plan_of(folder: Path, content: Any, base: Run | None = None) -> Plan:
    return read_plan(write(folder, content, base))


def weights(folder: Path, cell: str) -> bytes:
    run = Run.open(folder / "cells" / cell)
    run.require("train")
    return (best(run) / "model.safetensors").read_bytes()


def call(*args: object) -> Result:
    """`dream …` as main() has it: users' errors are raised."""
    return CliRunner().invoke(dream, [str(arg) for arg in args], standalone_mode=False)


def sweep(plan: Plan, folder: Path, *args: Any, **options: Any) -> dict[str, Any]:
    """Trainings alone: most tests have no use for a comparison."""
    return whole_sweep(plan, folder, *args, compare=False, **options)


def trained_anew(events: list[Event]) -> set[str]:
    return {event.stage for event in events if event.unit == "step"}


# Cells.


def test_every_cell_is_a_run_trained_on_the_same_data_for_as_many_tokens(
    world: Run, swept: tuple[Path, dict[str, Any], list[Event]]
) -> None:
    folder, state, events = swept
    assert list(state["cells"]) == NAMES
    assert {cell["state"] for cell in state["cells"].values()} == {"trained"}
    assert {(cell["steps"], cell["tokens"]) for cell in state["cells"].values()} == {(STEPS, STEPS * 2 * 256)}
    for name, cell in state["cells"].items():
        run = Run.open(folder / "cells" / name)
        assert run.settings.seed == cell["seed"]
        assert run.settings.train.dreams == (cell["system"] == "soft")
        assert run.settings.student == world.settings.student
        assert not run.traces.is_symlink()
        assert run.traces.stat().st_nlink == 1  # nothing breaks when the base, or another cell, is deleted
        with TraceStore(run.traces, readonly=True) as one, TraceStore(world.traces, readonly=True) as other:
            assert one.content_digest() == other.content_digest()
        assert cell["seconds"] == run.require("train").seconds
    packed = {(folder / "cells" / name / "data" / "data.json").read_bytes() for name in NAMES}
    assert len(packed) == 1
    assert len({weights(folder, name) for name in NAMES}) == 4
    assert trained_anew(events) >= {f"cell {i} of 4, {name}" for i, name in enumerate(NAMES, 1)}
    assert json.loads((folder / "sweep.json").read_text(encoding="utf-8")) == json.loads(json.dumps(state))


def test_other_commands_take_a_cell(copied: Path) -> None:
    cell = copied / "cells" / "soft-seed1"
    status = call("status", cell, "--json")
    assert status.exception is None
    assert "train" in json.loads(status.stdout)["stages"]
    exported = call("export", cell, "--quiet")
    assert exported.exception is None, exported.output
    assert (cell / "bundle" / "bundle.json").is_file()


def test_finished_cells_are_kept(copied: Path, world: Run, tmp_path: Path) -> None:
    before = {name: weights(copied, name) for name in NAMES}
    times = {name: (copied / "cells" / name / "run.json").stat().st_mtime_ns for name in NAMES}
    events: list[Event] = []
    state = sweep(plan_of(tmp_path, VARIANTS, world), copied, events.append)
    assert not trained_anew(events)
    assert {name: weights(copied, name) for name in NAMES} == before
    assert {name: (copied / "cells" / name / "run.json").stat().st_mtime_ns for name in NAMES} == times
    assert {cell["state"] for cell in state["cells"].values()} == {"trained"}


def test_cells_are_kept_where_their_data_was_made_again_to_the_same_end(
    copied: Path, world: Run, tmp_path: Path
) -> None:
    base = Run(shutil.copytree(world.path, tmp_path / "base"), world.settings)
    plan = plan_of(tmp_path, VARIANTS | {"variants": {"soft": None}, "seeds": 1}, base)
    before = weights(copied, "soft-seed0")
    mine(base, force=True)
    events: list[Event] = []
    sweep(plan, copied, events.append)
    assert not trained_anew(events)
    base.triplets.write_bytes(b"".join(base.triplets.read_bytes().splitlines(keepends=True)[:-9]))
    record = base.require("mine")
    base.record("mine", record.settings, {"triplets.jsonl": sha256_file(base.triplets)}, record.summary, 0.0)
    build_tokenizer(base)
    sweep(plan, copied, events.append)
    assert any(event.kind == "note" and "of other data: trained anew" in event.message for event in events)
    assert weights(copied, "soft-seed0") != before


def test_what_failed_and_is_not_in_the_file_any_more_fails_nothing(copied: Path, world: Run, tmp_path: Path) -> None:
    state = json.loads((copied / "sweep.json").read_text(encoding="utf-8"))
    state["cells"]["nodream-seed1"] |= {"state": "failed", "error": "it was too long"}
    (copied / "sweep.json").write_text(json.dumps(state), encoding="utf-8")
    file = write(tmp_path, VARIANTS | {"variants": {"soft": None}, "name": copied.name}, world)
    done = call("sweep", file, "--runs-dir", copied.parent, "--no-compare", "--quiet")
    assert done.exception is None, done.output
    assert "Failed" not in done.stderr


def test_a_lost_record_is_made_again_of_the_cells(copied: Path, world: Run, tmp_path: Path) -> None:
    old = json.loads((copied / "sweep.json").read_text(encoding="utf-8"))
    (copied / "sweep.json").write_text("{", encoding="utf-8")
    with pytest.raises(DistillError, match=r"sweep.json: can't be read .*; delete it: finished cells are kept"):
        sweep(plan_of(tmp_path, VARIANTS, world), copied)
    (copied / "sweep.json").write_text('{"cells": {}}', encoding="utf-8")
    events: list[Event] = []
    state = sweep(plan_of(tmp_path, VARIANTS, world), copied, events.append)
    assert not trained_anew(events)
    assert {name: cell["tokens"] for name, cell in state["cells"].items()} == {
        name: cell["tokens"] for name, cell in old["cells"].items()
    }


def test_variants_and_seeds_are_cells(world: Run, tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-3 for text; a setting may be dotted or nested."""
    low = "{train: {dreams: false, lr: 1e-3}, train.betas: [0.8, 0.9]}"
    plan = plan_of(tmp_path, f"base: {world.path}\nvariants: {{soft: , low: {low}}}\nseeds: [3, 5]")
    assert [cell.name for cell in plan.cells] == ["soft-seed3", "soft-seed5", "low-seed3", "low-seed5"]
    last = plan.cells[-1]
    assert last.changes == {"train.dreams": False, "train.lr": 1e-3, "train.betas": [0.8, 0.9]}
    assert (last.settings.seed, last.settings.train.lr, last.settings.train.dreams) == (5, 1e-3, False)
    assert last.data.seed == world.settings.seed
    assert (plan.baseline, plan.name, plan.metric) == ("soft", "sweep", "exact_match")


# Data.


def test_cells_that_cut_another_tokenizer_share_the_rest(world: Run, tmp_path: Path) -> None:
    content = {"variants": {"same": {}, "fewer": {"tokenize.image_tokens": 40}}, "seeds": 2}
    plan = plan_of(tmp_path, content, world)
    planned = {cell["cell"]: cell["runs"] for cell in overview(plan, tmp_path / "s")["cells"]}
    assert planned["same-seed1"] == ["train"]
    assert planned["fewer-seed1"] == ["tokenize", "train"]
    events: list[Event] = []
    state = sweep(plan, tmp_path / "s", events.append)
    assert {cell["state"] for cell in state["cells"].values()} == {"trained"}
    (data,) = (tmp_path / "s" / "data").iterdir()
    made = Run.open(data)
    base, cells = world.records(), {name: Run.open(tmp_path / "s" / "cells" / name).records() for name in planned}
    assert made.records()["capture"] == base["capture"]
    assert made.records()["mine"] == base["mine"]
    assert made.records()["tokenize"].settings["image_tokens"] == 40
    for name, records in cells.items():
        assert records["tokenize"] == (base if name.startswith("same") else made.records())["tokenize"]
    assert sum(event.kind == "start" and event.stage.endswith("tokenize") for event in events) <= 1
    assert not [event for event in events if "capture" in event.stage]
    shutil.rmtree(data)  # a cell stands alone
    assert Run.open(tmp_path / "s" / "cells" / "fewer-seed0").tokenizer.is_dir()


def test_without_a_base_data_is_made_once(world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "HELD_OUT", 8)
    tree = yaml.safe_load((world.path / "config.yaml").read_text(encoding="utf-8"))
    content = {"settings": tree, "variants": {"a": {}, "b": {"train.lr": 1e-3}}, "seeds": 2}
    content["settings"]["train"].pop("minutes")
    events: list[Event] = []
    sweep(plan_of(tmp_path, content), tmp_path / "s", events.append)
    (data,) = (tmp_path / "s" / "data").iterdir()
    stages = {event.stage for event in events if event.stage.startswith("data ")}
    assert {f"data {data.name}, {name}" for name in ("capture", "mine")} <= stages
    with TraceStore(world.traces, readonly=True) as one, TraceStore(data / "traces.db", readonly=True) as other:
        assert one.content_digest() == other.content_digest()
    again: list[Event] = []
    sweep(plan_of(tmp_path, content), tmp_path / "s", again.append)
    assert not [event for event in again if event.stage.startswith("data ")]


def test_the_bases_own_training_is_not_repeated(world: Run, tmp_path: Path) -> None:
    from distill.training.loop import train

    shutil.copytree(world.path, tmp_path / "base")
    base = Run.open(tmp_path / "base")
    train(base)
    events: list[Event] = []
    sweep(plan_of(tmp_path, {"variants": {"same": {}}, "seeds": 1}, base), tmp_path / "s", events.append)
    assert not trained_anew(events)
    assert weights(tmp_path / "s", "same-seed0") == (best(base) / "model.safetensors").read_bytes()


def test_engines_are_trained_where_they_are_asked_for(world: Run, tmp_path: Path) -> None:
    content = {"variants": {"long": {"dreaming.dream_length": 3}, "none": {"train.dreams": False}}, "engine": True}
    state = sweep(plan_of(tmp_path, content, world), tmp_path / "s")
    engine = json.loads(
        (tmp_path / "s" / "cells" / "long-seed0" / "engine" / "engine.json").read_text(encoding="utf-8")
    )
    assert engine["config"]["dream_length"] == 3
    assert state["cells"]["long-seed0"]["engine_seconds"] > 0
    assert "without dreams" in state["cells"]["none-seed0"]["engine_skipped"]


# Stops and failures.


def wait_for(process: BaseProcess, path: Path) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.exitcode is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG = 30
"""Steps that can be stopped in between."""


def long_variants(world: Run, folder: Path, seeds: int) -> Path:
    """Longer trainings than those of VARIANTS."""
    settings = VARIANTS["settings"] | {"train.steps": LONG, "train.checkpoint_every": 5, "train.keep_last": 100}
    return write(folder, {"name": "killed", "settings": settings, "variants": {"soft": None}, "seeds": seeds}, world)


def test_stopped_and_killed_it_ends_with_the_same_weights(world: Run, tmp_path: Path) -> None:
    file, cells = long_variants(world, tmp_path, 3), tmp_path / "killed" / "cells"
    command = ["sweep", str(file), "--runs-dir", str(tmp_path), "--no-compare"]
    process = start(tmp_path, command)
    wait_for(process, cells / "soft-seed0" / "checkpoints" / "step-000005")
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130
    assert "Nothing is lost" in (tmp_path / "output.txt").read_text(encoding="utf-8")
    process = start(tmp_path, command)
    wait_for(process, cells / "soft-seed1" / "checkpoints" / "step-000010")
    process.kill()
    process.join()
    state = json.loads((tmp_path / "killed" / "sweep.json").read_text(encoding="utf-8"))
    assert [cell["state"] for cell in state["cells"].values()] == ["trained", "training", "waiting"]
    kept = list_checkpoints(Run.open(cells / "soft-seed1"))
    assert 10 <= int(kept[-1].name.removeprefix("step-")) < LONG
    inode = kept[1].stat().st_ino
    events: list[Event] = []
    sweep(read_plan(file), tmp_path / "killed", events.append)
    assert kept[1].stat().st_ino == inode, "it began anew"
    assert not [event for event in events if event.stage.startswith("cell 1") and event.unit == "step"]
    (twice := tmp_path / "twice").mkdir()  # the third cell was neither stopped nor killed
    sweep(read_plan(long_variants(world, twice, 2)), tmp_path / "undisturbed")
    for name in ("soft-seed0", "soft-seed1"):
        assert weights(tmp_path / "killed", name) == weights(tmp_path / "undisturbed", name)


BAD = {"variants": {"wild": {"train.lr": 1e30}, "tame": {}}, "settings": {"train.warmup": 0}, "name": "bad"}


def test_a_cell_that_fails_is_told_and_tried_again(world: Run, tmp_path: Path) -> None:
    file = write(tmp_path, BAD, world)
    events: list[Event] = []
    state = sweep(read_plan(file), tmp_path / "bad", events.append)
    wild, tame = state["cells"]["wild-seed0"], state["cells"]["tame-seed0"]
    assert (wild["state"], tame["state"]) == ("failed", "trained")
    assert "lower train.lr" in wild["error"]
    assert "\n" not in wild["error"]
    assert [event.stage for event in events if event.kind == "warning" and "failed" in event.message] == ["wild-seed0"]
    result = call("sweep", file, "--runs-dir", tmp_path, "--quiet", "--no-compare")
    assert result.return_value == 1 or result.exit_code == 1
    assert "Failed: wild-seed0" in result.stderr
    tamed = BAD | {"variants": {"wild": {"train.lr": 1e-3}, "tame": {}}}
    events.clear()
    state = sweep(plan_of(tmp_path, tamed, world), tmp_path / "bad", events.append)
    assert state["cells"]["wild-seed0"]["state"] == "trained"
    assert "error" not in state["cells"]["wild-seed0"]
    assert {name for name in trained_anew(events) if name.startswith("cell")} == {"cell 1 of 2, wild-seed0"}


def test_a_bug_in_one_cell_keeps_its_traceback(world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Any, listen: Any) -> dict[str, Any]:
        if job.cell.system == "a":
            raise ZeroDivisionError("division\nby zero")
        return sweep_cells.train_cell(job, listen)

    monkeypatch.setattr("distill.sweep.sweep.train_cell", broken)
    state = sweep(plan_of(tmp_path, {"variants": {"a": {}, "b": {"train.lr": 1e-3}}}, world), tmp_path / "s")
    error = state["cells"]["a-seed0"]["error"]
    assert error.startswith("ZeroDivisionError: division by zero (all of it is in ")
    assert "in broken" in (tmp_path / "s" / "errors" / "a-seed0.txt").read_text(encoding="utf-8")
    assert state["cells"]["b-seed0"]["state"] == "trained"


def test_a_stage_that_fails_fails_its_cells_alone(world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(path: Path, settings: Settings, *args: Any) -> Run:
        if settings.tokenize.kind == "sentencepiece":
            raise BadInput("none-such")
        return sweep_cells.prepare_data(path, settings, *args)

    monkeypatch.setattr("distill.sweep.sweep.prepare_data", prepare)
    content = {"variants": {"good": {}, "bad": {"tokenize.kind": "sentencepiece"}}, "seeds": 2}
    state = sweep(plan_of(tmp_path, content, world), tmp_path / "s")
    assert [state["cells"][f"bad-seed{i}"]["state"] for i in (0, 1)] == ["failed", "failed"]
    assert "none-such" in state["cells"]["bad-seed1"]["error"]
    assert state["cells"]["good-seed1"]["state"] == "trained"


def test_two_sweeps_do_not_work_on_one_folder(world: Run, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with Run(tmp_path / "s", Settings()).working(), pytest.raises(DistillError, match="another dream command"):
        sweep(plan_of(tmp_path, VARIANTS, world), tmp_path / "s")


def test_a_child_is_trained_by_one_command_and_copied_or_not_at_all(
    copied: Path, world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(child: Run, **_: Any) -> None:
        with pytest.raises(DistillError, match="another dream command"), child.working():
            pass

    there = Run.open(copied / "cells" / NAMES[1])
    cell = Cell("soft", 1, {}, there.settings, there.settings)
    monkeypatch.setattr("distill.training.loop.train", train)
    for learn in (
        lambda: sweep_cells.train_cell(sweep_cells.Job(cell, world, there.path, False, "cell"), silent),
        lambda: train_child(world, there.path, there.settings, there.settings.train.steps, "train", silent),
    ):
        learn()
        with there.working(), pytest.raises(DistillError, match="another dream command"):
            learn()
    (tmp_path / "traces.db").write_text("no database", encoding="utf-8")
    with pytest.raises(DistillError, match=r"can't copy it to .*free some space"):
        copy_file(tmp_path / "traces.db", tmp_path / "copy.db")


# A changed file.


def test_cells_are_added_and_others_left_alone(copied: Path, world: Run, tmp_path: Path) -> None:
    before = weights(copied, "nodream-seed1")
    changed = VARIANTS | {"variants": {"soft": {}, "slow": {"train.lr": 1e-4}}}
    events: list[Event] = []
    state = sweep(plan_of(tmp_path, changed, world), copied, events.append)
    assert {name: cell["state"] for name, cell in state["cells"].items()} == {
        "soft-seed0": "trained",
        "soft-seed1": "trained",
        "nodream-seed0": "trained",
        "nodream-seed1": "trained",
        "slow-seed0": "trained",
        "slow-seed1": "trained",
    }
    assert weights(copied, "nodream-seed1") == before
    assert {stage for stage in trained_anew(events) if stage.startswith("cell")} == {
        "cell 3 of 4, slow-seed0",
        "cell 4 of 4, slow-seed1",
    }
    assert "nodream" not in (copied / "summary.md").read_text(encoding="utf-8")


def test_other_settings_under_the_same_name_need_force(copied: Path, world: Run, tmp_path: Path) -> None:
    changed = VARIANTS | {"variants": {"soft": {"train.lr": 1e-4}, "nodream": {"train.dreams": False}}}
    before = weights(copied, "soft-seed0")
    state = (copied / "sweep.json").read_bytes()
    with pytest.raises(RunMismatch, match=r"soft-seed0: .*train\.lr was 0\.004, is 0\.0001.*--force"):
        sweep(plan_of(tmp_path, changed, world), copied)
    assert weights(copied, "soft-seed0") == before
    assert (copied / "sweep.json").read_bytes() == state
    planned = call("sweep", write(tmp_path, changed, world), "--runs-dir", tmp_path, "--dry-run")
    assert "soft-seed0: train.lr was 0.004, is 0.0001 (needs --force)" in planned.stdout
    events: list[Event] = []
    sweep(plan_of(tmp_path, changed, world), copied, events.append, force=True)
    assert {stage.partition(", ")[2] for stage in trained_anew(events) if stage.startswith("cell")} == {
        "soft-seed0",
        "soft-seed1",
    }
    assert weights(copied, "soft-seed0") != before


def test_how_a_training_runs_may_change(copied: Path, world: Run, tmp_path: Path) -> None:
    how = {"train.keep_last": 3, "train.micro_rows": 1, "train.log_every": 5, "mine.processes": 1}
    content = VARIANTS | {"variants": {"soft": None}, "seeds": 1}
    before, events = weights(copied, "soft-seed0"), list[Event]()
    plan = plan_of(tmp_path, content | {"settings": VARIANTS["settings"] | how}, world)
    assert sweep(plan, copied, events.append)["cells"]["soft-seed0"]["state"] == "trained"
    assert (weights(copied, "soft-seed0"), trained_anew(events)) == (before, set())
    kept = plan_of(tmp_path, content, world)
    assert sweep_cells.data_key(plan.cells[0].data) == sweep_cells.data_key(kept.cells[0].data)
    varied = plan_of(tmp_path, content | {"variants": {"soft": {"train.precision": "bfloat16"}}}, world)
    with pytest.raises(RunMismatch, match=r"train\.precision was 'float32', is 'bfloat16'"):
        sweep(varied, copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no keys"),
        ("a: [", "is not YAML"),
        ("- a", "holds no keys"),
        ("variant: {a: {}}", "variant: no such key; did you mean variants?"),
        ("name: a", "has nothing to try; give it variants"),
        ("name: [a]\nvariants: {a: }", "name: ['a'] should be text"),
        ("variants: {a: {train.learning: 1}}", "variants.a: train.learning: no such setting"),
        ("variants: {a: {train.stepz: 1}}", "variants.a: train.stepz: no such setting. Did you mean: 'steps'?"),
        ("variants: {a: {train: 3}}", "variants.a: train: '3': it is a section; write train.SETTING: VALUE"),
        ("variants: {a: {train.lr: fast}}", "variants.a: train.lr: 'fast' should be a number"),
        (
            "variants: {a: {train.minutes: 3}}",
            "variants.a: cells are to see as many tokens each",
        ),
        (
            "variants: {a: {train.steps: 0}}",
            "train.steps=0: must be at least 1",
        ),
        ("variants: {a: {train.minutes: 1}}", "variants.a: cells are to see as many tokens each"),
        ("variants: {a: {train.schedule: square}}", "variants.a: train.schedule: 'square' is none of wsd, cosine"),
        ("variants: {a: {student.preset: nanoo}}", "variants.a: student.preset: 'nanoo' is none of"),
        ("variants: {a: {seed: 1}}", "variants.a: seed: cells get their seeds from the key seeds"),
        ("variants: {a: {evaluate.dreams: 1}}", "variants.a: evaluate.dreams: no training reads it"),
        (
            "variants: {a: {polish.lr: 1e-5}}",
            "variants.a: polish.lr: no training reads it; `dream polish` a cell's run",
        ),
        ("variants: {a: {redream.samples: 2}}", "variants.a: redream.samples: no training reads it"),
        ("variants: {a: {see.steps: 9}}", "variants.a: see.steps: no training reads it"),
        ('variants: {a: {teacher.think: "true"}}', "variants.a: teacher.think: all cells learn from the same answers"),
        (
            "variants: {a: {dreaming.dream_length: 1}}",
            "variants.a: dreaming.dream_length: only the dream engine",
        ),
        ("variants: [a, b]", "variants: ['a', 'b'] should hold names and values"),
        ("variants: {a: 3}", "variants.a: '3' should hold settings"),
        ("variants: {a/b: {}}", "variants.a/b: a variant is named with letters"),
        ("variants: {a: {train.lr: {x: 1}}}", "variants.a: train.lr.x: no such setting"),
        ("variants: {a: {train.lr: 1, train: {lr: 2}}}", "variants.a: train.lr: is given twice"),
        ("variants: {a: }\nsettings: {train.minutes: 3}", "settings: train.minutes: cells are to see as many tokens"),
        ("variants: {a: }\nseeds: 0", "seeds: '0' should be how many"),
        ("variants: {a: }\nseeds: [1, 1]", "seeds: ['1', '1'] should be how many"),
        ("variants: {a: }\nseeds: true", "seeds: 'true' should be how many"),
        ("variants: {a: }\nmetric: bits", "metric: 'bits' is none"),
        ("variants: {soft: }\nbaseline: sotf", "baseline: 'sotf' is none of its cells; did you mean soft?"),
        ("variants: {a: }\nengine: 3", "engine: '3' should be true or false"),
        ("variants: {a: }\nbase: nowhere", "base: nowhere: not a run folder"),
    ],
)
def test_a_bad_file_is_refused_with_the_key_to_mend(content: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(BadInput) as caught:
        read_plan(file)
    assert str(caught.value).startswith(f"{file}:")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_something_else_is_refused(world: Run, tmp_path: Path) -> None:
    (tmp_path / "lenses").mkdir()
    (tmp_path / "lenses" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(BadInput, match="is not empty and holds no sweep"):
        sweep(plan_of(tmp_path, VARIANTS, world), tmp_path / "lenses")
    assert [path.name for path in (tmp_path / "lenses").iterdir()] == ["letter.txt"]


def test_a_dry_run_writes_nothing(world: Run, tmp_path: Path) -> None:
    file = write(tmp_path, VARIANTS, world)
    before = sorted(path for path in tmp_path.rglob("*"))
    result = call("sweep", file, "--runs-dir", tmp_path, "--dry-run", "--json")
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    assert [cell["cell"] for cell in found["cells"]] == NAMES
    assert {(cell["data"], cell["state"], *cell["runs"]) for cell in found["cells"]} == {
        (str(world.path), "new", "train")
    }
    assert "nodream-seed1" in call("sweep", file, "--runs-dir", tmp_path, "--dry-run").stdout
    assert sorted(path for path in tmp_path.rglob("*")) == before
    planned = overview(plan_of(tmp_path, VARIANTS | {"engine": True}, world), tmp_path / "lenses")
    assert {(*cell["runs"],) for cell in planned["cells"]} == {("train", "engine")}


# What comes out.


def test_the_table_sorts_cells_by_the_metric(swept: tuple[Path, dict[str, Any], list[Event]]) -> None:
    folder, state, _ = swept
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [entry["cost"] for entry in results["systems"].values()] == [COST, COST]
    values = {name: entry["metrics"]["bits_per_byte"] for name, entry in results["systems"].items()}
    systems = sorted(values, key=lambda name: values[name]["value"])
    assert state["order"] == [f"{system}-seed{seed}" for system in systems for seed in (0, 1)]
    for name in NAMES:
        cell, value = state["cells"][name], values[state["cells"][name]["system"]]
        assert (cell["value"], cell["low"], cell["seed_value"]) == (
            value["value"],
            value["low"],
            value["seeds"][cell["seed"]],
        )
    text = (folder / "summary.md").read_text(encoding="utf-8")
    assert "4 cells by bits per byte" in text
    assert all(f"| {name} |" in text for name in NAMES)
    assert (folder / "report.html").is_file()


def test_what_was_measured_is_not_measured_again(
    swept: tuple[Path, dict[str, Any], list[Event]], world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.exam.examine.open_examinee", lambda *_: pytest.fail("opened in vain"))
    again = whole_sweep(plan_of(tmp_path, VARIANTS, world), swept[0])
    assert again == json.loads(json.dumps(swept[1]))


def test_what_a_cell_learned_since_is_not_measured(copied: Path, world: Run, tmp_path: Path) -> None:
    """A recipe is measured as its settings say, whatever became of one of its students."""
    went_on(Run.open(copied / "cells" / "soft-seed0"), "polish", rounds=1)
    whole_sweep(plan_of(tmp_path, VARIANTS, world), copied)
    told = json.loads((copied / "results.json").read_text(encoding="utf-8"))["systems"]["soft"]["trained_on"]
    assert (told["steps"], told["onward"]) == (STEPS, "")


def test_where_nothing_is_compared_no_report_is_named(copied: Path, world: Run, tmp_path: Path) -> None:
    content = VARIANTS | {"variants": {"soft": None}, "seeds": 1}
    result = call("sweep", write(tmp_path, content, world), "--runs-dir", tmp_path, "--quiet")
    assert result.exception is None, result.output
    assert "Report:" not in result.stdout
    assert "compared_with" not in json.loads((copied / "sweep.json").read_text(encoding="utf-8"))


def test_a_failed_baseline_is_replaced_aloud(world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = BAD | {"variants": {**BAD["variants"], "half": {"train.soft_weight": 0}}, "seeds": 2}
    train = sweep_cells.train_cell

    def one_fails(job: Any, listen: Any) -> dict[str, Any]:
        if job.cell.name in ("wild-seed0", "wild-seed1", "half-seed1"):
            raise BadInput("no luck")
        return train(job, listen)

    monkeypatch.setattr("distill.sweep.sweep.train_cell", one_fails)
    events: list[Event] = []
    plan = plan_of(tmp_path, content, world)
    assert plan.baseline == "wild"
    state = whole_sweep(plan, tmp_path / "s", events.append)
    assert state["compared_with"] == "tame"
    results = json.loads((tmp_path / "s" / "results.json").read_text(encoding="utf-8"))
    told = ["wild, the baseline, has no trained cell: compared with tame in its place.", "half has 1 of 2 seeds"]
    for text in told:
        assert any(warning.startswith(text) for warning in results["warnings"])
        assert any(event.kind == "warning" and event.message.startswith(text) for event in events)
    assert results["baseline"] == "tame"
    assert told[0] in (tmp_path / "s" / "report.md").read_text(encoding="utf-8")


def test_a_cell_that_can_not_be_measured_keeps_no_other_from_it(
    copied: Path, world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, refused = weights(copied, "nodream-seed0"), {"nodream-seed0"}

    def too_long(target: Any, *args: Any, **how: Any) -> Any:
        if target.path.parent.parent.name in refused:
            raise NothingHeldOut("no held-out answer fits its context")
        return examine(target, *args, **how)

    monkeypatch.setattr("distill.report.measure.examine", too_long)
    state = whole_sweep(plan_of(tmp_path, VARIANTS, world), copied)
    lost, kept = state["cells"]["nodream-seed0"], state["cells"]["nodream-seed1"]
    assert (lost["state"], lost["error"]) == ("failed", "no held-out answer fits its context")
    assert (lost["seed_value"], kept["seed_value"]) == (None, kept["value"])
    results = json.loads((copied / "results.json").read_text(encoding="utf-8"))
    assert (results["baseline"], results["systems"]["nodream"]["seeds"]) == ("soft", 1)
    refused |= {*NAMES}
    result = call("sweep", write(tmp_path, VARIANTS, world), "--runs-dir", tmp_path, "--quiet")
    assert isinstance(result.exception, NothingHeldOut), "all of them"
    refused -= {"nodream-seed0", "nodream-seed1"}
    result = call("sweep", write(tmp_path, VARIANTS, world), "--runs-dir", tmp_path, "--quiet")
    assert result.return_value == 1 or result.exit_code == 1
    assert "Failed: soft-seed0: no held-out answer fits" in result.stderr
    assert weights(copied, "nodream-seed0") == before
    state = json.loads((copied / "sweep.json").read_text(encoding="utf-8"))
    assert state["compared_with"] == "nodream"
    told = "soft, the baseline, could not be measured: compared with nodream in its place."
    assert told in (copied / "report.md").read_text(encoding="utf-8")


def test_the_metric_is_what_the_report_leads_with(tmp_path: Path) -> None:
    def metric(**settings: Any) -> str:
        return plan_of(tmp_path, {"variants": {"a": {}}, "settings": settings}).metric

    assert metric() == "bits_per_byte_used"
    assert metric(**{"evaluate.dreams": 0}) == "bits_per_byte"
    assert metric(**{"capture.dataset": "causal-world"}) == "exact_match"


def test_tables_of_cells_with_and_without_results() -> None:
    def entry(system: str, seed: int, loss: float | None, **more: Any) -> dict[str, Any]:
        return {"system": system, "seed": seed, "state": "trained", "changes": {}, "validation_loss": loss} | more

    cells = {
        "a-seed0": entry("a", 0, 3.0),
        "a-seed2": entry("a", 2, 2.0),
        "b-seed0": entry("b", 0, 2.4, changes={"capture.system": "x|y"}),
        "c-seed0": entry("c", 0, None, state="failed", error="too big"),
    }

    def table(results: dict[str, Any] | None) -> tuple[list[str], list[list[str]]]:
        found = values_of(cells, results, "agreement")
        merged = {name: cells[name] | found[name] for name in cells}
        heading, *lines = rows({"cells": merged, "order": list(found), "metric": "agreement"})
        return heading, lines

    heading, lines = table(None)
    assert heading == ["cell", "settings", "validation loss", "steps", "trained for (s)", "tokens/s", "state"]
    assert [line[0] for line in lines] == ["a-seed0", "a-seed2", "b-seed0", "c-seed0"]
    assert lines[2][1:3] == ["capture.system=x|y", "2.4000"]
    assert lines[-1][-1] == "failed: too big"
    results = {
        "systems": {
            "a": {
                "sweep_seeds": [0, 2],
                "metrics": {"agreement": {"value": 0.5, "low": 0.4, "high": 0.6, "seeds": [0.45, 0.55]}},
            },
            "b": {
                "sweep_seeds": [0],
                "metrics": {"agreement": {"value": 0.2, "low": 0.1, "high": 0.3, "seeds": [0.2]}},
            },
        }
    }
    heading, lines = table(results)
    assert heading[2] == "top-1 agreement, no dream"
    assert [line[0] for line in lines] == ["a-seed0", "a-seed2", "b-seed0", "c-seed0"]
    assert [line[2] for line in lines] == ["45.0 %", "55.0 %", "20.0 %", "–"]
    assert lines[0][3] == "50.0 % [40.0 %, 60.0 %]"
