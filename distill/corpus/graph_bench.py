"""What a persistent knowledge graph costs as dreams keep coming: nodes, memory, time, and what a reload keeps."""

import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.corpus.growing_graph import Chain, KnowledgeGraph
from distill.corpus.knowledge import load_graph
from distill.corpus.triplets import LENSES
from distill.events import Event, Listener, silent

STEPS = 5


def bench_graph(dreams: int, max_nodes: int, seed: int, listen: Listener = silent) -> dict[str, Any]:
    """Let a graph of at most `max_nodes` grow by `dreams` dreams of 4 × 5 steps, save it and read it again.

    Phrases are drawn from a tail without end (a Pareto law), so that new ones come to the last. `mib`: memory of
    Python objects after each fifth of the dreams. Time is taken in a second pass, as tracing memory takes time.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "knowledge.graphml"
        mib: list[float] = []
        most = 0
        tracemalloc.start()
        try:
            graph = KnowledgeGraph(path, max_nodes)
            for done, chains in enumerate(_dreams(dreams, seed), 1):
                graph.add(chains)
                most = max(most, len(graph))
                if done % max(1, dreams // 5) == 0:
                    mib.append(round(tracemalloc.get_traced_memory()[0] / 2**20, 1))
                if done % 100 == 0:
                    listen(Event("graph", "progress", done=done, total=2 * dreams, unit="dream"))
        finally:
            tracemalloc.stop()
        started = time.perf_counter()
        graph.save()
        saving = time.perf_counter() - started
        kept, read = set(graph.graph()), load_graph(path)
        return {
            "dreams": dreams,
            "max_nodes": max_nodes,
            "seed": seed,
            "most_nodes_in_memory": most,
            "mib": mib,
            "nodes_in_file": len(read),
            "kept_nodes_lost_by_reload": len(kept - set(read)),
            "milliseconds_a_dream": round(_timed(dreams, max_nodes, seed, listen) / dreams * 1e3, 3),
            "seconds_to_save": round(saving, 2),
            "file_bytes": path.stat().st_size,
        }


def _timed(count: int, max_nodes: int, seed: int, listen: Listener) -> float:
    """Seconds that adding all dreams takes."""
    graph = KnowledgeGraph(Path(os.devnull) / "none", max_nodes)
    seconds = 0.0
    for done, chains in enumerate(_dreams(count, seed), 1):
        started = time.perf_counter()
        graph.add(chains)
        seconds += time.perf_counter() - started
        if done % 100 == 0:
            listen(Event("graph", "progress", done=count + done, total=2 * count, unit="dream"))
    return seconds


def _dreams(count: int, seed: int) -> Iterator[list[Chain]]:
    draw = random.Random(seed)

    def phrase(role: str) -> str:
        return f"{role} {int(draw.paretovariate(0.6))}"

    for _ in range(count):
        yield [Chain(lens, [(phrase("thing"), phrase("deed"), phrase("end")) for _ in range(STEPS)]) for lens in LENSES]
