"""New facts after old ones: what is learned, what is kept, and the mathematics of keeping it."""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.ablation_run import small_world
from support.disturbed import WANTED, disturb
from support.gone_on import went_on
from support.small_student import enlarge
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench import continual, figures
from cli.main import dream
from distill.backbone.attention import Documents as Spans
from distill.backbone.model import Backbone, BackboneConfig, load_backbone
from distill.corpus.datasets.causal_world import LATER, drawn, made_of
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, CorruptFile, RunMismatch
from distill.events import Event
from distill.learning import keeping
from distill.learning.ewc import Anchor, diagonal_fisher, drawn_loss
from distill.learning.facts import Facts, learn_facts, undo
from distill.learning.feedback import FEEDBACK, Feedback, keep, read_feedback
from distill.learning.keeping import FISHER, MEMORY, Keeper, Keeping, count, of_past
from distill.learning.new_lines import NewLines, read_new
from distill.learning.onward import Onward
from distill.learning.replay import Memory, SumTree, gather
from distill.run import Run
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import Message
from distill.tokens.packing import ARRAYS, Documents
from distill.training import checkpoint
from distill.training.batches import Batch, Row
from distill.training.loop import train
from distill.training.losses import Targets, tail_kernel
from distill.training.plan import CHANCE_LR, INHERITED_LR
from distill.training.step import forward_backward
from distill.turns import joined

pytestmark = pytest.mark.usefixtures("one_thread")

# Priorities.


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=70), st.data())
def test_the_sum_tree_finds_what_a_linear_search_finds(values: list[float], data: st.DataObject) -> None:
    tree, numbers = SumTree(np.array(values)), np.array(values)
    for _ in range(data.draw(st.integers(0, 5))):
        places = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=8, unique=True))
        new = np.array(data.draw(st.lists(st.floats(0, 1e6), min_size=len(places), max_size=len(places))))
        tree.put(np.array(places, np.int64), new)
        numbers[places] = new
    assert tree.values.tolist() == numbers.tolist()
    assert tree.total == pytest.approx(numbers.sum(), rel=1e-12)
    if tree.total == 0:
        return
    masses = np.array(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))) * tree.total
    sums = np.concatenate([[0.0], numbers.cumsum()])
    for mass, found in zip(masses, tree.find(masses), strict=True):
        assert numbers[found] > 0
        slack = 1e-9 * tree.total
        assert sums[found] - slack <= mass <= sums[found + 1] + slack


def documents(lengths: list[int], slots: int = 0, chunks: bool = False) -> Documents:
    """Of answers of these lengths, each after a prompt of two tokens; every second one has a dream."""
    total, n = sum(lengths), len(lengths)
    ids = np.arange(total) % 7
    return Documents(
        prompt_ids=np.arange(2 * n).astype(np.uint16),
        prompt_ends=np.arange(2, 2 * n + 1, 2),
        dream_ids=np.arange(n // 2),
        dream_ends=(np.arange(n) + 1) // 2,
        answer_ids=ids,
        answer_ends=np.cumsum(lengths),
        slot_ids=np.arange(total * slots).reshape(total, slots),
        slot_logprobs=-np.arange(total * (1 + slots)).reshape(total, 1 + slots).astype(np.float16),
        chunk_ids=(np.arange(total) // 2 if chunks else np.full(total, -1)).astype(np.int32),
        chunk_logprobs=-np.arange((total + 1) // 2 if chunks else 0).astype(np.float32),
        answer_bytes=np.array(lengths),
    )


def test_importance_weights_make_all_documents_count_alike() -> None:
    losses = np.array([0.1, 3.0, 0.0, 1.0, 0.5])
    memory = Memory(documents([2] * 5), np.zeros(5, np.int64), np.ones(5))
    memory.tree.learn_losses(np.arange(5), losses)
    likely = np.maximum(losses, 0.01) ** 0.6
    likely /= likely.sum()
    for beta in (0.0, 0.4, 1.0):
        expected = (1 / (5 * likely)) ** beta
        assert memory.tree.weights(np.arange(5), beta) == pytest.approx(expected, rel=1e-12)
    values = np.array([1.0, -2.0, 3.0, 5.0, 8.0])
    assert (likely * memory.tree.weights(np.arange(5), 1.0) * values).sum() == pytest.approx(values.mean(), rel=1e-12)
    random = np.random.default_rng(0)
    drawn = np.bincount(memory.tree.find(random.random(20_000) * memory.tree.total), minlength=5) / 20_000
    assert drawn == pytest.approx(likely, abs=5 * np.sqrt(0.25 / 20_000))


def test_gathered_documents_are_what_they_were() -> None:
    one, two = documents([3, 1, 4], slots=2), documents([2, 5], chunks=True)
    chosen = [(two, 1), (one, 2), (one, 0), (two, 0)]
    both = gather(chosen)
    assert len(both) == 4
    for place, (source, i) in enumerate(chosen):
        for part in ("prompt", "dream", "answer"):
            assert getattr(both, part)(place).tolist() == getattr(source, part)(i).tolist()
        here, there = both.span(both.answer_ends, place), source.span(source.answer_ends, i)
        width = source.slot_ids.shape[1]
        assert both.slot_ids[here, :width].tolist() == source.slot_ids[there].tolist()
        assert both.slot_logprobs[here, : 1 + width].tolist() == source.slot_logprobs[there].tolist()
        assert np.isneginf(both.slot_logprobs[here, 1 + width :]).all()
        if source is two:
            own, theirs = both.chunk_ids[here], two.chunk_ids[there]
            assert both.chunk_logprobs[own].tolist() == two.chunk_logprobs[theirs].tolist()
        assert both.answer_bytes[place] == source.answer_bytes[i]


def test_memory_is_bounded_fair_and_read_back(tmp_path: Path) -> None:
    memory = Memory.of(documents([2] * 50), 20, seed=1)
    assert len(memory) == 20
    memory.tree.learn_losses(np.arange(20), np.linspace(0.1, 4, 20))
    grown = memory.with_new(documents([3] * 4), 20, seed=1)
    assert np.bincount(grown.learned).tolist() == [16, 4]
    assert grown.tree.values[grown.learned == 1].tolist() == [memory.tree.values.max()] * 4
    grown = grown.with_new(documents([1] * 30), 20, seed=1)
    assert np.bincount(grown.learned).tolist() == [8, 4, 8]
    assert [len(grown.documents.answer(i)) for i in range(20)] == [(2, 3, 1)[i] for i in grown.learned]
    grown.save(tmp_path / "memory.safetensors")
    read = Memory.load(tmp_path / "memory.safetensors")
    assert read.tree.nodes.tolist() == grown.tree.nodes.tolist()
    assert all(np.array_equal(getattr(read.documents, name), getattr(grown.documents, name)) for name in ARRAYS)
    (tmp_path / "memory.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile, match=r"memory\.safetensors: can't be read"):
        Memory.load(tmp_path / "memory.safetensors")


# Elastic weights, in float64.


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    config = BackboneConfig(vocab_size=5, hidden=8, layers=1, heads=2, kv_heads=1, ffn=8, context=8, pad_id=0, eos_id=1)
    return Backbone(config).initialize(3).double()


def one_document(ids: list[int], loss: list[int]) -> Batch:
    """A row that is a document, with loss at some of its positions."""
    where, size = torch.tensor(loss), len(ids)
    labels = torch.tensor(ids)[where]
    targets = Targets(labels, labels[:, None], torch.zeros(len(loss), 1), torch.zeros(len(loss)), torch.ones(len(loss)))
    spans = Spans(1, size, [(0, 0, size)], torch.device("cpu"))
    none = torch.ones(1, size, dtype=torch.bool)
    return Batch(
        torch.tensor([ids]), torch.arange(size)[None], spans, where, targets, torch.ones(len(loss)) > 0, len(loss), none
    )


def logprobs(model: Backbone, batch: Batch) -> torch.Tensor:
    hidden = model.hidden(batch.ids, batch.positions, batch.spans).flatten(0, 1)[batch.where]
    return model.lm_head(hidden).log_softmax(-1)


def test_the_fisher_information_is_what_brute_force_finds(tiny: Backbone) -> None:
    """Each word at each position, against all pairs of words drawn at both, weighted by how likely they are."""
    batch, parameters = one_document([2, 4, 3, 1], [1, 2]), dict(tiny.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    told = logprobs(tiny, batch)
    for place, word in product(range(2), range(5)):
        grads = torch.autograd.grad(told[place, word], list(parameters.values()), retain_graph=True)
        for name, grad in zip(parameters, grads, strict=True):
            expected[name] += told[place, word].exp().detach() * grad**2 / 2

    def every() -> Iterator[tuple[torch.Tensor, int]]:
        for words in product(range(5), repeat=2):
            chosen = logprobs(tiny, batch)[range(2), words].sum()
            yield -chosen * chosen.exp().sqrt().detach(), 0  # its square is weighted once

    found = {name: total / 2 for name, total in diagonal_fisher(tiny, every()).items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-10)  # norms are in float32
    assert float(expected["model.layers.0.mlp.up_proj.weight"].sum()) > 0


def test_words_are_drawn_as_the_model_would_say_them(tiny: Backbone) -> None:
    batch, generator = one_document([2, 4, 3, 1], [1, 2]), torch.Generator().manual_seed(0)
    told = logprobs(tiny, batch).detach()
    surprise = -(told.exp() * told).sum(1)
    spread = ((told.exp() * told**2).sum(1) - surprise**2).sum().sqrt()
    losses = [float(drawn_loss(tiny, batch, generator)[0].detach()) for _ in range(400)]
    assert np.mean(losses) == pytest.approx(float(surprise.sum()), abs=4 * float(spread) / 20 + 1e-6)
    assert drawn_loss(tiny, batch, generator)[1] == 2


def test_weights_are_pulled_along_the_penaltys_gradient(tiny: Backbone) -> None:
    model = Backbone(tiny.config).double()
    model.load_state_dict(tiny.state_dict())
    generator = torch.Generator().manual_seed(1)
    fisher = {n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    anchor = Anchor(model, fisher, 3.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    was = dict(tiny.named_parameters())
    penalty = sum((1.5 * fisher[n] * (p - was[n].detach()) ** 2).sum() for n, p in model.named_parameters())
    assert isinstance(penalty, torch.Tensor)
    penalty.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.lm_head.weight.sum().backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    assert anchor.pull() == pytest.approx(float(penalty.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        more, first = expected[name], before[name]
        assert more is not None
        torch.testing.assert_close(parameter.grad, more if first is None else first + more)


def test_the_own_past_is_what_was_said_before() -> None:
    sizes: dict[str, Any] = {"hidden": 8, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 8, "context": 8}
    model = enlarge(Backbone(BackboneConfig(vocab_size=40, pad_id=0, eos_id=1, **sizes)).initialize(5))
    batch = one_document([2, 4, 3, 1], [1, 2])
    batch.targets = of_past(model, batch, 0.25)
    told = logprobs(model, batch).detach().double()
    for place, label in enumerate(batch.targets.labels.tolist()):
        told_there = zip(batch.targets.slots[place].tolist(), batch.targets.logprobs[place].tolist(), strict=True)
        given = {slot: value for slot, value in told_there if value > -1e9}
        wanted = {*told[place].topk(20).indices.tolist(), label}
        assert given == pytest.approx({word: float(told[place, word]) for word in wanted}, abs=1e-5)
        assert int(batch.targets.slots[place, 0]) == label
    assert batch.targets.soft_weight.tolist() == [0.25, 0.25]
    count(batch.targets, torch.tensor([0.5, 2.0]))
    found = forward_backward(model, batch, "float32", tail_kernel)
    assert found["kl"].abs().max() < 1e-5
    own = told[range(2), batch.targets.labels]
    assert float(found["loss"]) == pytest.approx(0.75 * float(-(own * torch.tensor([0.5, 2.0])).sum()), rel=1e-4)


# A run.


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "FISHED", 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student of the small causal world, hardly trained. Don't alter it."""
    run = small_world(tmp_path_factory.mktemp("facts") / "world")
    run.settings.train.lr, run.settings.train.checkpoint_every = 1.2e-2, 3
    train(run)
    return run


def of(world: Run, folder: Path) -> Run:
    shutil.copytree(world.path, folder)
    return Run(folder, world.settings)


def new_file(path: Path, size: int = 12, held_out: int = 4) -> Path:
    """Answers about things of materials that the world's training never tells of."""
    counts = {"train": size, "familiar": held_out}
    lines: list[dict[str, Any]] = []
    for question in drawn(made_of(LATER), set(), counts, seed=1):
        chains = {lens: [[s.what, s.action, s.result] for s in steps] for lens, steps in question.dream.items()}
        told = {"prompt": question.prompt, "answer": question.answer, "held_out": question.split != "train"}
        lines.append(told | ({"dream": chains} if len(lines) % 2 else {}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_new_facts_are_learned_and_taken_back(world: Run, tmp_path: Path) -> None:
    run, source = of(world, tmp_path / "run"), new_file(tmp_path / "new.jsonl")
    before = (checkpoint.best(run) / "model.safetensors").read_bytes()
    args = ["learn", str(run.path), "--from", str(source)]
    kept = ["--replay", "1", "--past", "1", "--ewc", "3", "--memory", "30", "--epochs", "6", "--lr", "0.01"]
    said = CliRunner().invoke(dream, [*args, *kept])
    assert said.exit_code == 0, said.output
    assert "bits per byte before" in said.stdout
    assert "old answers" in said.stdout
    summary = run.records()["facts"].summary
    assert summary["new_bits_per_byte"] < summary["new_bits_per_byte_before"]
    assert (summary["answers"], summary["held_out"]) == (12, 4)
    memory = Memory.load(checkpoint.best(run) / MEMORY)
    assert np.bincount(memory.learned).tolist() == [18, 12]
    new = read_new(run, source).documents(run, held_out=False)
    remembered = np.flatnonzero(memory.learned == 1).tolist()
    came_with = {i: new.dream(place).tolist() for place, i in enumerate(remembered) if len(new.dream(place))}
    assert len(came_with) == 6
    assert {i: memory.documents.dream(i).tolist() for i in came_with} == came_with
    assert (checkpoint.best(run) / FISHER).is_file()
    board = EventAccumulator(str(run.path / "tensorboard" / "facts"))
    board.Reload()
    for name in ("loss", "replay", "past", "ewc"):
        assert len(board.Scalars(name)) == summary["steps"]
    rate = 1 - summary["new_bits_per_byte"] / summary["new_bits_per_byte_before"]
    assert [scalar.value for scalar in board.Scalars("adaptation_rate")] == pytest.approx([rate], abs=1e-3)
    assert "up to date" in CliRunner().invoke(dream, [*args, *kept]).stdout
    again = CliRunner().invoke(dream, ["learn", str(run.path), "--from", str(source), "--epochs", "1", "--json"])
    assert json.loads(again.stdout)["summary"]["answers"] == 12
    assert len(checkpoint.of_stage(run, "facts")) == 2
    with pytest.raises(RunMismatch, match=r"learned new facts, the work of `dream learn`; `dream learn .* --undo`"):
        checkpoint.refuse(run, "polish")
    for _ in range(2):
        undone = CliRunner().invoke(dream, ["learn", str(run.path), "--undo", "--json"])
        assert json.loads(undone.stdout)["deleted"] == 1
    assert (checkpoint.best(run) / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stage", ["facts", "learn"])
def test_what_was_learned_under_rewards_is_not_taken_back(stage: str, world: Run, tmp_path: Path) -> None:
    run = of(world, tmp_path / "run")
    went_on(run, stage, **{"from": checkpoint.best(run).name})
    went_on(run, "reward")
    before = checkpoint.list_checkpoints(run)
    refused = CliRunner().invoke(dream, ["learn", str(run.path), "--undo"])
    assert isinstance(refused.exception, RunMismatch)
    assert "learned by rewards, the work of `dream reward`" in str(refused.exception)
    assert checkpoint.list_checkpoints(run) == before
    for stage, left in (("reward", before[:-1]), ("learn", before[:-2])):
        undone = CliRunner().invoke(dream, [stage, str(run.path), "--undo", "--json"])
        assert json.loads(undone.stdout)["deleted"] == 1
        assert checkpoint.list_checkpoints(run) == left


def test_what_is_learned_is_not_told_as_held_out_and_what_does_not_fit_is_told(world: Run, tmp_path: Path) -> None:
    run, source = of(world, tmp_path / "run"), new_file(tmp_path / "new.jsonl", size=3, held_out=0)
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "so " * 2000, "answer": "It is long.", "held_out": False}) + "\n")
    heard: list[Event] = []
    summary = learn_facts(run, heard.append, source=source, epochs=1, keeping=Keeping(memory=20), measure=2)
    assert (summary["answers"], summary["held_out"]) == (3, 0)
    (warning,) = [event.message for event in heard if event.kind == "warning"]
    assert warning.startswith("1 new prompts fill the context of")


def test_what_began_as_another_model_learns_gently_though_its_start_is_gone(
    world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source, rates = of(world, tmp_path / "run"), new_file(tmp_path / "new.jsonl"), list[float]()
    run = Run(run.path, replace(run.settings, train=replace(run.settings.train, lr=0.0)))

    def begun(_run: Run, _new: NewLines, how: dict[str, Any], *_: Any) -> Facts:
        rates.append(how["lr"])
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.learning.facts.Facts", begun)
    for start in (None, "5" * 64):
        for path in checkpoint.list_checkpoints(run):
            state = json.loads((path / "loop.json").read_text(encoding="utf-8"))
            state["settings"]["start"] = start
            (path / "loop.json").write_text(json.dumps(state), encoding="utf-8")
        with pytest.raises(KeyboardInterrupt):
            learn_facts(run, source=source)
    assert rates == [CHANCE_LR / 3, INHERITED_LR / 3]


def test_a_learning_that_was_killed_ends_as_one_that_was_not(
    world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = new_file(tmp_path / "new.jsonl", size=4)
    whole, cut = (of(world, tmp_path / name) for name in ("whole", "cut"))
    how: dict[str, Any] = {"source": source, "epochs": 8, "keeping": Keeping(1, 1, 1, 30), "measure": 4}

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_facts(cut, stop, **how)
    (partial,) = checkpoint.of_stage(cut, "facts")
    assert checkpoint.read_loop(partial).settings["facts"]["steps"] == 3
    with monkeypatch.context() as patch:  # all was learned, and nothing of it written down
        patch.setattr(Facts, "record", lambda *_: None)  # pyright: ignore[reportUnknownLambdaType]
        told = learn_facts(cut, **how)
    assert told == learn_facts(cut, **how) == learn_facts(whole, **how)
    assert len(checkpoint.of_stage(cut, "facts")) == 1
    for name in ("model.safetensors", MEMORY, FISHER):
        assert (checkpoint.best(cut) / name).read_bytes() == (checkpoint.best(whole) / name).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        learn_facts(cut, stop, **how, force=True)
    how["source"] = new_file(tmp_path / "other.jsonl", size=3)
    other = learn_facts(cut, **how)
    assert other["old_bits_per_byte_before"] == told["old_bits_per_byte"], "it began where the one that was left did"


def test_what_does_not_fit_is_never_drawn(world: Run) -> None:
    learner = Onward(world, 1e-3)
    some = gather([(learner.given.documents, i) for i in range(4)])
    prompts = [np.resize(some.prompt(0), learner.model.config.context), *(some.prompt(i) for i in range(1, 4))]
    long = replace(some, prompt_ids=np.concatenate(prompts), prompt_ends=np.cumsum([*map(len, prompts)]))
    memory = Memory(long, np.zeros(4, np.int64), np.ones(4))
    drawn: list[int] = []

    class Seen(Memory):
        def draw(self, *args: Any) -> list[Row]:
            rows = super().draw(*args)
            drawn.extend(piece.document for row in rows for piece in row)
            return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "Memory", Seen)
        keeper = Keeper(learner, Keeping(ewc=1.0), load_backbone(learner.begun), memory, None)
    found = keeper.backward(8, 0.0, np.random.default_rng(0))
    assert all(map(np.isfinite, found.values()))
    drawn += [p.document for row in memory.draw(keeper.batches, 8, np.random.default_rng(0), 0.5) for p in row]
    assert {*drawn} == {1, 2, 3}


def test_what_goes_on_recomputes_as_its_training_is_set_to(world: Run) -> None:
    settings = replace(world.settings, train=replace(world.settings.train, recompute=True))
    assert Onward(Run(world.path, settings), 1e-3).model.recompute


def test_what_is_learned_of_a_best_that_was_not_the_last_is_the_best(world: Run, tmp_path: Path) -> None:
    """A training's last checkpoint may be worse than one before: what is learned comes after both."""
    run, source = of(world, tmp_path / "run"), new_file(tmp_path / "new.jsonl", size=4)
    *_, better, last = checkpoint.list_checkpoints(run)
    loop = json.loads((last / "loop.json").read_text(encoding="utf-8")) | {
        "best_step": checkpoint.read_loop(better).step
    }
    (last / "loop.json").write_text(json.dumps(loop), encoding="utf-8")
    (last / "checksums.json").unlink()
    checkpoint.write_checksums(last)
    assert checkpoint.best(run) == better
    how: dict[str, Any] = {"epochs": 1, "measure": 4}
    summary = learn_facts(run, source=source, keeping=Keeping(memory=20), **how)
    learned = checkpoint.best(run)
    assert checkpoint.stage_of(learned) == "facts"
    assert checkpoint.read_loop(learned).step == checkpoint.read_loop(last).step + summary["steps"]
    learn_facts(run, source=new_file(tmp_path / "more.jsonl", size=5), keeping=Keeping(memory=20), **how)
    assert checkpoint.list_checkpoints(run)[-2] == learned, "the learning before it stays, to be gone back to"
    assert [undo(run), undo(run)] == [1, 1]
    assert checkpoint.best(run) == better
    assert last.is_dir()


def test_what_either_run_holds_out_is_not_learned(world: Run, tmp_path: Path) -> None:
    run, other = of(world, tmp_path / "run"), of(world, tmp_path / "other")
    with TraceStore(run.traces, readonly=True) as store:
        asked = {trace.prompt for trace in store.traces(held_out=True)}
    assert asked
    with TraceStore(other.traces) as store:
        store.select({trace.key: False for trace in store.traces()})
    assert {trace.prompt for trace in read_new(run, other.path).traces if trace.held_out} == asked
    (prompt, *_), path = sorted(asked), tmp_path / "new.jsonl"
    later = joined([("user", prompt), ("assistant", "It is."), ("user", "And then?")])
    told = [{"prompt": text, "answer": "So.", "held_out": False} for text in (prompt, later, "Why?")]
    path.write_text("".join(json.dumps(each) + "\n" for each in told), encoding="utf-8")
    assert [trace.held_out for trace in read_new(run, path).traces] == [True, True, False]


def test_a_cut_answer_is_learned_as_one(world: Run, tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    lines = [{"prompt": "Why?", "text": "It falls. Then", "done_reason": reason} for reason in ("length", "stop")]
    path.write_text("\n\n" + json.dumps(lines[0]) + "\n" + json.dumps(lines[1] | {"prompt": "What?"}), encoding="utf-8")
    learned = read_new(world, path).documents(world, held_out=False)
    tokenizer = StudentTokenizer.load(world.tokenizer)
    said = [tokenizer.decode(learned.answer(i).tolist(), skip_special=True).strip() for i in range(2)]
    assert said == ["It falls.", "It falls. Then"], "up to its last whole sentence"
    path.write_text('\n\n{"prompt": "Why?", "text": "So.", "done_reason": 3}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"new\.jsonl, line 3: done_reason should be text"):
        read_new(world, path)


@pytest.mark.timeout(3600)  # with DREAM_MOMENTS; else it takes seconds
@pytest.mark.parametrize("stage", ["facts", "learn"])
def test_killed_at_any_moment_nothing_is_lost_and_nothing_learned_twice(stage: str, world: Run, tmp_path: Path) -> None:
    source = new_file(tmp_path / "new.jsonl", size=4)
    cut, whole = (of(world, tmp_path / name) for name in ("cut", "whole"))
    how = ["--from", str(source), "--ewc", "1", "--memory", "30", "--set", "train.checkpoint_every=1"]
    if stage == "learn":
        how = []
        for run, word in product((cut, whole), ("ball", "vase", "cup")):
            asked: list[Message] = [{"role": "user", "content": f"The {word} is dropped. What becomes of it?"}]
            keep(run.path / FEEDBACK, Feedback(asked, "", "It is whole.", "better", f"The {word} is broken."))
    draw = random.Random(0)
    moments = [draw.uniform(0.3, 3) for _ in range(WANTED)] or [0.3, 0.7, 1.2][: 2 if stage == "learn" else 3]
    how += ["--epochs", str(16 * WANTED or 8)]
    codes = disturb(tmp_path, ["learn", str(cut.path), *how], moments, seed=2)
    assert codes[-1] == 0
    assert codes.count(0) == 1 or not WANTED, "it was still learning each time"
    said = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert set(codes) <= {0, 143, -signal.SIGTERM, -signal.SIGKILL}, said[-2000:]
    assert disturb(tmp_path, ["learn", str(whole.path), *how], [], seed=2) == [0]
    assert len(checkpoint.of_stage(cut, stage)) == 1
    for name in ("model.safetensors", *((MEMORY, FISHER) if stage == "facts" else ())):
        assert (checkpoint.best(cut) / name).read_bytes() == (checkpoint.best(whole) / name).read_bytes()
    if stage == "learn":
        assert read_feedback(cut.path / FEEDBACK) == read_feedback(whole.path / FEEDBACK)


def test_another_run_is_a_source_too(world: Run, tmp_path: Path) -> None:
    run = of(world, tmp_path / "run")
    found = read_new(run, world.path)
    with TraceStore(run.traces, readonly=True) as store:
        assert [trace.prompt for trace in found.traces] == [trace.prompt for trace in store.traces()]
    learned = found.documents(run, held_out=False)
    assert len(learned) == 40
    assert (np.diff(learned.dream_ends, prepend=0) > 0).all()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"new\.jsonl, line 2: .*; a line is such as"),
        ('{"prompt": "a"}', "line 2: prompt and answer should be texts"),
        ('{"prompt": "a", "answer": "b", "held_out": 3}', "held_out should be true or false"),
        ('{"prompt": "a", "answer": "b", "dream": {"causal": [["c", "d"]]}}', "line 2"),
        ('{"prompt": "a", "answer": "b", "dream": {"odd": [["c", "d", "e"]]}}', "'odd' is none of spatial"),
    ],
)
def test_lines_that_are_none_are_told(world: Run, tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text(f'{{"prompt": "q", "answer": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=reason):
        read_new(world, path)
    path.write_text('{"prompt": "q", "answer": "a", "held_out": true}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"holds no answer to learn \(all are held out\)"):
        read_new(world, path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(BadInput, match=r"holds no answer to learn$"):
        read_new(world, path)


def test_what_is_not_for_new_answers_is_refused(world: Run, tmp_path: Path) -> None:
    path = new_file(tmp_path / "new.jsonl")
    for args, reason in (
        (["--replay", "1"], "--replay is for new answers"),
        (["--from", str(path), "--beta", "1"], "--beta is for feedback"),
    ):
        said = CliRunner().invoke(dream, ["learn", str(world.path), *args])
        assert (said.exit_code, reason in said.stderr) == (2, True)


def test_what_was_measured_of_another_student_is_measured_anew(world: Run, tmp_path: Path) -> None:
    run = of(world, tmp_path / "run")
    assert [continual.kept(run, "a", lambda: 1), continual.kept(run, "b", lambda: 2)] == [1, 2]
    assert continual.kept(run, "a", lambda: 3) == 1
    record = run.require("train")
    run.record("train", record.settings, {"checkpoints/step-9/model.safetensors": "another"}, {}, 0.0)
    assert [continual.kept(run, "a", lambda: 3), continual.kept(run, "b", lambda: 4)] == [3, 4]


def test_the_tables_of_the_docs_are_measured(world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = of(world, tmp_path / "run")
    small = {"NEW": 3, "HELD_OUT": 2, "EPOCHS": 1, "ASKED": 2, "TASKS": 2, "COUNTS": (0, 1), "NAMES": {"mir": "wax"}}
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    small |= {"KEEPS": {"plain": continual.PLAIN, "replay": continual.REPLAY}}
    for name, value in small.items():
        monkeypatch.setattr(continual, name, value)
    before = checkpoint.list_checkpoints(run)
    for what, file, rows in (("facts", "new-facts", 3), ("few", "few-examples", 2 + len(continual.WAYS))):
        continual.main(what, str(run.path), str(run.path))
        found = json.loads((tmp_path / f"{file}.json").read_text(encoding="utf-8"))
        assert len(found["rows"]) == rows
        assert all({*row} <= {*found["columns"]} for row in found["rows"])
        assert all(len(row[key]) == 3 for row in found["rows"] for key in row if isinstance(row[key], list))
    assert checkpoint.list_checkpoints(run) == before
    assert continual.interval([1.0, 2.0, 3.0]) == pytest.approx([2.0, 2 - 2.4841, 2 + 2.4841], abs=1e-4)
