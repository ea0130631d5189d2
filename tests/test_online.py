"""Learning from what comes: of lines, of pictures, watched and stepped back."""

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from support.ablation_run import small_world

from cli.main import dream
from distill.config import ImageTokenizerConfig
from distill.corpus.traces import TraceStore
from distill.errors import BadInput
from distill.events import Event
from distill.knowledge.graph import build_graph, load_graph, save_graph
from distill.learning import facts, online
from distill.learning.continuous_learning import HELD_OUT, IncrementalLearner, OnlineLearningLoop
from distill.learning.facts import learn_facts
from distill.learning.keeping import Keeping
from distill.learning.new_lines import new_lines
from distill.learning.online import RunLearner, arriving, follow, spoken
from distill.learning.rl_learning import RLContinuousLearner
from distill.mining.triplets import Triplet
from distill.run import Run
from distill.training import checkpoint
from distill.training.loop import train
from distill.turns import messages
from distill.vision.vision_encoder import TripletEncoder

pytestmark = pytest.mark.usefixtures("one_thread")


class Counter:
    """Knows what it was shown; each example is how much what is watched worsens."""

    def __init__(self) -> None:
        self.loss, self.before, self.seen = 1.0, 1.0, list[float]()

    def learn(self, examples: Sequence[float]) -> dict[str, float]:
        self.before, self.loss = self.loss, self.loss + sum(examples)
        self.seen += examples
        return {"watched_before": self.before, "watched": self.loss, "held_out": 1.0}

    def step_back(self) -> None:
        self.loss = self.before

    def grow(self) -> None:
        self.grown = self.loss


def test_the_loop_steps_back_from_what_does_harm_and_says_so() -> None:
    said: list[Event] = []
    loop = OnlineLearningLoop(learner := Counter(), together=2, bound=0.25, listen=said.append)
    assert loop.step(-0.1) == {}
    assert loop.step(-0.1)["stepped_back"] == 0
    assert [loop.step(0.1), loop.step(0.1)["stepped_back"]] == [{}, 0]
    loop.step(0.1)
    again = OnlineLearningLoop(copy.deepcopy(learner), together=2, bound=0.25, best=0.8)
    again.waiting = [*loop.waiting]
    assert loop.flush()["stepped_back"] == 1, "little by little is too much, too"
    assert again.flush()["stepped_back"] == 1, "of one that goes on, too"
    assert learner.loss == learner.grown == pytest.approx(1.0), "what is undone grows no graph"
    assert loop.flush() == {}
    (warning,) = said
    assert "held-out loss 1.100, 0.800 at best: stepped back; 1 examples are left out" in warning.message


def test_what_is_watched_is_compared_with_itself_alone() -> None:
    """Others are harder, and become better by what is learned: nothing to step back from."""

    class Sliding:
        def __init__(self) -> None:
            self.told = iter([
                (0.05, 0.05, 64.0, 3.0), (1.0, 0.6, 65.0, 3.0), (0.6, 0.75, 65.0, 3.0), (1.1, 1.0, 65.0, 6.0),
            ])  # fmt: skip

        def learn(self, examples: Sequence[float]) -> dict[str, float]:
            return dict(zip(("watched_before", "watched", "held_out", "phrases"), next(self.told), strict=True))

        def step_back(self) -> None: ...

        def grow(self) -> None: ...

    loop = OnlineLearningLoop(Sliding(), bound=0.1)
    assert [loop.step(0.0)["stepped_back"] for _ in range(4)] == [0, 0, 1, 0], "among more phrases, too"


def test_what_could_not_be_learned_goes_on_waiting() -> None:
    class Failing(Counter):
        def learn(self, examples: Sequence[float]) -> dict[str, float]:
            raise BadInput("the second is none")

    loop = OnlineLearningLoop(Failing(), together=2)
    loop.step(0.1)
    with pytest.raises(BadInput, match="the second is none"):
        loop.step(0.2)
    assert loop.waiting == [0.1, 0.2]


class Grown:
    def __init__(self) -> None:
        self.said: list[Triplet] = []

    def add(self, triplets: Any) -> None:
        self.said += triplets


def test_an_encoder_learns_from_one_picture_after_the_other() -> None:
    """Six kinds of triplets, told apart by colour; later ones don't take away what was known of the first."""
    torch.manual_seed(0)
    encoder = TripletEncoder(ImageTokenizerConfig(embedding_dim=64, patch_size=16, image_size=32))
    colours = torch.rand(6, 3, 3, 1, 1)
    labels = [(f"thing {i}", f"act {i % 3}", f"end {i % 2}") for i in range(6)]

    def shown(kind: int) -> list[Any]:
        return [(colour + 0.05 * torch.rand(3, 32, 32)).clamp(0, 1) for colour in colours[kind]]

    graph = Grown()
    learner = IncrementalLearner(encoder, graph, memory=24)
    with pytest.raises(BadInput, match="nothing was learned yet"):
        learner.predict(*[[image] for image in shown(0)])
    loop = OnlineLearningLoop(learner, together=4)
    kinds = [i % 3 for i in range(32)] + [3 + i % 3 for i in range(32)]
    metrics = [loop.step(*shown(kind), labels[kind]) for kind in kinds]
    heard = [found for found in metrics if found]
    assert heard[0]["accuracy"] < heard[-1]["accuracy"] == 1
    assert heard[-1]["reconstruction"] < heard[0]["reconstruction"] / 4
    assert heard[-1]["ewc"] > 0
    assert len(learner.memory) == 24
    assert len(learner.watch) == 24 // HELD_OUT
    assert {triplet.phrases for triplet in graph.said} == set(labels)
    told = learner.predict(*(torch.stack(images) for images in zip(*map(shown, range(6)), strict=True)))
    assert sum(own == label for own, label in zip(told, labels, strict=True)) >= 5
    before, memory, grown = [one.clone() for one in encoder.parameters()], [*learner.memory], len(graph.said)
    shares = learner._tree.values.copy()  # pyright: ignore[reportPrivateUsage]
    found = learner.learn([cast(Any, (*shown(0), ("one", "more", "label")))] * 4)
    assert found["phrases"] == len({phrase for label in labels for phrase in label}) + 3
    assert any((a != b).any() for a, b in zip(before, encoder.parameters(), strict=True))
    learner.step_back()
    assert all((a == b).all() for a, b in zip(before, encoder.parameters(), strict=True))
    assert all(one is other for one, other in zip(learner.memory, memory, strict=True)), "left out, as the warning says"
    assert (learner._tree.values == shares).all()  # pyright: ignore[reportPrivateUsage]
    assert len(graph.said) == grown, "the graph grows by what stays"
    assert not [edge for edge in build_graph(graph.said).edges(data="type") if edge[2] == "then"], "nothing followed"
    for wrong in (("thing", "act"), ("thing", "act", "")):
        with pytest.raises(BadInput, match="is no \\(what, action, result\\)"):
            learner.learn([cast(Any, (*shown(0), wrong))])
    with pytest.raises(BadInput, match="one triplet after the other"):
        learner.learn([cast(Any, (torch.rand(2, 3, 32, 32), *shown(0)[1:], labels[0]))])


def test_what_a_picture_shows_hangs_on_itself_alone() -> None:
    torch.manual_seed(0)
    fresh = TripletEncoder(ImageTokenizerConfig(embedding_dim=64, image_size=32), kind="resnet")
    encoder, shown = IncrementalLearner(fresh).encoder, torch.rand(3, 4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(*shown)[:1], encoder(*shown[:, :1]), rtol=1e-4, atol=1e-5)


def test_what_is_learned_lies_where_the_encoder_does() -> None:
    """Without a GPU the device "meta" has to do, which holds no numbers."""
    encoder = TripletEncoder(ImageTokenizerConfig(embedding_dim=64, patch_size=16, image_size=32)).to("meta")
    learner = IncrementalLearner(encoder)
    with pytest.raises(NotImplementedError):
        learner.learn([cast(Any, (*torch.rand(3, 3, 32, 32), ("a", "b", "c")))])
    walker = RLContinuousLearner(encoder)
    parameters = [*walker.policy_network.parameters(), *walker.reward_model.parameters()]
    assert {own.device.type for own in (*learner.phrases.values(), *parameters)} == {"meta"}
    assert len(learner.phrases) == 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_world(tmp_path_factory.mktemp("online") / "world")
    train(run)
    return run


def line(number: int, **more: Any) -> str:
    dream = {"causal": [["whole", "hammer", f"new {number}"]]}
    return json.dumps({"prompt": f"What is {number}?", "answer": f"It is {number}.", "dream": dream, **more}) + "\n"


def test_lines_are_learned_as_they_come_and_only_once(world: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(world.path, tmp_path / "run"), world.settings)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(map(line, range(5))) + '{"cut', encoding="utf-8")
    how: dict[str, Any] = {"keeping": Keeping(memory=20), "epochs": 1, "measure": 4, "patience": 0.0, "once": True}
    (tmp_path / "before.jsonl").write_text("".join(map(line, range(20, 30))), encoding="utf-8")
    learn_facts(run, source=tmp_path / "before.jsonl", keeping=how["keeping"], epochs=1, measure=4)
    first = follow(run, folder, together=2, bound=10.0, **how)
    assert [entry["lines"] for entry in first] == [2, 2, 1]
    assert len(checkpoint.of_stage(run, "facts")) == 1 + 2, "what was learned before can still be undone"
    assert "result:new 4" in load_graph(run.knowledge)
    assert follow(run, folder, together=2, bound=10.0, **how) == first, "nothing new came"
    (folder / "a.jsonl").write_text("".join(map(line, range(6))), encoding="utf-8")
    (folder / "b.jsonl").write_text(line(8, held_out=True) + line(7), encoding="utf-8")
    weights = (checkpoint.best(run) / "model.safetensors").read_bytes()
    said: list[Event] = []
    last = follow(run, folder, said.append, together=2, bound=-10.0, **how)[-1]
    assert (last["lines"], last["stepped_back"]) == (2, 1.0)
    assert any("stepped back; 2 examples are left out" in event.message for event in said)
    assert (checkpoint.best(run) / "model.safetensors").read_bytes() == weights
    assert "result:new 7" not in load_graph(run.knowledge)
    (folder / "c.jsonl").write_text('{"verdict": "good", "answer": "a", "messages": "hi"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"c\.jsonl, line 1: is no feedback \(messages must be a conversation\)"):
        follow(run, folder, **how)
    (folder / "c.jsonl").write_text("[]\n", encoding="utf-8")
    with pytest.raises(BadInput, match=r"c\.jsonl, line 1: is no line of JSON"):
        follow(run, folder, **how)


def test_the_graph_keeps_what_was_mined_and_gets_what_is_new(world: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(world.path, tmp_path / "run"), copy.deepcopy(world.settings))
    hub = build_graph(Triplet("ball", f"act {i}", "end", "causal", 0, str(i), 0, "") for i in range(200))
    save_graph(hub, run.knowledge, len(hub))
    said: list[Event] = []
    learner = RunLearner(run, Keeping(), said.append)
    learner.learned = new_lines(run, [("here", line(1))])
    learner.grow()
    graph = load_graph(run.knowledge)
    assert hub.edges <= graph.edges
    assert graph.has_edge("what:whole", "action:hammer")
    assert said == []
    run.settings.mine.graph_nodes = len(graph)
    learner.learned = new_lines(run, [("here", line(2))])
    learner.grow()
    full = load_graph(run.knowledge)
    assert len(full) == len(graph)
    assert full.has_edge("action:hammer", "result:new 2"), "what is new isn't the first to go"
    (note,) = said
    assert "without its 1 least nodes" in note.message


def test_what_the_run_holds_out_is_not_learned_from_a_stream(world: Run, tmp_path: Path) -> None:
    """A dataset holds out by its splits, whatever a prompt's hash or a line says."""
    run = Run(shutil.copytree(world.path, tmp_path / "run"), world.settings)
    with TraceStore(run.traces, readonly=True) as store:
        asked = [trace.prompt for trace in store.traces(held_out=True)][:2]
    lines = [line(1), *(line(2, prompt=prompt, held_out=False) for prompt in asked)]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    how: dict[str, Any] = {"keeping": Keeping(memory=20), "epochs": 1, "measure": 4, "patience": 0.0, "once": True}
    said: list[Event] = []
    (entry,) = follow(run, tmp_path / "a.jsonl", said.append, together=3, bound=10.0, **how)
    assert entry["lines"] == 1
    assert any("2 lines ask what the run holds out" in event.message for event in said)
    graph = load_graph(run.knowledge)
    assert "result:new 1" in graph
    assert "result:new 2" not in graph
    (tmp_path / "b.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    assert follow(run, tmp_path / "b.jsonl", bound=10.0, **how) == [entry], "nothing is left to learn"


def test_feedback_is_learned_as_it_comes(world: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(world.path, tmp_path / "run"), world.settings)
    asked = [{"role": "user", "content": "What is it?"}]
    told = (("bad", ""), ("better", "It is good."), ("good", ""))
    lines = [{"messages": asked, "dream": "", "answer": "So.", "verdict": what, "better": it} for what, it in told]
    (run.path / "feedback.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    how: dict[str, Any] = {"keeping": Keeping(memory=20), "epochs": 1, "measure": 4, "patience": 0.0, "once": True}
    (entry,) = follow(run, None, bound=10.0, **how)
    assert entry["lines"] == 2
    assert entry["read"] == {"feedback.jsonl": 3}
    moved = Run(run.path.rename(tmp_path / "moved"), run.settings)
    assert follow(moved, None, bound=10.0, **how) == [entry], "learned again where it was moved"
    facts.undo(moved)
    assert follow(moved, None, bound=10.0, **how) == [entry, entry], "taken back, and not learned again"


@pytest.mark.parametrize(("lines", "read"), [([1], [1]), ([0, 2, 3], [1, 2, 3]), ([0, 5, 2, 3], [1, 2, 3, 4])])
def test_a_file_that_is_not_what_it_was_is_read_from_its_first_line(
    lines: list[int], read: list[int], tmp_path: Path
) -> None:
    """Fewer lines, one less and one more, one changed: before it was begun again, or while it is followed."""
    file, heard = tmp_path / "a.jsonl", list[Event]()
    file.write_text("".join(map(line, range(3))), encoding="utf-8")
    following = arriving(file, {}, 0.0, heard.append, 0.0)
    *_, last = [each for each in islice(following, 4) if each]
    done = {str(file): (last[1], last[2])}
    assert list(islice(arriving(file, done, 0.0, heard.append, 0.0), 1)) == [None]
    assert heard == []
    file.write_text("".join(map(line, lines)), encoding="utf-8")
    for again in (following, arriving(file, done, 0.0, heard.append, 0.0)):
        found = list(islice(again, len(read) + 2))
        assert [each and each[1] for each in found] == [*read, None, None]
    text = f"{file}: lines that were read before are gone or changed; read from its first again"
    assert [event.message for event in heard] == [text] * 2


def test_what_was_read_before_digests_were_kept_still_counts(tmp_path: Path) -> None:
    file, heard = tmp_path / "a.jsonl", list[Event]()
    file.write_text("".join(map(line, range(3))), encoding="utf-8")
    found = list(islice(arriving(file, {str(file): (2, "")}, 0.0, heard.append, 0.0), 2))
    assert [each and each[1] for each in found] == [3, None]
    assert heard == []


def test_what_the_student_does_not_know_any_more_is_learned_again(
    world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken back, and what another training left behind; where a journal of before says less, it counts."""
    run, said = Run(shutil.copytree(world.path, tmp_path / "run"), world.settings), list[Event]()
    journal, stream = run.path / "online.jsonl", tmp_path / "a.jsonl"
    stream.write_text(line(1) + line(2), encoding="utf-8")
    sources, half = list[str](), list[str]()

    def keeps(learner: RunLearner, examples: Any) -> dict[str, float]:
        learner.learned = new_lines(run, examples)
        sources.append(learner.learned.digest)
        return {"watched_before": 1.0, "watched": 1.0, "held_out": 0.0, "lines": 1.0}

    monkeypatch.setattr(RunLearner, "learn", keeps)
    monkeypatch.setattr(checkpoint, "of_stage", lambda *_: [Path(each) for each in sources])
    monkeypatch.setattr(facts, "source_of", lambda path: path.name)
    monkeypatch.setattr(facts, "is_whole", lambda path: path.name not in half)

    def learned(*without: str, **other: str) -> tuple[int, bool]:
        """Lines that are learned where the journal is without these, and has others; and whether it says so."""
        entries = [json.loads(each) for each in journal.read_text(encoding="utf-8").splitlines()]
        entries = [{name: it for name, it in each.items() if name not in without} | other for each in entries]
        journal.write_text("".join(json.dumps(each) + "\n" for each in entries), encoding="utf-8")
        said.clear()
        after = follow(run, stream, said.append, keeping=Keeping(), together=1, bound=10.0, patience=0.0, once=True)
        return len(after) - len(entries), any("is learned again" in event.message for event in said)

    journal.touch()
    assert learned() == (2, False)
    assert learned() == (0, False)
    half.append(sources[-1])  # a kill left it so
    assert learned() == (1, True)
    half.clear()
    del sources[1:]
    assert learned() == (1, True), "the last of both"
    assert learned() == (0, False)
    assert learned("learned", "base", "digests") == (0, False)
    assert learned(base="another") == (2, True)


def test_the_command_says_what_was_learned(world: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(shutil.copytree(world.path, tmp_path / "run"), world.settings)
    (tmp_path / "a.jsonl").write_text(line(1), encoding="utf-8")

    def until_stopped(source: Path, done: Any, patience: float, listen: Any) -> Iterator[Any]:
        for found in arriving(source, done, 0.0, listen):
            yield found
            if found is None:
                raise KeyboardInterrupt

    monkeypatch.setattr(online, "arriving", until_stopped)
    args = ["learn", str(run.path), "--from", str(tmp_path / "a.jsonl"), "--follow", "--epochs", "1", "--json"]
    said = CliRunner().invoke(dream, [*args, "--force"])
    assert (said.exit_code, "--force is for" in said.stderr) == (2, True)
    told = json.loads(CliRunner().invoke(dream, args).stdout)
    (entry,) = told["learned"]
    assert (told["run"], entry["lines"], entry["stepped_back"]) == (str(run.path), 1, 0)
    assert entry["read"] == {str(tmp_path / "a.jsonl"): 1}


def test_feedback_of_a_conversation_and_after_a_system_message_is_learned_too() -> None:
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    good: dict[str, Any] = {"verdict": "good", "answer": "So.", "better": ""}
    told = spoken(good | {"messages": [system, asked]}, "Be brief.")
    assert told == {"prompt": "Why?", "answer": "So."}
    turns = [asked, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}]
    for message, before in ((system, "Be brief."), (system, "Another.")):
        found = spoken(good | {"messages": [message, *turns]}, before)
        assert found is not None
        assert messages(found["prompt"], before) == [message, *turns], "asked as it was"
    assert spoken(good | {"messages": [asked], "answer": ""}) is None
    assert spoken(good | {"messages": [asked], "verdict": "bad"}) is None
    cut = good | {"messages": [asked], "cut": True}
    assert spoken(cut) == {"prompt": "Why?", "answer": "So.", "done_reason": "length"}, "up to its last whole sentence"
    assert spoken(cut | {"verdict": "better", "better": "It is."}) == {"prompt": "Why?", "answer": "It is."}
    for wrong in ("hi", ["hi"], 3, [{"content": "Why?"}]):
        with pytest.raises(ValueError, match="messages must be a conversation"):
            spoken(good | {"messages": wrong})


def test_begun_again_it_keeps_no_more_checkpoints_than_before(world: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(world.path, tmp_path / "run"), world.settings)
    how: dict[str, Any] = {"keeping": Keeping(memory=20), "epochs": 1, "measure": 4, "patience": 0.0, "once": True}
    stream = tmp_path / "a.jsonl"
    for end in (4, 8):
        stream.write_text("".join(map(line, range(end))), encoding="utf-8")
        follow(run, stream, together=2, bound=10.0, **how)
        assert len(checkpoint.of_stage(run, "facts")) == 2
    stream.write_text("".join(map(line, range(8))) + '{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"a\.jsonl, line 9: prompt and answer should be texts"):
        follow(run, stream, together=2, **how)
