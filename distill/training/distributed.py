"""Several processes, one student: each reads its share of a batch's rows, gradients are summed (`sharding`: and kept in
parts).

`dream train --processes N` starts N workers here; under torchrun (WORLD_SIZE set) a process joins the others.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import BadInput, DistillError
from distill.events import Event, Listener
from distill.stopping import terminable

PATIENCE = timedelta(days=1)
"""For what others wait while the first process chooses layers and packs a corpus. No process waits for a dead one so
long: whoever started them, we or torchrun, ends all where one ends."""
STOP_SECONDS = 60
TOGETHER = 6_000_000
"""Numbers in a message of gradients: 24 MB, about as much as torch's DistributedDataParallel sends at once."""


@dataclass(frozen=True)
class World:
    """Who we are among how many. A world of one never communicates."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str = "auto") -> "World":
        """The world that the environment describes (torchrun's variables), or a world of one. device: `train.device`.
        Raises BadInput where there is no GPU for this process."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            backend = "gloo"
            if device != "cpu" and torch.cuda.is_available():
                place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
                if place >= count:
                    text = f"process {place + 1} of this machine finds {count} GPU{'s' if count > 1 else ''}"
                    raise BadInput(f"train.processes: {text}; take as many processes at most, or train.device=cpu")
                torch.cuda.set_device(place)
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=PATIENCE)
        return cls(dist.get_rank(), size)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensor: Tensor, source: int = 0) -> Tensor:
        """One process's values, the first's unless told, in place."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def summing(self, parameters: Iterable[torch.nn.Parameter]) -> Generator[None]:
        """Within it a pass backward leaves gradients summed over all processes: those that are there are on their way
        while others are computed."""
        if self.size == 1:
            yield
            return
        ready: list[Tensor] = []
        sent: list[tuple[Any, Tensor, list[Tensor]]] = []

        def send() -> None:
            flat = torch.cat([gradient.flatten() for gradient in ready])
            sent.append((dist.all_reduce(flat, async_op=True), flat, ready.copy()))
            ready.clear()

        def made(parameter: Tensor) -> None:
            assert parameter.grad is not None
            ready.append(parameter.grad)
            if sum(gradient.numel() for gradient in ready) >= TOGETHER:
                send()

        hooks = [parameter.register_post_accumulate_grad_hook(made) for parameter in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if ready:
            send()
        for work, flat, gradients in sent:
            work.wait()
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))


ALONE = World()

PRELOADED = ["distill.training.preloaded"]


def context() -> Any:
    """How processes that train are started. On Linux they are forked from one that has imported PRELOADED, which would
    take each of them seconds (and not from this one, whose CUDA may be in use)."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    return made


def die_with_the_parent() -> None:
    """What was killed is started again: nobody else may be training the same student then."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


Worker = Callable[[Path, Listener, bool], dict[str, Any]]


def launch(worker: Worker, path: Path, processes: int, listen: Listener, force: bool) -> dict[str, Any]:
    """Run `worker(path, listen, force)` in so many processes; the first one's events and result come back here.

    Raises the first worker's DistillError, or one that says which process died.
    """
    processes_of = context()
    queue: Any = processes_of.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, torch.get_num_threads() // processes)
    workers: list[Any] = [
        processes_of.Process(target=_work, args=(worker, path, rank, processes, port, threads, force, queue))
        for rank in range(processes)
    ]
    for process in workers:
        process.start()
    try:
        return _follow(workers, queue, listen)
    except KeyboardInterrupt:
        ask_to_stop(workers)
        raise
    finally:
        for process in workers:
            process.kill()
            process.join(10)


def ask_to_stop(processes: Sequence[Any]) -> None:
    """Let them finish the step and save. Ctrl-C reaches all processes of a terminal, but SIGTERM may have come to this
    one alone, so it is passed on: it asks no more than the Ctrl-C before it."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(STOP_SECONDS)


def _follow(workers: list[Any], queue: Any, listen: Listener) -> dict[str, Any]:
    import queue as queues

    while True:
        try:
            kind, content = queue.get(timeout=1.0)
        except queues.Empty:
            dead = [(process.exitcode, rank) for rank, process in enumerate(workers) if process.exitcode]
            if dead:
                code, rank = min(dead)  # one that was killed (below 0) takes the others with it
                raise DistillError(f"training process {rank} ended with code {code}; start again to resume") from None
            continue
        if kind == "event":
            listen(content)
        elif kind == "error":
            raise content
        else:
            return content


def _work(worker: Worker, path: Path, rank: int, size: int, port: int, threads: int, force: bool, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(threads)
    die_with_the_parent()

    def listen(event: Event) -> None:
        if rank == 0:
            queue.put(("event", event))

    try:
        with terminable():
            result = worker(path, listen, force)
        if rank == 0:
            queue.put(("result", result))
    except DistillError as error:
        queue.put(("error", error))
    except KeyboardInterrupt:
        pass  # the parent was interrupted too, and tells
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
