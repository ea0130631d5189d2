"""The ablation of dreaming: its trainings, arms, statistics and words, on a small causal world."""

import json
import shutil
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.ablation_run import STEPS, small_world
from support.gone_on import went_on

import bench.dreams
from bench import figures
from distill.corpus.datasets.stage import dataset_file
from distill.corpus.traces import TraceStore
from distill.corpus.truth import read_truths
from distill.dream.engine import drafted_dreams, prompt_states
from distill.errors import BadInput, MissingStage
from distill.events import Event, silent
from distill.exam.metrics.statistics import HierarchicalBootstrap, PairedBootstrap, Ratio
from distill.exam.provenance import changed_settings
from distill.exam.questions import Question, load_exam
from distill.exam.targets import How, Target
from distill.mining.triplets import by_trace, read_triplets, write_triplets
from distill.report.page import render_markdown
from distill.run import Run
from distill.shipped import shipped
from distill.sweep.ablation.ablate import Ablation, ablate, cells_of
from distill.sweep.ablation.arms import ARMS, PAIRS, Reader, dream_accuracy, others
from distill.sweep.plan import read_plan
from distill.tokens.chat import dream_ids, parse_dream, think_ids
from distill.training.checkpoint import best, folder_of, latest
from distill.training.engine.phases import train_engine
from distill.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Not ablated; don't alter it."""
    return small_world(tmp_path_factory.mktemp("world") / "small")


@pytest.fixture(scope="module")
def ablated(world: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """Trained, then ablated with two seeds; don't alter it."""
    folder = tmp_path_factory.mktemp("ablated") / "small"
    shutil.copytree(world.path, folder)
    run = Run.open(folder)
    train(run)
    return run, ablate(run, seeds=2)


@pytest.fixture
def copied(ablated: tuple[Run, dict[str, Any]], tmp_path: Path) -> Run:
    shutil.copytree(ablated[0].path, tmp_path / "small")
    return Run.open(tmp_path / "small")


@pytest.fixture(scope="module")
def reader(ablated: tuple[Run, dict[str, Any]]) -> Reader:
    """The dreaming student of seed 0 and its engine."""
    run = ablated[0]
    child = Run.open(run.path / "ablation" / "seed-0" / "dreams")
    ablation = Ablation(run, silent, list(ARMS), STEPS, force=False)
    target = Target("backbone", "checkpoint", best(child), run=child)
    return Reader(target, How(0, ablation.dream_tokens), ablation.exam.questions, ablation.codes, child)


@pytest.fixture(scope="module")
def questions(ablated: tuple[Run, dict[str, Any]]) -> list[Question]:
    return load_exam(ablated[0]).questions


def reads(reader: Reader, arm: str, questions: list[Question]) -> list[list[int]]:
    reader.arm = arm
    return reader.dreams(questions)


def mined(reader: Reader, questions: list[Question]) -> list[list[int]]:
    return [reader.mined(question.triplets) for question in questions]


def with_own(reader: Reader, questions: list[Question], dreams: list[list[int]], patch: pytest.MonkeyPatch) -> None:
    """Let these be the backbone's own dreams."""
    patch.setattr(reader, "_own", {question.key: dream for question, dream in zip(questions, dreams, strict=True)})


# Trainings.


def test_trainings_differ_in_their_dreams_and_seeds_alone(ablated: tuple[Run, dict[str, Any]]) -> None:
    run, results = ablated
    trained_on = {arm: entry["trained_on"] for arm, entry in results["systems"].items()}
    assert len({(about["parameters"], about["data"]) for about in trained_on.values()}) == 1
    weights: set[bytes] = set()
    for seed, training in [(s, t) for s in (0, 1) for t in ("nodream", "pause", "dreams")]:
        child = Run.open(run.path / "ablation" / f"seed-{seed}" / training)
        assert child.settings.seed == seed
        assert child.require("train").summary["tokens"] == STEPS * 2 * 256
        assert child.settings.train.dreams == (training != "nodream")
        assert child.settings.train.pause == (training == "pause")
        assert child.settings.student == run.settings.student
        assert latest(child) == folder_of(child, STEPS)
        with TraceStore(child.traces, readonly=True) as one, TraceStore(run.traces, readonly=True) as other:
            assert one.content_digest() == other.content_digest()
        assert (child.data / "data.json").read_bytes() == (run.data / "data.json").read_bytes()
        weights.add((best(child) / "model.safetensors").read_bytes())
    assert len(weights) == 6
    child = Run.open(run.path / "ablation" / "seed-0" / "dreams")
    assert child.records()["train"] == run.records()["train"], "the run's own training is one of them"
    assert (best(run) / "model.safetensors").read_bytes() in weights


def test_the_runs_own_engine_is_shared_where_it_is_what_the_child_would_train(copied: Run) -> None:
    train_engine(copied)
    child = copied.path / "ablation" / "seed-0" / "dreams"
    shutil.rmtree(child)
    own = {path.name: path.read_bytes() for path in copied.engine.iterdir()}
    ablate(copied, seeds=1, arms=["engine"])
    assert {path.name: path.read_bytes() for path in (child / "engine").iterdir()} == own
    assert Run.open(child).require("engine").seconds == copied.require("engine").seconds
    shutil.rmtree(child)
    copied.settings.dreaming.keep_above = 0.25  # the run's own engine isn't up to date any more
    ablate(copied, seeds=1, arms=["engine"])
    assert json.loads((child / "engine" / "engine.json").read_text(encoding="utf-8"))["config"]["keep_above"] == 0.25
    assert json.loads((copied.engine / "engine.json").read_text(encoding="utf-8"))["config"]["keep_above"] == 0.5


def test_other_settings_of_dreaming_train_the_engine_anew(copied: Run) -> None:
    copied.settings.dreaming.dream_steps = 2
    events: list[Event] = []
    ablate(copied, events.append, seeds=1, arms=["engine"])
    child = Run.open(copied.path / "ablation" / "seed-0" / "dreams")
    assert child.require("engine").summary["steps"]["dream"] == 2
    notes = [event.message for event in events if event.kind == "note" and event.stage == "seed 0, dreams, engine"]
    assert "the settings of dreaming changed: training the engine anew" in notes


def test_what_an_arm_learned_since_is_not_measured(copied: Run) -> None:
    went_on(Run.open(copied.path / "ablation" / "seed-0" / "dreams"), "polish", rounds=1)
    told = ablate(copied, seeds=1, arms=["backbone", "nodream"])["systems"]["backbone"]["trained_on"]
    assert (told["steps"], told["onward"]) == (STEPS, "")


def test_a_report_names_no_servers(world: Run) -> None:
    settings = deepcopy(world.settings)
    settings.teacher.hosts = ["http://somebody:11434"]
    assert changed_settings(settings) == changed_settings(world.settings)
    assert changed_settings(settings)["capture.dataset"] == "causal-world"


def test_the_shipped_sweep_has_every_training(world: Run, tmp_path: Path) -> None:
    plan = read_plan(shipped("configs") / "sweeps" / "ablation.yaml")
    assert list(plan.systems) == list(dict.fromkeys(arm.training for arm in ARMS.values()))
    run = Run(tmp_path, deepcopy(world.settings))
    run.settings.train.retrieve, run.settings.seed = "walk", 7
    cells = cells_of(run, ["dreams", "retrieval"], seeds=2, steps=9)
    assert [(cell.seed, cell.system, cell.settings.train.retrieve) for cell in cells] == [
        (seed, name, how) for seed in (7, 8) for name, how in (("dreams", ""), ("retrieval", "walk"))
    ]
    assert {cell.settings.train.steps for cell in cells} == {9}


# Results.


def samples_in(run: Run) -> list[dict[str, Any]]:
    text = (run.path / "ablation" / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_files_hold_the_numbers_and_the_report_is_made_of_them(ablated: tuple[Run, dict[str, Any]]) -> None:
    run, results = ablated
    folder = run.path / "ablation"
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text == render_markdown(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    assert list(results["systems"]) == [name for name, arm in ARMS.items() if not arm.optional]
    for arm in results["systems"]:
        assert f"{arm}: {ARMS[arm].label}." in text
    assert str(run.path.parent) not in text
    pairs = list(dict.fromkeys((found["system"], found["against"]) for found in results["differences"]))
    assert pairs == [pair for pair in PAIRS if {*pair} <= results["systems"].keys()]
    assert results["tests"]["kinds"] == ["paired"]
    assert "<h1" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_docs_tables_are_made_of_the_results(
    ablated: tuple[Run, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, results = ablated
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    bench.dreams.main("inherited", str(run.path))
    tables = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert tables.keys() == {"inherited-world", "inherited-world-differences", "inherited-world-dreams"}
    assert f"--seeds 2 --steps {STEPS} --arms nodream,pause,backbone" in tables["inherited-world"]["command"]
    row = next(row for row in tables["inherited-world"]["rows"] if row["name"] == "no dream")
    told = results["systems"]["nodream"]["metrics"]["exact_match"]
    assert row["exact_match"] == [round(100 * told[name], 1) for name in ("value", "low", "high")]
    assert [row["name"] for row in tables["inherited-world-dreams"]["rows"]] == [
        "dreams that it decodes",
        "dreams that its engine drafts",
    ]
    apart = tables["inherited-world-differences"]["rows"]
    assert "dreams that its engine drafts − dreams that it decodes" in [row["name"] for row in apart]
    bench.dreams.main("students", str(run.path), str(run.path))
    rows = json.loads((tmp_path / "world-students.json").read_text(encoding="utf-8"))["rows"]
    how = run.settings.student.layers, STEPS, run.settings.train.stutter, 2
    assert [(row["layers"], row["steps"], row["stutter"], row["seeds"]) for row in rows] == [how, how]
    told = results["systems"]["oracle"]["metrics"]["exact_match_depth"]
    assert rows[0]["oracle depth"] == [round(100 * told[name], 1) for name in ("value", "low", "high")]


def test_means_and_differences_follow_from_the_samples(ablated: tuple[Run, dict[str, Any]]) -> None:
    run, results = ablated
    samples = samples_in(run)

    def by_hand(arm: str) -> float:
        sizes = np.array([len(sample["teacher"].encode()) for sample in samples])
        rates = [
            [sample["systems"][arm][seed]["metrics"]["bits_per_byte_used"] for sample in samples] for seed in (0, 1)
        ]
        return float(np.mean(np.array(rates) @ sizes / sizes.sum()))

    told = {(d["system"], d["against"], d["metric"]): d for d in results["differences"]}
    assert results["systems"]["pause"]["metrics"]["bits_per_byte_used"]["value"] == pytest.approx(by_hand("pause"))
    found = told["engine", "pause", "bits_per_byte_used"]
    assert found["value"] == pytest.approx(by_hand("engine") - by_hand("pause"))
    assert found["low"] <= found["value"] <= found["high"]
    truths = read_truths(run)
    for sample in samples:
        assert sample["expected"] == truths[sample["key"]].answer
        for arm in sample["systems"].values():
            hit = arm[1]["answer"].split() == sample["expected"].split()
            assert arm[1]["metrics"]["exact_match"] == hit
            assert arm[1]["metrics"][f"exact_match_{sample['split']}"] == hit


def test_exact_match_is_of_what_an_arm_says(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other true answer becomes what the student said: trainings stay, the arm is measured anew."""
    said = {sample["key"]: sample["systems"]["pause"][0]["answer"] for sample in samples_in(copied)[::2]}
    lines = [json.loads(line) for line in dataset_file(copied).read_text(encoding="utf-8").splitlines()]
    lines = [{**line, "answer": said.get(line["key"], "never")} for line in lines]
    dataset_file(copied).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr("distill.sweep.ablation.ablate.dream_size", lambda _: 70)
    events: list[Event] = []
    results = ablate(copied, events.append, seeds=1, arms=["pause"])
    assert results["decoding"]["dream_tokens"] == 70, "as long as dreams could be"
    assert results["systems"]["pause"]["metrics"]["exact_match"]["value"] == 0.5
    assert not [event for event in events if event.unit == "step"]
    assert set(results["systems"]) == {"pause"}
    assert results["differences"] == []


def test_an_interrupted_ablation_goes_on(copied: Run, ablated: tuple[Run, dict[str, Any]]) -> None:
    arms = copied.path / "ablation" / "seed-1" / "arms"
    shutil.rmtree(arms / "oracle")
    (kept,) = (arms / "engine").glob("*/journal.jsonl")
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    (answers,) = (line for line in lines if line.get("phase") == "answers")
    answers["records"][0]["answer"] = "from the kept file"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    class Interruptedly(Exception):
        pass

    def interrupt(event: Event) -> None:
        if event.stage == "seed 1, oracle" and event.unit == "answers":
            raise Interruptedly

    (copied.path / "ablation" / "results.json").unlink()
    with pytest.raises(Interruptedly):
        ablate(copied, interrupt, seeds=2)
    assert not (copied.path / "ablation" / "results.json").exists()
    events: list[Event] = []
    results = ablate(copied, events.append, seeds=2)
    assert samples_in(copied)[0]["systems"]["engine"][1]["answer"] == "from the kept file"
    assert not [event for event in events if event.unit == "step"]  # nothing was trained
    last = [event for event in events if event.stage == "seed 1, oracle" and event.kind == "progress"][-1]
    assert last.done == last.total == 2 * 12
    assert results["differences"] == ablated[1]["differences"]
    # A line that was cut short isn't taken.
    kept.write_text(kept.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    ablate(copied, seeds=2)
    assert samples_in(copied)[0]["systems"]["engine"][1]["answer"] != "from the kept file"


def test_without_true_answers_likelihood_and_chrf_are_measured(copied: Run) -> None:
    dataset_file(copied).unlink()
    results = ablate(copied, seeds=1, arms=["nodream", "backbone"])
    found = results["systems"]["backbone"]["metrics"]
    assert {"chrf", "bits_per_byte_used", "codes_right"} <= found.keys()
    assert "exact_match" not in found
    assert results["tests"]["leading"] == "bits_per_byte_used"
    assert "one training each" in render_markdown(results)


def test_true_dreams_of_siblings(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each held-out prompt but one gets a second answer, with what was mined from another's."""
    dataset_file(copied).unlink()
    mined = by_trace(read_triplets(copied.triplets))
    with TraceStore(copied.traces) as store:
        held = list(store.traces(held_out=True))
        for trace, donor in zip(held[1:], held[:-1], strict=True):
            mined["2" + trace.key] = [replace(t, trace="2" + trace.key) for t in mined[donor.key]]
            store.put(replace(trace, key="2" + trace.key, response=donor.response, sample=1))
    write_triplets(copied.triplets, [triplet for group in mined.values() for triplet in group])
    copied.settings.evaluate.prompts = len(held)
    arms = ["nodream", "oracle", "empty", "sibling", "oracle_other", "oracle_shuffled"]
    results = ablate(copied, seeds=1, arms=arms)
    assert list(results["systems"]) == arms
    assert results["exam"]["prompts"] == len(held)
    samples = samples_in(copied)
    said = {arm: [sample["systems"][arm][0] for sample in samples] for arm in arms}
    alone = [sample["key"] == held[0].key for sample in samples]
    assert [told["metrics"]["bits_per_byte_used"] is None for told in said["sibling"]] == alone
    true = {sample["key"]: told["dream"] for sample, told in zip(samples, said["oracle"], strict=True)}
    places = {trace.key: i for i, trace in enumerate(held)}
    for sample, sibling, other in zip(samples, said["sibling"], said["oracle_other"], strict=True):
        place = places[sample["key"]]
        assert sibling["dream"] == (true[held[place - 1].key] if place else "")
        assert other["dream"] in {*true.values()} - {true[sample["key"]]}
    sizes = [0 if out else len(sample["teacher"].encode()) for sample, out in zip(samples, alone, strict=True)]

    def bits(arm: str) -> float:
        return float(np.average([told["metrics"]["bits_per_byte_used"] or 0 for told in said[arm]], weights=sizes))

    told = {(d["system"], d["against"], d["metric"]): d["value"] for d in results["differences"]}
    assert told["oracle", "sibling", "bits_per_byte_used"] == pytest.approx(bits("oracle") - bits("sibling"))
    moved = results["systems"]["sibling"]["metrics"]["steering_chrf"]
    assert moved["low"] <= moved["value"] <= moved["high"]
    assert "steering_concepts" in results["systems"]["sibling"]["metrics"]
    monkeypatch.setattr(figures, "RESULTS", copied.path)
    bench.dreams.main("own", str(copied.path))
    own = json.loads((copied.path / "dreams-own.json").read_text(encoding="utf-8"))
    bench.dreams.main("read", str(copied.path))
    rows = json.loads((copied.path / "dreams-read-whole.json").read_text(encoding="utf-8"))["rows"]
    assert [row["arm"] for row in rows] == [label for arm, label in bench.dreams.READ.items() if arm in arms]
    assert own["rows"] == rows
    assert own["command"].startswith("dream run --config demo --set")
    row = next(row for row in rows if row["arm"] == bench.dreams.READ["oracle"])
    for name, control in (("", "empty"), ("_dreamless", "nodream")):
        saved = told["oracle", control, "bits_per_byte_used"]
        assert row[f"minus{name}"][0] == round(saved, 4)
        assert row[f"share{name}"] == round(100 * saved / bits(control), 1)
    assert "answer follows its dream, chrF2" in render_markdown(results)


def test_retrieval_is_measured_with_and_without(copied: Run) -> None:
    results = ablate(copied, seeds=1, arms=["backbone", "retrieval"])
    child = Run.open(copied.path / "ablation" / "seed-0" / "retrieval")
    assert child.settings.train.retrieve == "neighbourhood"
    assert (child.data / "data.json").read_bytes() != (copied.data / "data.json").read_bytes()
    told = {d["metric"]: d for d in results["differences"]}
    assert told["exact_match"]["against"] == "backbone"
    assert told["bits_per_byte_used"]["value"]
    ablation = Ablation(copied, silent, ["retrieval"], STEPS, force=False)
    copied.settings.student.context = max(map(ablation._size, ablation.exam.questions))
    with pytest.raises(BadInput, match=r"raise student\.context, or lower train\.retrieve_limit"):
        ablate(copied, seeds=1, arms=["retrieval"])


# Arms.


def test_arms_read_what_they_say(reader: Reader, questions: list[Question]) -> None:
    true = mined(reader, questions)
    read = {arm: reads(reader, arm, questions) for arm in ARMS}
    assert read["nodream"] == read["empty"] == [[]] * len(questions)
    assert read["oracle"] == true
    assert all(true)
    assert read["pause"] == [[reader.tokenizer.pad_id] * len(dream) for dream in true]
    assert read["backbone"] == reader.own_dreams(questions)
    for dreams in read.values():  # what is kept is their text
        assert [reader.tokenizer.encode(reader.tokenizer.decode(ids), special=True) for ids in dreams] == dreams


def test_engine_dreams_are_what_its_graph_keeps(
    reader: Reader, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt at a time, by the engine's own functions; with every path, with some and with none kept."""
    for keep_above in (0.0, 0.5, 1.0):
        monkeypatch.setattr(reader._child.settings.dreaming, "keep_above", keep_above)
        for question, found in zip(questions[:4], reads(reader, "engine", questions), strict=False):
            with torch.inference_mode():
                drafted = reader.engine(*prompt_states(reader.model, [reader.header(question)]))
            (dream,) = drafted_dreams(drafted, keep_above=keep_above)
            assert found == (dream_ids(reader.tokenizer, dream) if any(dream.values()) else [])


def test_spoiled_dreams_are_spoiled(reader: Reader, questions: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    true = mined(reader, questions)
    with_own(reader, questions, true, monkeypatch)
    image = reader.tokenizer.image_code
    for own, shuffled in zip(true, reads(reader, "shuffled", questions), strict=True):
        assert Counter(shuffled) == Counter(own)
        assert [i for i, id in enumerate(shuffled) if image(id) is None] == [
            i for i, id in enumerate(own) if image(id) is None
        ]
        assert shuffled != own
    assert sorted(map(tuple, reads(reader, "other", questions))) == sorted(map(tuple, true))
    assert reads(reader, "shuffled", questions) == reads(reader, "shuffled", questions)
    with_own(reader, questions, [[] for _ in questions], monkeypatch)
    assert reads(reader, "shuffled", questions) == [[] for _ in questions]


def test_answers_follow_the_dream_they_are_given(reader: Reader, ablated: tuple[Run, dict[str, Any]]) -> None:
    """Likelihoods of one arm equal those of the rendered context, answer by answer."""
    samples = samples_in(ablated[0])
    tokenizer, model, questions = reader.tokenizer, reader.model, load_exam(ablated[0]).questions
    for question, sample in zip(questions, samples, strict=True):
        told, mined = sample["systems"]["oracle"][0], reader.mined(question.triplets)
        answer, _ = reader.aligned(question)
        context = [*reader.header(question), *think_ids(tokenizer, parse_dream(tokenizer, mined))]
        with torch.inference_mode():
            logits = model(torch.tensor([[*context, *answer]]))[0].double().log_softmax(-1)
        places = range(len(context) - 1, len(context) - 1 + len(answer))
        bits = -sum(float(logits[p, id]) for p, id in zip(places, answer, strict=True)) / np.log(2)
        assert told["metrics"]["bits_per_byte_used"] == pytest.approx(bits / question.bytes, rel=1e-4)
        assert told["metrics"]["tokens_dreamed"] == len(mined)
        assert told["dream"] == tokenizer.decode(mined)


def test_dream_accuracy_by_hand(reader: Reader) -> None:
    tokenizer = reader.tokenizer

    def ids(**chains: list[tuple[int, int, int]]) -> list[int]:
        return dream_ids(tokenizer, chains)

    true = ids(spatial=[(1, 2, 3), (3, 4, 5)], causal=[(6, 7, 8)])
    own = [
        true,
        ids(spatial=[(1, 2, 9), (3, 9, 5)], causal=[(6, 7, 8)]),  # 7 of 9
        ids(spatial=[(1, 2, 3)], causal=[(6, 7, 8), (0, 0, 0)]),  # a step missing, one too many: 6 of 9
        ids(temporal=[(1, 2, 3), (3, 4, 5)]),  # another lens
        ids(spatial=[(1, 2, 3)]),
        ids(),
    ]
    found = dream_accuracy(tokenizer, own, [true] * 4 + [[], ids()])
    assert found["codes_right"].numerator.tolist() == [9, 7, 6, 0, 0, 0]
    assert found["codes_right"].denominator.tolist() == [9, 9, 9, 9, 0, 0]
    assert found["dreams_right"].numerator.tolist() == [1, 0, 0, 0, 0, 0]
    assert found["dreams_right"].denominator.tolist() == [1, 1, 1, 1, 0, 0]


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=24), st.integers(0, 9))
def test_others_are_others_of_the_same_kind(groups: list[str], seed: int) -> None:
    found = others(groups, seed)
    assert sorted(found) == list(range(len(groups)))
    assert all(i != j for i, j in enumerate(found))
    sizes = Counter(groups)
    alone = sum(size == 1 for size in sizes.values())
    foreign = sum(groups[i] != groups[j] for i, j in enumerate(found))
    assert foreign == (0 if alone == 0 else 2 if alone == 1 else alone)


# Statistics.


def test_one_seed_is_the_bootstrap_over_prompts() -> None:
    ratio = Ratio.of(np.random.default_rng(0).normal(size=30))
    one, plain = HierarchicalBootstrap(1, 30, 300, 5).interval([ratio]), PairedBootstrap(30, 300, 5).interval(ratio)
    assert one is not None
    assert plain is not None
    assert one == plain
    assert HierarchicalBootstrap(2, 1, 10, 0).interval([ratio, Ratio.of([np.nan])]) is None
    assert HierarchicalBootstrap(1, 1, 10, 0).contrast([Ratio.of([np.nan])], [ratio], by_seed=True) is None


def test_a_seed_that_differs_widens_the_interval() -> None:
    values = np.random.default_rng(0).random(200) < 0.5
    same = HierarchicalBootstrap(3, 200, 500, 0).interval([Ratio.of(values)] * 3)
    flipped = [Ratio.of(values), Ratio.of(values), Ratio.of(values | (np.arange(200) % 2 == 0))]
    wider = HierarchicalBootstrap(3, 200, 500, 0).interval(flipped)
    assert same is not None
    assert wider is not None
    assert wider.high - wider.low > 2 * (same.high - same.low)
    assert wider == HierarchicalBootstrap(3, 200, 500, 0).interval(flipped)


@pytest.mark.parametrize(("of_seed", "of_prompt"), [(0.0, 0.3), (0.05, 0.2), (0.3, 0.2)])
def test_intervals_cover_the_truth_over_seeds_and_prompts(of_seed: float, of_prompt: float) -> None:
    """Simulated exact matches, three seeds, 80 prompts; the seeds hardly differ, somewhat, and more than prompts."""
    hits, runs = Counter[str](), 150
    for number in range(runs):
        draw = np.random.default_rng([number, 7])
        prompts = draw.normal(0, of_prompt, 80)
        arms: list[list[Ratio]] = []
        for _ in range(2):
            chance = np.clip(0.5 + draw.normal(0, of_seed, (3, 1)) + prompts, 0, 1)
            arms.append([Ratio.of(row) for row in draw.random((3, 80)) < chance])
        bootstrap = HierarchicalBootstrap(3, 80, 400, number)
        value, found = bootstrap.interval(arms[0]), bootstrap.contrast(arms[1], arms[0], by_seed=True)
        assert value is not None
        assert found is not None
        difference = found[0]
        hits["value"] += value.low <= 0.5 <= value.high
        hits["difference"] += difference.low <= 0.0 <= difference.high
    for name in ("value", "difference"):  # binomial noise of 150 runs is ± 3.5 %
        assert 0.9 <= hits[name] / runs <= 0.998, (name, hits[name])


# Bad input, and the command.


def test_what_cannot_be_ablated_says_so(world: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"arms: 'soft' is none of nodream, pause, backbone, sure, engine.* and all"):
        ablate(world, arms=["nodream", "soft"])
    with pytest.raises(BadInput, match="seeds: 0 is too few"):
        ablate(world, seeds=0)
    with pytest.raises(MissingStage, match="dream capture"):
        ablate(Run.create(tmp_path / "empty", world.settings))
    none = Run(world.path, replace(world.settings, dreaming=replace(world.settings.dreaming, dream_steps=0)))
    with pytest.raises(BadInput, match=r"arms: none of them can be measured: dreaming\.dream_steps=0 trains no engine"):
        ablate(none, arms=["engine"])
    shutil.copytree(world.path, tmp_path / "copy")
    copy = Run.open(tmp_path / "copy")
    copy.settings.evaluate.prompts = 1
    with pytest.raises(BadInput, match=r"an ablation needs 2 \(evaluate\.prompts"):
        ablate(copy)
    copy.settings.evaluate.prompts = 12
    sizes = sorted(map(Ablation(copy, silent, [], STEPS, False)._size, load_exam(copy).questions))
    copy.settings.student.context = sizes[5]
    short = Ablation(copy, silent, [], STEPS, False)
    assert len(short.exam.questions) == sum(size <= sizes[5] for size in sizes) < 12
    copy.settings.student.context = sizes[0] - 1
    with pytest.raises(BadInput, match="0 of 12 held-out prompts fit the student's context"):
        ablate(copy)
    copy.settings.student.context = world.settings.student.context
    copy.triplets.write_text("", encoding="utf-8")
    with pytest.raises(BadInput, match="no held-out prompt has a dream"):
        ablate(copy)


def test_the_command_tells_and_writes(copied: Run, tmp_path: Path) -> None:
    from cli.main import dream

    runner, out = CliRunner(), tmp_path / "docs" / "found.md"
    told = runner.invoke(dream, ["ablate", str(copied.path), "--seeds", "2", "--out", str(out), "-q"])
    assert told.exit_code == 0, told.output
    assert "backbone − pause" in told.output
    assert out.read_text(encoding="utf-8") == (copied.path / "ablation" / "report.md").read_text(encoding="utf-8")
    call = ["ablate", str(copied.path), "--arms", "nodream, empty", "--seeds", "1", "--json", "-q"]
    results = json.loads(runner.invoke(dream, call).output)
    assert list(results["systems"]) == ["nodream", "empty"]
    wrong = runner.invoke(dream, ["ablate", str(copied.path), "--arms", "dreams"])
    assert isinstance(wrong.exception, BadInput)
