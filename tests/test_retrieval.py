"""Graph retrieval against the triplets themselves, and in training and evaluation against leaks."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import load_examples

from distill.config import CaptureSettings, EvaluateSettings, Settings, TokenizeSettings, TrainSettings
from distill.corpus.datasets.stage import capture_dataset
from distill.corpus.traces import TraceStore
from distill.errors import BadInput
from distill.events import silent
from distill.knowledge.graph import build_graph, load_graph
from distill.knowledge.growing_graph import Chain, KnowledgeGraph
from distill.knowledge.mine import mine
from distill.knowledge.retrieval import WAYS, Labels, Retriever
from distill.mining.inflect import content_stems
from distill.mining.triplets import LENSES, Triplet, by_trace, read_triplets
from distill.run import Run
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.build import build_tokenizer
from distill.tokens.chat import prompt_ids, with_context
from distill.tokens.image_tokens import Codebook, load_codes
from distill.tokens.packing import Documents, pack, split_traces
from distill.tokens.recall import Recall


def triplet(words: Sequence[str], lens: str = "causal", step: int = 0, trace: str = "t") -> Triplet:
    return Triplet(words[0], words[1], words[2], lens, step, trace, 0, "syntax")


KITCHEN = [
    triplet(("a ball", "falls", "to the floor"), trace="0"),
    triplet(("the floor", "stops", "the ball"), step=1, trace="0"),
    triplet(("a cup", "falls", "into pieces"), trace="1"),
    triplet(("a cup", "falls", "into pieces"), trace="2"),
    triplet(("pieces", "cut", "a finger"), step=1, trace="2"),
    triplet(("butter", "melts", "in the pan"), "spatial", trace="3"),
    triplet(("a vase", "made of", "glass"), "abstract", trace="4"),
    triplet(("a table", "made of", "wood"), "abstract", trace="5"),
]
WORDS = ("ball", "cup", "floor", "glass", "sea", "falls", "breaks", "the old cup", "glass floor")
TRIPLETS = st.lists(
    st.builds(
        triplet,
        st.tuples(*[st.sampled_from(WORDS)] * 3),
        st.sampled_from(LENSES),
        st.integers(0, 2),
        st.sampled_from("abcd"),
    ),
    max_size=12,
)
PROMPTS = st.lists(st.sampled_from([*WORDS, "what", "if", "moon"]), max_size=5).map(" ".join)


def known(triplets: Sequence[Triplet]) -> set[Labels]:
    return {t.phrases for t in triplets}


@pytest.mark.parametrize("how", WAYS)
def test_it_tells_what_was_said_of_the_prompts_things(how: str) -> None:
    ask = Retriever(build_graph(KITCHEN)).retrieve
    assert ask("What becomes of butter?", how, limit=1) == [("butter", "melts", "in the pan")]
    assert ask("VASES!", how, limit=1) == [("a vase", "made of", "glass")]
    assert ask("Why is the sky blue?", how) == []
    assert ask("", how) == []
    assert Retriever(nx.MultiDiGraph()).retrieve("a ball", how) == []


def test_the_neighbourhood_covers_the_prompt_before_it_repeats() -> None:
    ask = Retriever(build_graph(KITCHEN)).retrieve
    found = ask("the butter and the vase and the pan")
    assert found[:2] == [("butter", "melts", "in the pan"), ("a vase", "made of", "glass")]
    first, second = ask("Cups fall.", limit=2)
    assert first == ("a cup", "falls", "into pieces")
    assert second == ("a ball", "falls", "to the floor"), "the action's other chain, further away"
    assert ask("a finger", limit=2) == [("pieces", "cut", "a finger")]
    assert ask("the vase", limit=3)[1] == ("a table", "made of", "wood"), "a hop further, if there is room"


def test_a_walk_goes_on_to_what_followed() -> None:
    ask = Retriever(build_graph(KITCHEN)).retrieve
    for seed in range(20):
        found = ask("cup", "walk", limit=2, seed=seed)
        assert found[0] == ("a cup", "falls", "into pieces")
        assert found[1] == ("pieces", "cut", "a finger")


def test_a_sample_draws_the_important_more_often() -> None:
    triplets = [triplet(("a cup", "holds", "tea"), trace=str(i)) for i in range(20)]
    triplets += [triplet(("a cup", "hides", "a coin"), trace="x")]
    first = [Retriever(build_graph(triplets)).retrieve("cup", "sample", 1, seed)[0][2] for seed in range(200)]
    assert 110 < first.count("tea") < 190


@given(TRIPLETS, PROMPTS, st.sampled_from(WAYS), st.integers(1, 6), st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_only_chains_that_were_said_and_no_more_than_asked(
    triplets: list[Triplet], prompt: str, how: str, limit: int, seed: int
) -> None:
    graph = build_graph(triplets)
    found = Retriever(graph).retrieve(prompt, how, limit, seed)
    assert set(found) <= known(triplets)
    assert len(found) == len(set(found)) <= limit
    for what, action, result in found:
        lenses = [
            {data["lens"] for data in graph.get_edge_data(*ends).values() if data["type"] == kind}
            for ends, kind in (
                ((f"what:{what}", f"action:{action}"), "performs"),
                ((f"action:{action}", f"result:{result}"), "causes"),
            )
        ]
        assert lenses[0] & lenses[1]
    asked = content_stems([prompt])
    touching = {t.phrases for t in triplets if content_stems(t.phrases) & asked}
    assert bool(found) == bool(touching)
    if how == "sample":
        assert len(found) == min(limit, len(touching))
        assert set(found) <= touching
    if how == "neighbourhood":
        assert set(found[: len(touching)]) <= touching, "what the prompt names comes first"
        assert len(found) >= min(limit, len(touching))
        if found:
            labels = {word for phrase in WORDS for word in content_stems([phrase])} & asked
            nodes = {f"{role}:{p}" for t in triplets for role, p in zip(("w", "a", "r"), t.phrases, strict=True)}
            held = {stem: sum(stem in content_stems([name[2:]]) for name in nodes) for stem in labels}
            rarity = {stem: len(nodes) / count for stem, count in held.items() if count}
            best = max(_worth(t, rarity) for t in touching)
            assert _worth(found[0], rarity) == pytest.approx(best)


def _worth(phrases: Labels, rarity: dict[str, float]) -> float:
    from math import log

    return sum(log(1 + rarity[stem]) for stem in content_stems(phrases) if stem in rarity)


@given(TRIPLETS, PROMPTS, st.sampled_from(WAYS), st.sampled_from("abcd"))
@settings(deadline=None, max_examples=150)
def test_leaving_a_trace_out_is_a_graph_of_the_others(
    triplets: list[Triplet], prompt: str, how: str, trace: str
) -> None:
    """To the last draw: nothing of the trace is left, not even in the weights. Afterwards all is back."""
    own = [t for t in triplets if t.trace == trace]
    rest = [t for t in triplets if t.trace != trace]
    retriever = Retriever(build_graph(triplets))
    before = retriever.retrieve(prompt, how)
    with retriever.without(build_graph(own)):
        assert retriever.retrieve(prompt, how) == Retriever(build_graph(rest)).retrieve(prompt, how)
    assert retriever.retrieve(prompt, how) == before


SCRIPT = """
from distill.knowledge.graph import load_graph; from distill.knowledge.retrieval import WAYS, Retriever
import sys; from pathlib import Path
retriever = Retriever(load_graph(Path(sys.argv[1])))
print([retriever.retrieve("the cup falls to the floor in pieces", how, 4, 7) for how in WAYS])
"""


def test_the_same_seed_gives_the_same_in_any_process_and_another_seed_another(tmp_path: Path) -> None:
    graph = KnowledgeGraph(tmp_path / "k")
    graph.add(Chain(t.lens, [t.phrases]) for t in KITCHEN)
    graph.save()
    told = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "k")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    saved = load_graph(tmp_path / "k")
    for how in ("walk", "sample"):
        drawn = {tuple(Retriever(saved).retrieve("the cup falls to the floor", how, 2, seed)) for seed in range(20)}
        assert len(drawn) > 1


def test_a_graph_of_ten_thousand_nodes_answers_at_once() -> None:
    draw = random.Random(0)

    def phrase(role: str) -> str:
        return f"{role}{int(draw.paretovariate(0.25)) % 5000} thing{draw.randrange(20)}"

    triplets = [
        triplet((phrase("w"), phrase("a"), phrase("r")), draw.choice(LENSES), step, str(trace))
        for trace in range(2500)
        for step in range(5)
    ]
    retriever = Retriever(build_graph(triplets))
    assert len(retriever.entries) > 10_000
    for how in WAYS:
        started = time.process_time()
        for number in range(20):
            assert len(retriever.retrieve(f"w{number} thing1 and thing2", how)) == 4
        assert time.process_time() - started < 20 * 0.2, "seconds; a fraction of it where nothing else runs"


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(BadInput, match="'magic' is no way to retrieve; choose neighbourhood, walk, sample"):
        Retriever(build_graph(KITCHEN)).retrieve("cup", "magic")
    old = build_graph(KITCHEN)
    old.remove_edges_from([edge[:3] for edge in old.edges(keys=True, data="type") if edge[3] == "yields"])
    with pytest.raises(BadInput, match=r"holds no chains.*more max_nodes.*dream mine --force"):
        Retriever(old)
    with pytest.raises(BadInput, match=r"train\.retrieve=magic: choose one of neighbourhood, walk, sample"):
        Recall(TrainSettings(retrieve="magic"), 0, {}, {}, [])


# In training and evaluation.
def test_context_is_written_as_image_tokens() -> None:
    assert with_context("What?", []) == "What?"
    triples = [("a ball", "falls", "down"), ("a cup", "breaks", "here"), ("a ball", "falls", "down")]
    assert with_context("What?", triples) == "What?\n⟨a ball⟩⟨falls⟩⟨down⟩⟨a cup⟩⟨breaks⟩⟨here⟩"


@pytest.mark.parametrize("how", WAYS)
def test_nothing_of_a_trace_leaks_into_its_own_prompt(how: str) -> None:
    labels = sorted({phrase for t in KITCHEN for phrase in t.phrases})
    codes = {label: code for code, label in enumerate(labels)}

    def told(prompt: str, *own: str) -> str:
        """The traces that are answers to the prompt."""
        known: dict[str, list[Triplet]] = {}
        for trace, triplets in by_trace(KITCHEN).items():
            known.setdefault(prompt if trace in own else trace, []).extend(triplets)
        return Recall(TrainSettings(retrieve=how, retrieve_limit=2), 0, known, codes, labels).prompt(prompt)

    assert told("Why does butter melt?", "3") == "Why does butter melt?"
    assert told("Why does butter melt?", "0") == "Why does butter melt?\n⟨butter⟩⟨melts⟩⟨in the pan⟩"
    assert told("Cups!", "1").startswith("Cups!\n⟨a cup⟩⟨falls⟩⟨into pieces⟩"), "trace 2 says so too"
    assert "falls" not in told("Cups!", "0", "1", "2"), "nor what its other answers say"
    assert "butter" not in told("Butter, cups!", "3")
    coarse = Recall(TrainSettings(retrieve=how), 0, by_trace(KITCHEN), dict.fromkeys(labels, 0), ["stuff"])
    assert coarse.prompt("butter") == "butter\n⟨stuff⟩⟨stuff⟩⟨stuff⟩"
    unknown = Recall(TrainSettings(retrieve=how), 0, by_trace(KITCHEN), {}, [])
    assert unknown.prompt("butter") == "butter"
    assert Recall(TrainSettings(), 0, by_trace(KITCHEN), codes, labels).prompt("butter") == "butter"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The causal world, up to its tokenizer."""
    settings = Settings(
        capture=CaptureSettings(dataset="causal-world", dataset_size=120),
        tokenize=TokenizeSettings(kind="sentencepiece", vocab_size=700, image_tokens=128),
        evaluate=EvaluateSettings(prompts=12),
    )
    made = Run.create(tmp_path_factory.mktemp("retrieval") / "run", settings)
    capture_dataset(made, silent)
    mine(made)
    build_tokenizer(made)
    return made


def with_retrieval(run: Run, how: str) -> Run:
    train = replace(run.settings.train, retrieve=how, retrieve_limit=3)
    return Run(run.path, replace(run.settings, train=train))


def texts(run: Run, part: str) -> list[str]:
    tokenizer, documents = StudentTokenizer.load(run.tokenizer), Documents.load(run.data / part)
    return [tokenizer.decode(documents.prompt(i).tolist()) for i in range(len(documents))]


def triples_in(text: str) -> list[Labels]:
    """Image tokens of a prompt, by three."""
    phrases = [piece.split("⟩")[0] for piece in text.split("⟨")[1:]]
    assert len(phrases) % 3 == 0
    return [(phrases[i], phrases[i + 1], phrases[i + 2]) for i in range(0, len(phrases), 3)]


@pytest.fixture(scope="module")
def plain(run: Run) -> dict[str, list[str]]:
    """Prompts without what is retrieved, by part."""
    pack(with_retrieval(run, ""))
    return {part: texts(run, part) for part in ("train", "validation")}


@pytest.mark.parametrize("how", WAYS)
def test_training_prompts_hold_what_other_training_answers_say(run: Run, plain: dict[str, list[str]], how: str) -> None:
    pack(with_retrieval(run, how))
    told = {part: texts(run, part) for part in ("train", "validation")}
    codebook = Codebook.load(run.tokenizer)
    codes, mined = load_codes(run.tokenizer, codebook), by_trace(read_triplets(run.triplets))
    with TraceStore(run.traces, readonly=True) as store:
        traces = dict(zip(("train", "validation"), split_traces(store), strict=True))
    source = {trace.key for trace in traces["train"]}
    assert source.isdisjoint(trace.key for trace in traces["validation"])
    counts = [0, 0]
    for part, prompts in told.items():
        for trace, before, after in zip(traces[part], plain[part], prompts, strict=True):
            others = {
                tuple(codebook.labels[codes[phrase]] for phrase in t.phrases)
                for key in source - {trace.key}
                for t in mined.get(key, [])
            }
            found = triples_in(after)
            assert set(found) <= others
            assert len(found) <= 3
            assert before.split("<|im_end|>")[0] in after
            counts[part == "validation"] += bool(found)
    assert counts[0] > 0.9 * len(traces["train"])
    assert counts[1] > 0.9 * len(traces["validation"])


def test_packing_notices_the_setting(run: Run) -> None:
    plain = pack(with_retrieval(run, ""))
    assert plain["train"]["prompt_tokens"] < pack(with_retrieval(run, "walk"))["train"]["prompt_tokens"]
    assert pack(with_retrieval(run, "")) == plain


def test_held_out_prompts_hold_what_training_answers_say(run: Run) -> None:
    tokenizer, codebook = StudentTokenizer.load(run.tokenizer), Codebook.load(run.tokenizer)
    codes, mined = load_codes(run.tokenizer, codebook), by_trace(read_triplets(run.triplets))
    with TraceStore(run.traces, readonly=True) as store:
        held = {trace.key for trace in store.traces(held_out=True)}
    training = {
        tuple(codebook.labels[codes[phrase]] for phrase in t.phrases)
        for key, group in mined.items()
        if key not in held
        for t in group
    }
    plain, _ = load_examples(with_retrieval(run, ""), tokenizer, codes, 512, 80)
    for example in plain:
        assert example.header == prompt_ids(tokenizer, example.prompt)
    for how in WAYS:
        told, _ = load_examples(with_retrieval(run, how), tokenizer, codes, 512, 80)
        assert [(e.key, e.prompt, e.answer, e.mined) for e in told] == [
            (e.key, e.prompt, e.answer, e.mined) for e in plain
        ]
        for example in told:
            found = triples_in(tokenizer.decode(example.header))
            assert 1 <= len(found) <= 3
            assert set(found) <= training
            assert example.header == prompt_ids(tokenizer, with_context(example.prompt, found))
