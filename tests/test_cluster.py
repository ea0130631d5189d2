"""Two nodes of Ray on this machine, of which one is killed at work: the files are those of one process."""

import contextlib
import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.ablation_run import small_world
from support.fake_ollama import timed
from support.small_capture import captured_small

from distill.address import Address
from distill.cluster import QUIET, Cluster, _connected, _perform, open_cluster
from distill.config import CaptureSettings, Settings, TeacherSettings
from distill.corpus.capture import capture
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, DistillError, MissingDependency
from distill.events import Event, Listener, silent
from distill.exam.baselines import make_child, train_child
from distill.knowledge.mine import mine
from distill.mining import readings
from distill.run import Run
from distill.sweep.elsewhere import Files, Lesson, changed, learn, stamps
from distill.sweep.plan import read_plan
from distill.sweep.sweep import sweep
from distill.training.checkpoint import best, list_checkpoints

ray = pytest.importorskip("ray", reason="Ray has no wheel for this machine")
from ray._private.state import available_resources_per_node  # noqa: E402
from ray.cluster_utils import Cluster as RayCluster  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

STORE = 100 * 2**20
pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


class Nodes:
    """A cluster of a head, and of a node that is made anew after it was killed."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.address, self.second = cluster, cluster.address, None
        self.events: list[Event] = []
        open_cluster(self.address, silent)  # by the head, before there is another to go by

    def both(self) -> None:
        """Of two nodes, each with a process that waits for work."""
        self.events = []
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, object_store_memory=STORE)
        both = (self.cluster.head_node.node_id, self.second.node_id)
        where = [NodeAffinitySchedulingStrategy(node, soft=False) for node in both]
        ray.get([ray.remote(lambda: None).options(scheduling_strategy=node).remote() for node in where])

    def killing(self, when: Callable[[Event], bool], where: str) -> Listener:
        """Listens, and kills the second node as soon as it may, if the work is done there."""

        def listen(event: Event) -> None:
            self.events.append(event)
            if where and when(event):
                self.kill()

        return listen

    def kill(self) -> None:
        if self.second is not None:
            self.second.kill_all_processes(check_alive=False)
            self.cluster.worker_nodes.remove(self.second)
            self.second = None

    @contextlib.contextmanager
    def killed_at_work(self) -> Generator[None]:
        """The second node, once it does something."""
        at_work = threading.Thread(target=self._wait)
        at_work.start()
        yield
        at_work.join()

    def _wait(self) -> None:
        assert self.second is not None
        while available_resources_per_node()[self.second.node_id].get("CPU", 0):
            time.sleep(0.05)
        self.kill()

    @property
    def deaths(self) -> list[str]:
        return [event.message for event in self.events if event.stage == "cluster"]


@pytest.fixture(scope="module")
def cluster() -> Generator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        # By itself its workers wait while anything else computes, which tests beside them always do.
        for name, value in {**QUIET, "RAY_worker_niceness": "0"}.items():
            patch.setenv(name, value)
        made = RayCluster(
            head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False},
            initialize_head=True,
        )
        yield Nodes(made)
        ray.shutdown()
        _connected.cache_clear()
        made.shutdown()


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    cluster.both()
    return cluster


def test_what_is_no_cluster_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, why in (
        ("foo", "is no address"),
        ("127.0.0.1:9", "refused"),
        ("ray://127.0.0.1:9", "refused"),
    ):
        with pytest.raises(BadInput, match=f"^--cluster {address}: .*{why}"):
            open_cluster(address, silent)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"pip install 'dreaming-student\[cluster\]'"):
        open_cluster("local", silent)


class Unequal:
    """Of Ray what hands tasks out, a minute a wait: the machine with two cores goes when it has nothing to do, and
    may be back ten minutes after a task began."""

    def __init__(self, comes_back: bool) -> None:
        self.exceptions = SimpleNamespace(RayError=KeyError, RayTaskError=IndexError)
        self.now, self.back, self.cancelled = 1.0, 0.0, list[str]()
        self.away = 600 if comes_back else math.inf

    def tasks(self) -> Iterator[str]:
        """Made for an hour each."""
        for task in ("a", "b"):
            self.now += 3600
            self.back = self.now + self.away
            yield task

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def nodes(self) -> list[dict[str, Any]]:
        cores = [{"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}]
        there = self.now >= self.back
        return [{"Alive": there or own["CPU"] < 2, "NodeManagerAddress": "", "Resources": own} for own in cores]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, "GPU": 1.0}

    def remote(self, *_: Any, **how: Any) -> Any:
        return SimpleNamespace(options=self.remote, remote=lambda _, task, *rest: task)

    def wait(self, open: list[str], **how: Any) -> tuple[list[str], list[str]]:
        self.now += 60 * bool(how["timeout"])
        return (open if self.now >= self.back else []), []

    def get(self, ref: str) -> str:
        self.back = math.inf
        return ref

    def cancel(self, ref: str) -> None:
        self.cancelled.append(ref)


@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.parametrize(("gpus", "what"), [(0, "2 cores"), (1, "2 cores and 1 GPU")])
def test_tasks_that_no_machine_can_do_any_more_are_told_and_fail(
    comes_back: bool, gpus: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unequal, events = Unequal(comes_back), list[Event]()
    monkeypatch.setattr("distill.cluster.time", SimpleNamespace(monotonic=lambda: unequal.now, sleep=unequal.sleep))
    cluster = Cluster(unequal)
    cluster.listen = events.append
    found = list(cluster.results(str, unequal.tasks(), cpus=2, gpus=gpus))
    told = [event.message.split("; ") for event in events]
    assert {lack for lack, _ in told} == {f"no machine of the cluster has {what} any more"}
    left = [int(wait.split()[1]) for _, wait in told]
    if comes_back:
        assert found == [("a", "a"), ("b", "b")]
        assert left == [15, 12, 9, 6] * 2
    else:
        assert left == [15, 12, 9, 6, 3]
        assert [task for task, _ in found] == ["a", "b"]
        assert all(isinstance(error, DistillError) and "the same command goes on" in str(error) for _, error in found)
        assert unequal.cancelled == ["a"], "the other was never begun"


def test_what_a_task_raises_is_what_it_raises_here(nodes: Nodes) -> None:
    there = open_cluster(nodes.address, silent)
    assert list(there.map(Address, ["a", "b", "c"])) == ["a", "b", "c"]
    with pytest.raises(BadInput, match=r"^'ftp://x': is no server's address") as told:
        list(there.map(Address, ["a", "ftp://x"]))
    assert told.type is BadInput
    with pytest.raises(ValueError, match="invalid literal") as bug:
        list(there.map(int, ["1", "x"]))
    assert "_perform" in bug.value.__notes__[0]
    with pytest.raises(BadInput, match="install the same there"):
        _perform(int, "1", 0, None, "0.0")


def test_capture_asks_the_questions_of_a_dead_node_again(nodes: Nodes, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"What is {i} and {i}?" for i in range(60)), encoding="utf-8")
    with timed(2, 0.05) as one, timed(2, 0.05) as other:
        settings = Settings(
            teacher=TeacherSettings(model="ollama:smollm2:135m", hosts=[one.url, other.url]),
            capture=CaptureSettings(prompts=[str(prompts)]),
        )
        digests: list[str] = []
        for name, where in (("alone", ""), ("spread", nodes.address)):
            settings.runtime.cluster = where
            run = Run.create(tmp_path / name, settings)
            summary = capture(run, nodes.killing(lambda event: event.done >= 10, where))
            assert (summary["responses"], summary["failed"]) == (60, 0)
            with TraceStore(run.traces, readonly=True) as store:
                digests.append(store.content_digest())
    assert digests[0] == digests[1]
    assert [text for text in nodes.deaths if "done again" in text]
    assert nodes.second is None


def test_mining_reads_the_parts_of_a_dead_node_again(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, spread = captured_small(tmp_path / "alone"), captured_small(tmp_path / "spread")
    alone.settings.mine.processes = 1
    mine(alone)
    spread.settings.runtime.cluster = nodes.address
    monkeypatch.setattr(readings, "PART", 2)
    monkeypatch.setattr(readings, "PARTS", 1)
    monkeypatch.setattr(readings, "load_parser", None)  # this one reads nothing
    with nodes.killed_at_work():
        mine(spread, nodes.events.append)
    for path in (alone.triplets, alone.knowledge):
        assert (spread.path / path.name).read_bytes() == path.read_bytes()
    assert len(nodes.deaths) == 1
    assert nodes.deaths[0].startswith("a worker died; its ")


def test_a_cell_goes_on_from_the_last_checkpoint_that_came_back(tmp_path: Path) -> None:
    """Without a cluster: what its machines do, and the death of one."""
    world = small_world(tmp_path / "world")
    settings = replace(world.settings, train=replace(world.settings.train, checkpoint_every=2, log_every=1))
    alone = train_child(world, tmp_path / "alone", copy.deepcopy(settings), 6, "alone", silent)
    spread = make_child(world, tmp_path / "spread", copy.deepcopy(settings), 6, silent)
    steps: list[float] = []

    def told(said: Any) -> None:
        if isinstance(said, Files):
            said.write(spread.path)
            if len(list_checkpoints(spread)) == 2:
                raise InterruptedError("as its machine died")
        elif said.unit == "step":
            steps.append(said.done)

    with pytest.raises(InterruptedError):
        learn(Lesson(changed(spread.path, {}), False, "spread", 1), told)
    learn(Lesson(changed(spread.path, {}), False, "spread", 1), told).write(spread.path)
    assert steps == [1, 3]
    assert (best(spread) / "model.safetensors").read_bytes() == (best(alone) / "model.safetensors").read_bytes()
    names = [{name for name in stamps(run.path) if "tensorboard" not in name} for run in (alone, spread)]
    assert names[0] == names[1]
    assert not spread.traces.is_symlink()
    assert spread.traces.stat().st_nlink == 1


def test_a_sweep_trains_the_cell_of_a_dead_node_on(nodes: Nodes, tmp_path: Path) -> None:
    content = {
        "base": str(small_world(tmp_path / "world").path),
        "settings": {"train.checkpoint_every": 2, "train.log_every": 1, "evaluate": {"prompts": 6}},
        "variants": {"soft": None, "nodream": {"train.dreams": False}},
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    found: list[dict[str, bytes]] = []
    for name, where in (("alone", ""), ("spread", nodes.address)):
        folder = tmp_path / name
        listen = nodes.killing(lambda event: event.kind == "start", where)
        state = sweep(read_plan(file, cluster=where), folder, listen, compare=False)
        assert {cell["state"] for cell in state["cells"].values()} == {"trained"}
        runs = [Run.open(path) for path in sorted((folder / "cells").iterdir())]
        found.append({run.name: (best(run) / "model.safetensors").read_bytes() for run in runs})
        found.append({f"{run.name} {p.name}": p.read_bytes() for run in runs for p in sorted(run.data.rglob("*.npy"))})
    assert found[:2] == found[2:]
    assert nodes.deaths == ["a worker died; its task is done again"]
