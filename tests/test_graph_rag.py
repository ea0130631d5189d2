"""Retrieval by attention against dense float64 and sorting; what it learns; and what is done with it in a terminal."""

import json
import math
import random
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from support.ablation_run import small_world

from bench import figures
from bench import retrieval as bench
from cli import main as entry
from distill.config import CaptureSettings, ImageTokenizerConfig, Settings
from distill.corpus.datasets import hearsay_world
from distill.corpus.datasets.causal_world import THINGS
from distill.corpus.datasets.stage import capture_dataset
from distill.errors import BadInput, CorruptFile, DistillError, MissingDependency
from distill.events import Event, silent
from distill.knowledge.graph import build_graph
from distill.knowledge.graph_rag import RETRIEVAL, GraphAttention, GraphRAGEnhanced, segment_softmax
from distill.knowledge.mine import mine
from distill.knowledge.retrieval import Retriever
from distill.knowledge.subgraph import batch_of, side_by_side, words_in
from distill.knowledge.vectors import ExactIndex, FaissIndex, Kind, index_of
from distill.mining.triplets import FACT, Triplet, by_trace, read_triplets
from distill.run import Run
from distill.tokens.packing import learned_retrieval, pack
from distill.training.loop import train


def fact(what: str, action: str, result: str, trace: str, step: int = 0, lens: str = "abstract") -> Triplet:
    return Triplet(what, action, result, lens, step, trace, -1, "dataset")


def told(number: int) -> list[Triplet]:
    """Of a thing what it is and what that is made of: two hops."""
    stuff = ("glass", "wood", "wax")[number // 2 % 3]
    kind = f"kin{'abcdefghijkl'[number // 2]}o"
    return [
        fact(f"thing{number}x", "kind of", kind, f"t{number}"),
        fact(kind, "made of", stuff, f"t{number}", 1),
        fact("table", "stands", "on floor", f"t{number}", lens="spatial"),
    ]


THINGS_TOLD = {f"What is a thing{number}x on the table?": told(number) for number in range(12)}


@pytest.fixture(scope="module")
def graph() -> Any:
    return build_graph(triplet for own in THINGS_TOLD.values() for triplet in own)


# The mathematics.


def test_the_softmax_of_segments_is_each_ones_own() -> None:
    draw = torch.Generator().manual_seed(1)
    scores = 50 * torch.randn(40, 3, generator=draw, dtype=torch.float64)
    segments = torch.randint(0, 7, (40,), generator=draw)
    found = segment_softmax(scores, segments, 7)
    for segment in range(7):
        inside = segments == segment
        torch.testing.assert_close(found[inside], scores[inside].softmax(0))


def test_attention_over_edges_is_dense_attention_by_hand() -> None:
    """One message after another, in float64, with loops in the place of scattering."""
    torch.manual_seed(2)
    n, width, heads = 5, 8, 2
    layer = GraphAttention(width, heads).double()
    nodes, edges = torch.randn(n, width, dtype=torch.float64), torch.randn(7, width, dtype=torch.float64)
    ends = torch.tensor([[0, 1], [1, 2], [0, 1], [3, 3], [2, 0], [4, 1], [1, 4]])
    found, attention = layer(nodes, edges, ends)
    q, k, v = layer.qkv(layer.norm(nodes)).chunk(3, -1)
    incoming: dict[int, list[tuple[int, int, torch.Tensor]]] = {node: [] for node in range(n)}
    for number, (source, target) in enumerate(ends.tolist()):
        incoming[target].append((number, source, edges[number] + layer.direction[0]))
        incoming[source].append((7 + number, target, edges[number] + layer.direction[1]))
    for node in range(n):
        incoming[node].append((14 + node, node, layer.direction[2]))
    wanted = torch.zeros_like(nodes)
    shares = torch.zeros(14 + n, heads, dtype=torch.float64)
    for node, messages in incoming.items():
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            along = [layer.edge(edge) for _, _, edge in messages]
            keys = torch.stack(
                [(k[source] + a[:width])[part] for (_, source, _), a in zip(messages, along, strict=True)]
            )
            values = torch.stack(
                [(v[source] + a[width:])[part] for (_, source, _), a in zip(messages, along, strict=True)]
            )
            weights = torch.softmax(keys @ q[node][part] / math.sqrt(width / heads), 0)
            wanted[node, part] = weights @ values
            for (number, _, _), weight in zip(messages, weights, strict=True):
                shares[number, head] = weight
    torch.testing.assert_close(attention, shares)
    wanted = nodes + layer.out(wanted)
    torch.testing.assert_close(found, wanted + layer.feed(wanted))


def test_prompts_side_by_side_are_as_alone_and_their_order_is_no_matter(graph: Any) -> None:
    retriever, model = Retriever(graph), GraphRAGEnhanced(seed=3).double()
    alone = []
    for prompt in list(THINGS_TOLD)[:3]:
        words = words_in(prompt)
        around = retriever.near(sorted(retriever.entries)[:4], 2, 20)
        batch = batch_of(retriever, words[: 2 + len(alone)], around)
        alone.append(replace(batch, matches=batch.matches.double(), counts=batch.counts.double()))
    together = model(side_by_side(alone)).split([len(batch.chains) for batch in alone])
    for batch, found in zip(alone, together, strict=True):
        torch.testing.assert_close(model(batch), found)
        order = torch.randperm(len(batch.chains))
        moved = replace(batch, chains=batch.chains[order], lenses=batch.lenses[order], counts=batch.counts[order])
        torch.testing.assert_close(model(moved), found[order])


@pytest.mark.parametrize("kind", ["exact", "auto", "faiss"])
def test_the_index_finds_what_sorting_finds(kind: Kind) -> None:
    draw = np.random.default_rng(4)
    vectors, queries = (
        draw.standard_normal((900, 16)).astype(np.float32),
        draw.standard_normal((20, 16)).astype(np.float32),
    )
    if kind == "faiss":
        pytest.importorskip("faiss")
    found = index_of(vectors, kind)
    scores, ids = found.search(queries, 10)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float64) @ (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ).T.astype(np.float64)
    wanted = np.argsort(-cosines, axis=1)[:, :10]
    assert (ids == wanted).all(), "three lists, all of which are searched"
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, wanted, 1), rtol=1e-5, atol=1e-6)
    assert index_of(vectors[:3], kind).search(queries, 10)[1].shape == (20, 3)


def test_exact_search_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.knowledge.vectors.BLOCK", 7)
    vectors = np.random.default_rng(5).standard_normal((50, 4)).astype(np.float32)
    assert ExactIndex(vectors).search(vectors, 1)[1][:, 0].tolist() == list(range(50))


def test_without_faiss_exact_search_is_taken_and_faiss_by_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.knowledge.vectors.LARGE", 1)
    monkeypatch.setattr("distill.knowledge.vectors.find_spec", lambda _name: None)
    vectors = np.eye(3, dtype=np.float32)
    assert isinstance(index_of(vectors), ExactIndex)
    with pytest.raises(MissingDependency, match=r'pip install "dreaming-student\[faiss\]"'):
        FaissIndex(vectors)
    with pytest.raises(BadInput, match="choose auto, exact or faiss"):
        index_of(vectors, "magic")  # pyright: ignore[reportArgumentType]


# What it learns.


def test_hops_lead_over_concepts_and_are_bounded(graph: Any) -> None:
    retriever = Retriever(graph)

    def labels(hops: int, most: int = 100) -> set[str]:
        return {
            " ".join(retriever.entries[name].label for name in c[:3])
            for c in retriever.near(["what:thing0x"], hops, most)
        }

    assert labels(1) == {"thing0x kind of kinao"}
    assert labels(2) == {"thing0x kind of kinao", "thing1x kind of kinao", "kinao made of glass"}
    assert "kindo made of glass" in labels(3)
    assert len(labels(9, most=5)) == 5
    assert retriever.near(["what:nothing"], 3, 9) == []


def test_it_learns_what_answers_need_two_hops_away(graph: Any) -> None:
    """Of things that it was not taught about, as of those that it was."""
    taught = {prompt: own for number, (prompt, own) in enumerate(THINGS_TOLD.items()) if number not in (3, 8)}
    retriever = Retriever(graph)
    model = GraphRAGEnhanced(width=32, layers=2, seed=1)
    assert model.fit(retriever, taught, steps=60) == 10
    retriever.attention = model
    for number in (3, 8, 0):
        prompt = list(THINGS_TOLD)[number]
        needed = {triplet.phrases for triplet in told(number)}
        assert set(retriever.retrieve(prompt, "attention", 3)) == needed
        assert not needed <= set(retriever.retrieve(prompt, "neighbourhood", 3))
        shares = model.weigh(retriever, prompt)
        assert abs(sum(shares.values()) - 1) < 1e-5
        assert retriever.retrieve(prompt, "attention", 3, seed=5) == retriever.retrieve(prompt, "attention", 3)
    assert retriever.retrieve("", "attention") == []
    assert Retriever(build_graph([]), model).retrieve("a thing", "attention") == []


def test_chains_are_drawn_by_their_probabilities(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, retriever = GraphRAGEnhanced(), Retriever(graph)
    one, two, three = sorted(retriever.chains)[:3]
    monkeypatch.setattr(model, "weigh", lambda *_: {one: 0.2, two: 0.7, three: 0.1})
    assert model.rank(retriever, "") == [two, one, three]
    draw = random.Random(6)
    first = [model.rank(retriever, "", draw)[0] for _ in range(2000)]
    assert [round(first.count(chain) / 2000, 1) for chain in (one, two, three)] == [0.2, 0.7, 0.1]


def test_a_store_by_itself(tmp_path: Path, graph: Any) -> None:
    store = GraphRAGEnhanced(ImageTokenizerConfig(embedding_dim=24), width=16, seed=1)
    assert store.retrieve("What is thing0x?") == []
    assert len(store.add(told(0)).add(told(1)).retrieve("What is thing0x?")) == 4
    assert store.prompt_vectors([["thing0x"]]).shape == store.node_vectors(["kinao"]).shape == (1, 24)
    store.save(tmp_path / "x.safetensors", {"learned": "here"})
    again, about = GraphRAGEnhanced.load(tmp_path / "x.safetensors")
    assert about["learned"] == "here"
    assert again.weigh(Retriever(graph), "thing3x?") == store.weigh(Retriever(graph), "thing3x?")
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    with pytest.raises(CorruptFile, match="no weights of retrieval"):
        GraphRAGEnhanced.load(tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="no answer has a triplet"):
        store.fit(Retriever(graph), {"What?": []})
    with pytest.raises(BadInput, match="can't be shared evenly by 3 heads"):
        GraphRAGEnhanced(width=16, heads=3)


def test_prompts_without_words_teach_too(graph: Any) -> None:
    assert GraphRAGEnhanced(width=16).fit(Retriever(graph), {"?!": told(0)}, steps=1) == 1


@pytest.mark.parametrize(("asked", "steps"), [(None, 60), (2000, 2000)])
def test_few_prompts_bound_the_steps_that_nobody_asked_for(graph: Any, asked: int | None, steps: int) -> None:
    def once(event: Event) -> NoReturn:
        assert event.total == steps
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GraphRAGEnhanced(width=16).fit(Retriever(graph), {"What is thing0x?": told(0)}, asked, listen=once)


def test_the_world_of_hearsay(tmp_path: Path) -> None:
    """Its graph knows what is said of things that no training question is about."""
    things = hearsay_world.things_of(0)
    everything = [*things["train"], *things["unseen"]]
    assert len({name for thing, kind, _ in everything for name in (thing, kind)}) == len(THINGS) * 8 * 6
    assert not {kind for _, kind, _ in things["train"]} & {kind for _, kind, _ in things["unseen"]}
    run = Run.create(tmp_path / "run", Settings(capture=CaptureSettings(dataset="hearsay-world", dataset_size=30)))
    capture_dataset(run, silent)
    mine(run)
    found = by_trace(read_triplets(run.triplets))
    facts = {triplet.phrases for trace, own in found.items() if trace.startswith(FACT) for triplet in own}
    questions = list(hearsay_world.questions(30, 20, 0))
    assert [question.split for question in questions] == ["train"] * 30 + ["familiar"] * 20 + ["unseen"] * 20
    for question in questions:
        known = question.dream["abstract"]
        assert {(step.what, step.action, step.result) for step in known} <= facts
        assert (known[0].what in {thing for thing, _, _ in things["unseen"]}) == (question.split == "unseen")
        assert f"A {known[0].what} is" in question.prompt


# At the terminal.

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            entry.main([*map(str, args)])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


@pytest.fixture(scope="module")
def soon() -> Generator[None]:
    """Attention is learned for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.knowledge.graph_rag.STEPS", 2)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, soon: None) -> Path:
    """A small world, trained for a moment on what attention retrieves."""
    run = small_world(tmp_path_factory.mktemp("graph-rag") / "world")
    settings = replace(run.settings, train=replace(run.settings.train, retrieve="attention"))
    run = Run.create(run.path, settings)
    train(run)
    return run.path


PROMPT = "A vase is on the shelf, cold and whole. It is dropped. What becomes of it?"


def test_a_run_keeps_what_it_learned_and_learns_anew_where_answers_changed(world: Path, tmp_path: Path) -> None:
    run = Run.open(Path(shutil.copytree(world, tmp_path / "run")))
    kept = (run.path / RETRIEVAL).read_bytes()
    pack(run)
    learned_retrieval(run)
    assert (run.path / RETRIEVAL).read_bytes() == kept
    (run.path / RETRIEVAL).write_bytes(b"broken")
    heard: list[str] = []
    learned_retrieval(run, lambda event: heard.append(event.kind))
    assert (run.path / RETRIEVAL).read_bytes() != b"broken"
    assert heard[0] == "start"
    assert heard[-1] == "done"
    run.settings.seed = 9
    first = (run.path / RETRIEVAL).read_bytes()
    learned_retrieval(run)
    assert (run.path / RETRIEVAL).read_bytes() != first
    (run.path / RETRIEVAL).unlink()
    (run.path / RETRIEVAL).mkdir()  # where nothing can be kept
    events: list[Event] = []
    assert learned_retrieval(run, events.append) is not None
    assert events[-1].kind == "warning"
    assert events[-1].message.endswith("; it is learned anew next time")
    (run.data / "data.json").unlink()
    with pytest.raises(DistillError, match="can't write it"):
        pack(run)


def test_chat_and_watch_read_what_attention_finds(world: Path, call: Call) -> None:
    from bundle.load import load_dreaming
    from distill.tokens.chat import with_context

    model = load_dreaming(world)
    known = model.memory.recall(model.parts, PROMPT, "attention", 0)
    assert len(known) == 4
    told = with_context(PROMPT, known)
    how = ("--quiet", "--max-tokens", 8, "--temperature", 0)
    assert call("watch", world, PROMPT, "--retrieve", "attention", *how) == call("watch", world, told, *how)
    chat = ("--tokens", 8, "--temperature", 0)
    assert call("chat", world, "--prompt", PROMPT, "--retrieve", "attention", *chat) == call(
        "chat", world, "--prompt", told, *chat
    )


def test_a_saved_student_keeps_it_and_notices_another_graph(world: Path, tmp_path: Path, call: Call) -> None:
    from bundle.load import load_dreaming
    from distill.dream.model import DreamingReasoningLLM

    load_dreaming(world).save_pretrained(tmp_path / "saved")
    saved = DreamingReasoningLLM.load_pretrained(tmp_path / "saved", device="cpu")
    how: dict[str, Any] = {"retrieve": "attention", "temperature": 0, "max_length": 4}
    assert saved.generate(PROMPT, **how) == load_dreaming(world).generate(PROMPT, **how)
    shutil.copy(tmp_path / "saved" / RETRIEVAL, tmp_path)
    Run.open(world).knowledge.rename(tmp_path / "away.graphml")
    try:
        text = (tmp_path / "away.graphml").read_text(encoding="utf-8")
        (tmp_path / "knowledge.graphml").write_text(text + "\n", encoding="utf-8")
    finally:
        (tmp_path / "away.graphml").rename(Run.open(world).knowledge)
    with pytest.warns(UserWarning, match="changed since retrieval by attention was learned"):
        saved.know(tmp_path / "knowledge.graphml").generate(PROMPT, **how)
    (tmp_path / RETRIEVAL).unlink()
    with pytest.raises(BadInput, match=r"retrieval\.safetensors: no such file"):
        saved.know(tmp_path / "knowledge.graphml").generate(PROMPT, **how)


def test_branches_are_scored_and_the_best_is_chosen(world: Path, call: Call, tmp_path: Path) -> None:
    how = ("--retrieve", "attention", "--max-tokens", 8, "--seed", 3)
    code, out, _ = call("simulate", world, PROMPT, "--branches", 3, *how, "--json")
    assert code == 0
    found = json.loads(out)
    assert len(found["branches"]) == 3
    scores = [branch["score"] for branch in found["branches"]]
    assert found["chosen"] == int(np.argmax(scores))
    assert found["answer"] == found["branches"][found["chosen"]]["record"]["answer"]
    for branch in found["branches"]:
        parts = [branch[name] for name in ("likelihood", "agreement", "support") if branch[name] is not None]
        assert branch["score"] == pytest.approx(np.mean(parts))
        assert all(0 <= part <= 1 for part in parts)
        assert len(branch["facts"]) <= 4
        for number, step in enumerate(branch["steps"]):
            assert step["tokens"] == [3 * number + 1, 3 * number + 2, 3 * number + 3]
            assert (step["times"] > 0) == bool(step["nodes"])
        if branch["steps"]:
            assert branch["support"] == pytest.approx(np.mean([step["times"] > 0 for step in branch["steps"]]))
    code, out, _ = call("simulate", world, PROMPT, "--branches", 3, *how, "--json", "--html", "/dev/null/x.html")
    assert (code, json.loads(out)["answer"]) == (1, found["answer"]), "told before it is written"
    page = tmp_path / "branches.html"
    code, out, _ = call("simulate", world, PROMPT, "--branches", 2, *how, "--html", page)
    assert code == 0
    assert out.startswith(("★ branch 1", "  branch 1"))
    assert out.count("branch ") == 2
    assert out.count("★") == 1
    assert "facts: ⟨" in out
    assert "★ branch" in page.read_text(encoding="utf-8")
    code, out, _ = call("simulate", world, PROMPT, "--branches", 1, "--max-tokens", 4, "--json")
    (only,) = json.loads(out)["branches"]
    assert (code, only["agreement"], len(only["facts"])) == (0, None, 4), "as it was trained"


def test_the_likelihood_of_a_branch_is_the_backbones_own(world: Path) -> None:
    from bundle.load import load_dreaming
    from distill.dream.simulate import simulate
    from distill.tokens.chat import prompt_ids, think_ids

    model = load_dreaming(world)
    parts = model.parts
    asked = prompt_ids(parts.tokenizer, PROMPT, system=parts.system)
    cut = simulate(model, PROMPT, 1, max_length=6, seed=2)
    wild: dict[str, Any] = {"max_length": 80, "temperature": 5.0, "top_k": 0, "top_p": 1.0}
    drawn = (simulate(model, PROMPT, 1, seed=seed, **wild) for seed in range(11, 40))
    ended = next(found for found in drawn if not found.rollouts[0].record.cut)
    for found, end in ((cut, []), (ended, [parts.tokenizer.eos_id])):
        (one,) = found.rollouts
        read = [*asked, *think_ids(parts.tokenizer, parts.editor.written(one.record.dream))]
        answer = parts.tokenizer.encode(one.record.answer) + end
        with torch.inference_mode():
            logits = parts.model(torch.tensor([[*read, *answer]])).double().log_softmax(-1)[0]
        nats = [float(logits[len(read) + i - 1, token]) for i, token in enumerate(answer)]
        assert one.likelihood == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
        told = "cut: it didn't end within its tokens, or within the context" in found.lines(0)
        assert told != bool(end), "a branch that was cut is told"
    with pytest.raises(BadInput, match="branches=0"):
        simulate(model, PROMPT, 0)


def test_what_retrieval_finds_is_measured(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "SEEDS", 1)
    for what in ("facts", "matches"):
        bench.main([what, str(world)])
    facts, matches = (
        json.loads((tmp_path / f"retrieval-{what}.json").read_text(encoding="utf-8")) for what in ("facts", "matches")
    )
    assert len(facts["rows"]) == 6, "right and untold, of three splits"
    assert all(0 <= row[how][0] <= 1 for row in facts["rows"] for how in ("attention", "walk", "sample"))
    first = facts["rows"][0]
    others = [first[how][0] for how in ("neighbourhood", "walk", "sample")]
    assert first["difference"][0] == pytest.approx(first["attention"][0] - max(others), abs=2e-4)
    assert [row["name"] for row in matches["rows"]] == ["attention", bench.GUESS]


def test_faiss_is_measured_against_exact_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    for name, value in (("VECTORS", 4000), ("QUERIES", 5), ("CENTRES", 20)):
        monkeypatch.setattr(bench, name, value)
    bench.main(["index"])
    rows = json.loads((tmp_path / "retrieval-index.json").read_text(encoding="utf-8"))["rows"]
    assert [row["recall"] for row in rows] == [1.0, 1.0], "all of their few lists are searched"
