"""Many machines as one, by Ray (the extra `cluster`): work that is done again where whoever does it dies.

Whoever asks owns the run folder: tasks and what comes of them travel as values, so no machine needs another's disk.
Nothing of Ray is imported before a cluster is opened.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from distill.errors import BadInput, DistillError, MissingDependency, TeacherUnavailable
from distill.events import Event, Listener

REACHED = 10.0
"""Seconds in which an address must answer."""
TICK = 0.2
"""Seconds between two looks at what is told meanwhile."""
GRACE = 0.5
"""Seconds after a death in which others are taken for the same."""
PATIENCE = 900.0
"""Seconds without a machine that could do a task any more: then tasks fail. Cloud machines need minutes to start."""
REMINDED = 180.0
"""Seconds between two warnings of it."""
TRIES = 4
"""Workers that may die of a task: then it is the task's fault."""
AT_ONCE = 264
"""Calls that a helper answers at once."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of what it may do one day
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # all that it would print on stdout, as of a node's death
}
END = object()
_ADDRESS = re.compile(r"(ray://)?(\[[0-9a-fA-F:]+\]|[^\s/:@]+):(\d+)")
_FORMS = "write local (this machine's cores), auto, HOST:PORT or ray://HOST:10001"

T = TypeVar("T")
R = TypeVar("R")
Tell = Callable[[Any], None]


def open_cluster(address: str, listen: Listener) -> "Cluster":
    """The cluster there; a process has one. `local`: one of its own, which ends with it.

    Raises MissingDependency without Ray, BadInput for what is no address or can't be reached.
    """
    cluster = _connected(address)
    if not cluster.told:
        cluster.told = True
        there = cluster.ray.cluster_resources()
        counts = {"machines": len(cluster.machines()), "cores": there.get("CPU", 0), "GPUs": there.get("GPU", 0)}
        told = ", ".join(f"{what}: {count:g}" for what, count in counts.items())
        listen(Event("cluster", "note", f"{address} ({told})"))
    cluster.listen = listen
    return cluster


@functools.cache
def _connected(address: str) -> "Cluster":
    where = _ADDRESS.fullmatch(address)
    if where is None and address not in ("local", "auto"):
        raise BadInput(f"--cluster {address}: is no address of a cluster; {_FORMS}")
    os.environ |= QUIET
    if where is not None:
        os.environ["RAY_NUM_REDIS_GET_RETRIES"] = "1"  # it tries for 40 s, and by itself 20 times
    try:
        import ray
    except ImportError as error:
        raise MissingDependency(
            f"--cluster {address}: Ray isn't installed; pip install 'dreaming-student[cluster]'"
        ) from error
    if where is not None:
        _reach(address, where[2].strip("[]"), int(where[3]))
    before = signal.getsignal(signal.SIGTERM)
    how: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        with warnings.catch_warnings(action="ignore"):
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **how)
    except Exception as error:  # of many kinds
        said = " ".join(str(error).split())[:300] or type(error).__name__
        token = "" if "RAY_AUTH_MODE" in os.environ else "; if its head wants a token, set RAY_AUTH_MODE=token here"
        raise BadInput(f"--cluster {address}: Ray can't connect: {said}{token}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # which Ray takes
    return Cluster(ray)


def _reach(address: str, host: str, port: int) -> None:
    """Now, and in our words: Ray would try for minutes."""
    try:
        socket.create_connection((host, port), REACHED).close()
    except OSError as error:
        raise BadInput(
            f"--cluster {address}: nobody answers there within {REACHED:g} s ({error.strerror or error}); `ray "
            "start --head` starts one"
        ) from error


@dataclass(eq=False)
class _Flight(Generic[T]):
    """A task that is being done. number: anew for each who does it. deaths: of those who did. result: in a tuple, once
    there is one, or an error."""

    task: T
    number: int = -1
    ref: Any = None
    deaths: int = 0
    result: tuple[Any] | None = None


class Cluster:
    """One that is connected."""

    listen: Listener

    def __init__(self, ray: Any) -> None:
        self.ray, self.hired, self.told = ray, 0, False
        self.died: Any = ray.exceptions.RayError
        self.failed: Any = ray.exceptions.RayTaskError

    # Who is there.
    def nodes(self, machine: str = "") -> list[dict[str, Any]]:
        """Of one machine, or of all."""
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        return [node for node in alive if machine in ("", node["NodeManagerAddress"])]

    def machines(self) -> list[str]:
        """Their addresses."""
        return sorted({node["NodeManagerAddress"] for node in self.nodes()})

    def most(self, resource: str) -> int:
        """CPU or GPU of the node that has most."""
        return max((int(node["Resources"].get(resource, 0)) for node in self.nodes()), default=0)

    # Tasks.
    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """What `function` makes of each task, in order; of tasks, and results, no more are held than keep all cores
        busy. function: of a module that all machines have. Raises what it raises; DistillError where all die of a task.
        """
        for _, result in self.results(function, tasks, ordered=True, ahead=2):
            if isinstance(result, Exception):
                raise result
            yield result

    def results(
        self,
        function: Callable[..., R],
        tasks: Iterable[T],
        *,
        sent: Callable[[T], Any] = lambda task: task,
        heard: Callable[[T, Any], None] | None = None,
        ordered: bool = False,
        ahead: int = 1,
        cpus: int = 1,
        gpus: int = 0,
    ) -> Iterator[tuple[T, R | Exception]]:
        """Each task with what `function` made of it, or raised, as they come or in order.

        sent: what of a task is sent, made anew when it is done again. heard: takes what is told meanwhile; then the
        function's second argument tells. ahead: tasks begun for each that can be done at once. cpus, gpus: of each.
        """
        ears = None if heard is None else self.ray.remote(_Ears).options(num_cpus=0, max_restarts=-1).remote()
        perform = self.ray.remote(_perform).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
        flying: list[_Flight[T]] = []
        waiting, begun = iter(tasks), itertools.count()
        lacks = _Lack(self, cpus, gpus)

        def begin(flight: _Flight[T]) -> None:
            flight.number = next(begun)
            if lacks.over:
                flight.result = (lacks.error,)
                return
            lacks.since = 0.0  # whoever was idle may have been taken away: it is asked for only now
            try:
                flight.ref = perform.remote(function, sent(flight.task), flight.number, ears, _version())
            except Exception as error:  # a bug is this task's, as one where it is done
                flight.result = (error,)

        while True:
            room = ahead * self._places(cpus, gpus)
            while len(flying) < room and (drawn := next(waiting, END)) is not END:
                flying.append(_Flight(cast(T, drawn)))
                begin(flying[-1])
            if not flying:
                break
            if lost := self._collect(flying[:1] if ordered else flying, flying):
                time.sleep(GRACE)
                lost += self._collect([], [flight for flight in flying if flight not in lost])
                self.tell_death(len(lost), "task")
            if heard is not None:
                self._hear(ears, {flight.number: flight.task for flight in flying}, heard)
            for flight in lost:
                begin(flight)
            lacks.look()
            for flight in flying if lacks.over else ():
                if flight.result is None:
                    self.ray.cancel(flight.ref)
                    flight.result = (lacks.error,)
            while done := next((flight for flight in flying[: 1 if ordered else None] if flight.result), None):
                flying.remove(done)
                assert done.result
                yield done.task, done.result[0]
        if ears is not None:
            self.ray.kill(ears)

    def _places(self, cpus: int, gpus: int) -> int:
        """How many such tasks can be done at once now."""
        there = self.ray.cluster_resources()
        return max(1, int(there.get("GPU", 0) // gpus if gpus else there.get("CPU", 0) // cpus))

    def _collect(self, wanted: list[_Flight[T]], flying: list[_Flight[T]]) -> list[_Flight[T]]:
        """Take in what is done; wait a moment for one of those that are wanted. Returns what is to be done again."""
        if wanted and not any(flight.result for flight in wanted):
            self.ray.wait([flight.ref for flight in wanted], timeout=TICK)
        open = {flight.ref: flight for flight in flying if flight.result is None}
        done = self.ray.wait(list(open), num_returns=len(open), timeout=0)[0] if open else []
        return [flight for flight in map(open.__getitem__, done) if not self._settled(flight)]

    def _settled(self, flight: _Flight[Any]) -> bool:
        try:
            flight.result = (self.ray.get(flight.ref),)
        except self.failed as error:
            flight.result = (_cause(error),)
        except self.died as error:
            flight.deaths += 1
            if flight.deaths < TRIES:
                return False
            said = str(error).splitlines()[0]
            flight.result = (DistillError(f"{TRIES} workers of the cluster died of one task, the last so: {said}"),)
        return True

    def _hear(self, ears: Any, tasks: dict[int, T], heard: Callable[[T, Any], None]) -> None:
        with contextlib.suppress(self.died):  # they, too: what was told then is lost
            for number, said in self.ray.get(ears.hear.remote()):
                if number in tasks:
                    heard(tasks[number], said)

    def tell_death(self, count: int, what: str) -> None:
        several = f"its {count} {what}s are" if count > 1 else f"its {what} is"
        self.listen(Event("cluster", "warning", f"a worker died; {several} done again"))


class _Lack:
    """Whether all machines with so many cores and GPUs have gone: Ray would wait for one, in silence."""

    def __init__(self, cluster: Cluster, cpus: int, gpus: int) -> None:
        self._cluster, self._wanted = cluster, {"CPU": cpus, "GPU": gpus}
        what = f"{cpus} core{'s' * (cpus > 1)}" + (f" and {gpus} GPU{'s' * (gpus > 1)}" if gpus else "")
        self._told = f"no machine of the cluster has {what} any more"
        self.error = DistillError(f"{self._told}; start one, and the same command goes on")
        self.over = False
        """It has been so for long."""
        self._there, self.since, self._next = False, 0.0, 0.0
        self.look()

    def look(self) -> None:
        """While it is so, that is told. A cluster that never had one may yet grow."""
        nodes, now = [node["Resources"] for node in self._cluster.nodes()], time.monotonic()
        if any(all(node.get(kind, 0) >= count for kind, count in self._wanted.items()) for node in nodes):
            self._there, self.since, self._next, self.over = True, 0.0, 0.0, False
        elif self._there:
            self.since = self.since or now
            left = PATIENCE - (now - self.since)
            self.over = left <= 0
            if now >= self._next and not self.over:
                self._next = now + REMINDED
                self._cluster.listen(Event("cluster", "warning", f"{self._told}; waiting {left / 60:.0f} min for one"))


class Helper:
    """Something of ours that lives on a machine of the cluster, and is made anew where it dies. Thread-safe.

    make: of a module that all machines have. machine: which one's, any where it is "".
    """

    def __init__(self, cluster: Cluster, make: Callable[[], Any], machine: str = "") -> None:
        self._cluster, self._make, self._machine = cluster, make, machine
        self._lock = threading.Lock()
        self._actor: Any = None
        self._open = 0

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises what the method raises; TeacherUnavailable where its machine has gone, or it dies again and again."""
        for attempt in range(TRIES):
            with self._lock:
                actor = self._actor = self._actor or self._hire()
                self._open += 1
            try:
                return self._cluster.ray.get(actor.call.remote(method, *arguments))
            except self._cluster.failed as error:
                raise _cause(error) from error
            except self._cluster.died:
                with self._lock:
                    if self._actor is actor:
                        self._actor = None
                        self._cluster.tell_death(self._open, "question")
                time.sleep(GRACE * attempt)
            finally:
                with self._lock:
                    self._open -= 1
        raise TeacherUnavailable(f"{self._machine or 'the cluster'}: {TRIES} workers died, one after the other")

    def _hire(self) -> Any:
        ray, where = self._cluster.ray, "SPREAD"
        if self._machine:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            nodes = self._cluster.nodes(self._machine)
            if not nodes:
                raise TeacherUnavailable(f"{self._machine}: is no machine of the cluster any more")
            where = NodeAffinitySchedulingStrategy(nodes[self._cluster.hired % len(nodes)]["NodeID"], soft=False)
        self._cluster.hired += 1
        how: dict[str, Any] = {"num_cpus": 0, "max_concurrency": AT_ONCE, "scheduling_strategy": where}
        return ray.remote(_Holder).options(**how).remote(self._make, _version())

    def close(self) -> None:
        if self._actor is not None:
            with contextlib.suppress(self._cluster.died):
                self._cluster.ray.kill(self._actor)


def _cause(error: Any) -> Exception:
    """What a task raised; a bug says where, there."""
    cause = error.cause
    if isinstance(cause, ImportError):
        return DistillError(f"a worker of the cluster lacks what is installed here: {cause}; install the same there")
    if not isinstance(cause, DistillError):
        cause.add_note(str(error))
    return cause


def _version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("dreaming-student")
    return ""


# What runs on the workers.
def _check_version(theirs: str) -> None:
    if (here := _version()) != theirs:
        what = f"dreaming-student {here}, and not {theirs}"
        raise BadInput(f"a worker of the cluster ({socket.gethostname()}) has {what}; install the same there")


def _perform(function: Callable[..., R], task: Any, number: int, ears: Any, version: str) -> R:
    _check_version(version)
    if ears is None:
        return function(task)
    import ray.exceptions

    last: list[Any] = []

    def tell(said: Any) -> None:
        last[:] = [ears.tell.remote(number, said)]

    result = function(task, tell)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(last)  # before the result is there
    return result


class _Ears:
    """What is told of tasks until it is asked for: all events, and the last of anything else."""

    def __init__(self) -> None:
        self._heard: list[tuple[int, Any]] = []

    def tell(self, number: int, said: Any) -> None:
        if not isinstance(said, Event):
            self._heard = [(of, what) for of, what in self._heard if of != number or isinstance(what, Event)]
        self._heard.append((number, said))

    def hear(self) -> list[tuple[int, Any]]:
        heard, self._heard = self._heard, []
        return heard


class _Holder:
    def __init__(self, make: Callable[[], Any], version: str) -> None:
        self._make, self._version = make, version
        self._lock, self._held = threading.Lock(), None

    def call(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            if self._held is None:
                _check_version(self._version)
                self._held = self._make()
        return getattr(self._held, method)(*arguments)
