"""Training as a user lives it: started, killed, resumed, spread over processes, given broken files."""

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.disturbed import start
from support.small_capture import tokenized_small

from distill.backbone.model import Backbone, config_for, load_backbone, save_backbone
from distill.config import RedreamSettings, Settings, StudentSettings, TrainSettings
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, CorruptFile, DistillError, MissingStage, RunMismatch
from distill.events import Event, silent
from distill.exam.baselines import copy_file
from distill.mining.triplets import TripletFile, by_trace, read_triplets
from distill.run import Run
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.build import build_tokenizer
from distill.tokens.packing import ARRAYS, Documents, chosen_dreams, pack, split_traces
from distill.training import checkpoint, numerics, trainer
from distill.training import redream as redreaming
from distill.training.ahead import Ahead
from distill.training.batches import Batch, Row
from distill.training.checkpoint import LoopState
from distill.training.distributed import ALONE, World
from distill.training.loop import train
from distill.training.plan import data_fingerprint, schedule, unread

FILES = ("run.json", "traces.db", "triplets.jsonl", "knowledge.graphml", "tokenizer")


def small_settings(source: Run, **train_settings: object) -> Settings:
    options: dict[str, object] = {
        "steps": 12,
        "warmup": 0.25,
        "batch_rows": 2,
        "lr": 4e-3,
        "checkpoint_every": 4,
        "validate_every": 4,
        "log_every": 2,
        "drafts_from": 0.5,
        "precision": "float32",
        "compile": "never",
        "keep_last": 9,
        **train_settings,
    }
    return Settings(
        teacher=source.settings.teacher,
        capture=source.settings.capture,
        tokenize=source.settings.tokenize,
        student=StudentSettings(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, context=256),
        train=TrainSettings(**options),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Captured, mined and tokenized; not trained."""
    torch.set_num_threads(1)
    run = tokenized_small(tmp_path_factory.mktemp("prepared") / "run")
    return Run.create(run.path, small_settings(run))


def fork(source: Run, folder: Path, **train_settings: object) -> Run:
    run = Run.create(folder, small_settings(source, **train_settings))
    for name in FILES:
        copy_file(source.path / name, run.path / name)
    return run


@pytest.fixture(scope="module")
def trained(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve steps without a stop."""
    run = fork(prepared, tmp_path_factory.mktemp("trained") / "run")
    train(run)
    return run


def weights(run: Run, step: int) -> bytes:
    return (checkpoint.folder_of(run, step) / "model.safetensors").read_bytes()


def rows(run: Run) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_training_learns_and_leaves_its_records(trained: Run) -> None:
    record = trained.require("train")
    assert record.summary["steps"] == 12
    measured = rows(trained)
    assert [row["step"] for row in measured] == [2, 4, 6, 8, 10, 12]
    assert measured[-1]["loss"] < 0.9 * measured[0]["loss"]
    assert {path.name for path in checkpoint.list_checkpoints(trained)} == {f"step-{n:06d}" for n in (0, 4, 8, 12)}
    state = checkpoint.read_loop(checkpoint.latest(trained))
    assert state.drafts
    validated = {row["step"]: row["validation_loss"] for row in measured if "validation_loss" in row}
    assert state.best_step == min(validated, key=validated.__getitem__)
    assert state.best_loss == pytest.approx(validated[state.best_step], abs=1e-6)
    assert checkpoint.best(trained) == checkpoint.folder_of(trained, state.best_step)
    assert list((trained.path / "tensorboard").iterdir())
    checkpoint.verify_checkpoint(checkpoint.latest(trained))


def test_what_is_validated_for_the_log_is_not_validated_again_for_the_checkpoint(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, validate = list[float](), trainer.validate

    def counted(*args: Any) -> dict[str, float]:
        found = validate(*args)
        measured.append(found["validation_loss"])
        return found

    monkeypatch.setattr(trainer, "validate", counted)
    summary = train(fork(prepared, tmp_path / "run", steps=4, validate_every=2, drafts_from=1.0))
    assert len(measured) == 2
    assert summary["validation_loss"] == pytest.approx(measured[-1], abs=1e-6)


def test_checksums_that_know_no_weights_are_told(tmp_path: Path) -> None:
    (tmp_path / "checksums.json").write_text('{"loop.json": "0"}', encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"checksums\.json: knows no model\.safetensors; delete "):
        checkpoint.weights_of(tmp_path)


def test_what_force_would_replace_stays_where_no_training_can_begin(trained: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(trained.path, tmp_path / "run"), copy.deepcopy(trained.settings))
    before = checkpoint.list_checkpoints(run)
    for section, name, value, match in (
        (run.settings.train, "optimizer", "adam", "train.optimizer"),
        (run.settings.train, "device", "tpu", "train.device"),
        (run.settings.student, "init", str(tmp_path / "nowhere"), "nowhere"),
    ):
        was = getattr(section, name)
        setattr(section, name, value)
        with pytest.raises(DistillError, match=match):
            train(run, force=True)
        setattr(section, name, was)
        assert checkpoint.list_checkpoints(run) == before
        assert run.require("train") == trained.require("train")


def test_a_training_begun_anew_and_stopped_is_no_student_yet(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shipped and measured asks for the record; its best checkpoint is that of no step."""
    run = Run(shutil.copytree(trained.path, tmp_path / "run"), trained.settings)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(run, force=True)
    with pytest.raises(MissingStage, match="no finished train stage; run `dream train"):
        run.require("train")
    train(run)
    assert run.require("train").summary["steps"] == 12


def test_what_a_stop_left_is_worth_more_than_the_start(tmp_path: Path) -> None:
    """Nothing was validated yet; where something was, it counts."""
    run = Run.create(tmp_path / "run", Settings())
    for last, expected in (
        (LoopState(131, stopped=True), 131),
        (LoopState(132), 0),
        (LoopState(133, stopped=True, best_step=132), 132),
    ):
        for state in (LoopState(), last):
            folder = checkpoint.folder_of(run, state.step)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "loop.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
        assert checkpoint.best(run) == checkpoint.folder_of(run, expected)


def test_dreams_are_drafted_for_what_will_be_read_alone(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted: list[int] = []

    def dream(model: object, documents: object, tokenizer: object, steps: int, seed: int, some: Sequence[int]) -> Any:
        drafted.extend(some)
        return {}

    monkeypatch.setattr("distill.training.drafts.dream_on", dream)
    run = fork(prepared, tmp_path / "run", steps=2, batch_rows=1, drafts_from=0.0, drafts_share=1.0, empty_dreams=0.0)
    pack(run)
    made = trainer.Trainer(run, ALONE, silent)
    made.fit()
    read = {piece.document for row in made.batches.epoch(0)[:2] for piece in row}
    assert drafted
    assert {*drafted} <= read
    assert len(read) < len(made.batches.usable)


def test_dreams_may_not_get_longer_within_a_training(trained: Run, tmp_path: Path) -> None:
    """train.stutter and train.strict go by how long they may be."""
    run = Run(shutil.copytree(trained.path, tmp_path / "run"), copy.deepcopy(trained.settings))
    run.settings.dreaming.dream_length = run.settings.mine.steps + 1
    with pytest.raises(RunMismatch, match="dream_length"):
        train(run)


def test_a_finished_training_is_kept(trained: Run) -> None:
    events: list[Event] = []
    assert train(trained, events.append) == trained.require("train").summary
    assert [event.kind for event in events] == ["done"]


def test_training_twice_gives_the_same_bits(trained: Run, prepared: Run, tmp_path: Path) -> None:
    again = fork(prepared, tmp_path / "run")
    train(again)
    assert weights(again, 12) == weights(trained, 12)
    assert rows(again) == rows(trained)


def test_more_steps_go_on_from_the_last_checkpoint(trained: Run, tmp_path: Path) -> None:
    """Resume through every checkpoint, before and after the drafts: the bits of an undisturbed run."""
    run = Run.open(Path(shutil.copytree(trained.path, tmp_path / "run")))
    for step in (8, 12):  # as if killed after step 4, with metrics already written past it
        shutil.rmtree(checkpoint.folder_of(run, step))
    content = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    del content["stages"]["train"]
    (run.path / "run.json").write_text(json.dumps(content), encoding="utf-8")
    train(run)
    assert weights(run, 12) == weights(trained, 12)
    assert rows(run) == rows(trained)
    optimizer = "optimizer.safetensors"
    ours = (checkpoint.latest(run) / optimizer).read_bytes()
    assert ours == (checkpoint.latest(trained) / optimizer).read_bytes()


def test_the_time_of_all_sessions_is_told(trained: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(trained.path, tmp_path / "run"), copy.deepcopy(trained.settings))
    newest = checkpoint.latest(run)
    loop = json.loads((newest / "loop.json").read_text(encoding="utf-8"))
    (newest / "loop.json").write_text(json.dumps(loop | {"seconds": 3600.0}), encoding="utf-8")
    (newest / "checksums.json").unlink()
    checkpoint.write_checksums(newest)
    run.settings.train.log_every += 1
    train(run)
    assert 3600 < run.require("train").seconds < 3700


def test_muon_and_a_mean_of_weights_go_on_to_the_same_bits(prepared: Run, tmp_path: Path) -> None:
    """What ships is the mean; what training goes on from lies beside it."""
    hidden = {"bottleneck": 0.7, "prompt_dropout": 0.2, "unread_until": 0.9}
    options = {"optimizer": "muon", "average": 0.2, "steps": 8, **hidden}
    whole, stopped = (fork(prepared, tmp_path / name, **options) for name in ("whole", "stopped"))
    train(whole)
    stopped.settings.train.checkpoint_every = 8
    train(stopped)
    shutil.rmtree(checkpoint.folder_of(stopped, 8))
    shutil.copytree(checkpoint.folder_of(whole, 4), checkpoint.folder_of(stopped, 4))
    (stopped.path / "run.json").write_text((prepared.path / "run.json").read_text(encoding="utf-8"), encoding="utf-8")
    stopped.settings.train.checkpoint_every = 4
    train(stopped)
    assert rows(stopped) == rows(whole)
    last, again = (checkpoint.folder_of(run, 8) for run in (whole, stopped))
    for name in ("model.safetensors", "raw.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (last / name).read_bytes(), name
    mean, raw = load_backbone(last).state_dict(), checkpoint.load_raw(last)
    before = load_backbone(checkpoint.folder_of(whole, 4)).state_dict()
    for name, tensor in raw.items():
        assert not torch.equal(mean[name], tensor), name
        assert float((mean[name] - tensor).norm()) < float((before[name] - tensor).norm()), name


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, Settings())
    one, two = (checkpoint.folder_of(run, step) for step in (1, 2))
    for folder in (one, two):
        folder.mkdir(parents=True)

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", press)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(run, 1, 2)
    assert checkpoint.list_checkpoints(run) == [two]
    checkpoint.delete(two)
    assert list(run.checkpoints.iterdir()) == [], "what was left of the other is cleared"


def test_documents_packed_some_at_a_time_are_the_same_files(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fork(prepared, tmp_path / "run")
    counts = pack(run)
    files = {path: path.read_bytes() for path in run.data.rglob("*.npy")}
    assert len(files) >= 2 * len(ARRAYS)
    (run.data / "data.json").unlink()
    monkeypatch.setattr("distill.tokens.packing.TOGETHER", 5)
    events: list[Event] = []
    assert pack(run, events.append) == counts
    assert {path: path.read_bytes() for path in run.data.rglob("*.npy")} == files
    assert events[-1].done == events[-1].total > 5
    assert all(event.kind == "progress" for event in events)
    was = run.require("capture")
    run.record("capture", was.settings, {"traces.db": "of more prompts"}, was.summary, 0.0)
    pack(run, events.append)
    (warning,) = (event.message for event in events if event.kind == "warning")
    assert f"`dream mine {run.path} && dream tokenize {run.path}` first" in warning
    run.record("capture", was.settings, was.outputs, was.summary, 0.0)
    mined, lines = by_trace(read_triplets(run.triplets)), run.triplets.read_text(encoding="utf-8").splitlines()
    (tmp_path / "shuffled.jsonl").write_text("\n".join(sorted(lines)), encoding="utf-8")
    with contextlib.closing(TripletFile(tmp_path / "shuffled.jsonl")) as found:
        assert found == mined
        assert len(found) == len(mined)
        assert "unheard" not in found


def test_dreams_under_which_answers_are_likelier_are_packed(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an interrupted choice goes on to the same file."""
    monkeypatch.setattr(redreaming, "TOGETHER", 4)
    # One that has learned next to nothing dreams of anything, and its answers are as likely after that.
    trained = fork(prepared, tmp_path / "trained", steps=1, checkpoint_every=1, validate_every=1, drafts_share=0.0)
    train(trained)
    runs: list[Run] = []
    for name in ("whole", "stopped"):
        shutil.copytree(trained.path, tmp_path / name)
        runs.append(Run.open(tmp_path / name))
        runs[-1].settings.redream = RedreamSettings(samples=4, prior=0.0)
    run, stopped = runs
    summary = redreaming.redream(run)

    def stop(event: Event) -> None:
        if event.kind == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        redreaming.redream(stopped, stop)
    assert chosen_dreams(stopped) == {}
    redreaming.redream(stopped)
    assert stopped.dreams.read_bytes() == run.dreams.read_bytes()
    assert not list(stopped.path.glob("dreams-*"))
    assert redreaming.redream(run) == summary
    chosen = chosen_dreams(run)
    run.settings.redream.minutes = 1e-9
    assert redreaming.redream(run)["dreams"] == 0
    assert chosen_dreams(run) == chosen, "what a round doesn't come to, an earlier one chose"
    shutil.copytree(stopped.path, run.path, dirs_exist_ok=True)

    lines = {line["trace"]: line for line in map(json.loads, run.dreams.read_text(encoding="utf-8").splitlines())}
    assert summary["answers"] == summary["dreams"] == len(lines)
    assert 0 < summary["replaced"] == sum(line["replaced"] for line in lines.values())
    for line in lines.values():
        answer, answer_now = line["answer"]
        assert line["replaced"] == (answer_now > answer)

    with TraceStore(run.traces, readonly=True) as store:
        keys = [trace.key for trace in split_traces(store)[0]]
    mined = Documents.load(run.data / "train")
    before = data_fingerprint(run)
    pack(run)
    assert data_fingerprint(run) != before
    assert "an earlier stage has run again" in run.stale("train")
    documents, tokenizer = Documents.load(run.data / "train"), StudentTokenizer.load(run.tokenizer)
    model, newline = load_backbone(checkpoint.best(run)).double(), tokenizer.newline_id
    for i, key in enumerate(keys):
        ids = documents.dream(i).tolist()
        if key not in lines:
            assert not ids
            continue
        assert tokenizer.decode(ids) == lines[key]["dream"]
        assert (ids != mined.dream(i).tolist()) == lines[key]["replaced"]
        if i % 9:
            continue
        for place, dream in enumerate((mined.dream(i).tolist(), ids)):
            think = [tokenizer.think_id, newline, *dream, newline, tokenizer.end_think_id, newline]
            text = torch.tensor([*documents.prompt(i).tolist(), *think, *documents.answer(i).tolist()])
            with torch.no_grad():
                said = model(text[None, :-1]).log_softmax(-1)[0].gather(1, text[1:, None]).squeeze(1)
            begin = len(documents.prompt(i)) - 1
            assert float(said[begin : begin + len(think)].sum()) == pytest.approx(lines[key]["dream_nats"][place], 1e-4)
            assert float(said[begin + len(think) :].sum()) == pytest.approx(lines[key]["answer"][place], 1e-4)
    run.record("tokenize", {}, {"tokenizer": "another"}, {}, 0.0)
    assert chosen_dreams(run) == {}, "made of other tokens"


def wait_for(process: BaseProcess, run: Run) -> None:
    """For its first checkpoint."""
    deadline = time.monotonic() + 240
    while not checkpoint.folder_of(run, 4).exists():
        assert process.exitcode is None, (run.path.parent / "output.txt").read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigkill_and_start_again_end_with_the_same_files(trained: Run, prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run")
    process = start(tmp_path, ["train", str(run.path), "--phase", "backbone"])
    wait_for(process, run)
    process.kill()
    process.join()
    assert "train" not in run.records()
    train(Run.open(run.path))
    for path in checkpoint.list_checkpoints(trained):
        for name in ("model.safetensors", "config.json"):
            assert (run.checkpoints / path.name / name).read_bytes() == (path / name).read_bytes()
    assert rows(run) == rows(trained)
    assert not [path.name for path in run.checkpoints.iterdir() if path.name.endswith((".partial", ".old"))]


def test_two_processes_train_the_same_student(trained: Run, prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", processes=2)
    events: list[Event] = []
    summary = train(run, events.append)
    assert summary["processes"] == 2
    assert any(event.kind == "progress" for event in events)
    one, two = (load_backbone(checkpoint.folder_of(r, 4)).state_dict() for r in (trained, run))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-4)
    assert_alike(run, trained, rel=1e-4)


def assert_alike(run: Run, other: Run, rel: float) -> None:
    """What each step's row tells of all processes; the other losses are the first one's."""
    told = ("step", "loss", "gradient_norm", "validation_loss", "validation_bits_per_byte")
    ours, theirs = ([{name: row[name] for name in told if name in row} for row in rows(r)] for r in (run, other))
    assert ours == [pytest.approx(row, rel=rel) for row in theirs]


def test_several_processes_need_a_gpu_each_unless_they_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, joined = list[int](), list[str]()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: joined.append(backend))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for place, device in (("0", "auto"), ("1", "cpu")):
        monkeypatch.setenv("LOCAL_RANK", place)
        assert World.join(device) == World(1, 2)
    assert (chosen, joined) == ([0], ["cpu:gloo,cuda:nccl", "gloo"])
    with pytest.raises(BadInput, match=r"train\.processes: process 2 of this machine finds 1 GPU; .*device=cpu"):
        World.join("cuda")


def test_what_two_processes_sharded_goes_on_after_a_kill_in_one_two_or_four(prepared: Run, tmp_path: Path) -> None:
    """Processes that make different numbers of passes, Muon, a mean of the weights, and drafts."""
    less = {"batch_rows": 5, "micro_rows": 2, "recompute": True, "log_every": 1}
    options = {"optimizer": "muon", "average": 0.2, "steps": 5, "checkpoint_every": 2, **less}
    whole = fork(prepared, tmp_path / "whole", **options)
    train(whole)
    killed = fork(prepared, tmp_path / "killed", processes=2, shard="always", **options)

    said: list[str] = []

    def kill(event: Event) -> None:
        said.append(event.message)
        if event.kind == "progress" and event.done == 3:
            workers = [process for process in multiprocessing.active_children() if "ForkServer" in process.name]
            max(workers, key=lambda worker: int(worker.name.rpartition("-")[2])).kill()

    with pytest.raises(DistillError, match="process 1 ended with code -9; start again to resume"):
        train(killed, kill)
    assert "each of 2 processes holds a part of the student" in said
    assert len(list((checkpoint.latest(killed) / "optimizer").iterdir())) == 2
    for processes in (1, 2, 4):
        run = Run.open(Path(shutil.copytree(killed.path, tmp_path / str(processes))))
        run.settings.train.processes = processes
        train(run)
        assert_alike(run, whole, rel=1e-4)
        ours, theirs = (load_backbone(checkpoint.latest(r)).state_dict() for r in (run, whole))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("how", [{"micro_rows": 1}, {"recompute": True}])
def test_less_memory_trains_the_same_student(how: dict[str, int], trained: Run, prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", **how)
    train(run)
    one, two = (load_backbone(checkpoint.folder_of(r, 4)).state_dict() for r in (trained, run))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-4)
    for theirs, ours in zip(rows(trained)[:2], rows(run)[:2], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_batches_made_ahead_train_the_same_student(
    trained: Run, prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; drafts come in between."""
    taken: list[bool] = []

    def prepare(self: Ahead, rows: list[Row], unread: float = 0.0) -> None:
        self._made = (rows, unread), self.make(rows, unread)

    def take(self: Ahead, rows: list[Row], unread: float = 0.0) -> list[Batch]:
        taken.append(self._made is not None and self._made[0] == (rows, unread))
        return original(self, rows, unread)

    original = Ahead.take
    monkeypatch.setattr(Ahead, "prepare", prepare)
    monkeypatch.setattr(Ahead, "take", take)
    run = fork(prepared, tmp_path / "run")
    train(run)
    assert sum(taken) > 3
    one, two = (checkpoint.folder_of(r, 12) / "model.safetensors" for r in (trained, run))
    assert one.read_bytes() == two.read_bytes()


def test_recomputing_keeps_what_enters_each_layer_alone() -> None:
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        config = config_for(StudentSettings(hidden=32, layers=4, heads=2, kv_heads=2, ffn=64, context=64), 256, 0, 1)
        model = Backbone(config).initialize(0).train()
        model.recompute, saved = recompute, 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.hidden(torch.arange(64)[None])
        kept[recompute] = saved
    assert kept[True] < kept[False] / 4


def test_minutes_end_a_training(prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", minutes=0.03, steps=10**6, drafts_share=0.0)
    summary = train(run)
    state = checkpoint.read_loop(checkpoint.latest(run))
    assert 0 < summary["steps"] < 10**4
    assert state.seconds == pytest.approx(1.8, abs=0.9)


def test_a_trial_chooses_and_is_remembered(prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", precision="auto", compile="auto", steps=3, checkpoint_every=3)
    summary = train(run)
    kept = json.loads((run.checkpoints / "numerics.json").read_text(encoding="utf-8"))
    assert summary["numerics"] == kept["precision"], "three steps don't pay for compiling"
    assert set(kept["products"]) == {"float32", "bfloat16"}
    assert (summary["trial"], summary["trial_seconds"]) == (kept["trial"], kept["seconds"])
    assert kept["why"] != "as set"


def test_precision_asked_for_on_resume_is_obeyed(prepared: Run, tmp_path: Path) -> None:
    """What may change between sessions counts from there on; left to `auto` it stays what the training began with."""
    run = fork(prepared, tmp_path / "run", precision="bfloat16", steps=1, batch_rows=1, keep_last=1)
    run.settings.student.context = 96
    kept = run.checkpoints / "numerics.json"
    train(run)
    assert json.loads(kept.read_text(encoding="utf-8"))["precision"] == "bfloat16"
    run.settings.train.precision = "float32"
    assert train(run)["numerics"] == "bfloat16", "nothing was left to train"
    run.settings.train.precision, run.settings.train.steps = "auto", 2
    assert train(run)["numerics"] == "bfloat16"
    run.settings.train.precision, run.settings.train.steps = "float32", 3
    events: list[Event] = []
    assert train(run, events.append)["numerics"] == "float32"
    assert any(event.message == "going on in float32, as set; so far it was bfloat16" for event in events)
    assert json.loads(kept.read_text(encoding="utf-8"))["precision"] == "float32"
    kept.write_text(kept.read_text(encoding="utf-8").replace('"cpu"', '"cuda"'), encoding="utf-8")
    run.settings.train.precision, run.settings.train.steps = "auto", 4
    train(run)
    assert json.loads(kept.read_text(encoding="utf-8"))["products"], "another kind of device: found out anew"
    assert {path.name for path in checkpoint.list_checkpoints(run)} >= {"step-000000", "step-000004"}
    run.settings.train.steps = 2
    train(run, events.append)
    assert events[-2].kind == "warning"
    assert "4 steps are done, more than are asked for now" in events[-2].message


def test_minutes_buy_training_not_the_trial(prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock(passed: float = 0.1) -> float:
        nonlocal now
        now += passed
        return now

    def slow(*_: object) -> numerics.Numerics:
        clock(1.5)
        return numerics.Numerics("float32", False, seconds=1.5)

    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=clock, perf_counter=time.perf_counter))
    monkeypatch.setattr(numerics, "choose", slow)
    run = fork(prepared, tmp_path / "run", minutes=0.02, steps=10**6, drafts_share=0.0)
    summary = train(run)
    state = checkpoint.read_loop(checkpoint.latest(run))
    assert state.seconds == pytest.approx(1.2, abs=0.9)
    assert summary["steps"] > 1
    assert summary["trial_seconds"] == 1.5
    run.settings.train.minutes = 0.04
    more = train(run)
    assert more["steps"] > summary["steps"]
    assert checkpoint.read_loop(checkpoint.latest(run)).seconds == pytest.approx(2.4, abs=0.9)


def test_other_settings_are_refused_by_name(trained: Run, prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", steps=2, checkpoint_every=2)
    train(run)
    run.settings.train.lr = 1e-3
    with pytest.raises(RunMismatch, match=r"train\.lr \(0\.004 there, 0\.001 now\)"):
        train(run)
    assert train(run, force=True)["steps"] == 2
    run.settings.train.steps = 3
    assert train(run)["steps"] == 3


def test_a_training_from_before_a_setting_was_there_goes_on(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fork(prepared, tmp_path / "run", steps=2, checkpoint_every=2)
    train(run)
    read = checkpoint.read_loop

    def older(folder: Path) -> checkpoint.LoopState:
        state = read(folder)
        state.settings.pop("dream_weight", None)
        return state

    monkeypatch.setattr(checkpoint, "read_loop", older)
    run.settings.train.steps = 3
    assert train(run)["steps"] == 3
    run.settings.train.steps, run.settings.train.dream_weight = 4, 0.5
    with pytest.raises(RunMismatch, match=r"train\.dream_weight \(1\.0 there, 0\.5 now\)"):
        train(run)


def test_a_harmed_checkpoint_is_refused(prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", steps=4)
    train(run)
    run.settings.train.steps = 8
    file = checkpoint.latest(run) / "optimizer.safetensors"
    content = file.read_bytes()
    middle = len(content) // 2
    for harmed in (content[:middle], content[:middle] + b"?" + content[middle + 1 :], None):
        file.unlink() if harmed is None else file.write_bytes(harmed)
        with pytest.raises(CorruptFile, match=r"step-000004.*optimizer\.safetensors.*delete"):
            train(run)
    shutil.rmtree(checkpoint.latest(run))
    assert train(run)["steps"] == 8


def test_other_data_set_earlier_checkpoints_aside(prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", steps=2)
    train(run)
    first = weights(run, 2)
    run.settings.tokenize.image_tokens = 8
    build_tokenizer(run)
    events: list[Event] = []
    train(run, events.append)
    assert any("training anew" in event.message for event in events)
    assert (run.path / "checkpoints.1" / "step-000002" / "model.safetensors").read_bytes() == first
    assert checkpoint.read_loop(checkpoint.latest(run)).step == 2
    assert len(load_backbone(checkpoint.latest(run)).state_dict()["model.embed_tokens.weight"]) == len(
        StudentTokenizer.load(run.tokenizer).tokens
    )


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_ctrl_c_saves_and_the_rest_is_as_if_undisturbed(
    processes: int, number: signal.Signals, trained: Run, prepared: Run, tmp_path: Path
) -> None:
    """Ctrl-C, and SIGTERM to the one that was started."""
    run = fork(prepared, tmp_path / "run", processes=processes)
    process = start(tmp_path, ["train", str(run.path), "--phase", "backbone", "--json"])
    wait_for(process, run)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(120)
    said = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert process.exitcode == 128 + number, said
    assert "Traceback" not in said
    stopped = checkpoint.read_loop(checkpoint.latest(run)).step
    assert 4 <= stopped < 12
    train(Run.open(run.path))
    if processes == 1:
        assert weights(run, 12) == weights(trained, 12)
        assert rows(run) == rows(trained)
    else:
        assert rows(run)[0]["loss"] == pytest.approx(rows(trained)[0]["loss"], rel=1e-4)


def test_prompts_that_fill_the_context_are_left_out_and_told(prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", steps=2)
    run.settings.student.context = 24
    events: list[Event] = []
    train(run, events.append)
    said = [event.message for event in events if event.kind == "warning"]
    assert any("fill the context of 24 tokens: left out; raise student.context" in text for text in said)
    run.settings.student.context = 8
    with pytest.raises(BadInput, match=r"student\.context"):
        train(run, force=True)


def test_stages_must_come_in_order(small_run: Run, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small_settings(small_run))
    with pytest.raises(MissingStage, match="capture"):
        train(run)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "float8"}, "train.precision"),
        ({"compile": "maybe"}, "train.compile"),
        ({"shard": "true"}, "train.shard"),
        ({"schedule": "steps"}, "train.schedule"),
        ({"device": "warp"}, "train.device"),
        ({"log_every": 0}, "train.log_every"),
        ({"checkpoint_every": 0}, "train.checkpoint_every"),
        ({"lr": -1.0}, "train.lr"),
        ({"betas": [0.9]}, "train.betas"),
        ({"soft_weight": 1.5}, "train.soft_weight"),
        ({"bottleneck": -0.1}, "train.bottleneck"),
        ({"warmup": 50.0}, "train.warmup: 50 is a share"),
    ],
)
def test_bad_settings_are_named(setting: dict[str, object], message: str, prepared: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        train(fork(prepared, tmp_path / "run", **setting))


def test_a_student_starts_from_another_checkpoint(trained: Run, prepared: Run, tmp_path: Path) -> None:
    """--init: the body is taken over, and rows of tokens that both vocabularies have."""
    source = tmp_path / "source"
    source.mkdir()
    model = load_backbone(checkpoint.latest(trained))
    save_backbone(model, source)
    (source / "tokenizer.json").write_bytes((trained.tokenizer / "tokenizer.json").read_bytes())
    run = fork(prepared, tmp_path / "run", steps=1, checkpoint_every=1)
    run.settings.student.init, run.settings.student.image_rows = str(source), "untied"
    with pytest.raises(BadInput, match=r"student\.image_rows=untied: is for a student that begins as its teacher"):
        train(run)
    run.settings.student.image_rows = "apart"
    said: list[Event] = []
    train(run, said.append)
    assert any("student.layers: isn't used: the student begins as" in event.message for event in said)
    train(run, said.append)
    assert sum("begin as their words, and learn no quicker" in event.message for event in said) == 1, "when it begins"
    start = load_backbone(checkpoint.folder_of(run, 0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(start.state_dict()[name], tensor), name
    run.settings.student.init = str(tmp_path)
    with pytest.raises(BadInput, match=r"no config\.json"):
        train(run, force=True)


def test_a_sentencepiece_student_learns_by_chunks(prepared: Run, tmp_path: Path) -> None:
    run = fork(prepared, tmp_path / "run", steps=30, checkpoint_every=30, drafts_share=0.0)
    run.settings.tokenize.kind, run.settings.train.told = "sentencepiece", True
    build_tokenizer(run)
    assert StudentTokenizer.load(run.tokenizer).kind == "sentencepiece"
    events: list[Event] = []
    train(run, events.append)
    assert any("train.told=true: isn't used" in event.message for event in events)
    counts = json.loads((run.data / "data.json").read_text(encoding="utf-8"))["counts"]
    assert counts["train"]["soft_share"] > 0.5
    measured = rows(run)
    assert measured[-1]["loss"] < 0.9 * measured[0]["loss"]
    assert all(row["kl"] >= 0 for row in measured)


def test_schedules() -> None:
    settings = TrainSettings(unread_until=0.4)
    assert [unread(settings, done) for done in (0, 0.1, 0.4, 1)] == [1, 0.75, 0, 0]
    assert unread(TrainSettings(unread_until=0.0), 0.0) == 0
    assert [round(schedule("wsd", p, 0.1), 4) for p in (0.0, 0.5, 0.8, 0.9, 1.0)] == [1.0, 1.0, 1.0, 0.55, 0.1]
    assert [round(schedule("cosine", p, 0.0), 4) for p in (0.0, 0.5, 1.0, 1.2)] == [1.0, 0.5, 0.0, 0.0]
