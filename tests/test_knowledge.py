"""The knowledge graph against plain counting, and its file against damage."""

from collections import Counter
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answers_run import texts

from distill.corpus.knowledge import build_graph, load_graph, merge, most_important, save_graph
from distill.corpus.syntax_miner import mine_texts
from distill.corpus.triplets import LENSES, Triplet
from distill.errors import BadInput, CorruptFile


def triplet(what: str, action: str, result: str, lens: str = "causal", step: int = 0, trace: str = "t") -> Triplet:
    return Triplet(what, action, result, lens, step, trace, 0, "syntax")


@pytest.fixture(scope="module")
def mined() -> list[Triplet]:
    return [t for found in mine_texts(texts()[:20], 5) for t in found.triplets]


def as_sets(graph: nx.MultiDiGraph) -> tuple[set[object], set[object]]:
    nodes = {(name, *sorted(data.items())) for name, data in graph.nodes(data=True)}
    edges = {(a, b, data["type"], data["lens"], data["count"]) for a, b, data in graph.edges(data=True)}
    return nodes, edges


def test_nodes_and_edges_count_what_triplets_say(mined: list[Triplet]) -> None:
    graph = build_graph(mined)
    nodes = Counter(
        f"{role}:{p}" for t in mined for role, p in zip(("what", "action", "result"), t.phrases, strict=True)
    )
    assert {name: data["count"] for name, data in graph.nodes(data=True)} == nodes
    performs = Counter((f"what:{t.what}", f"action:{t.action}", t.lens) for t in mined)
    causes = Counter((f"action:{t.action}", f"result:{t.result}", t.lens) for t in mined)
    steps = {(t.trace, t.lens, t.step): t for t in mined}
    then = Counter(
        (f"result:{t.result}", f"action:{steps[trace, lens, step + 1].action}", lens)
        for (trace, lens, step), t in steps.items()
        if (trace, lens, step + 1) in steps
    )
    yields = Counter((f"what:{t.what}", f"result:{t.result}", t.lens) for t in mined)
    for kind, expected in {"performs": performs, "causes": causes, "then": then, "yields": yields}.items():
        edges = [(a, b, data) for a, b, data in graph.edges(data=True) if data["type"] == kind]
        assert {(a, b, data["lens"]): data["count"] for a, b, data in edges} == expected
        assert len(edges) == len(expected)
    assert {data["type"] for _, data in graph.nodes(data=True)} == {"entity", "action", "outcome"}


def test_importance_is_mentions_times_connections() -> None:
    graph = build_graph([triplet("ball", "falls", "down"), triplet("ball", "bounces", "up", trace="u")])
    assert graph.nodes["what:ball"]["importance"] == 2 * (1 + 4)
    assert graph.nodes["result:up"]["importance"] == 1 * (1 + 2)


def test_merging_graphs_is_building_one_of_both(mined: list[Triplet]) -> None:
    traces = sorted({t.trace for t in mined})
    first = [t for t in mined if t.trace in traces[:7]]
    rest = [t for t in mined if t.trace not in traces[:7]]
    graph = build_graph(first)
    merge(graph, build_graph(rest))
    assert as_sets(graph) == as_sets(build_graph(mined))


def test_the_file_holds_the_most_important(tmp_path: Path, mined: list[Triplet]) -> None:
    graph = build_graph(mined)
    save_graph(graph, tmp_path / "all.graphml", 10**6)
    assert as_sets(load_graph(tmp_path / "all.graphml")) == as_sets(graph)
    save_graph(graph, tmp_path / "some.graphml", 30)
    some = load_graph(tmp_path / "some.graphml")
    assert some.number_of_nodes() == 30
    least = min(data["importance"] for _, data in some.nodes(data=True))
    assert all(data["importance"] <= least for name, data in graph.nodes(data=True) if name not in some)
    assert as_sets(some)[1] == {e for e in as_sets(graph)[1] if e[0] in some and e[1] in some}


def test_equal_graphs_give_equal_bytes(tmp_path: Path, mined: list[Triplet]) -> None:
    """Also after a round trip, and whatever the order in which traces came."""
    save_graph(build_graph(mined), tmp_path / "a", 100)
    save_graph(build_graph(mined), tmp_path / "b", 100)
    save_graph(load_graph(tmp_path / "a"), tmp_path / "c", 100)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


PHRASES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12)


@given(st.lists(st.builds(triplet, PHRASES, PHRASES, PHRASES, st.sampled_from(LENSES), trace=PHRASES), max_size=6))
def test_any_printable_phrase_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, triplets: list[Triplet]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.graphml"
    graph = build_graph(triplets)
    save_graph(graph, path, 100)
    assert as_sets(load_graph(path)) == as_sets(graph)
    assert set(most_important(graph, 5)) <= set(graph)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"not xml",
        lambda data: b"<graphml/>",
        lambda data: data.replace(b">outcome<", b">other<", 1),
        lambda data: data.replace(b">causes<", b">hates<", 1),
        lambda data: data.replace(b">causal<", b">magic<", 1),
        lambda data: data.replace(b'edgedefault="directed"', b'edgedefault="undirected"'),
        lambda data: data.replace(b"<graphml", b'<!DOCTYPE g [<!ENTITY a "b">]><graphml', 1),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "knowledge.graphml"
    save_graph(build_graph([triplet("ball", "falls", "down")]), path, 10)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFile, match=r"knowledge\.graphml: not a knowledge graph") as caught:
        load_graph(path)
    assert "\n" not in str(caught.value)


def test_too_large_or_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.graphml"
    save_graph(build_graph([triplet("ball", "falls", "down")]), path, 10)
    with pytest.raises(BadInput, match="more than 100"):
        load_graph(path, max_bytes=100)
    with pytest.raises(BadInput, match="dream mine"):
        load_graph(tmp_path / "none.graphml")
