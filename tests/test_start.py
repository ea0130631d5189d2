"""A student that begins as its teacher: from a small real teacher's file to the first checkpoint."""

import base64
import functools
import importlib
import json
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.gone_on import went_on
from support.small_student import dreaming_model, small_tokenizer

import bench.dreams
import bench.feedback
import bench.polish
from bench import figures
from bundle.gguf import file_bytes, write_gguf
from bundle.load import load_student
from cli.main import dream
from cli.repl import Chat, together
from distill.backbone.model import count_parameters, load_backbone
from distill.config import CaptureSettings, Settings, StudentSettings, TeacherSettings, TokenizeSettings, TrainSettings
from distill.corpus.capture import capture
from distill.corpus.pack_targets import pack_targets
from distill.corpus.prompts import is_held_out
from distill.errors import BadInput, DistillError, MissingStage, RunMismatch, TeacherError
from distill.events import Event, silent
from distill.exam.baselines import train_child
from distill.knowledge.mine import mine
from distill.learning.consult import JOURNAL, Consultation, early
from distill.learning.feedback import FEEDBACK, Feedback, keep, read_feedback
from distill.learning.learn import Judged, Learning, learn, preference_loss
from distill.learning.polish import Polishing, judged, polish
from distill.run import Run
from distill.student.image_rows import KIND, SHIFT, across, begin_image_rows, direction
from distill.student.initialize import new_student, rows_of, transplant
from distill.sweep.ablation.ablate import cells_of
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.open_source import open_source
from distill.teacher.protocol import TokenTargets
from distill.tokens.aligner import Aligned, Aligner
from distill.tokens.bpe import USER_TOKENS, StudentTokenizer
from distill.tokens.build import build_tokenizer
from distill.tokens.chat import prompt_ids
from distill.tokens.packing import Documents, is_validation, pack
from distill.training import checkpoint, plan, trainer
from distill.training.batches import Batches
from distill.training.features import Features
from distill.training.loop import train
from distill.training.mixture import Mixture
from distill.training.sizes import measure_sizes
from distill.training.start import action_shares, begin, default_ffn, is_inherited, samples, start_settings
from distill.vision import PROJECTOR

QUESTIONS = [f"What happens when you {verb} {thing}?" for verb in ("drop", "throw", "push") for thing in
             ("a ball", "an egg", "a cup", "the door", "a book", "ice", "a stone", "a tree")]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a teacher of two layers that has learned one answer."""
    tokenizer = small_tokenizer(smollm2, [*QUESTIONS, "The ball falls to the floor."])
    model = dreaming_model(tokenizer, QUESTIONS, steps=60)
    path = tmp_path_factory.mktemp("teacher") / "teacher.gguf"
    write_gguf(model.state_dict(), model.config, tokenizer, path, "f32", {"general.license": "mit"})
    return path


@pytest.fixture(scope="module")
def answered(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its answers, mined and tokenized. Don't alter it."""
    folder = tmp_path_factory.mktemp("answered")
    questions = folder / "questions.txt"
    questions.write_text("\n".join(QUESTIONS), encoding="utf-8")
    settings = Settings(
        teacher=TeacherSettings(model=f"embedded:{teacher}", threads=1),
        capture=CaptureSettings(prompts=[str(questions)], max_tokens=24, temperature=0.3),
        tokenize=TokenizeSettings(image_tokens=8),
        student=StudentSettings(context=96),
        train=TrainSettings(steps=2, batch_rows=2, checkpoint_every=1, precision="float32", compile="never"),
    )
    run = Run.create(folder / "run", settings)
    capture(run)
    mine(run)
    build_tokenizer(run)
    return run


def of(answered: Run, folder: Path, **student: object) -> Run:
    """The same answers with another student."""
    import shutil

    shutil.copytree(answered.path, folder)
    run = Run.open(folder)
    for name, value in student.items():
        setattr(run.settings.student, name, value)
    return run


def test_the_whole_teacher_under_our_vocabulary_says_what_it_said(answered: Run, teacher: Path) -> None:
    """Logits of words that both have are equal, for a prompt that both write alike."""
    source, tokenizer = open_source(teacher), StudentTokenizer.load(answered.tokenizer)
    student, theirs = transplant(source, tokenizer, 96), source.backbone(96)
    rows = rows_of(source.tokenizer, tokenizer)
    ids = prompt_ids(tokenizer, QUESTIONS[0], think=False)
    assert all(len(rows[id]) == 1 for id in ids), "every token of the prompt is one of the teacher's"
    with torch.no_grad():
        ours = student(torch.tensor([ids]))[0, -1]
        expected = theirs(torch.tensor([[rows[id][0] for id in ids]]))[0, -1]
    single = [id for id, found in enumerate(rows) if len(found) == 1]
    torch.testing.assert_close(ours[single], expected[[rows[id][0] for id in single]], rtol=1e-4, atol=1e-4)


def test_an_image_token_begins_as_its_label_without_brackets_and_the_rest_as_a_list(
    answered: Run, teacher: Path
) -> None:
    theirs = open_source(teacher).tokenizer
    tokenizer = StudentTokenizer.load(answered.tokenizer)
    rows, vocabulary = rows_of(theirs, tokenizer), Vocabulary(theirs)
    fresh = [i for i in map(int, tokenizer.image_ids) if tokenizer.tokens[i] not in theirs.token_to_id]
    assert fresh
    for id in fresh:
        spelled = vocabulary.decode(rows[id]).decode()
        assert spelled == f" {tokenizer.tokens[id][1:-1]}"
    unknown = replace(theirs, tokens=[f"<{token}" if token in USER_TOKENS else token for token in theirs.tokens])
    rows = rows_of(unknown, tokenizer)
    begins = {
        id: vocabulary.decode(rows[id]) for id in (tokenizer.think_id, tokenizer.end_think_id, *tokenizer.lens_ids)
    }
    assert [*begins.values()] == [b"\n"] * 2 + [b" -"] * 4, "a list, within its text"
    assert rows[tokenizer.eos_id] == [theirs.eos_id]
    assert rows[tokenizer.start_id] == [theirs.token_to_id["<|im_start|>"]]


def test_training_begins_as_the_teacher(answered: Run, tmp_path: Path) -> None:
    run = of(answered, tmp_path / "run")
    events: list[Event] = []
    summary = train(run, events.append)
    about = json.loads((run.start / "start.json").read_text(encoding="utf-8"))
    assert about["license"] == "mit"
    assert (about["layers"], about["of_layers"], about["ffn"], about["of_ffn"]) == ([0, 1], 2, 160, 160)
    assert any("begins as its teacher, teacher.gguf" in event.message for event in events)
    start, first = load_backbone(run.start), load_backbone(checkpoint.folder_of(run, 0))
    for name, tensor in start.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor), name
    assert is_inherited(run)
    assert summary["parameters"] == count_parameters(start)
    assert begin(run, events.append) == run.start
    made = run.require("start").finished
    train(run, events.append)
    assert run.require("start").finished == made, "nothing changed: kept"
    records = run.records()
    for section, key, value, told in (
        (run.settings.student, "layers", 1, r"train\.student"),
        (run.settings.teacher, "weights", "other.gguf", r"teacher\.weights \('' there, 'other\.gguf' now\)"),
    ):
        before = getattr(section, key)
        setattr(section, key, value)
        with pytest.raises(RunMismatch, match=told):
            train(run)
        setattr(section, key, before)
    assert run.records() == records, "refused before anything was cut"


def test_rows_that_the_teacher_does_not_have_learn_quicker(
    answered: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one step, that is so many times as far, and all else is where it would be."""
    after: list[dict[str, torch.Tensor]] = []
    for factor in (1.0, plan.NEW_ROWS):
        monkeypatch.setattr(trainer, "NEW_ROWS", factor)
        run = of(answered, tmp_path / f"x{factor:g}", image_rows="untied")
        run.settings.train.steps, run.settings.train.checkpoint_every = 1, 1
        train(run)
        after.append(load_backbone(checkpoint.folder_of(run, 1)).state_dict())
    start, new = load_backbone(run.start).state_dict(), StudentTokenizer.load(run.tokenizer).think_id
    for name, tensor in start.items():
        plain, quick = (each[name] - tensor for each in after)
        rows = slice(new if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor), None)
        assert torch.equal(plain[: rows.start], quick[: rows.start]), name
        torch.testing.assert_close(quick[rows], plain[rows] * plan.NEW_ROWS, rtol=1e-3, atol=1e-6)
    assert not torch.equal(after[0]["lm_head.weight"], start["lm_head.weight"])


def test_layers_and_neurons_are_cut(answered: Run, tmp_path: Path) -> None:
    run = of(answered, tmp_path / "run", layers=1, ffn=64, heads=2)
    folder = begin(run)
    assert folder is not None
    model = load_backbone(folder)
    assert (model.config.layers, model.config.ffn, model.config.heads, model.config.head_dim) == (1, 64, 2, 16)
    about = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    assert len(about["layers"]) == 1
    assert about["nats_a_token_at"].keys() == {"1"}
    with pytest.raises(BadInput, match=r"student\.layers=3: the teacher has 2"):
        begin(of(answered, tmp_path / "more", layers=3))


def test_a_student_of_a_dataset_begins_as_the_model_whose_weights_are_named(teacher: Path, tmp_path: Path) -> None:
    settings = Settings(
        capture=CaptureSettings(dataset="causal-world", dataset_size=40, held_out=0.1),
        tokenize=TokenizeSettings(image_tokens=64),
        student=StudentSettings(layers=1, heads=2, context=256),
    )
    run = Run.create(tmp_path / "run", settings)
    capture(run)
    mine(run)
    build_tokenizer(run)
    assert begin(run) is None
    run.settings.teacher.weights = str(teacher)
    folder = begin(run)
    assert folder is not None
    config = load_backbone(folder).config
    assert (config.layers, config.heads, config.hidden) == (1, 2, open_source(teacher).config.hidden)
    assert is_inherited(run)
    run.settings.student.heads = 3  # need not divide what a student from chance would have
    assert cells_of(run, ["dreams"], 1, 2)[0].settings.student.heads == 3
    run.settings.teacher.weights = ""
    with pytest.raises(BadInput, match="3 heads don't divide a hidden size of 256"):
        cells_of(run, ["dreams"], 1, 2)


def test_image_tokens_are_told_apart_from_words(answered: Run, teacher: Path) -> None:
    """Where the teacher speaks, each is less likely by SHIFT on average than with its label's row alone."""
    tokenizer = StudentTokenizer.load(answered.tokenizer)
    run = answered
    pack(run)
    plain = transplant(open_source(teacher), tokenizer, 96)
    judged = samples(run, tokenizer, 96, 4096)
    from distill.student.cut import final_states

    states = torch.cat(final_states(plain, judged))
    assert float((states @ direction(states)).mean()) == pytest.approx(1.0, abs=1e-3)
    before = (states @ plain.lm_head.weight.T).detach().clone()
    action = action_shares(Documents.load(run.data / "train"), tokenizer)
    assert 0 < int((action > 0).sum()) < int((action < 0).sum()), "of three tokens one is an action"
    for kind in ("untied", "apart"):
        moved = begin_image_rows(transplant(open_source(teacher), tokenizer, 96), tokenizer, judged, kind, action)
        after = states @ moved.lm_head.weight.T
        change = (after - before)[:, tokenizer.image_ids]
        assert float(change.detach().mean()) == pytest.approx(-SHIFT, abs=0.05)
        image, acts = across(states, direction(states))
        assert abs(float(states.mean(0) @ (image + acts))) < 1e-3, "on average, they make no token likelier"
        change = (moved.lm_head.weight - plain.lm_head.weight).detach()
        rows = change @ image
        kinds = {"image": tokenizer.image_ids, "lens": list(tokenizer.lens_ids), "tag": [tokenizer.end_think_id]}
        sides = {name: float(rows[ids].mean()) for name, ids in kinds.items()}
        assert sides == pytest.approx({"image": KIND, "lens": -KIND, "tag": -KIND}, abs=1e-3)
        torch.testing.assert_close(change[tokenizer.image_ids] @ acts, KIND * action, atol=1e-3, rtol=0)
        assert torch.equal(after[:, : tokenizer.base_size], before[:, : tokenizer.base_size])
        assert moved.config.tie_embeddings == (kind == "apart")


def test_without_readable_weights_it_begins_by_chance_and_says_so(answered: Run, teacher: Path, tmp_path: Path) -> None:
    run = of(answered, tmp_path / "run")
    run.settings.teacher.model = "ollama:somewhere"
    run.settings.teacher.hosts = ["http://192.0.2.1:11434"]
    events: list[Event] = []
    assert begin(run, events.append) is None
    (warning,) = [event.message for event in events if event.kind == "warning"]
    assert warning.startswith("the student begins from chance: ")
    assert "--teacher-weights" in warning
    assert "\n" not in warning
    assert not is_inherited(run)
    train(run)
    run.settings.teacher = answered.settings.teacher  # which can be read now
    run.settings.train.steps = 3
    assert train(run, events.append)["steps"] == 3
    assert any(event.message.startswith("the student began from chance, and goes on so") for event in events)
    run.settings.teacher = replace(run.settings.teacher, weights=str(teacher))
    run.settings.train.steps = 4
    assert train(run)["steps"] == 4
    assert not is_inherited(run)
    train(run, force=True)
    assert is_inherited(run)


def test_chance_is_chance(answered: Run, tmp_path: Path) -> None:
    run = of(answered, tmp_path / "run", init="chance")
    assert begin(run) is None
    tokenizer = StudentTokenizer.load(run.tokenizer)
    one, two = (new_student(run.settings.student, tokenizer, seed) for seed in (0, 1))
    assert not torch.equal(one.model.embed_tokens.weight, two.model.embed_tokens.weight)
    run.settings.student.image_rows = "label"  # near their labels' words, and apart from them
    rows = new_student(run.settings.student, tokenizer, 0).model.embed_tokens.weight.detach()
    words = torch.stack([rows[tokenizer.encode(f" {label}")].mean(0) for label in tokenizer.labels])
    near = torch.cosine_similarity(rows[torch.from_numpy(tokenizer.image_ids)], words)
    assert 0.4 < near.min() < near.max() < 0.9


def test_hidden_states_are_drawn_to_the_teachers(answered: Run, tmp_path: Path) -> None:
    """A student that is its whole teacher is at distance nought from it; one that was cut ends nearer if drawn."""
    run = of(answered, tmp_path / "run", image_rows="untied")
    run.settings.train.match, run.settings.train.steps, run.settings.train.log_every = 1.0, 1, 1
    train(run)
    (row,) = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert row["match"] == pytest.approx(0.0, abs=1e-6)
    ends: list[float] = []
    for weight in (1e-6, 5.0):
        cut = of(answered, tmp_path / f"cut{weight:g}", ffn=32)
        settings = cut.settings.train
        settings.match, settings.strict, settings.steps, settings.log_every, settings.lr = weight, 0.0, 30, 1, 2e-3
        settings.checkpoint_every = 30
        train(cut)
        ends.append(json.loads(cut.metrics.read_text(encoding="utf-8").splitlines()[-1])["match"])
    assert ends[1] < 0.8 * ends[0]
    chance = of(answered, tmp_path / "chance", init="chance")
    chance.settings.train.match = 1.0
    with pytest.raises(BadInput, match=r"train\.match: only a student that begins as its teacher"):
        train(chance)


@torch.no_grad()
def test_a_batch_that_both_have_read_alike_nowhere_draws_to_nothing(answered: Run) -> None:
    pack(answered)
    documents, tokenizer = Documents.load(answered.data / "train"), StudentTokenizer.load(answered.tokenizer)
    batches = Batches(documents, tokenizer, 96, Mixture(True, 0.0, 0.0), 0, 0.8)
    batch = batches.assemble(batches.epoch(0)[:1])
    model = new_student(StudentSettings(init="chance", context=96), tokenizer, 0)
    states: list[torch.Tensor] = []
    model.hidden(batch.ids, batch.positions, batch.spans, states=states)
    features = Features(new_student(StudentSettings(init="chance", context=96), tokenizer, 1), range(len(states)))
    assert float(features.distance(batch, states)) > 0
    batch.alike.zero_()
    assert float(features.distance(batch, states)) == 0


def test_trainings_that_are_compared_begin_alike(answered: Run, tmp_path: Path) -> None:
    """A cut takes what time there is, so two may differ: the second cell of a sweep begins as the first did."""
    cells = list[Run]()
    told = list[Event]()
    for name, seed, student in (("a", 0, {}), ("b", 1, {}), ("c", 1, {"ffn": 32})):
        run = of(answered, tmp_path / f"{name}-settings", **student)
        run.settings.seed = seed
        told.clear()
        cells.append(train_child(answered, tmp_path / name, run.settings, 1, name, told.append))
        assert any("begins as its teacher" in event.message for event in told) == (name != "b")
    a, b, c = ((cell.start / "model.safetensors").read_bytes() for cell in cells)
    assert a == b != c
    assert cells[1].fresh("start", start_settings(cells[1])) is not None


def test_sizes_are_measured_once(answered: Run, tmp_path: Path) -> None:
    run = of(answered, tmp_path / "run")
    found = measure_sizes(run, layers=[1], neurons=[64])
    assert [(size.layers, size.ffn) for size in found] == [(2, 160), (1, 160), (2, 64)]
    whole, *smaller = found
    assert all(size.parameters < whole.parameters for size in smaller)
    assert all(size.bits_per_byte > 0 for size in found)
    assert file_bytes(whole.config, "q8_0") < file_bytes(whole.config, "f16") < file_bytes(whole.config, "f32")
    before = (run.path / "sizes.json").read_text(encoding="utf-8")
    assert measure_sizes(run, layers=[1], neurons=[64]) == found
    args = ["sizes", str(run.path), "--layers", "1", "--ffn", "64", "--quiet"]
    told = json.loads(CliRunner().invoke(dream, [*args, "--json"]).stdout)["sizes"]
    assert [(one["parameters"], one["top1"]) for one in told] == [(size.parameters, size.top1) for size in found]
    heading, *lines = CliRunner().invoke(dream, args).stdout.splitlines()
    assert heading.startswith("layers  neurons  parameters  MB ")
    assert [line.split()[:2] for line in lines] == [["2", "160"], ["1", "160"], ["2", "64"]]
    assert (run.path / "sizes.json").read_text(encoding="utf-8") == before


def test_what_is_kept_by_default() -> None:
    assert default_ffn(1536, whole=False) == 512
    assert default_ffn(8192, whole=False) == 2816
    assert default_ffn(160, whole=False) == 160, "what is small already stays"
    assert default_ffn(1536, whole=True) == 1536, "where layers were cut, they stay whole"


# Learning from its own answers.


@pytest.fixture(scope="module")
def trained(answered: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student of half its teacher's neurons, hardly trained. Don't alter it."""
    run = of(answered, tmp_path_factory.mktemp("trained") / "run", ffn=80)
    train(run)
    return run


def to_polish(trained: Run, folder: Path, **settings: object) -> Run:
    run = of(trained, folder, ffn=80)
    for name, value in ({"rounds": 3, "answers": 8, "lr": 1e-3} | settings).items():
        setattr(run.settings.polish, name, value)
    return run


def weights_of(run: Run) -> bytes:
    return (checkpoint.best(run) / "model.safetensors").read_bytes()


def test_answers_are_judged_as_their_teacher_would_go_on(answered: Run, teacher: Path) -> None:
    """Against one answer at a time in float64, without slots."""
    tokenizer = StudentTokenizer.load(answered.tokenizer)
    model = transplant(open_source(teacher), tokenizer, 96).double()
    prompts = [prompt_ids(tokenizer, question) for question in QUESTIONS[:3]]
    answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("The ball falls.", "It", "The floor falls up")]
    found = judged(model, tokenizer, prompts, answers)
    words = [*range(tokenizer.base_size), tokenizer.eos_id]
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert found.prompt(i).tolist() == prompt
        assert found.answer(i).tolist() == answer
        span = found.span(found.answer_ends, i)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
        for place, token in enumerate(answer):
            expected = dict(zip(words, logits[place][words].log_softmax(-1).tolist(), strict=True))
            likeliest = sorted(expected, key=lambda id: -expected[id])[:20]
            ids, logprobs = found.slot_ids[span][place], found.slot_logprobs[span][place].astype(float)
            kept = {int(id): value for id, value in zip(ids, logprobs[1:], strict=True) if np.isfinite(value)}
            assert kept.keys() | {token} == {*likeliest, token}
            assert logprobs[0] == pytest.approx(expected[token], rel=2e-3, abs=2e-3)
            assert kept == pytest.approx({id: expected[id] for id in kept}, rel=2e-3, abs=2e-3)


def test_polishing_brings_own_answers_nearer_to_the_teacher_and_can_be_undone(trained: Run, tmp_path: Path) -> None:
    run = to_polish(trained, tmp_path / "run", rounds=8)
    before, records = weights_of(run), run.records()
    events: list[Event] = []
    summary = polish(run, events.append)
    assert summary["kl_of_own_answers"] < 0.8 * summary["kl_of_own_answers_before"]
    assert (summary["rounds"], summary["answers"]) == (8, 64)
    assert any(event.message.startswith("by its teacher's weights, ") for event in events)
    assert weights_of(run) != before
    assert checkpoint.best(run) == checkpoint.latest(run)
    assert [event.done for event in events if event.kind == "progress"] == list(range(1, 9))
    assert polish(run, events.append) == summary
    assert events[-1].message == "nothing changed: kept"
    assert list((run.path / "tensorboard" / "polish").iterdir())
    args = ["polish", str(run.path), "--rounds", "8", "--set", "polish.answers=8", "--set", "polish.lr=1e-3"]
    kept = json.loads(CliRunner().invoke(dream, [*args, "--json"]).stdout)
    assert (kept["skipped"], kept["summary"]) == (True, summary)
    assert train(run)["steps"] == 2, "what trained it is as it was"
    run.settings.train.steps = 4
    with pytest.raises(RunMismatch, match=r"of `dream polish`; `dream polish .* --undo`"):
        train(run)
    undone = CliRunner().invoke(dream, ["polish", str(run.path), "--undo", "--json"])
    assert json.loads(undone.stdout)["deleted"] == 1
    assert weights_of(run) == before
    assert run.records() == records
    assert not (run.path / "tensorboard" / "polish").exists()


@pytest.mark.parametrize("gaps", [0.0, 1.0])
def test_own_answers_have_gaps_as_the_teachers_do(gaps: float, trained: Run, tmp_path: Path) -> None:
    run = to_polish(trained, tmp_path / "run")
    run.settings.train.gaps = gaps
    polishing = Polishing(run, {}, silent)
    asked = types.SimpleNamespace(answers=lambda *how: (polishing.given.documents, {}))
    polishing.consultation = cast("Consultation", asked)
    own, rows = polishing._own(0, np.random.default_rng(0))  # pyright: ignore[reportPrivateUsage]
    batch = own.assemble(rows)
    apart = [(batch.positions[row, a + 1 : b] - batch.positions[row, a : b - 1]) for row, a, b in batch.spans.spans]
    assert bool((torch.cat(apart) > 1).any()) == (gaps > 0)


def test_a_polishing_that_was_stopped_ends_as_one_that_was_not(trained: Run, tmp_path: Path) -> None:
    whole, cut = (to_polish(trained, tmp_path / name, rounds=4) for name in ("whole", "cut"))

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.done == 2:
            raise KeyboardInterrupt

    begun = checkpoint.best(cut)
    (begun / PROJECTOR).write_bytes(b"what reads pictures")
    (begun / "checksums.json").unlink()
    checkpoint.write_checksums(begun)
    with pytest.raises(KeyboardInterrupt):
        polish(cut, stop)
    assert "polish" not in cut.records()
    assert len(checkpoint.of_stage(cut, "polish")) == 1
    cut.settings.polish.temperature = 1.0
    with pytest.raises(RunMismatch, match="other settings; --force"):
        polish(cut)
    cut.settings.polish.temperature = 0.5
    told, expected = polish(cut), polish(whole)
    assert told == expected
    assert weights_of(cut) == weights_of(whole)
    assert (checkpoint.best(cut) / PROJECTOR).read_bytes() == b"what reads pictures", "it goes on from one that is gone"


def test_a_polishing_stays_until_another_can_take_its_place(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = to_polish(trained, tmp_path / "run", rounds=1, answers=2)
    polished, journal = went_on(run, "polish"), run.checkpoints / JOURNAL
    journal.write_text(json.dumps({"how": {}, "weights": ""}) + "\n", encoding="utf-8")

    def left() -> tuple[list[Path], str]:
        return checkpoint.list_checkpoints(run), journal.read_text(encoding="utf-8")

    def gone(*_: object, **_more: object) -> None:
        raise TeacherError("it is gone")

    before = left()
    for through, what in (
        ("server", "distill.learning.consult.opened"),
        ("weights", "distill.learning.polish.transplant"),
        ("weights", "distill.learning.polish.Polishing._round"),
    ):
        run.settings.polish.through = through
        with monkeypatch.context() as patch:
            patch.setattr(what, gone)
            with pytest.raises(TeacherError, match="it is gone"):
                polish(run, force=True)
        assert left() == before, what
    learned = went_on(run, "facts")
    before = left()
    with pytest.raises(RunMismatch, match=r"learned new facts, the work of `dream learn`; `dream learn .* --undo`"):
        polish(run, force=True)
    assert left() == before
    checkpoint.delete(learned)
    assert polish(run, force=True)["rounds"] == 1
    (kept,) = checkpoint.of_stage(run, "polish")
    assert checkpoint.read_loop(kept).settings["polish"]["round"] == 1
    assert kept == polished or not polished.exists()
    assert not journal.exists()


def test_the_teachers_answers_alone_are_what_polishing_is_compared_with(trained: Run, tmp_path: Path) -> None:
    run, events = to_polish(trained, tmp_path / "run", teachers_share=1.0), []
    summary = polish(run, events.append)
    assert (summary["rounds"], summary["answers"]) == (3, 0)
    assert summary["steps"] >= 3
    assert weights_of(run) != weights_of(trained)
    assert not [event for event in events if event.kind == "warning"]


def test_a_student_that_cuts_words_otherwise_asks_its_teacher(answered: Run, tmp_path: Path) -> None:
    """What was begun is read, and what the teacher goes on with is learned, by chunks of bytes."""
    run = of(answered, tmp_path / "run", init="chance", preset="nano", layers=1)
    run.settings.tokenize = TokenizeSettings(kind="sentencepiece", vocab_size=400, image_tokens=8)
    build_tokenizer(run)
    train(run)
    events: list[Event] = []
    for name, value in {"rounds": 2, "answers": 6, "lr": 2e-3}.items():
        setattr(run.settings.polish, name, value)
    assert polish(run, events.append)["answers"] == 12
    assert any("needs its teacher's tokens; tokenize with --kind aligned" in event.message for event in events)
    assert any(event.message.startswith("by forward KL: polish.beta") for event in events)
    lines = [json.loads(line) for line in (run.checkpoints / JOURNAL).read_text(encoding="utf-8").splitlines()]
    assert lines[0]["how"]["answers"] == 6
    begun = [words for line in lines if "begun" in line for _, _, words in line["begun"]]
    assert len(begun) == 12
    assert any(begun)
    assert any(line["targets"] for line in lines if "place" in line)
    run.settings.polish.rounds = 1
    assert polish(run, force=True)["answers"] == 6
    assert len(checkpoint.of_stage(run, "polish")) == 1
    lines = [json.loads(line) for line in (run.checkpoints / JOURNAL).read_text(encoding="utf-8").splitlines()]
    assert [line["round"] for line in lines if "begun" in line] == [0]


def test_what_a_teacher_goes_on_with_ends_before_a_token_that_the_student_lacks(answered: Run) -> None:
    tokenizer = StudentTokenizer.load(answered.tokenizer)
    assert tokenizer.teacher_map is not None
    lacked, known = (int(np.flatnonzero(of)[0]) for of in (tokenizer.teacher_map < 0, tokenizer.teacher_map >= 0))
    spelled = {lacked: b"x", known: tokenizer.decode([int(tokenizer.teacher_map[known])]).encode()}
    aligner = Aligner(tokenizer, spelled.__getitem__)
    nowhere: Any = None  # neither journal nor teacher
    consultation = Consultation(types.SimpleNamespace(lines=[]), nowhere, [], nowhere, tokenizer, aligner)  # pyright: ignore

    def aligned(*ids: int) -> Aligned:
        told = np.array(ids, np.int32)
        some = told[:, None]
        nats = np.full(some.shape, -1.0, np.float32)
        targets = TokenTargets(told, nats[:, 0], some, nats, np.ones(len(ids), bool))
        said = b"".join(spelled[id] for id in ids).decode()
        line = {"text": said, "done": "stop", "targets": base64.b64encode(pack_targets(targets)).decode()}
        return consultation._aligned(line)  # pyright: ignore[reportPrivateUsage]

    assert len(aligned(known, lacked, known).ids) == 1
    assert len(aligned(lacked, known, known).ids) == 0, "and no hard labels of its text"


def test_answers_are_not_drawn_by_their_dreams_numbers(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[int]] = {}

    def noted(name: str, generate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            drawn.setdefault(name, []).extend(how["seed"])
            return generate(*args, **how)

        return call

    for name in ("distill.learning.polish", "distill.training.drafts"):
        monkeypatch.setattr(f"{name}.generate", noted(name, importlib.import_module(name).generate))
    polish(to_polish(trained, tmp_path / "run", rounds=2))
    answers, dreams = drawn.values()
    assert len({*answers, *dreams}) == len(answers) + len(dreams) > 16


def test_prompts_that_nobody_answered_are_answered_too(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of an exam."""
    new = [f"What happens when you drop a ball {number} times?" for number in range(40)]
    file = tmp_path / "further.txt"
    file.write_text("\n".join([*QUESTIONS, *new]), encoding="utf-8")
    run, events = to_polish(trained, tmp_path / "run", rounds=1, answers=99, prompts=[str(file)]), []
    asked: list[list[int]] = []

    def noted(model: Any, tokenizer: Any, prompts: Sequence[list[int]], answers: Any) -> Documents:
        asked.extend(prompts)
        return judged(model, tokenizer, prompts, answers)

    monkeypatch.setattr("distill.learning.polish.judged", noted)
    summary = polish(run, events.append)
    further = [text for text in new if not is_held_out(text, run.settings.capture.held_out) and not is_validation(text)]
    assert 0 < len(further) < len(new)
    tokenizer, given = StudentTokenizer.load(run.tokenizer), Documents.load(run.data / "train")
    system = run.settings.capture.system
    expected = [*map(list, map(given.prompt, range(len(given))))]
    expected += [prompt_ids(tokenizer, text, system=system) for text in further]
    assert sorted(asked) == sorted(expected)
    assert summary["answers"] == len(expected)
    assert any(f"{len(further)} of {len(new) + len(QUESTIONS)} further prompts" in event.message for event in events)
    assert polish(run) == summary
    file.write_text("\n".join([*QUESTIONS, *new[:20]]), encoding="utf-8")
    with pytest.raises(RunMismatch, match="polished with other settings"):
        polish(run)
    run.settings.train.retrieve = "walk"
    with pytest.raises(BadInput, match=r"^polish\.prompts: .*not with train\.retrieve"):
        polish(run)


def test_an_answer_is_cut_off_early_and_before_a_word(answered: Run) -> None:
    tokenizer, random = StudentTokenizer.load(answered.tokenizer), np.random.default_rng(0)
    ids = tokenizer.encode("The ball falls to the floor")
    cuts = {tokenizer.decode(early(ids, tokenizer, random)) for _ in range(100)}
    assert cuts == {"The", "The ball", "The ball falls", "The ball falls to", "The ball falls to the"}
    whole = {tokenizer.decode(early([*ids, tokenizer.eos_id], tokenizer, random)) for _ in range(100)}
    assert whole == {*cuts, "The ball falls to the floor"}
    assert early([tokenizer.eos_id], tokenizer, random) == []


def test_what_cannot_be_polished_is_refused(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(MissingStage, match="dream train"):
        polish(Run.create(tmp_path / "new", Settings()))
    for name in ("teachers_share", "beta"):
        with pytest.raises(BadInput, match=rf"polish\.{name}=1\.5: lies between 0 and 1"):
            polish(to_polish(trained, tmp_path / name, **{name: 1.5}))
    run = to_polish(trained, tmp_path / "run")
    run.settings.teacher.weights = str(tmp_path / "none.gguf")
    with pytest.raises(BadInput, match=r"none\.gguf"):
        polish(run)
    assert checkpoint.of_stage(run, "polish") == []


# Learning from feedback.


def test_preferences_cost_what_their_formulas_say(answered: Run) -> None:
    """One answer at a time in float64, written down anew: DPO for pairs, KTO for the others."""
    tokenizer = StudentTokenizer.load(answered.tokenizer)
    torch.manual_seed(0)
    now = new_student(StudentSettings(init="chance", preset="nano", layers=1, context=64), tokenizer, 0).double()
    context = prompt_ids(tokenizer, QUESTIONS[0])
    falls, flies, long = ([*tokenizer.encode(t), tokenizer.eos_id] for t in ("It falls.", "It flies", "It falls down"))
    groups = [
        [Judged(context, falls, 1, -9.0), Judged(context, flies, -1, -8.5)],
        [Judged(context, long, 1, -20.0)],
        [Judged(context[:-2], flies, -1, -7.0)],
    ]

    def nats(model: torch.nn.Module, each: Judged) -> float:
        logits = model(torch.tensor([[*each.context, *each.answer]]))[0].log_softmax(-1)
        return sum(float(logits[len(each.context) - 1 + n, id]) for n, id in enumerate(each.answer))

    with torch.no_grad():
        reward = [[0.3 * (nats(now, each) - each.was) for each in group] for group in groups]
        better, good, bad = reward[0], reward[1][0], reward[2][0]
        mean = max(0.0, (sum(better) + good + bad) / 4)
        pair = math.log(1 + math.exp(better[1] - better[0])) - 0.2 * nats(now, groups[0][0]) / len(falls)
        expected = [pair, 1 - 1 / (1 + math.exp(mean - good)), 1 - 1 / (1 + math.exp(bad - mean))]
    found = preference_loss(now, groups, 0.3)
    assert float(found.detach()) == pytest.approx(sum(expected) / 3, rel=1e-5)


def stopping(event: Event) -> None:
    raise KeyboardInterrupt


def test_feedback_from_the_chat_teaches_and_can_be_taken_back(trained: Run, tmp_path: Path) -> None:
    run = of(trained, tmp_path / "run", ffn=80)
    before = weights_of(run)
    talked = CliRunner().invoke(dream, ["chat", str(run.path)], input="/good\n/temp\n/stream maybe\n")
    assert talked.stdout == "temperature 0.7\n/stream takes on or off, not 'maybe'\n"
    assert "Error: /good: nothing was answered yet" in talked.stderr
    unasked = CliRunner().invoke(dream, ["chat", str(run.path), "--image", str(run.path / "config.yaml")])
    assert (unasked.exit_code, "--image needs --prompt" in unasked.stderr) == (2, True)
    talk = Chat(load_student(run.path), temperature=0, max_tokens=8, feedback=run.path / FEEDBACK)
    for question in QUESTIONS:
        list(talk.pieces(question))
        assert "kept" in str(talk.command("/better It falls up"))
        talk.command("/reset")
    list(talk.pieces(QUESTIONS[0]))
    assert "kept" in str(talk.command("/bad"))
    with pytest.raises(BadInput, match="say what it should have said"):
        talk.command("/better")
    said = CliRunner().invoke(dream, ["learn", str(run.path), "--lr", "0.003", "--epochs", "12", "--json"])
    summary = json.loads(said.stdout)["summary"]
    assert summary["feedback"] == len(QUESTIONS) + 1
    assert summary["preferred"] > max(summary["preferred_before"], 0.9)
    assert weights_of(run) != before
    assert {each["prompt"] for each in summary["examples"]} <= {*QUESTIONS}
    student = load_student(run.path)
    how: dict[str, Any] = {"think": False, "temperature": 0, "max_tokens": 8}
    taught = [together(student.chat([{"role": "user", "content": q}], **how)) for q in QUESTIONS]
    assert sum("falls up" in each["content"] for each in taught) > len(QUESTIONS) / 2
    known = weights_of(run)
    with pytest.raises(KeyboardInterrupt):
        learn(run, stopping, force=True)
    assert weights_of(run) == known, "what was learned stays until it is learned anew"
    learn(run, force=True, epochs=1)
    assert len(checkpoint.of_stage(run, "learn")) == 1
    assert weights_of(run) not in (known, before)
    with pytest.raises(RunMismatch, match="learned from feedback"):
        polish(to_polish(run, tmp_path / "copy"))
    assert json.loads(CliRunner().invoke(dream, ["learn", str(run.path), "--undo", "--json"]).stdout)["deleted"] == 1
    assert weights_of(run) == before
    assert len(read_feedback(run.path / FEEDBACK)) == len(QUESTIONS) + 1


def test_an_answer_that_was_cut_is_learned_without_an_end(trained: Run, tmp_path: Path) -> None:
    run = of(trained, tmp_path / "run")
    talk = Chat(load_student(run.path), temperature=0, max_tokens=1, feedback=run.path / FEEDBACK)
    list(talk.pieces(QUESTIONS[0]))
    talk.command("/good")
    list(talk.pieces(QUESTIONS[0]))
    talk.command("/better It falls up")
    keep(run.path / FEEDBACK, Feedback([{"role": "user", "content": QUESTIONS[0]}], "", "It falls", "good"))
    lines = read_feedback(run.path / FEEDBACK)
    assert [line.cut for line in lines] == [True, True, False]
    lines = [replace(line, dream="") for line in lines]
    learning = Learning(run, lines, 1e-5)
    ended = [[judged.answer[-1] == learning.tokenizer.eos_id for judged in group] for group in learning.groups]
    assert ended == [[False], [True, False], [True]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: is no feedback"),
        ('{"messages": [], "dream": "", "answer": "a", "verdict": "good"}', "ends with a question"),
        (
            '{"messages": [{"role": "user", "content": "q"}], "dream": "", "answer": "a", "verdict": "fine"}',
            "verdict 'fine' is none of",
        ),
        (
            '{"messages": [{"role": "user", "content": "q"}], "dream": "", "answer": "a", "verdict": "better"}',
            "better is empty",
        ),
        (
            '{"messages": [{"content": "p"}, {"role": "user", "content": "q"}], "dream": "", "answer": "a", '
            '"verdict": "good"}',
            r"line 2: is no feedback \(messages must be a conversation",
        ),
    ],
)
def test_a_line_that_is_no_feedback_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / FEEDBACK
    keep(path, Feedback([{"role": "user", "content": "q"}], "", "a", "good"))
    path.write_bytes(path.read_bytes() + line.encode())
    with pytest.raises(BadInput, match=reason):
        read_feedback(path)
    keep(path, Feedback([{"role": "user", "content": "q"}], "", "a", "bad"))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    with pytest.raises(DistillError, match="can't write it"):
        keep(tmp_path, Feedback([{"role": "user", "content": "q"}], "", "a", "bad"))


def test_the_tables_of_what_is_learned_on_are_measured(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = of(trained, tmp_path / "run")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.polish, "SAMPLES", 1)
    monkeypatch.setattr(bench.polish, "RESAMPLES", 100)
    monkeypatch.setattr(bench.feedback, "EPOCHS", 1)
    monkeypatch.setattr(bench.feedback, "sentences", str.split)  # this teacher knows one
    before = checkpoint.list_checkpoints(run)
    polish = functools.partial(bench.polish.main, "polish", "0.001", ",".join(bench.polish.NAMES))
    for measure, file, rows in ((polish, "polish", 11), (bench.feedback.main, "learn", 2)):
        measure(str(run.path), str(run.path))
        found = json.loads((tmp_path / f"{file}.json").read_text(encoding="utf-8"))
        assert len(found["rows"]) == rows
        assert all({*row} <= {*found["columns"]} for row in found["rows"])
        assert all(len(row[key]) == 3 for row in found["rows"] for key in row if isinstance(row[key], list))
    assert checkpoint.list_checkpoints(run) == before
    assert bench.feedback.told(run)[0][2] == "The"
    asked, told = bench.dreams.told(run)
    assert asked == pytest.approx(
        -Documents.load(run.data / "train").slot_logprobs[:, 0].astype(float).mean(), rel=1e-3
    )
    assert told not in (asked, 0)
