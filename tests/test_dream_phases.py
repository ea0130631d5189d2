"""The dream engine's training as a user lives it: in phases, killed, resumed, its backbone changed beneath it."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.backbone.model import load_backbone, save_backbone
from distill.config import (
    CaptureSettings,
    DreamingConfig,
    Settings,
    StudentSettings,
    TokenizeSettings,
    TrainSettings,
)
from distill.corpus.capture import capture
from distill.corpus.traces import TraceStore
from distill.dream import engine as dream_engine
from distill.dream.engine import DreamEngine, drafted_dreams, prompt_states
from distill.dream.generator import Dreams
from distill.errors import BadInput, CorruptFile, MissingStage, RunMismatch
from distill.events import Event, Listener
from distill.exam.baselines import copy_file
from distill.knowledge.mine import mine
from distill.mining.triplets import LENSES, Triplet, by_trace, read_triplets
from distill.run import Run
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.build import build_tokenizer
from distill.tokens.chat import prompt_ids, think_ids
from distill.tokens.image_tokens import Codebook, coded_steps, dream_of, load_codes
from distill.training import checkpoint
from distill.training.engine.data import DreamBatch, Order, dream_targets, first_triplets, load_data, outcomes
from distill.training.engine.metrics import measure, mined_dream
from distill.training.engine.objectives import PromptStates, Reader, phase_loss, targets_of
from distill.training.engine.phases import EngineTrainer, train_engine
from distill.training.engine.plan import engine_of
from distill.training.loop import train

FILES = ("run.json", "traces.db", "dataset.jsonl", "triplets.jsonl", "knowledge.graphml", "tokenizer", "data",
         "checkpoints")  # fmt: skip
FULL = {"input": 3, "dream": 5, "end": 3}


def small_settings(**dreaming: object) -> Settings:
    options: dict[str, object] = {
        **{f"{phase}_steps": steps for phase, steps in FULL.items()},
        "dream_length": 2,
        "graph_reasoning_hops": 1,
        "batch": 16,
        "checkpoint_every": 2,
        **dreaming,
    }
    return Settings(
        capture=CaptureSettings(dataset="causal-world", dataset_size=90),
        tokenize=TokenizeSettings(vocab_size=1024, image_tokens=48),
        student=StudentSettings(hidden=32, layers=2, heads=4, kv_heads=2, ffn=64, context=160),
        train=TrainSettings(steps=1, batch_rows=1, compile="never", precision="float32", log_every=1),
        dreaming=DreamingConfig(**options),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Generator[None]:
    """Engines of a small width: what is tested doesn't depend on it, and saving a large one takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for part in ("InputTokenizer", "DreamGenerator", "DreamGraphReasoner"):
            kind = getattr(dream_engine, part)

            class Narrow(kind):
                def __init__(self, *args: Any, **options: Any) -> None:
                    super().__init__(*args, **{**options, "width": 64})

            patch.setattr(dream_engine, part, Narrow)
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, narrow: None) -> Run:
    """A run of the causal world with a backbone that has made one step. Don't alter it."""
    torch.set_num_threads(1)
    run = Run.create(tmp_path_factory.mktemp("student") / "run", small_settings())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.corpus.datasets.stage.HELD_OUT", 5)
        for stage in (capture, mine, build_tokenizer, train):
            stage(run)
    return run


def fork(source: Run, folder: Path, **dreaming: object) -> Run:
    run = Run.create(folder, small_settings(**dreaming))
    for name in FILES:
        if (source.path / name).exists():
            copy_file(source.path / name, run.path / name)
    return run


@pytest.fixture(scope="module")
def finished(student: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All phases, never disturbed. Don't alter it."""
    run = fork(student, tmp_path_factory.mktemp("finished") / "run")
    train_engine(run)
    return run


class Parts:
    """What a trainer works with."""

    def __init__(self, run: Run, steps: int = 2) -> None:
        self.tokenizer, self.codebook = StudentTokenizer.load(run.tokenizer), Codebook.load(run.tokenizer)
        self.backbone = load_backbone(checkpoint.best(run)).requires_grad_(False)
        self.data = load_data(run, self.codebook, steps, self.backbone.config.context)
        self.engine = DreamEngine.new(run.settings.dreaming, self.backbone.config.hidden, self.codebook, 1)
        self.reader = Reader(self.backbone, self.tokenizer)
        self.batch = self.data["train"].batch(np.arange(6))
        self.states = prompt_states(self.backbone, self.batch.prompts)


@pytest.fixture(scope="module")
def parts(student: Run) -> Parts:
    return Parts(student)


def rows(run: Run) -> list[dict[str, Any]]:
    """engine/metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (run.engine / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(run: Run) -> dict[str, bytes]:
    return {name: (run.engine / name).read_bytes() for name in ("engine.safetensors", "optimizer.safetensors")}


def at(phase: str, step: int, do: Callable[[], None]) -> Listener:
    """Do something once a step of a phase is done: before it can be saved."""
    count = sum(steps for name, steps in FULL.items() if list(FULL).index(name) < list(FULL).index(phase)) + step

    def listen(event: Event) -> None:
        if event.kind == "progress" and event.done == count:
            do()

    return listen


# The data.

PHRASES = ("a ball", "drops", "the floor", "rolls", "unknown")
CODES = {"a ball": 0, "drops": 1, "the floor": 2, "rolls": 1}


@given(
    st.lists(st.tuples(*[st.sampled_from(PHRASES)] * 3, st.sampled_from(LENSES), st.integers(0, 9)), max_size=20),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_targets_are_the_dream_and_its_phrases(found: list[tuple[str, str, str, str, int]], steps: int) -> None:
    triplets = [Triplet(*phrases, lens, step, "t", 0, "syntax") for *phrases, lens, step in found]
    row_of = {phrase: row for row, phrase in enumerate(PHRASES)}
    codes, phrase_rows = dream_targets(triplets, CODES, row_of, steps)
    dream = dream_of(triplets, CODES)
    assert codes.shape == phrase_rows.shape == (4, steps, 3)
    for lens, name in enumerate(LENSES):
        kept = dream[name][:steps]
        assert [tuple(step) for step in codes[lens] if step[0] >= 0] == kept
        assert (codes[lens, len(kept) :] == -1).all()
        for step, phrases in zip(kept, phrase_rows[lens], strict=False):
            assert [CODES[PHRASES[row]] for row in phrases] == list(step)
        assert (phrase_rows[lens, len(kept) :] == -1).all()


def test_batches_hold_what_was_traced_and_mined(student: Run, parts: Parts) -> None:
    with TraceStore(student.traces, readonly=True) as store:
        training = {trace.prompt: trace for trace in store.traces(held_out=False)}
        held_out = {trace.prompt for trace in store.traces(held_out=True)}
    mined = by_trace(read_triplets(student.triplets))
    codes = load_codes(student.tokenizer, parts.codebook)
    by_ids = {tuple(prompt_ids(parts.tokenizer, prompt)): trace for prompt, trace in training.items()}
    seen: set[str] = set()
    for data in parts.data.values():
        batch = data.batch(np.arange(len(data)))
        for i, ids in enumerate(batch.prompts):
            trace = by_ids[tuple(ids)]  # none that was held out
            seen.add(trace.prompt)
            assert parts.tokenizer.decode(batch.answers[i]).startswith(trace.response.text)
            dream = dream_of(mined[trace.key], codes)
            assert mined_dream(batch.codes[i]) == {lens: chain[:2] for lens, chain in dream.items()}
            phrase = coded_steps(mined[trace.key], codes)["causal"][0][1].what
            expected = torch.from_numpy(parts.codebook.encoder.encode([phrase])[0])
            torch.testing.assert_close(batch.phrases[i, LENSES.index("causal"), 0, 0], expected, atol=1e-3, rtol=0)
        assert torch.equal(batch.phrases.abs().sum(-1) > 0, batch.codes >= 0)
    assert seen <= set(training)
    assert not seen & held_out
    assert len(seen) == len(training) == len(parts.data["train"]) + len(parts.data["validation"])


def test_prompts_without_room_for_a_dream_are_left_out(student: Run, parts: Parts) -> None:
    longest = int(parts.data["train"].lengths.max())
    data = load_data(student, parts.codebook, 2, longest + 5 + 4 * 7)["train"]
    assert data.left_out == int((parts.data["train"].lengths == longest).sum())
    assert len(data) + data.left_out == len(parts.data["train"])


def test_phrases_are_encoded_once(student: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fork(student, tmp_path / "run")
    (run.data / "phrases.npy").unlink(missing_ok=True)
    codebook = Codebook.load(run.tokenizer)
    asked: list[int] = []
    encode = codebook.encoder.encode
    monkeypatch.setattr(codebook.encoder, "encode", lambda phrases: asked.append(len(phrases)) or encode(phrases))
    first = load_data(run, codebook, 2, 160)["train"].vectors
    again = load_data(run, codebook, 2, 160)["train"].vectors
    assert len(asked) == 1
    assert first.dtype == np.float16
    assert np.array_equal(first, again)
    whole = (run.data / "phrases.npy").read_bytes()
    (run.data / "phrases.npy").write_bytes(whole[:500])
    assert np.array_equal(load_data(run, codebook, 2, 160)["train"].vectors, first)
    assert len(asked) == 2


@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_reads_every_prompt_once(count: int, size: int, seed: int) -> None:
    order = Order(count, size, seed)
    epochs = [[order.at(1, step) for step in range(k * order.batches, (k + 1) * order.batches)] for k in (0, 1)]
    for epoch in epochs:
        assert sorted(int(i) for batch in epoch for i in batch) == list(range(count))
        assert max(map(len, epoch)) <= size
    again = Order(count, size, seed)
    last = 2 * order.batches - 1
    assert np.array_equal(again.at(1, last), epochs[1][-1])  # whatever was asked for before
    if count > 12:
        everything = [np.concatenate(epoch).tolist() for epoch in epochs]
        other = np.concatenate([order.at(2, step) for step in range(order.batches)]).tolist()
        assert everything[0] != everything[1]
        assert everything[0] != other


def test_first_and_last_of_a_dream() -> None:
    codes = torch.full((4, 4, 3, 3), -1)
    codes[0, 0, :2] = torch.tensor([[1, 2, 3], [4, 5, 6]])
    codes[0, 2, 0] = torch.tensor([7, 8, 9])  # the causal chain says what becomes of it
    codes[1, 1, 0] = torch.tensor([10, 11, 12])
    codes[1, 3, :3] = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3]])  # no causal chain: the last lens's
    codes[2, 2, :2] = torch.tensor([[5, 5, 5], [6, 6, 6]])
    codes[3, 0, 0] = torch.tensor([4, 4, 4])
    phrases = codes[..., None].expand(-1, -1, -1, -1, 8).float()
    batch = DreamBatch(np.arange(4), [[1]] * 4, [[1]] * 4, codes, phrases)
    first, last = first_triplets(batch), outcomes(batch)
    assert first[0].tolist() == [[1, 2, 3], [10, 11, 12], [5, 5, 5], [4, 4, 4]]
    assert last[0].tolist() == [[7, 8, 9], [3, 3, 3], [6, 6, 6], [4, 4, 4]]
    assert torch.equal(first[1][..., 0].long(), first[0])
    assert torch.equal(last[1][..., 0].long(), last[0])


# What is minimized.


def test_the_backbone_reads_the_dreams_that_it_would_be_given(parts: Parts) -> None:
    """The answer's cross-entropy is that of the text with the engine's dream in it."""
    engine, batch = parts.engine, parts.batch
    drafted = engine(*parts.states)
    loss = parts.reader.answer_loss(drafted, batch)
    nats, tokens = 0.0, 0
    dreams = drafted_dreams(drafted, keep=False)
    assert any(chain for dream in dreams for chain in dream.values())
    for prompt, dream, answer in zip(batch.prompts, dreams, batch.answers, strict=True):
        text = torch.tensor([[*prompt, *think_ids(parts.tokenizer, dream), *answer]])
        logits = parts.backbone(text).double().log_softmax(-1)[0]
        for place in range(text.shape[1] - len(answer), text.shape[1]):
            nats -= float(logits[place - 1, text[0, place]])
            tokens += 1
    assert float(loss.detach()) == pytest.approx(nats / tokens, rel=1e-5)


def test_a_dream_without_a_step_is_read_as_none(parts: Parts) -> None:
    """Where no path is kept, and where none has a step: as a student does that answers."""
    engine, batch, data = parts.engine, parts.batch, parts.data["validation"]
    drafted = engine(*parts.states)
    nothing = replace(drafted, dreams=replace(drafted.dreams, more=torch.full_like(drafted.dreams.more, -5.0)))
    think = [think_ids(parts.tokenizer, None)] * len(batch.prompts)
    nats, tokens = parts.reader.read(batch.prompts, think, batch.answers)
    loss = parts.reader.answer_loss(nothing, batch)
    assert float(loss.detach()) == pytest.approx(float(nats.detach()) / tokens)
    engine.config.keep_above = 1.0
    found = measure("end", engine, parts.reader, data, PromptStates(parts.backbone, data))
    engine.config.keep_above = 0.5
    assert found["kept_share"] == 0.0
    assert found["answer_engine"] == found["answer_none"] != found["answer_mined"]


def test_the_answer_teaches_the_engine_and_never_the_backbone(parts: Parts) -> None:
    before = {name: tensor.clone() for name, tensor in parts.backbone.state_dict().items()}
    loss = parts.reader.answer_loss(parts.engine(*parts.states), parts.batch)
    parts.engine.zero_grad()
    loss.backward()
    for part in (parts.engine.input_tokenizer, parts.engine.generator):
        assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 0
    assert all(parameter.grad is None for parameter in parts.backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.backbone.state_dict().items())


def test_texts_that_pass_the_context_count_as_far_as_they_fit(parts: Parts) -> None:
    prompt, context = parts.batch.prompts[0], parts.backbone.config.context
    answer = parts.batch.answers[0] * context
    think = think_ids(parts.tokenizer, None)
    whole, tokens = parts.reader.read([prompt], [think], [answer])
    assert tokens == context - len(prompt) - len(think)
    cut, same = parts.reader.read([prompt], [think], [answer[:tokens]])
    assert same == tokens
    assert float(whole) == pytest.approx(float(cut))


def test_each_phase_trains_its_own_parts(parts: Parts) -> None:
    reached = {"input": {"input_tokenizer"}, "dream": {"input_tokenizer", "generator"}}
    reached["end"] = {*reached["dream"], "reasoner", "decoder"}
    for phase, expected in reached.items():
        parts.engine.zero_grad()
        losses = phase_loss(phase, parts.engine, parts.reader, parts.batch, parts.states)
        losses["total"].backward()
        touched = {name.split(".")[0] for name, p in parts.engine.named_parameters() if p.grad is not None}
        assert touched == expected
    assert set(losses) == {"total", "code", "cosine", "coherence", "more", "diversity", "balance", "input", "answer",
                           "score", "importance", "image"}  # fmt: skip


def test_kept_states_are_those_of_the_backbone(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = PromptStates(parts.backbone, parts.data["train"])
    assert len(kept.kept) == len(parts.data["train"])
    states, real = kept.of(parts.batch)
    assert torch.equal(real, parts.states[1])
    torch.testing.assert_close(states[real], parts.states[0][real], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("distill.training.engine.objectives.KEPT_BYTES", 10)
    computed = PromptStates(parts.backbone, parts.data["train"])
    assert not computed.kept
    assert torch.equal(computed.of(parts.batch)[0], parts.states[0])


def test_metrics_of_a_perfect_dreamer(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that says the mined dream is right everywhere; one of a lens wrong, and that lens alone tells."""
    engine, data = parts.engine, parts.data["validation"]
    batch = data.batch(np.arange(len(data)))
    states = PromptStates(parts.backbone, data)
    targets = targets_of(batch, 4)

    def forced(wrong: int | None) -> Callable[..., Dreams]:
        codes = targets.codes.clamp_min(0)
        if wrong is not None:
            codes[:, wrong] = (codes[:, wrong] + 1) % len(parts.codebook)
        logits = F.one_hot(codes, len(parts.codebook)).float() * 50
        tokens = engine.generator.centroids[codes]
        more = torch.where(targets.steps, 5.0, -5.0)
        gates = torch.full((len(batch), 4, 4), 0.25)
        return lambda *_: Dreams(tokens, logits, more, gates, torch.eye(4), tokens)

    monkeypatch.setattr(engine.generator, "forward", forced(None))
    found = measure("end", engine, parts.reader, data, states)
    assert found["code_accuracy"] == found["exact_dreams"] == found["length_accuracy"] == found["right_all"] == 1.0
    assert found["answer_engine"] > 0
    assert found["diversity_offsets"] == 1.0
    scores = engine(*states.of(batch)).reasoned.scores.detach()
    dreamed = targets.steps[..., 0]
    assert found["brier"] == pytest.approx(float((scores[dreamed] - 1).square().mean()), abs=1e-5)
    engine.config.keep_above = 0.0
    everything = measure("end", engine, parts.reader, data, states)
    engine.config.keep_above = 0.5
    assert everything["kept_share"] == everything["right_kept"] == 1.0
    assert everything["answer_engine"] == pytest.approx(everything["answer_mined"])
    monkeypatch.setattr(engine.generator, "forward", forced(2))
    found = measure("end", engine, parts.reader, data, states)
    assert (found["code_accuracy_causal"], found["code_accuracy_spatial"]) == (0.0, 1.0)
    assert found["exact_dreams"] == 0.0
    assert 0 < found["code_accuracy"] < 1


# The stage.


def test_it_learns_and_leaves_its_records(student: Run, finished: Run) -> None:
    record = finished.require("engine")
    assert record.summary["steps"] == FULL
    assert set(record.outputs) == {"engine/engine.safetensors", "engine/engine.json"}
    assert finished.stale("engine") == []
    measured = rows(finished)
    assert [(row["phase"], row["step"]) for row in measured] == [(p, s + 1) for p, n in FULL.items() for s in range(n)]
    dreams = [row["code_loss"] for row in measured if row["phase"] == "dream"]
    assert dreams[-1] < 0.9 * dreams[0]
    judged = [(row["phase"], row["step"]) for row in measured if "validation_input_accuracy" in row]
    assert judged == [("input", 2), ("input", 3), ("dream", 2), ("dream", 4), ("dream", 5), ("end", 2), ("end", 3)]
    assert {"validation_brier", "validation_gate_causal", "validation_diversity_paths"} <= set(measured[-1])
    best = checkpoint.best(student).relative_to(student.path) / "model.safetensors"
    assert (finished.path / best).read_bytes() == (student.path / best).read_bytes()
    loaded = DreamEngine.load(finished.engine, Codebook.load(finished.tokenizer), 32)
    assert loaded.config == finished.settings.dreaming
    events: list[Event] = []
    assert train_engine(finished, events.append) == record.summary
    assert [event.kind for event in events] == ["done"]


def test_killed_again_and_again_it_ends_with_the_same_bits(student: Run, finished: Run, tmp_path: Path) -> None:
    """A kill loses what wasn't saved: between two saves, right before one, right after a phase's last."""

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    run = fork(student, tmp_path / "run")
    for phase, step in (("input", 1), ("input", 3), ("dream", 2), ("dream", 5), ("end", 1), ("end", 3)):
        with pytest.raises(Killed):
            train_engine(run, at(phase, step, kill))
        assert "engine" not in run.records()
    summary = train_engine(run)
    assert weights(run) == weights(finished)
    assert rows(run) == rows(finished)
    clocked = ("training_seconds",)
    expected = finished.require("engine").summary
    assert {k: v for k, v in summary.items() if k not in clocked} == {
        k: v for k, v in expected.items() if k not in clocked
    }


def test_ctrl_c_saves_at_once_and_phase_by_phase_is_the_same(student: Run, finished: Run, tmp_path: Path) -> None:
    run = fork(student, tmp_path / "run")
    assert train_engine(run, phase="input")["steps"] == {"input": 3}
    assert "engine" not in run.records()
    with pytest.raises(KeyboardInterrupt):
        train_engine(run, at("dream", 3, lambda: signal.raise_signal(signal.SIGINT)), phase="dream")
    state = json.loads((run.engine / "loop.json").read_text(encoding="utf-8"))
    assert (state["phase"], state["step"]) == ("dream", 3)
    train_engine(run, phase="end")
    assert weights(run) == weights(finished)
    assert rows(run) == rows(finished)


def test_what_may_change_and_what_may_not(student: Run, finished: Run, tmp_path: Path) -> None:
    run = fork(student, tmp_path / "run")
    copy_file(finished.engine, run.engine)
    copy_file(finished.path / "run.json", run.path / "run.json")
    run.settings.dreaming.keep_above = 0.25
    events: list[Event] = []
    train_engine(run, events.append)
    assert not [event for event in events if event.kind == "progress"]
    assert json.loads((run.engine / "engine.json").read_text(encoding="utf-8"))["config"]["keep_above"] == 0.25
    assert weights(run)["engine.safetensors"] == weights(finished)["engine.safetensors"]
    run.settings.dreaming.end_steps = 4
    with pytest.raises(RunMismatch, match=r"dreaming\.end_steps \(3 there, 4 now\)"):
        train_engine(run)
    assert train_engine(run, force=True, phase="input")["steps"] == {"input": 3}
    run.settings.dreaming.dream_steps = 1  # a phase that is still to come
    run.settings.dreaming.lr = 0.5
    with pytest.raises(RunMismatch, match=r"dreaming\.lr"):
        train_engine(run)
    run.settings.dreaming.lr = DreamingConfig().lr
    assert train_engine(run, phase="dream")["steps"] == {"input": 3, "dream": 1}


def taken(finished: Run, folder: Path) -> tuple[Run, Path]:
    """A copy of the finished run, and its backbone's weights."""
    run = fork(finished, folder)
    copy_file(finished.engine, run.engine)
    return run, checkpoint.best(run) / "model.safetensors"


def test_an_engine_begun_anew_is_not_the_finished_one(finished: Run, tmp_path: Path) -> None:
    run, backbone = taken(finished, tmp_path / "run")
    assert engine_of(run, backbone) == run.engine
    train_engine(run, force=True, phase="input")
    assert engine_of(run, backbone) is None
    train_engine(run)
    assert engine_of(run, backbone) == run.engine
    assert weights(run) == weights(finished)
    (run.engine / "engine.safetensors").write_bytes(b"altered")
    with pytest.raises(CorruptFile, match=r"engine\.safetensors.*train the dream engine anew"):
        engine_of(run, backbone)


def test_a_kill_while_it_was_saved_loses_nothing(finished: Run, tmp_path: Path) -> None:
    """Between the two renames, the engine is beside its place."""
    run, _ = taken(finished, tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run.engine.rename(run.path / f".engine.{process.pid}.old")
    events: list[Event] = []
    train_engine(run, events.append)
    assert [event.kind for event in events] == ["done"]
    assert weights(run) == weights(finished)


def test_another_backbone_sets_the_engine_aside(student: Run, finished: Run, tmp_path: Path) -> None:
    run = fork(student, tmp_path / "run", end_steps=0, dream_steps=1)
    copy_file(finished.engine, run.engine)
    best = checkpoint.best(run)
    model = load_backbone(best)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    save_backbone(model, best)
    with pytest.raises(CorruptFile, match=r"model\.safetensors.*dream train --force"):
        train_engine(run)
    path = str((best / "model.safetensors").relative_to(run.path))
    record = run.require("train")
    run.record("train", record.settings, {path: checkpoint.sha256_file(best / "model.safetensors")}, {}, 1.0)
    events: list[Event] = []
    train_engine(run, events.append)
    assert any("engine.1" in event.message for event in events if event.kind == "note")
    old = (run.path / "engine.1" / "engine.safetensors").read_bytes()
    assert old == weights(finished)["engine.safetensors"]
    assert run.require("engine").summary["steps"] == {"input": 3, "dream": 1, "end": 0}


@pytest.mark.parametrize("name", ["engine.safetensors", "optimizer.safetensors", "loop.json"])
def test_a_harmed_engine_is_refused(name: str, student: Run, finished: Run, tmp_path: Path) -> None:
    run = fork(student, tmp_path / "run")
    copy_file(finished.engine, run.engine)
    content = (run.engine / name).read_bytes()
    (run.engine / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFile, match=rf"{name}.*train the dream engine anew"):
        train_engine(run)
    shutil.rmtree(run.engine)
    assert train_engine(run, phase="input")["steps"] == {"input": 3}


@pytest.mark.parametrize("why", ["train.dreams", "train.pause", "dreaming.dream_steps", "no dreams", "student.context"])
def test_without_dreams_it_is_skipped(why: str, student: Run, finished: Run, tmp_path: Path) -> None:
    run = fork(student, tmp_path / "run", dream_steps=int(why != "dreaming.dream_steps"))
    run.settings.train.dreams = why != "train.dreams"
    run.settings.train.pause = why == "train.pause"
    if why == "student.context":
        run.settings.student.context = 40
    if why == "no dreams":
        described = json.loads((run.data / "data.json").read_text(encoding="utf-8"))
        described["counts"]["train"]["dreams"] = 0
        (run.data / "data.json").write_text(json.dumps(described), encoding="utf-8")
    copy_file(finished.engine, run.engine)
    events: list[Event] = []
    assert why in train_engine(run, events.append)["skipped"]
    assert any(event.kind == "note" and why in event.message for event in events)
    assert run.require("engine").outputs == {}
    assert not run.engine.exists()  # nobody takes it for this student's
    assert (run.path / "engine.1").exists()
    assert train_engine(run)["skipped"]


def test_a_phase_may_make_so_many_passes(student: Run, tmp_path: Path) -> None:
    run = fork(student, tmp_path / "run", input_steps=999, dream_steps=7, end_steps=999, epochs=6)
    trainer = EngineTrainer(run, lambda event: None)
    assert trainer.order.batches == -(-len(trainer.data) // 16)
    assert trainer.steps("input") == 6 * trainer.order.batches
    assert trainer.steps("dream") == 7
    assert trainer.steps("end") == 2 * trainer.order.batches
    trainer.config.epochs = 0
    assert trainer.steps("end") == 999


@pytest.mark.parametrize(
    ("setting", "value"),
    [("batch", 0), ("dream_length", 0), ("num_dream_sequences", 0), ("lr", 0.0), ("end_steps", -1),
     ("keep_above", 1.5), ("checkpoint_every", 0), ("epochs", -1), ("output_mode", "sound")],
)  # fmt: skip
def test_bad_settings_are_named(setting: str, value: object, student: Run, tmp_path: Path) -> None:
    run = fork(student, tmp_path / "run", **{setting: value})
    with pytest.raises(BadInput, match=rf"dreaming\.{setting}"):
        train_engine(run)


def test_it_comes_after_the_backbone(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small_settings())
    with pytest.raises(MissingStage, match="dream train"):
        train_engine(run)
    with pytest.raises(BadInput, match="phase 'last': choose all, input, dream, end"):
        train_engine(run, phase="last")
