"""The causal world: what it says is what a second simulation, written apart from the first, says."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import dream, main
from distill.config import Settings
from distill.corpus.capture import capture
from distill.corpus.datasets import causal_world as world
from distill.corpus.datasets.questions import Question
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, MissingStage
from distill.knowledge.graph import load_graph
from distill.knowledge.mine import mine
from distill.mining.triplets import LENSES, Mined, by_trace, read_triplets
from distill.run import Run

TOLD = re.compile(r"A (\w+) is ([a-z ]+), (\w+) and (\w+)\. It is (.+)\. What becomes of it\?")

# The rules once more, as a reader of the docs would write them down: (material, action) → what happens.
FALLS = {("on the shelf", "drop"): ("on the floor", 2), ("on the table", "drop"): ("on the floor", 1)}
PLACE = {
    "lift": ["in the pond", "on the floor", "on the table", "on the shelf"],
    "push": ["on the shelf", "on the table", "on the floor", "in the pond"],
}
SWAPS = [{"on the shelf", "on the floor"}, {"on the table", "in the pond"}]


def second_opinion(material: str, place: str, heat: int, form: str, action: str) -> tuple[str, int, str]:
    """(place, heat 0…3, condition) after an action, by rules spelled otherwise than in the module."""
    fall = 0
    new = place
    if action == "drop" and (place, action) in FALLS:
        new, fall = FALLS[place, action]
    elif action in PLACE and place != PLACE[action][-1]:
        new = PLACE[action][PLACE[action].index(place) + 1]
    elif action == "swap":
        new = next(iter(next(pair for pair in SWAPS if place in pair) - {place}))
    elif action == "throw":
        new = "in the pond"
    splash = new == "in the pond" != place
    warmth = heat
    if splash:
        warmth = 1
    elif action == "heat" and place != "in the pond":
        warmth = min(3, heat + 1)
    elif action == "cool":
        warmth = max(0, heat - 1)
    elif action == "freeze":
        warmth = 0
    brittle = material == "glass" or (material in {"wax", "rubber"} and heat == 0)
    worse = {"whole": "cracked", "cracked": "broken"}.get(form, form)
    gone = "broken" if form in {"whole", "cracked"} else form
    turned = {"whole": "bent", "bent": "whole"}.get(form, form)
    if action == "mend":
        form = {"broken": "cracked", "cracked": "whole", "bent": "whole"}.get(form, form)
    elif action == "dry":
        form = "whole" if form == "soggy" else form
    elif fall and brittle:
        form = gone if fall == 2 else worse
    elif action in {"hammer", "twist"}:
        if brittle:
            form = gone
        elif material == "metal":
            form = turned if action == "hammer" or heat >= 2 else form
        elif material == "wax":
            form = turned if heat >= 2 else worse
        elif material == "wood":
            form = worse
        elif material == "paper" and action == "twist":
            form = turned
    elif action == "heat" and warmth == 3:
        if material == "wax" and form in {"whole", "cracked", "broken", "bent"}:
            form = "melted"
        elif material == "paper" and form == "soggy":
            form = "whole"
        elif (material == "wood" and form in {"whole", "cracked"}) or (
            material == "paper" and form in {"whole", "cracked", "bent"}
        ):
            form = "burnt"
    elif splash and material == "paper" and form in {"whole", "cracked", "bent"}:
        form = "soggy"
    elif splash and material == "glass" and heat == 3:
        form = worse
    return new, warmth, form


def parse(question: Question) -> tuple[str, str, str, str, list[str]]:
    match = TOLD.fullmatch(question.prompt)
    assert match, question.prompt
    thing, place, temperature, condition, told = match.groups()
    actions = {words: action for action, words in world.WORDS.items()}
    return thing, place, temperature, condition, [actions[words] for words in told.split(", then ")]


@pytest.fixture(scope="module")
def drawn() -> list[Question]:
    return list(world.questions(3000, 150, 5))


def test_answers_and_dreams_agree_with_a_second_simulation(drawn: list[Question]) -> None:
    for question in drawn:
        thing, place, temperature, form, actions = parse(question)
        heat = world.TEMPERATURES.index(temperature)
        for i, action in enumerate(actions):
            before = (place, world.TEMPERATURES[heat], form)
            place, heat, form = second_opinion(world.made_of(world.THINGS)[thing], place, heat, form, action)
            after = (place, world.TEMPERATURES[heat], form)
            for lens, was, becomes in zip(LENSES, before, after, strict=False):
                step = question.dream[lens][i]
                assert (step.what, step.action, step.result) == (was, action, becomes), question
        assert question.answer == f"The {thing} is {place}, {world.TEMPERATURES[heat]} and {form}."
        assert question.depth == len(actions)


def test_splits_are_what_they_say(drawn: list[Question]) -> None:
    unseen = world.unseen_pairs(5)
    assert Counter(question.split for question in drawn) == {
        "train": 3000,
        "familiar": 150,
        "combination": 150,
        "depth": 150,
    }
    assert len({question.prompt for question in drawn}) == len(drawn)
    for question in drawn:
        thing, *_, actions = parse(question)
        pairs = {(thing, action) for action in actions}
        assert bool(pairs & unseen) == (question.split == "combination")
        assert (question.depth == world.DEEPEST) == (question.split == "depth")


def test_every_thing_lacks_some_actions_but_no_material_lacks_any() -> None:
    for seed in range(5):
        unseen = world.unseen_pairs(seed)
        assert Counter(thing for thing, _ in unseen) == {
            thing: world.UNSEEN_ACTIONS for things in world.THINGS.values() for thing in things
        }
        for things in world.THINGS.values():
            for action in world.WORDS:
                assert sum((thing, action) in unseen for thing in things) <= len(things) // 2
    assert world.unseen_pairs(0) != world.unseen_pairs(1)


def test_the_order_of_actions_counts(drawn: list[Question]) -> None:
    """Half of the questions of three actions and more have another answer in another order."""
    different = total = 0
    for question in drawn:
        thing, place, temperature, condition, actions = parse(question)
        if len(actions) < 3:
            continue
        ends: set[world.State] = set()
        for order in (actions, actions[::-1], [*actions[1:], actions[0]]):
            state = world.State(place, temperature, condition)
            for action in order:
                state = world.act(world.made_of(world.THINGS)[thing], state, action)
            ends.add(state)
        total += 1
        different += len(ends) > 1
    assert total > 500
    assert different / total > 0.45


def test_drawing_is_deterministic_and_longer_sets_begin_with_shorter_ones(drawn: list[Question]) -> None:
    assert list(islice(world.questions(9000, 1, 5), 100)) == drawn[:100]
    assert next(world.questions(1, 1, 6)) != drawn[0]


@pytest.fixture
def world_run(tmp_path: Path) -> Run:
    settings = Settings()
    settings.capture.dataset, settings.capture.dataset_size = "causal-world", 40
    return Run.create(tmp_path / "run", settings)


def test_capture_and_mine_write_traces_answers_and_true_dreams(world_run: Run) -> None:
    summary = capture(world_run)
    assert summary["responses"] == 940
    assert summary["held_out"] == 900
    entries = [json.loads(line) for line in (world_run.path / "dataset.jsonl").read_text(encoding="utf-8").splitlines()]
    with TraceStore(world_run.traces, readonly=True) as store:
        traces = {trace.key: trace for trace in store.traces()}
        assert store.teacher().spec == "dataset:causal-world"
    assert {entry["key"] for entry in entries} == set(traces)
    for entry in entries:
        assert traces[entry["key"]].response.text == entry["answer"]
        assert traces[entry["key"]].held_out == (entry["split"] != "train")
    mine(world_run)
    found = by_trace(read_triplets(world_run.triplets))
    assert set(found) == set(traces)
    for entry in entries:
        chain = [t for t in found[entry["key"]] if t.lens == "spatial"]
        assert [t.step for t in chain] == list(range(entry["depth"]))
        assert chain[-1].result in entry["answer"]


def test_both_stages_are_skipped_when_nothing_changed(world_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(world_run)
    mine(world_run)
    before = (world_run.path / "run.json").stat().st_mtime_ns
    capture(world_run)
    mine(world_run)
    assert (world_run.path / "run.json").stat().st_mtime_ns == before
    assert world_run.stale("capture") == []
    assert world_run.stale("mine") == []

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    nothing = Mined([], 0, 0)
    monkeypatch.setattr(
        "distill.knowledge.mine._miner", lambda run, store, total, listen: (nothing for _ in range(total))
    )
    monkeypatch.setattr("distill.knowledge.mine.save_graph", press)
    world_run.settings.mine.steps = 1
    with pytest.raises(KeyboardInterrupt):
        mine(world_run)
    with pytest.raises(MissingStage):
        world_run.require("mine")
    world_run.settings.seed = 1
    with pytest.raises(Exception, match="use another --name"):
        capture(world_run)  # another world's questions don't belong into this run


@pytest.mark.parametrize(("name", "size"), [("causal-word", 10), ("causal-world", 0), ("causal-world", 10**7)])
def test_an_unknown_dataset_or_a_bad_size_is_one_clear_line(tmp_path: Path, name: str, size: int) -> None:
    settings = Settings()
    settings.capture.dataset, settings.capture.dataset_size = name, size
    with pytest.raises(BadInput, match=r"capture\.dataset"):
        capture(Run.create(tmp_path / "run", settings))


def test_the_command_line_takes_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["capture", str(tmp_path / "w"), "--dataset", "causal-world", "--set", "capture.dataset_size=20"]
    result = CliRunner().invoke(dream, [*arguments, "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["summary"]["responses"] == 920
    with pytest.raises(SystemExit) as stop:
        main(["capture", str(tmp_path / "v"), "--dataset", "causal"])
    assert stop.value.code == 1
    assert "none of causal-world" in capsys.readouterr().err
    assert not (tmp_path / "v").exists()


def test_the_knowledge_graph_tells_nothing_of_held_out_answers(tmp_path: Path) -> None:
    settings = Settings()
    settings.capture.dataset, settings.capture.dataset_size = "causal-world", 1
    run = Run.create(tmp_path / "run", settings)
    capture(run)
    mine(run)
    with TraceStore(run.traces, readonly=True) as store:
        (trained,) = store.traces(held_out=False)
    known = {phrase for triplet in by_trace(read_triplets(run.triplets))[trained.key] for phrase in triplet.phrases}
    assert {data["label"] for _, data in load_graph(run.knowledge).nodes(data=True)} == known
