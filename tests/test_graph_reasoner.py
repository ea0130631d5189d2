"""The dream graph against loops over its nodes and neighbours, and what it leaves in a knowledge graph."""

from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.dream.graph_reasoner import (
    ACROSS,
    EARLIER,
    LATER,
    SELF,
    DreamGraphReasoner,
    Hop,
    Reasoned,
    chains_of,
    graph_edges,
    relations_of,
)
from distill.dream.record import Branch, DreamRecord, Slot, Step
from distill.errors import BadInput, CorruptFile
from distill.mining.triplets import LENSES

DIM, S, T = 12, 4, 5


def reasoner(hops: int = 3, seed: int = 0, heads: int = 4) -> DreamGraphReasoner:
    """A small one in float64, its edges' biases drawn too."""
    torch.manual_seed(seed)
    model = DreamGraphReasoner(DIM, heads=heads, hops=hops, width=16).double()
    for hop in model.hops:
        nn.init.normal_(hop.relation)
    return model


def dreams(batch: int = 2, paths: int = S, steps: int = T, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, how many steps of each path live, the prompt."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(batch, paths, steps, 3, DIM, generator=draw, dtype=torch.float64)
    lengths = torch.randint(0, steps + 1, (batch, paths), generator=draw)
    live = torch.arange(steps) < lengths[..., None]
    return embeddings, live, torch.randn(batch, 3, DIM, generator=draw, dtype=torch.float64)


def neighbours(node: tuple[int, int], live: Tensor) -> list[tuple[tuple[int, int], int]]:
    """Whom a node reads, and what they are to it, straight from the definition of the graph. live (S, T)."""
    path, step = node
    around = [((path, step - 1), EARLIER), ((path, step + 1), LATER)]
    around += [((other, step), ACROSS) for other in range(live.shape[0]) if other != path]
    there = [(at, what) for at, what in around if 0 <= at[1] < live.shape[1] and bool(live[at])]
    return [(node, SELF), *there]


def hop_by_loops(hop: Hop, nodes: dict[tuple[int, int], Tensor], live: Tensor):
    """One round of messages to every living node; also each one's attention, mean over heads."""
    width = next(iter(nodes.values())).shape[0]
    size = width // hop.heads
    projected = {at: hop.qkv(hop.norm(x)) for at, x in nodes.items()}
    after: dict[tuple[int, int], Tensor] = {}
    paid: dict[tuple[tuple[int, int], tuple[int, int]], float] = {}
    for at, x in nodes.items():
        around = neighbours(at, live)
        message = torch.zeros(width, dtype=x.dtype)
        for head in range(hop.heads):
            part = slice(head * size, (head + 1) * size)
            query = projected[at][:width][part]
            scores = [
                float(query @ projected[other][width : 2 * width][part]) / size**0.5 + float(hop.relation[what, head])
                for other, what in around
            ]
            exponents = [torch.exp(torch.tensor(score - max(scores), dtype=x.dtype)) for score in scores]
            for (other, _), exponent in zip(around, exponents, strict=True):
                share = exponent / sum(exponents)
                message[part] += share * projected[other][2 * width :][part]
                paid[at, other] = paid.get((at, other), 0.0) + float(share) / hop.heads
        x = x + hop.out(message)
        after[at] = x + hop.feed(x)
    return after, paid


@torch.no_grad()
def test_it_is_attention_along_the_edges() -> None:
    """Every output against loops in float64: states, importances of nodes and edges, and what they come to."""
    model = reasoner()
    embeddings, live, prompt = dreams(batch=3, seed=3)
    assert (live.any(-1) != live.all(-1)).any()
    reasoned = model(embeddings, live, prompt)
    for b in range(3):
        alive = [tuple(at) for at in live[b].nonzero().tolist()]
        question = model.prompt(prompt[b].flatten())
        nodes: dict[tuple[int, int], Tensor] = {}
        for path, step in alive:
            angles = torch.tensor([step / 10_000 ** (2 * (i // 2) / 16) for i in range(16)], dtype=torch.float64)
            place = torch.where(torch.arange(16) % 2 == 0, angles.sin(), angles.cos())
            nodes[path, step] = model.step(embeddings[b, path, step].flatten()) + question + place
        paid: dict[tuple[tuple[int, int], tuple[int, int]], float] = {}
        for hop in model.hops:
            assert isinstance(hop, Hop)
            nodes, shares = hop_by_loops(hop, nodes, live[b])
            paid = {edge: paid.get(edge, 0.0) + share / len(model.hops) for edge, share in shares.items()}
        nodes = {at: model.norm(x) for at, x in nodes.items()}
        weight = {at: float(torch.sigmoid(model.importance(x))) for at, x in nodes.items()}
        pooled = sum((weight[at] * nodes[at] for at in alive), torch.zeros(16, dtype=torch.float64))
        pooled = pooled / max(sum(weight.values()), 1e-6)
        torch.testing.assert_close(reasoned.embedding[b], model.outcome(torch.cat([pooled, question])))
        both = {
            edge: (paid[edge] + paid[edge[::-1]]) / 2 for edge in paid if edge[0][0] == edge[1][0] and edge[0] < edge[1]
        }
        across = {edge: share for edge, share in paid.items() if edge[0][0] != edge[1][0]}
        most = max([*both.values(), *across.values()], default=1.0)
        for path in range(S):
            for step in range(T):
                assert float(reasoned.node_importance[b, path, step]) == pytest.approx(weight.get((path, step), 0.0))
                if step + 1 < T:
                    want = both.get(((path, step), (path, step + 1)), 0.0) / most
                    assert float(reasoned.temporal[b, path, step]) == pytest.approx(want)
                for other in range(S):
                    want = across.get(((path, step), (other, step)), 0.0) / most
                    assert float(reasoned.causal[b, step, path, other]) == pytest.approx(want)
            own = [nodes[path, step] for step in range(T) if (path, step) in nodes]
            if own:
                stacked = torch.stack(own)
                logit = model.score(torch.cat([stacked.mean(0), stacked.amax(0), stacked[-1]]))[0]
                torch.testing.assert_close(reasoned.score_logits[b, path], logit)
            else:
                assert float(reasoned.scores[b, path]) < 1e-9


def test_the_graph_of_4_by_5_has_20_nodes_16_temporal_edges_and_causal_ones_within_a_step() -> None:
    relations = relations_of(S, T)
    assert relations.shape == (20, 20)
    assert int((relations == EARLIER).sum()) == int((relations == LATER).sum()) == 16
    assert int((relations == ACROSS).sum()) == T * S * (S - 1)
    assert int((relations == SELF).sum()) == 20
    live = torch.ones(1, S, T, dtype=torch.bool)
    reasoned = reasoner()(*dreams(1)[:1], live, dreams(1)[2])
    edges = graph_edges(reasoned, live)
    assert [edge.kind for edge in edges].count("temporal") == 16
    assert [edge.kind for edge in edges].count("causal") == 60
    assert max(edge.importance for edge in edges) == pytest.approx(1.0)
    assert all(0 <= edge.importance <= 1 for edge in edges)


@given(st.permutations(range(S)), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_paths_in_another_order_are_judged_the_same(order: list[int], seed: int) -> None:
    model = reasoner(seed=seed)
    embeddings, live, prompt = dreams(seed=seed)
    before, after = model(embeddings, live, prompt), model(embeddings[:, order], live[:, order], prompt)
    torch.testing.assert_close(after.embedding, before.embedding)
    torch.testing.assert_close(after.node_importance, before.node_importance[:, order])
    torch.testing.assert_close(after.score_logits, before.score_logits[:, order])
    torch.testing.assert_close(after.temporal, before.temporal[:, order])
    torch.testing.assert_close(after.causal, before.causal[:, :, order][..., order])


@given(st.integers(0, 100))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_what_does_not_live_changes_nothing(seed: int) -> None:
    """Neither noise in dead steps, nor a whole dead path, nor dead steps at the end of all."""
    model = reasoner(seed=seed)
    embeddings, live, prompt = dreams(seed=seed)
    live[:, -1] = False
    live[..., -1] = False
    noisy = torch.where(live[..., None, None], embeddings, torch.nan)
    whole, without = model(noisy, live, prompt), model(embeddings[:, :-1, :-1], live[:, :-1, :-1], prompt)
    torch.testing.assert_close(whole.embedding, without.embedding)
    torch.testing.assert_close(whole.node_importance[:, :-1, :-1], without.node_importance)
    torch.testing.assert_close(whole.score_logits[:, :-1], without.score_logits)
    torch.testing.assert_close(whole.causal[:, :-1, :-1, :-1], without.causal)
    torch.testing.assert_close(whole.temporal[:, :-1, :-1], without.temporal)
    assert not whole.node_importance[:, -1].any()
    assert not whole.causal[:, :, -1].any()
    assert not whole.causal[..., -1].any()


@torch.no_grad()
def test_a_message_travels_an_edge_a_hop() -> None:
    embeddings, _, prompt = dreams(1)
    live = torch.ones(1, S, T, dtype=torch.bool)
    changed = embeddings.clone()
    changed[0, 0, 0] += 1
    steps = [abs(path > 0) + step for path in range(S) for step in range(T)]
    for hops in (1, 2, 3):
        model = reasoner(hops)
        moved = model(changed, live, prompt).importance_logits != model(embeddings, live, prompt).importance_logits
        assert moved.flatten().tolist() == [distance <= hops for distance in steps]


def judged(logits: list[list[float]], steps: int = 1) -> Reasoned:
    found = torch.tensor(logits)
    batch, paths = found.shape
    zero = torch.zeros(batch, paths, steps)
    return Reasoned(zero, zero, zero, zero[..., 1:], torch.zeros(batch, steps, paths, paths), found)


@given(
    st.lists(st.lists(st.floats(-4, 4), min_size=9, max_size=9), min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=9, max_size=9),
    st.floats(0, 1),
)
def test_of_each_lens_the_best_path_is_kept_if_it_is_likely_right(
    logits: list[list[float]], lives: list[bool], least: float
) -> None:
    live = torch.tensor(lives)[None, :, None].expand(len(logits), -1, 1)
    reasoned = judged(logits)
    keep = DreamGraphReasoner.arbitrate(reasoned, live, least)
    for row, scores in zip(keep.tolist(), reasoned.scores.tolist(), strict=True):
        for lens in range(len(LENSES)):
            paths = [path for path in range(lens, 9, 4) if lives[path] and scores[path] >= torch.tensor(least)]
            best = max(paths, key=lambda path: (scores[path], -path), default=None)
            assert [path for path in range(lens, 9, 4) if row[path]] == ([] if best is None else [best])


def test_dreaming_is_adaptive_down_to_nothing() -> None:
    reasoned, live = judged([[2.0, -2.0, 0.5, -0.5]]), torch.ones(1, 4, 1, dtype=torch.bool)
    assert DreamGraphReasoner.arbitrate(reasoned, live, 0.5).tolist() == [[True, False, True, False]]
    assert DreamGraphReasoner.arbitrate(reasoned, live, 0.99).tolist() == [[False] * 4]
    assert DreamGraphReasoner.arbitrate(reasoned, live, 0.0).tolist() == [[True] * 4]
    assert DreamGraphReasoner.arbitrate(reasoned, live & False, 0.0).tolist() == [[False] * 4]


def test_it_learns_which_paths_are_right_and_which_steps_matter() -> None:
    """A path is right if none of its steps contradicts the prompt; the steps that do matter."""
    torch.manual_seed(0)
    model = DreamGraphReasoner(DIM, heads=4, width=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    live = torch.ones(32, S, T, dtype=torch.bool)
    live[:, 1, 3:] = False

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        prompt = torch.randn(32, 3, DIM)
        wrong = torch.rand(32, S, T) < 0.15
        said = torch.where(wrong[..., None], -prompt[:, None, None, 0], prompt[:, None, None, 0])
        embeddings = torch.randn(32, S, T, 3, DIM) * 0.3
        embeddings[..., 0, :] += said
        return embeddings, prompt, wrong & live

    def loss_of(reasoned: Reasoned, wrong: Tensor) -> Tensor:
        bce = nn.functional.binary_cross_entropy_with_logits
        return bce(reasoned.score_logits, (~wrong.any(-1)).float()) + bce(
            reasoned.importance_logits[live], wrong[live].float()
        )

    for _ in range(100):
        embeddings, prompt, wrong = draw()
        optimizer.zero_grad()
        loss_of(model(embeddings, live, prompt), wrong).backward()
        optimizer.step()
    embeddings, prompt, wrong = draw()
    reasoned = model(embeddings, live, prompt)
    assert ((reasoned.scores > 0.5) == ~wrong.any(-1)).float().mean() > 0.9
    assert ((reasoned.node_importance > 0.5) == wrong).float().mean() > 0.95


def test_gradients_are_finite_where_nothing_lives() -> None:
    model = reasoner()
    embeddings, live, prompt = dreams()
    live[0] = False
    reasoned = model(embeddings.requires_grad_(), live, prompt)
    sum(
        part.sum()
        for part in (reasoned.embedding, reasoned.node_importance, reasoned.scores, reasoned.temporal, reasoned.causal)
    ).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert not embeddings.grad[0].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_heads_that_do_not_fit_the_width_are_refused() -> None:
    with pytest.raises(BadInput, match="5 heads"):
        DreamGraphReasoner(DIM, heads=5, width=16)


@torch.no_grad()
def test_the_graph_is_exported(tmp_path: Path) -> None:
    embeddings, live, prompt = dreams(seed=1)
    reasoned = reasoner()(embeddings, live, prompt)
    labels = [[(f"w{p}", f"a{s}", "r") for s in range(T)] for p in range(S)]
    graph = DreamGraphReasoner.to_networkx(reasoned, live, labels, item=1)
    assert set(graph) == {f"{path}/{step}" for path, step in live[1].nonzero().tolist()}
    for name, data in graph.nodes(data=True):
        path, step = map(int, name.split("/"))
        assert data["lens"] == LENSES[path % 4]
        assert data["label"] == f"w{path} a{step} r"
        assert data["importance"] == pytest.approx(float(reasoned.node_importance[1, path, step]))
    for source, target, data in graph.edges(data=True):
        (p, s), (q, t) = (map(int, name.split("/")) for name in (source, target))
        if data["kind"] == "temporal":
            assert (p, s + 1) == (q, t)
        else:
            assert s == t
            assert data["importance"] == pytest.approx(float(reasoned.causal[1, s, q, p]))
    nx.write_graphml(graph, tmp_path / "dream.graphml")
    assert set(nx.read_graphml(tmp_path / "dream.graphml")) == set(graph)
    bare = DreamGraphReasoner.to_networkx(reasoned, live, item=1)
    assert all(set(data) == {"lens", "importance"} for _, data in bare.nodes(data=True))


# Knowledge.
def step(what: str, action: str, result: str, importance: float = 0.5) -> Step:
    return Step(*(Slot(label, 0, 1.0) for label in (what, action, result)), importance=importance)


def record(*branches: tuple[str, list[Step], bool]) -> DreamRecord:
    return DreamRecord("p", "engine", [Branch(lens, steps, 0.5, kept, "engine") for lens, steps, kept in branches])


def test_the_seeds_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the seeds, word for word: an importance of one's own, saved, and loaded by plain networkx."""
    monkeypatch.chdir(tmp_path)
    reasoner = DreamGraphReasoner()
    dream_sequences = [
        record(("causal", [step("a ball", "release", "falls", 0.9), step("falls", "hit", "bounces", 0.7)], True)),
        record(("causal", [step("a ball", "release", "falls", 0.3)], True)),
        record(("spatial", [step("a cup", "tip", "spills", 1.0)], False)),
    ]

    def importance_fn(node, data):
        # Example: prioritize nodes with high reward or attention
        return data.get("reward", 0.0) + data.get("attention", 0.0)

    reasoner.save_important_knowledge_to_graphml(
        dream_sequences, filepath="important_knowledge.graphml", importance_fn=importance_fn, max_nodes=1000
    )

    import networkx as nx

    G = nx.read_graphml("important_knowledge.graphml")  # noqa: N806
    # Use G to seed or augment the next reasoning session
    assert set(G) == {"what:a ball", "action:release", "result:falls", "what:falls", "action:hit", "result:bounces"}
    assert G.nodes["what:a ball"]["attention"] == pytest.approx(0.6)
    assert G.nodes["what:a ball"]["count"] == 2
    assert G.nodes["result:bounces"]["attention"] == pytest.approx(0.7)

    for dreams, max_nodes in ((dream_sequences, 1000), ([], 3)):
        reasoner.save_important_knowledge_to_graphml(dreams, "important_knowledge.graphml", importance_fn, max_nodes)
    G = nx.read_graphml("important_knowledge.graphml")  # noqa: N806
    assert set(G) == {"what:falls", "action:hit", "result:bounces"}, "the most attended"
    assert G.nodes["action:hit"]["count"] == 2, "merged with the file that was there"


def test_dreams_are_known_in_whichever_form_they_come() -> None:
    kept = ("causal", [step("A  ball", "release", "falls", 0.25)], True)
    dropped = ("spatial", [step("a cup", "tip", "spills")], False)
    (chain,) = chains_of(record(kept, dropped))
    assert (chain.lens, chain.steps, chain.attention) == ("causal", [("a ball", "release", "falls")], [0.25])
    (branch,) = chains_of(record(dropped).branches[0])
    assert branch.steps == [("a cup", "tip", "spills")]
    (plain,) = chains_of({"temporal": [("a\x00seed", "⟨sprouts⟩", "a plant"), ("a seed", "?", "nothing")]})
    assert (plain.lens, plain.steps, plain.attention) == ("temporal", [("a seed", "sprouts", "a plant")], None)


def test_knowledge_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    save = DreamGraphReasoner.save_important_knowledge_to_graphml
    path = tmp_path / "known.graphml"
    dream = {"causal": [("a ball", "release", "falls")]}
    cases = [
        (BadInput, "'magic' is no lens", {"dream_sequences": [{"magic": [("a", "b", "c")]}]}),
        (BadInput, "max_nodes=0", {"max_nodes": 0}),
        (
            BadInput,
            "gave no number for 'what:a ball'",
            {"importance_fn": lambda node, data: float("nan"), "max_nodes": 1},
        ),
        (BadInput, "Is a directory", {"filepath": tmp_path}),
    ]
    for kind, text, arguments in cases:
        with pytest.raises(kind, match=text) as caught:
            save(**{"dream_sequences": [dream], "filepath": path, **arguments})
        assert "\n" not in str(caught.value)
    path.write_text("no graph", encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"known\.graphml: not a knowledge graph .* delete it, or name another file"):
        save([dream], path)
    assert path.read_text(encoding="utf-8") == "no graph"
