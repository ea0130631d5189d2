"""What a persistent knowledge graph costs as dreams keep coming: nodes, memory, time, and what a reload keeps."""

import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.result import BenchResult, Series, machine
from distill.events import Event, Listener, silent
from distill.knowledge.graph import load_graph
from distill.knowledge.growing_graph import Chain, KnowledgeGraph
from distill.mining.triplets import LENSES

STEPS = 5


def bench_graph(
    dreams: int, max_nodes: int, seed: int, repeat: int = 1, warmup: int = 0, listen: Listener = silent
) -> BenchResult:
    """Let a graph of at most `max_nodes` grow by `dreams` dreams of 4 × 5 steps, save it and read it again.

    Phrases are drawn from a tail without end (a Pareto law), so that new ones come to the last; every repetition
    draws the same. about.mib: memory of Python objects after each fifth of the dreams. Time is taken in a pass of its
    own, as tracing memory takes time.
    """
    total = (warmup + repeat) * 2 * dreams
    found: list[dict[str, Any]] = []
    for round_ in range(warmup + repeat):
        found.append(
            _grown(
                dreams,
                max_nodes,
                seed,
                lambda done, base=round_ * 2 * dreams: listen(
                    Event("bench graph", "progress", done=base + done, total=total, unit="dream")
                ),
            )
        )
    found = found[warmup:]
    named = {
        "a dream": ("s", "seconds_a_dream"),
        "to save": ("s", "seconds_to_save"),
        "most nodes in memory": ("nodes", "most_nodes_in_memory"),
        "memory at the end": ("bytes", "bytes_in_memory"),
        "the file": ("bytes", "file_bytes"),
    }
    return BenchResult(
        "graph",
        [Series(name, unit, -1, tuple(one[key] for one in found)) for name, (unit, key) in named.items()],
        settings={"dreams": dreams, "max_nodes": max_nodes, "seed": seed},
        about={key: found[-1][key] for key in ("mib", "nodes_in_file", "kept_nodes_lost_by_reload")},
        warmup=warmup,
        machine=machine(),
    )


def _grown(dreams: int, max_nodes: int, seed: int, told: Callable[[int], None]) -> dict[str, Any]:
    """One repetition; `told` hears of how many of 2 · dreams are done."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "knowledge.graphml"
        traced: list[int] = []
        most = 0
        tracemalloc.start()
        try:
            graph = KnowledgeGraph(path, max_nodes)
            for done, chains in enumerate(_dreams(dreams, seed), 1):
                graph.add(chains)
                most = max(most, len(graph))
                if done % max(1, dreams // 5) == 0:
                    traced.append(tracemalloc.get_traced_memory()[0])
                if done % 100 == 0:
                    told(done)
        finally:
            tracemalloc.stop()
        started = time.perf_counter()
        graph.save()
        saving = time.perf_counter() - started
        kept, read = set(graph.graph()), load_graph(path)
        return {
            "most_nodes_in_memory": most,
            "mib": [round(size / 2**20, 1) for size in traced],
            "bytes_in_memory": traced[-1],
            "nodes_in_file": len(read),
            "kept_nodes_lost_by_reload": len(kept - set(read)),
            "seconds_a_dream": _timed(dreams, max_nodes, seed, told) / dreams,
            "seconds_to_save": saving,
            "file_bytes": path.stat().st_size,
        }


def _timed(count: int, max_nodes: int, seed: int, told: Callable[[int], None]) -> float:
    """Seconds that adding all dreams takes."""
    graph = KnowledgeGraph(Path(os.devnull) / "none", max_nodes)
    seconds = 0.0
    for done, chains in enumerate(_dreams(count, seed), 1):
        started = time.perf_counter()
        graph.add(chains)
        seconds += time.perf_counter() - started
        if done % 100 == 0:
            told(count + done)
    return seconds


def _dreams(count: int, seed: int) -> Iterator[list[Chain]]:
    draw = random.Random(seed)

    def phrase(role: str) -> str:
        return f"{role} {int(draw.paretovariate(0.6))}"

    for _ in range(count):
        yield [Chain(lens, [(phrase("thing"), phrase("deed"), phrase("end")) for _ in range(STEPS)]) for lens in LENSES]
