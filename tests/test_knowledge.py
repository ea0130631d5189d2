"""The knowledge graph against plain counting, its file against damage, and one that grows against its bound."""

import random
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answers_run import texts

from distill.errors import BadInput, CorruptFile
from distill.knowledge.graph import Tally, build_graph, load_graph, merge, most_important, save_graph
from distill.knowledge.growing_graph import EDGES, SLACK, Chain, KnowledgeGraph
from distill.mining.syntax_miner import mine_texts
from distill.mining.triplets import LENSES, Triplet, by_trace


def triplet(what: str, action: str, result: str, lens: str = "causal", step: int = 0, trace: str = "t") -> Triplet:
    return Triplet(what, action, result, lens, step, trace, 0, "syntax")


@pytest.fixture(scope="module")
def mined() -> list[Triplet]:
    return [t for found in mine_texts(texts()[:20], 5) for t in found.triplets]


def as_sets(graph: nx.MultiDiGraph) -> tuple[set[object], set[object]]:
    nodes = {(name, *sorted(data.items())) for name, data in graph.nodes(data=True)}
    edges = {(a, b, *sorted(data.items())) for a, b, data in graph.edges(data=True)}
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
    for kind, expected in {"performs": performs, "causes": causes, "then": then}.items():
        edges = [(a, b, data) for a, b, data in graph.edges(data=True) if data["type"] == kind]
        assert {(a, b, data["lens"]): data["count"] for a, b, data in edges} == expected
        assert len(edges) == len(expected)
    yields = Counter((f"what:{t.what}", f"result:{t.result}", t.lens, t.action) for t in mined)
    edges = [(a, b, data) for a, b, data in graph.edges(data=True) if data["type"] == "yields"]
    assert {(a, b, data["lens"], data["by"]): data["count"] for a, b, data in edges} == yields
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


def test_a_tally_gives_the_most_important_of_the_graph_that_it_does_not_hold(
    mined: list[Triplet], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, tally = build_graph(mined), Tally()
    for group in by_trace(mined).values():
        tally.add(group)
    for most in (0, 1, 30, 10**6):
        small, expected = tally.graph(most), most_important(graph, most)
        assert list(small.nodes(data=True)) == list(expected.nodes(data=True))
        assert sorted(small.edges(keys=True, data=True), key=str) == sorted(
            expected.edges(keys=True, data=True), key=str
        )
    assert (tally.nodes, tally.edges) == (graph.number_of_nodes(), graph.number_of_edges())
    assert not Tally().graph(5).nodes
    monkeypatch.setattr("distill.knowledge.graph.EDGES", 1)
    few, all_ = tally.graph(30), most_important(graph, 30)
    assert (few.number_of_edges(), tally.dropped) == (30, all_.number_of_edges() - 30)
    counts = sorted((data["count"] for *_, data in all_.edges(data=True)), reverse=True)
    assert sorted((data["count"] for *_, data in few.edges(data=True)), reverse=True) == counts[:30]


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
        lambda data: data.replace(b">falls</data>\n    </edge>", b"></data></edge>").replace(
            b'attr.name="by"', b'attr.name="if"'
        ),
        lambda data: data.replace(b'">1<', b'">0<'),
        lambda data: data.replace(b"encoding='utf-8'", b"encoding='foo'"),
        lambda data: data.replace(b'attr.type="long"', b""),
        lambda data: data.replace(b'">1<', b'">-1<'),
        lambda data: data.decode().replace("utf-8", "utf-16").encode("utf-16"),
        lambda data: data[: data.index(b"<graph ")] + b'<graph edgedefault="directed"><node id="1"/></graph></graphml>',
        lambda data: data.replace(b'edgedefault="directed"', b'edgedefault="undirected"'),
        lambda data: data.replace(b"<graphml", b'<!DOCTYPE g [<!ENTITY a "b">]><graphml', 1),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "knowledge.graphml"
    save_graph(build_graph([triplet("ball", "falls", "down")]), path, 10)
    path.write_bytes(damage(path.read_bytes()))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(CorruptFile, match=r"knowledge\.graphml: not a knowledge graph") as caught:
            load_graph(path)
    assert not [warning for warning in warned if warning.category is UserWarning]
    assert "\n" not in str(caught.value)


def test_too_large_or_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.graphml"
    save_graph(build_graph([triplet("ball", "falls", "down")]), path, 10)
    with pytest.raises(BadInput, match="more than 100"):
        load_graph(path, max_bytes=100)
    with pytest.raises(BadInput, match="dream mine"):
        load_graph(tmp_path / "none.graphml")
    with pytest.raises(BadInput, match=r"No such file or directory.*; name another"):
        load_graph(tmp_path / "none.graphml", remedy="name another")


# A graph that grows.
def shape(graph: nx.MultiDiGraph) -> tuple[set[object], set[object]]:
    """Nodes and edges with their counts; without importance and attention, which a part may have otherwise."""
    nodes = {(name, data["type"], data["label"], data["count"]) for name, data in graph.nodes(data=True)}
    return nodes, as_sets(graph)[1]


def chains_of(triplets: list[Triplet]) -> Iterator[Chain]:
    for trace in sorted({t.trace for t in triplets}):
        for lens in LENSES:
            own = sorted((t for t in triplets if (t.trace, t.lens) == (trace, lens)), key=lambda t: t.step)
            yield Chain(lens, [t.phrases for t in own])


WORDS = st.sampled_from(["ball", "cup", "sea", "tree", "falls", "grows"])
STEPS = st.lists(st.tuples(WORDS, WORDS, WORDS, st.floats(0, 1)), max_size=4)
CHAINS = st.lists(
    st.builds(
        lambda lens, steps: Chain(lens, [step[:3] for step in steps], [step[3] for step in steps]),
        st.sampled_from(LENSES),
        STEPS,
    ),
    max_size=5,
)


def test_it_counts_as_the_mined_graph_does(tmp_path: Path, mined: list[Triplet]) -> None:
    graph = KnowledgeGraph(tmp_path / "k", 10**5)
    graph.add(chains_of(mined))
    assert shape(graph.graph()) == shape(build_graph(mined))
    importance = dict(build_graph(mined).nodes(data="importance"))
    assert dict(graph.graph().nodes(data="importance")) == importance
    graph.save()
    assert as_sets(load_graph(tmp_path / "k")) == as_sets(graph.graph())
    save_graph(build_graph(mined), tmp_path / "mined", 10**5)
    assert shape(KnowledgeGraph(tmp_path / "mined", 10**5).graph()) == shape(build_graph(mined))


@given(CHAINS, st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_reloading_loses_no_kept_node(tmp_path_factory: pytest.TempPathFactory, chains: list[Chain], most: int) -> None:
    path = tmp_path_factory.getbasetemp() / "kept.graphml"
    path.unlink(missing_ok=True)
    graph = KnowledgeGraph(path, most)
    graph.add(chains)
    graph.save()
    assert len(graph) <= most
    again = KnowledgeGraph(path, most)
    assert as_sets(again.graph()) == as_sets(graph.graph()) == as_sets(load_graph(path))
    data = path.read_bytes()
    again.save()
    assert path.read_bytes() == data


@given(CHAINS, CHAINS)
@settings(deadline=None, max_examples=60)
def test_merging_does_not_care_about_the_order(
    tmp_path_factory: pytest.TempPathFactory, first: list[Chain], second: list[Chain]
) -> None:
    """One by one, or as two graphs in either order: the same counts and the same attention to the last digit."""
    path = tmp_path_factory.getbasetemp() / "unwritten"
    parts = [KnowledgeGraph(path), KnowledgeGraph(path)]
    whole = KnowledgeGraph(path)
    for part, chains in zip(parts, (first, second), strict=True):
        part.add(chains)
        whole.add(chains)
    graphs = [part.graph() for part in parts]
    parts[0].merge(graphs[1])
    parts[1].merge(graphs[0])
    assert as_sets(parts[0].graph()) == as_sets(parts[1].graph()) == as_sets(whole.graph())
    told: dict[str, list[float]] = {}
    for chain in first + second:
        for phrases, attention in zip(chain.steps, chain.attention or (), strict=True):
            for role, phrase in zip(("what", "action", "result"), phrases, strict=True):
                told.setdefault(f"{role}:{phrase}", []).append(attention)
    for name, data in whole.graph().nodes(data=True):
        assert data["count"] == data["weighed"] == len(told[name])
        assert data["attention"] == pytest.approx(sum(told[name]) / len(told[name]), abs=1e-6)


def dream(draw: random.Random) -> list[Chain]:
    """4 × 5 steps of phrases with a tail without end: there is always something new."""

    def phrase(role: str) -> str:
        return f"{role} {int(draw.paretovariate(0.8))}"

    return [Chain(lens, [(phrase("thing"), phrase("act"), phrase("end")) for _ in range(5)]) for lens in LENSES]


DREAMS = 1_200


def test_thousands_of_dreams_leave_a_graph_within_its_bound(tmp_path: Path) -> None:
    """Of nodes at every moment, of edges at the end, and of memory, which grows little more after the first half."""
    draw, most = random.Random(0), 100
    graph = KnowledgeGraph(tmp_path / "k", most)
    early = 0
    tracemalloc.start()
    try:
        for number in range(DREAMS):
            graph.add(dream(draw))
            assert len(graph) <= SLACK * most
            if number == DREAMS // 2:
                early = tracemalloc.get_traced_memory()[1]
                tracemalloc.reset_peak()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.4 * early, "what is left to fill are edges, up to their bound"
    assert peak < SLACK * most * SLACK * EDGES * 400, "bytes of an edge, at most"
    grown = graph.graph()
    assert all(grown.out_degree(name) <= SLACK * EDGES for name in grown)
    assert {"what:thing 1", "action:act 1", "result:end 1"} <= set(grown), "what comes often stays"
    assert grown.nodes["what:thing 1"]["count"] > DREAMS
    graph.save()
    assert len(load_graph(tmp_path / "k")) == len(graph) == most
    assert set(load_graph(tmp_path / "k")) == set(graph.graph())


def test_pruning_keeps_the_most_important_and_no_loose_ends(tmp_path: Path) -> None:
    draw = random.Random(1)
    graph = KnowledgeGraph(tmp_path / "k", 30, lambda name, data: data["count"] + len(data["label"]) / 100)
    for _ in range(40):
        graph.add(dream(draw))
    grown, ranks = graph.graph(), {}
    for name, data in grown.nodes(data=True):
        ranks[name] = data["count"] + len(data["label"]) / 100
        neighbours = set(grown.successors(name)) | set(grown.predecessors(name))
        assert data["importance"] == data["count"] * (1 + len(neighbours))
    graph.save()
    best = sorted(ranks, key=lambda name: (-ranks[name], name))[:30]
    assert set(load_graph(tmp_path / "k")) == set(best)


def test_an_importance_that_is_no_number_is_named(tmp_path: Path) -> None:
    def nothing(name: str, data: dict[str, object]) -> float:
        return None  # pyright: ignore[reportReturnType]

    graph = KnowledgeGraph(tmp_path / "k", 2, nothing)
    graph.add([Chain("causal", [("ball", "falls", "down")])])
    with pytest.raises(BadInput, match="importance_fn: gave no number for 'what:ball'"):
        graph.save()


@pytest.mark.parametrize("phrase", ["a\x0bb", "a\rb", "a\ud800", "a\uffff"])
def test_what_no_file_could_hold_is_refused(tmp_path: Path, phrase: str) -> None:
    graph = KnowledgeGraph(tmp_path / "k")
    with pytest.raises(BadInput, match="characters that a graph's file can't hold"):
        graph.add([Chain("causal", [("ball", "falls", "down")]), Chain("causal", [("ball", phrase, "down")])])
    assert len(graph) == 0, "nor is what came before it added"
    graph.save()
    assert len(KnowledgeGraph(tmp_path / "k")) == 0


@pytest.mark.parametrize("phrase", ["نمی\u200cخواهم", "👩\u200d🚀", "10\xa0km", "a\xadb", "a\tb", "\U0001fae9"])
def test_what_a_file_holds_is_added(tmp_path: Path, phrase: str) -> None:
    graph = KnowledgeGraph(tmp_path / "k")
    graph.add(iter([Chain("causal", [("ball", phrase, "down")])]))
    graph.save()
    assert phrase in {data["label"] for _, data in load_graph(tmp_path / "k").nodes(data=True)}


def test_one_that_holds_the_graph_goes_on_from_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "k"
    ours, theirs = KnowledgeGraph(path), KnowledgeGraph(path)
    ours.add([Chain("causal", [("ball", "falls", "down")])])
    theirs.add([Chain("causal", [("ball", "bounces", "up")])])
    ours.save()
    theirs.save()
    ours.add([Chain("causal", [("ball", "rolls", "away")])])
    ours.save()
    ours.save()
    theirs.save()
    assert load_graph(path).nodes["what:ball"]["count"] == 3
    assert as_sets(ours.graph()) == as_sets(load_graph(path)) == as_sets(theirs.graph())


@given(st.lists(st.tuples(st.booleans(), CHAINS, st.booleans()), max_size=6))
@settings(deadline=None, max_examples=40)
def test_two_who_save_in_turns_lose_and_double_nothing(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[bool, list[Chain], bool]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "turns.graphml"
    path.unlink(missing_ok=True)
    holders, alone = (KnowledgeGraph(path), KnowledgeGraph(path)), KnowledgeGraph(path.with_name("unwritten"))
    for who, chains, save in turns:
        holders[who].add(chains)
        alone.add(chains)
        if save:
            holders[who].save()
    for holder in holders:
        holder.save()
    assert as_sets(load_graph(path)) == as_sets(alone.graph())


GROW = """
import sys; from pathlib import Path; from distill.knowledge.growing_graph import Chain, KnowledgeGraph
for i in range(10):
    graph = KnowledgeGraph(Path(sys.argv[1]))
    graph.add([Chain("causal", [("ball", "falls", sys.argv[2])])])
    graph.save()
"""


def test_processes_that_grow_one_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "k"
    workers = [subprocess.Popen([sys.executable, "-c", GROW, str(path), f"end {i}"]) for i in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    nodes = load_graph(path).nodes
    assert nodes["what:ball"]["count"] == 30
    assert [nodes[f"result:end {i}"]["count"] for i in range(3)] == [10, 10, 10]


def test_a_file_that_is_no_graph_or_too_large_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "k.graphml"
    graph = KnowledgeGraph(path, max_bytes=2000)
    graph.add([Chain("causal", [("ball", "falls", "down")] * 2)])
    for data, kind in ((b"<graphml/>", CorruptFile), (b"x" * 2001, BadInput)):
        path.write_bytes(data)
        with pytest.raises(kind, match=r"k\.graphml: ") as caught:
            KnowledgeGraph(path, max_bytes=2000)
        with pytest.raises(kind):
            graph.save()
        assert path.read_bytes() == data
        assert "\n" not in str(caught.value)
    path.unlink()
    graph.save()
    assert load_graph(path).nodes["what:ball"]["count"] == 2
