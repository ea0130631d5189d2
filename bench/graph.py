"""What a persistent knowledge graph costs as dreams keep coming: nodes, memory, time, and what a reload keeps."""

import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch, seconds_of
from distill.events import Event
from distill.knowledge.graph import load_graph
from distill.knowledge.growing_graph import Chain, KnowledgeGraph
from distill.mining.triplets import LENSES

STEPS = 5

SERIES = {
    "a dream": ("s", "seconds_a_dream"),
    "to save": ("s", "seconds_to_save"),
    "most nodes in memory": ("nodes", "most_nodes_in_memory"),
    "memory at the end": ("bytes", "bytes_in_memory"),
    "the file": ("bytes", "file_bytes"),
}
"""Name → unit, and what `_grown` calls it."""


def bench_graph(watch: Stopwatch, dreams: int, max_nodes: int, seed: int) -> BenchResult:
    """Let a graph of at most `max_nodes` grow by `dreams` dreams of 4 × 5 steps, save it and read it again.

    Phrases are drawn from a tail without end (a Pareto law), so that new ones come to the last; every repetition
    draws the same. about.mib: memory of Python objects after each fifth of the dreams. Time is taken in a pass of its
    own, as tracing memory takes time.
    """
    done, total = 0, watch.rounds * 2 * dreams

    def tell() -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            watch.listen(Event("bench graph", "progress", done=done, total=total, unit="dream"))

    found = watch.each(partial(_grown, dreams, max_nodes, seed, tell), "bench graph, rounds")
    return watch.result(
        "graph",
        [Series(name, unit, -1, tuple(one[key] for one in found)) for name, (unit, key) in SERIES.items()],
        {"dreams": dreams, "max_nodes": max_nodes, "seed": seed},
        {key: found[-1][key] for key in ("mib", "nodes_in_file", "kept_nodes_lost_by_reload")},
    )


def _grown(dreams: int, max_nodes: int, seed: int, tell: Callable[[], None]) -> dict[str, Any]:
    """One repetition; `tell` is called for each of 2 · dreams."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "knowledge.graphml"
        traced: list[int] = []
        most = 0
        tracemalloc.start()
        try:
            graph = KnowledgeGraph(path, max_nodes)
            for count, chains in enumerate(_dreams(dreams, seed), 1):
                graph.add(chains)
                most = max(most, len(graph))
                if count % max(1, dreams // 5) == 0:
                    traced.append(tracemalloc.get_traced_memory()[0])
                tell()
        finally:
            tracemalloc.stop()
        saving = seconds_of(graph.save)
        kept, read = set(graph.graph()), load_graph(path)
        again, seconds = KnowledgeGraph(Path(os.devnull) / "none", max_nodes), 0.0
        for chains in _dreams(dreams, seed):
            seconds += seconds_of(partial(again.add, chains))
            tell()
        return {
            "most_nodes_in_memory": most,
            "mib": [round(size / 2**20, 1) for size in traced],
            "bytes_in_memory": traced[-1],
            "nodes_in_file": len(read),
            "kept_nodes_lost_by_reload": len(kept - set(read)),
            "seconds_a_dream": seconds / dreams,
            "seconds_to_save": saving,
            "file_bytes": path.stat().st_size,
        }


def _dreams(count: int, seed: int) -> Iterator[list[Chain]]:
    draw = random.Random(seed)

    def phrase(role: str) -> str:
        return f"{role} {int(draw.paretovariate(0.6))}"

    for _ in range(count):
        yield [Chain(lens, [(phrase("thing"), phrase("deed"), phrase("end")) for _ in range(STEPS)]) for lens in LENSES]
