"""What a persistent knowledge graph costs as dreams keep coming: nodes, memory, time, and what a reload keeps."""

import os
import random
import tempfile
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch, seconds_of
from distill.knowledge.graph import load_graph
from distill.knowledge.growing_graph import Chain, KnowledgeGraph
from distill.mining.triplets import LENSES

STEPS = 5
TIMES = dict.fromkeys(("a dream", "to save"), "s")
UNITS = {**TIMES, "most nodes in memory": "nodes", "memory at the end": "bytes", "the file": "bytes"}


def bench_graph(watch: Stopwatch, dreams: int, max_nodes: int, seed: int) -> BenchResult:
    """Let a graph of at most `max_nodes` grow by `dreams` dreams of 4 × 5 steps, save it and read it again.

    Phrases are drawn from a tail without end (a Pareto law), so that new ones come to the last; every repetition
    draws the same. about.mib: memory of Python objects after each fifth of the dreams.
    """
    found = watch.each(partial(_grown, dreams, max_nodes, seed), "bench graph")
    return watch.result(
        "graph",
        [Series(name, unit, -1, tuple(one[name] for one in found)) for name, unit in UNITS.items()],
        {"dreams": dreams, "max_nodes": max_nodes, "seed": seed},
        {name: value for name, value in found[-1].items() if name not in UNITS},
    )


def _grown(dreams: int, max_nodes: int, seed: int) -> dict[str, Any]:
    """One repetition. Time is taken in a pass of its own, as tracing memory takes time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "knowledge.graphml"
        traced, most = list[int](), 0
        tracemalloc.start()
        try:
            graph = KnowledgeGraph(path, max_nodes)
            for count, chains in enumerate(_dreams(dreams, seed), 1):
                graph.add(chains)
                most = max(most, len(graph))
                if count % max(1, dreams // 5) == 0:
                    traced.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        saving = seconds_of(graph.save)
        kept, read = set(graph.graph()), load_graph(path)
        again = KnowledgeGraph(Path(os.devnull) / "none", max_nodes)
        adding = sum(seconds_of(partial(again.add, chains)) for chains in _dreams(dreams, seed))
        return {
            "a dream": adding / dreams,
            "to save": saving,
            "most nodes in memory": most,
            "memory at the end": traced[-1],
            "the file": path.stat().st_size,
            "mib": [round(size / 2**20, 1) for size in traced],
            "nodes_in_file": len(read),
            "kept_nodes_lost_by_reload": len(kept - set(read)),
        }


def _dreams(count: int, seed: int) -> Iterator[list[Chain]]:
    draw = random.Random(seed)

    def phrase(role: str) -> str:
        return f"{role} {int(draw.paretovariate(0.6))}"

    for _ in range(count):
        yield [Chain(lens, [(phrase("thing"), phrase("deed"), phrase("end")) for _ in range(STEPS)]) for lens in LENSES]
