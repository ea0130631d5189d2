"""The dreaming model against plain forward passes, the stock student and its own parts; its folders; its refusals."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dreaming_student import PROMPTS, engine, parts
from support.small_student import ANSWER, DREAM, small_model, write_checkpoint

from bundle.load import Student, load_dreaming
from bundle.manifest import Manifest, write_manifest
from distill.backbone.model import Backbone
from distill.backbone.session import Session
from distill.config import CaptureSettings, DreamingConfig, Settings
from distill.dream.dreamers import WAKING, Written, decode, decode_guided, instead, read_dream
from distill.dream.editor import DreamEditor, parse_replacements
from distill.dream.engine import DreamEngine, drafted_dreams, prompt_states
from distill.dream.graph_reasoner import DreamGraphReasoner
from distill.dream.model import DreamingReasoningLLM
from distill.dream.output_decoder import OutputDecoder, Sampling, Speaker, Splitter, image_labels
from distill.dream.pretrained import Parts
from distill.dream.reading import split_words
from distill.dream.record import Branch, DreamRecord
from distill.dream.starter import starter_tokenizer
from distill.errors import BadInput, CorruptFile, DistillError, RunMismatch
from distill.knowledge.graph import load_graph
from distill.knowledge.graph_rag import RETRIEVAL
from distill.knowledge.retrieval import Retriever
from distill.mining.triplets import LENSES
from distill.run import Run, sha256_file
from distill.student.grammar import DreamGrammar
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import Dream, prompt_ids, think_ids
from distill.tokens.image_tokens import Codebook

KEEP_ALL = DreamingConfig(keep_above=0.0)
GUIDE = "⟨a cup⟩⟨push⟩"


pytestmark = pytest.mark.usefixtures("one_thread")


def make(config: DreamingConfig = KEEP_ALL, **how: Any) -> DreamingReasoningLLM:
    """The trained student with an untrained engine that dreams 4 × 5 steps."""
    backbone, tokenizer, codebook = parts()
    given = {"backbone": backbone, "tokenizer": tokenizer, "codebook": codebook, "engine": engine(1, config)}
    return DreamingReasoningLLM(config, device="cpu", **{**given, **how})


@pytest.fixture(scope="module")
def model() -> DreamingReasoningLLM:
    """Don't alter it."""
    return make()


@torch.inference_mode()
def greedy(backbone: Backbone, tokenizer: StudentTokenizer, ids: Sequence[int], most: int) -> list[int]:
    """An answer by definition: one whole forward pass a token, the likeliest piece of a word or the end."""
    written: list[int] = []
    words = [*range(tokenizer.base_size), tokenizer.eos_id]
    while len(written) < most:
        logits = backbone(torch.tensor([[*ids, *written]]))[0, -1]
        written.append(words[int(logits[words].argmax())])
        if written[-1] == tokenizer.eos_id:
            break
    return written


def text_of(tokenizer: StudentTokenizer, ids: Sequence[int]) -> str:
    splitter = Splitter(tokenizer, answering=True)
    return "".join(piece[1] for id in ids if (piece := splitter.push(id)))


# The three dreamers.


@pytest.mark.parametrize("keep_above", [0.0, 1.0])
def test_the_engines_dream_is_read_as_if_it_stood_in_the_prompt(keep_above: float) -> None:
    config = DreamingConfig(keep_above=keep_above)
    model = make(config)
    backbone, tokenizer, _ = parts()
    for prompt in (PROMPTS[0], "A cup."):
        ids = prompt_ids(tokenizer, prompt)
        drafted = engine(1, config)(*prompt_states(backbone, [ids]))
        (dream,) = drafted_dreams(drafted, keep_above=keep_above)
        assert any(dream.values()) == (keep_above == 0)
        kept = dream if keep_above == 0 else None
        expected = text_of(tokenizer, greedy(backbone, tokenizer, ids + think_ids(tokenizer, kept), 30))
        result = model.generate(prompt, dreamer="engine", temperature=0, max_length=30, return_dreams=True)
        assert result["output"] == expected
        for path, branch in enumerate(result["dreams"]):
            steps = [tuple(slot.code for slot in step.slots) for step in branch.steps]
            assert branch.lens == LENSES[path]
            assert steps == [tuple(step) for step in drafted.dreams.codes()[0, path, : len(steps)].tolist()]
            assert len(steps) == int(drafted.dreams.live()[0, path].sum())
            assert branch.kept == bool(kept and kept[branch.lens])
            assert sum(branch.gates.values()) == pytest.approx(1)
            if steps:
                assert branch.score == pytest.approx(drafted.reasoned.scores[0, path].item(), abs=1e-5)


def test_the_backbone_dreams_as_the_stock_student_does() -> None:
    model = make(engine=None)
    backbone, tokenizer, _ = parts()
    student = Student("small", backbone, tokenizer)
    for prompt in (*PROMPTS, "A cup, pushed"):
        for seed, how in enumerate(({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.3, "top_k": 9})):
            for think, dreamer in ((True, None), (False, "none")):
                stock = student.answer(prompt, think=think, seed=seed, max_tokens=90, **how)
                ours = model.generate(prompt, dreamer=dreamer, seed=seed, max_length=90, return_dreams=True, **how)
                assert ours["output"] == stock.text
                assert ours["record"].dream == ("none" if dreamer else stock.dream_text)
    result = model.generate(PROMPTS[0], temperature=0, return_dreams=True)
    assert result["output"] == ANSWER
    assert [slot.label for slot in result["dreams"][0].steps[0].slots] == ["a ball", "release", "falls to the floor"]


def test_probabilities_of_a_decoded_dream_are_the_backbones() -> None:
    backbone, tokenizer, _ = parts()
    result = make(engine=None).generate(PROMPTS[0], temperature=0, return_dreams=True)
    ids = tokenizer.encode(f"<think>\n{DREAM}", special=True)
    prompt = prompt_ids(tokenizer, PROMPTS[0])
    with torch.inference_mode():
        table = backbone(torch.tensor([prompt + ids]))[0].double().softmax(-1)
    (step,) = result["dreams"][0].steps
    for slot in step.slots:
        place = len(prompt) + ids.index(int(tokenizer.image_ids[slot.code]))
        assert slot.probability == pytest.approx(float(table[place - 1, ids[place - len(prompt)]]), abs=1e-5)


def test_an_engine_judges_what_the_backbone_dreamed() -> None:
    """The graph reasons over the same image tokens, wherever they come from."""
    model = make()
    result = model.generate(PROMPTS[0], dreamer="backbone", temperature=0, return_dreams=True)
    dreamed, *others = result["dreams"]
    assert 0 < dreamed.score < 1
    assert dreamed.steps[0].importance > 0
    assert [branch.score for branch in others] == [0, 0, 0]
    assert all(branch.kept and branch.provenance == "backbone" for branch in result["dreams"])
    assert model.generate(PROMPTS[0], dreamer="backbone", temperature=0) == ANSWER


class Scripted:
    """A speaker that says what is written down for it, whatever it reads; after that, the last token for ever."""

    def __init__(self, script: list[int], room: int = 10_000) -> None:
        self.script, self.heard = script, list[int]()
        self.context = room

    @property
    def room(self) -> int:
        return self.context - len(self.heard)

    def peek(self) -> int:
        return self.script[0]

    def take(self) -> int:
        token = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.heard.append(token)
        return token

    def read(self, ids: Sequence[int]) -> None:
        self.heard += ids

    def probability(self, token: int) -> float:
        return 0.5


def test_a_dream_is_woken_at_the_contexts_end_and_one_cut_short_is_read(model: DreamingReasoningLLM) -> None:
    tokenizer, image = model.parts.tokenizer, int(model.parts.tokenizer.image_ids[5])
    newline, causal = tokenizer.newline_id, tokenizer.lens_ids[2]
    endless = Scripted([tokenizer.think_id, newline, causal, image], room=40)
    decode(model.parts, endless)  # pyright: ignore[reportArgumentType]
    assert endless.heard[-3:] == [newline, tokenizer.end_think_id, newline]
    assert endless.room == WAKING - 3
    cut = Written([causal, image, image, image, image], [0.5] * 5)
    states = torch.zeros(1, 3, model.parts.model.config.hidden)
    assert read_dream(model.parts, cut, states).dream == {**{lens: [] for lens in LENSES}, "causal": [(5, 5, 5)]}
    empty = Scripted([tokenizer.think_id, newline, tokenizer.end_think_id, newline, tokenizer.eos_id])
    written = decode(model.parts, empty)  # pyright: ignore[reportArgumentType]
    assert not written.ids
    assert not any(branch.steps for branch in read_dream(model.parts, written, states).branches)
    assert empty.heard == think_ids(tokenizer, None)
    assert empty.peek() == tokenizer.eos_id, "the end is the answer's to say"


def test_a_guided_backbone_fills_each_lens_and_no_more(model: DreamingReasoningLLM) -> None:
    tokenizer = model.parts.tokenizer
    first = int(tokenizer.image_ids[0])
    endless = Scripted([first + 7])
    written = decode_guided(model.parts, endless, [3, 4])  # pyright: ignore[reportArgumentType]
    dream = read_dream(model.parts, written, torch.zeros(1, 3, model.parts.model.config.hidden)).dream
    assert dream == {lens: [(3, 4, 7), *[(7, 7, 7)] * 4] for lens in LENSES}
    assert endless.heard == think_ids(tokenizer, dream), "what was read is the dream's own spelling"


@pytest.mark.parametrize("dreamer", ["engine", "backbone"])
@pytest.mark.parametrize("guide", ["a cup", "⟨a cup⟩", GUIDE, "⟨a cup⟩ ⟨push⟩ ⟨breaks⟩"])
def test_a_guide_begins_each_path(model: DreamingReasoningLLM, dreamer: str, guide: str) -> None:
    wanted = [label for label in ("a cup", "push", "breaks") if label in guide]
    result = model.generate("What now?", dreamer=dreamer, guide=guide, max_length=5, return_dreams=True)
    begun = [branch for branch in result["dreams"] if branch.steps]
    assert len(begun) == 4 or (dreamer == "backbone" and len(wanted) < 3)
    for branch in begun:
        assert [slot.label for slot in branch.steps[0].slots][: len(wanted)] == wanted
        assert branch.provenance.startswith(f"guided {dreamer}")


def test_a_guided_dream_is_read_whatever_the_graph_thinks_of_it() -> None:
    model = make(DreamingConfig(keep_above=1.0))
    drafted = model.generate("A cup", dreamer="engine", return_dreams=True, max_length=1)
    assert not any(branch.kept for branch in drafted["dreams"])
    guided = model.generate("A cup", guide=GUIDE, temperature=0, max_length=20, return_dreams=True)
    assert all(branch.kept for branch in guided["dreams"])
    tokenizer = model.parts.tokenizer
    dream = {b.lens: [tuple(slot.code for slot in step.slots) for step in b.steps] for b in guided["dreams"]}
    ids = prompt_ids(tokenizer, "A cup") + think_ids(tokenizer, dream)
    assert guided["output"] == text_of(tokenizer, greedy(model.parts.model, tokenizer, ids, 20))


# Dreams that a user writes.


def test_a_given_dream_is_read_as_it_is(model: DreamingReasoningLLM) -> None:
    """Against whole forward passes; and where words are drawn, a dream given back says what it said before."""
    backbone, tokenizer, _ = parts()
    written = "⟨temporal⟩ ⟨a cup⟩⟨push⟩⟨breaks⟩\n⟨abstract⟩"
    codes = [tokenizer.labels.index(label) for label in ("a cup", "push", "breaks")]
    read = think_ids(tokenizer, {"temporal": [(codes[0], codes[1], codes[2])]})
    expected = text_of(tokenizer, greedy(backbone, tokenizer, prompt_ids(tokenizer, PROMPTS[0]) + read, 30))
    result = model.generate(PROMPTS[0], dream=written, temperature=0, max_length=30, return_dreams=True)
    assert (result["output"], result["record"].dreamer) == (expected, "given")
    assert [branch.provenance for branch in result["dreams"]] == ["given"] * 4
    assert result["dreams"][1].score > 0, "the engine's graph judges it as any other"
    how = {"temperature": 1.3, "seed": 3, "max_length": 20}
    for dreamer in ("engine", "backbone", "checked"):
        own = model.generate(PROMPTS[0], dreamer=dreamer, return_dreams=True, **how)
        again = model.generate(PROMPTS[0], dreamer=dreamer, dream=own["record"].dream, return_dreams=True, **how)
        assert again["output"] == own["output"]
        assert again["record"].dream == own["record"].dream
        swapped = model.generate(PROMPTS[0], dreamer=dreamer, replace={2: "push"}, return_dreams=True, **how)
        slots = [slot.label for i, t in own["record"].read for slot in own["dreams"][i].steps[t].slots]
        replaced = [slot.label for i, t in swapped["record"].read for slot in swapped["dreams"][i].steps[t].slots]
        assert replaced == [slots[0], "push", *slots[2:]]
        both = model.generate(PROMPTS[0], dreamer=dreamer, dream=own["record"].dream, replace={2: "⟨push⟩"}, **how)
        assert both == swapped["output"]
    empty = model.generate(PROMPTS[0], dream="none", return_dreams=True, **how)
    assert empty["output"] == model.generate(PROMPTS[0], dreamer="none", **how)
    assert (empty["record"].read, empty["record"].dream) == ([], "⟨spatial⟩⟨temporal⟩⟨causal⟩⟨abstract⟩")
    for dream in (None, "none"):
        silent = model.generate(PROMPTS[0], dreamer="none", dream=dream, return_dreams=True, **how)
        assert (silent["output"], silent["record"].dream) == (empty["output"], "none")


EDITOR = DreamEditor(starter_tokenizer(["a ball", "falls", "⁂ 7"]), 2)
GRAMMAR = DreamGrammar(EDITOR.tokenizer, EDITOR.steps)
PIECES = st.sampled_from([f"⟨{label}⟩" for label in (*LENSES, "a ball", "falls", "⁂ 7", "a bal")])


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=8))
def test_what_a_user_may_write_is_what_the_grammar_allows(text: str) -> None:
    """Anything is either refused in one line or spelled so that no token of it is masked."""
    dream, refused = None, ""
    try:
        dream = EDITOR.changed({}, text)
    except BadInput as error:
        refused = str(error)
    if dream is None:
        assert refused == " ".join(refused.splitlines()) != ""
        return
    ids = think_ids(EDITOR.tokenizer, dream)
    allowed = GRAMMAR.forbidden[torch.tensor(GRAMMAR.rows(ids)), torch.tensor(ids)]
    assert bool((allowed == 0).all())
    assert EDITOR.written(EDITOR.text(dream)) == EDITOR.said(EDITOR.text(dream))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(LENSES), max_size=4), st.dictionaries(st.integers(1, 24), st.integers(0, 2)))
def test_tokens_are_replaced_by_their_numbers(lenses: list[str], codes: dict[int, int]) -> None:
    dream: Dream = {lens: [(0, 1, 2), (2, 1, 0)][: i % 3] for i, lens in enumerate(lenses)}
    numbered = dict(enumerate((code for lens in LENSES for step in dream.get(lens, ()) for code in step), 1))
    written = "".join(f" {number}=⟨{EDITOR.tokenizer.labels[code]}⟩" for number, code in codes.items())
    assert EDITOR.replacements(parse_replacements(written) if codes else {}) == codes
    if not codes.keys() <= numbered.keys():
        with pytest.raises(BadInput, match="there is none to replace"):
            EDITOR.replaced(dream, codes)
        return
    after = EDITOR.replaced(dream, codes)
    assert [code for lens in LENSES for step in after[lens] for code in step] == [*{**numbered, **codes}.values()]
    assert {lens: len(steps) for lens, steps in after.items() if steps} == {k: len(v) for k, v in dream.items() if v}


def test_each_word_s_attention_is_that_of_the_pass_that_chose_it(model: DreamingReasoningLLM) -> None:
    """Against transformers' own weights, by definition; the words are the answer's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    backbone, tokenizer, _ = parts()
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**backbone.config.to_hf()), attn_implementation="eager")
    theirs.load_state_dict(backbone.state_dict())
    how = {"dream": "⟨causal⟩⟨a cup⟩⟨push⟩⟨breaks⟩⟨abstract⟩" + "⟨a ball⟩" * 6, "temperature": 0, "max_length": 24}
    result = model.generate(PROMPTS[0], return_dreams=True, attention=True, **how)
    record, prompt = result["record"], prompt_ids(tokenizer, PROMPTS[0])
    assert record.answer == result["output"] == "".join(word.text for word in record.words)
    assert model.generate(PROMPTS[0], return_dreams=True, **how)["record"].words == []
    dream = think_ids(tokenizer, DreamEditor(tokenizer, 5).written(how["dream"]))
    said = tokenizer.encode(record.answer, special=True)
    with torch.no_grad():
        layers = theirs(torch.tensor([[*prompt, *dream, *said]]), output_attentions=True).attentions
    table = torch.stack(layers).double().mean((0, 1, 2))
    start = len(prompt) + len(dream)
    images = [
        place for place in range(len(prompt), start) if tokenizer.image_code([*prompt, *dream][place]) is not None
    ]
    begin = start
    for word in record.words:
        end = begin + len(word.text.encode())  # a byte is a token
        row = table[begin - 1 : end - 1].mean(0)
        expected = (row[: len(prompt)].sum(), row[len(prompt) : start].sum(), row[start:].sum())
        assert (word.question, word.dream, word.answer) == pytest.approx([float(part) for part in expected], abs=2e-5)
        assert word.tokens == pytest.approx((row[images] / row[images].sum()).tolist(), abs=2e-5)
        begin = end
    assert split_words(tokenizer, tokenizer.encode("日本 a", special=True)) == [
        ("日", [0, 1, 2]),
        ("本", [3, 4, 5]),
        (" a", [6, 7]),
    ]


@pytest.mark.parametrize("dreamer", ["engine", "backbone"])
def test_a_dream_is_told_step_by_step(model: DreamingReasoningLLM, dreamer: str) -> None:
    told: list[DreamRecord] = []
    result = model.generate(PROMPTS[0], dreamer=dreamer, temperature=0, return_dreams=True, on_dream=told.append)
    whole = result["record"]
    assert whole.cut == (dreamer == "engine"), "one answer ends by itself"
    assert told[-1] == replace(whole, answer="", cut=False)
    assert len(told) == (6 if dreamer == "engine" else 2)
    for earlier, later in pairwise(told):
        for a, b in zip(earlier.branches, later.branches, strict=True):
            assert len(a.steps) <= len(b.steps)
            assert [s.slots for s in a.steps] == [s.slots for s in b.steps[: len(a.steps)]]
    assert DreamRecord.from_json(json.loads(json.dumps(whole.to_json()))) == whole


# What comes out.


def test_streams_lists_and_single_prompts_say_the_same(model: DreamingReasoningLLM) -> None:
    how: dict[str, Any] = {"temperature": 0.9, "max_length": 30, "dreamer": "engine"}
    alone = [model.generate(prompt, seed=5 + i, **how) for i, prompt in enumerate(PROMPTS)]
    assert model.generate(PROMPTS, seed=5, **how) == alone
    pieces = list(model.generate(PROMPTS[1], seed=6, stream=True, **how))
    assert "".join(pieces) == alone[1]
    assert len(pieces) > 3
    assert [entry["output"] for entry in model.generate(PROMPTS, seed=5, return_dreams=True, **how)] == alone
    assert alone[0] != model.generate(PROMPTS[0], seed=6, **how), "nothing was drawn"


def test_images_are_unit_vectors_with_the_nearest_labels(model: DreamingReasoningLLM) -> None:
    backbone, tokenizer, codebook = parts()
    batch = model.generate(list(PROMPTS), output_mode="image")
    for i, prompt in enumerate(PROMPTS):
        drafted = engine(1, KEEP_ALL)(*prompt_states(backbone, [prompt_ids(tokenizer, prompt)]))
        with torch.inference_mode():
            (expected,) = engine(1, KEEP_ALL).decoder.image(drafted.reasoned.embedding)
        both = model.generate(prompt, output_mode="both", return_dreams=True, temperature=0, max_length=8)
        assert both["output"]["text"] == model.generate(prompt, dreamer="engine", temperature=0, max_length=8)
        for role in range(3):
            assert batch[role].shape == (2, 512)
            torch.testing.assert_close(batch[role][i], expected[role], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(both["output"]["image"][role][0], expected[role], rtol=1e-4, atol=1e-5)
            nearest = int(np.argmax(codebook.centroids.astype(np.float64) @ expected[role].double().numpy()))
            assert both["labels"][role] == codebook.labels[nearest]
    together = model.generate(list(PROMPTS), output_mode="both", max_length=4)
    assert len(together["text"]) == 2
    assert together["image"][0].shape == (2, 512)


def test_without_an_engine_the_outcome_is_the_dreams_last_step() -> None:
    codebook = parts()[2]
    model = make(engine=None)
    found = model.generate(PROMPTS[0], output_mode="image", temperature=0, return_dreams=True)
    assert found["labels"] == ("a ball", "release", "falls to the floor")
    np.testing.assert_array_equal(found["output"][0][0].numpy(), codebook.centroids[codebook.labels.index("a ball")])


def test_image_head_against_float64() -> None:
    torch.manual_seed(0)
    head, reasoning = OutputDecoder(), torch.randn(3, 512)
    got = head.image(reasoning)
    head = head.double()
    for row in range(3):
        for role in range(3):
            x = reasoning[row].double() + head.role[role]
            normed = (x - x.mean()) / (x.var(correction=0) + head.norm.eps).sqrt() * head.norm.weight + head.norm.bias
            up = normed @ head.up.weight.T + head.up.bias
            y = x + (0.5 * up * (1 + torch.erf(up / 2**0.5))) @ head.down.weight.T + head.down.bias
            torch.testing.assert_close(got[row, role].double(), y / y.norm(), rtol=1e-5, atol=1e-6)
    assert image_labels(torch.from_numpy(parts()[2].centroids[None, 4:7]), parts()[2]) == [
        tuple(parts()[2].labels[4:7])
    ]


def test_text_goes_on_from_what_was_read() -> None:
    backbone, tokenizer, _ = parts()
    ids = prompt_ids(tokenizer, PROMPTS[0], think=False)
    speaker = Speaker(Session(backbone, 1), Sampling(temperature=0))
    speaker.read(ids)
    text = "".join(OutputDecoder.text(speaker, tokenizer, 60))
    assert text == text_of(tokenizer, greedy(backbone, tokenizer, ids, 60))


def codes_of(branches: Sequence[Branch]) -> list[list[int]]:
    return [[slot.code for step in branch.steps for slot in step.slots] for branch in branches]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_checked_draft_is_the_dream_that_is_decoded(model: DreamingReasoningLLM, temperature: float) -> None:
    """Each draw of the backbone is compared with the draft, so that all that is said stays its own, seed by seed."""
    for seed in range(4):
        how: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_length": 12, "return_dreams": True}
        decoded, checked = (model.generate(PROMPTS[0], dreamer=who, **how) for who in ("backbone", None))
        assert checked["record"].dreamer == "checked"
        assert checked["output"] == decoded["output"]
        assert codes_of(checked["dreams"]) == codes_of(decoded["dreams"])
        assert {branch.provenance for branch in checked["dreams"]} == {"checked engine"}


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass reads, from now on."""
    passes: list[int] = []
    append = Session.append

    def counted(self: Session, ids: torch.Tensor, *how: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        passes.append(ids.shape[1])
        return append(self, ids, *how, **more)

    monkeypatch.setattr(Session, "append", counted)
    return passes


def test_what_was_expected_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, tokenizer, _ = parts()
    whole = Parts(backbone, tokenizer, None)
    passes = passes_of(monkeypatch)

    def dreamt(expected: list[int] | None) -> tuple[list[int], list[float], int]:
        speaker = Speaker(Session(backbone, 1), Sampling(temperature=0))
        speaker.read(prompt_ids(tokenizer, PROMPTS[1]))
        speaker.obey(whole.grammar)
        passes.clear()
        if expected is not None:
            speaker.expect(expected, instead(tokenizer))
        written = decode(whole, speaker)
        return written.ids, written.sure, len(passes)

    ids, sure, count = dreamt(None)
    true = [tokenizer.think_id, tokenizer.newline_id, *ids, tokenizer.end_think_id, tokenizer.newline_id]
    assert count == len(true)
    places = [i for i, id in enumerate(true) if tokenizer.image_code(id) is not None]
    slip = list(true)
    for place in places[:2]:
        slip[place] = int(tokenizer.image_ids[int(slip[place] == tokenizer.image_ids[0])])
    short = true[: places[0]] + true[places[0] + 3 :]
    for draft, most in ((true, 1), (slip, 3), (short, 5), (true[:7], count - 5), ([5] * 9, count + 1), ([], count)):
        found = dreamt(draft)
        assert found[0] == ids
        assert found[1] == pytest.approx(sure, abs=1e-5)
        assert found[2] <= most


def test_a_draft_that_nothing_comes_of_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, tokenizer, _ = parts()
    speaker, (one, other) = Speaker(Session(backbone, 1), Sampling(temperature=0)), map(int, tokenizer.image_ids[:2])
    speaker.read(prompt_ids(tokenizer, PROMPTS[1]))
    read = passes_of(monkeypatch)
    monkeypatch.setattr(speaker, "peek", lambda: one)
    speaker.expect([one] * 3 + [other] * 30, instead(tokenizer))
    for _ in range(20):
        speaker.take()
    assert read == [33, 30, 29, 28, *[1] * 14]
    assert speaker.ids[-20:] == [one] * 20


def test_graph_data_names_what_the_edges_join(model: DreamingReasoningLLM) -> None:
    graph = model.generate("A cup", dreamer="engine", return_dreams=True, max_length=2)["graph_data"]
    names = {node["id"] for node in graph["nodes"]}
    assert len(names) == graph["num_nodes"] == 20
    assert graph["num_edges"] == len(graph["edges"]) == 16 + 5 * 12
    assert {end for edge in graph["edges"] for end in (edge["source"], edge["target"])} <= names
    assert {edge["kind"] for edge in graph["edges"]} == {"temporal", "causal"}


# Images that come in.


def test_images_are_seen_by_the_engine_and_read_by_the_backbone(model: DreamingReasoningLLM) -> None:
    backbone, tokenizer, codebook = parts()
    seen = torch.from_numpy(codebook.centroids[[7, 9]]).unsqueeze(0) * 3
    for prompt in (None, PROMPTS[0]):
        words = f"⟨{codebook.labels[7]}⟩⟨{codebook.labels[9]}⟩" + (f"\n{prompt}" if prompt else "")
        ids = prompt_ids(tokenizer, words)
        assert [int(tokenizer.image_ids[code]) for code in (7, 9)] == [id for id in ids if id >= tokenizer.image_ids[0]]
        states, real = prompt_states(backbone, [ids])
        drafted = engine(1, KEEP_ALL)(states, real, seen)
        (dream,) = drafted_dreams(drafted, keep_above=0.0)
        expected = text_of(tokenizer, greedy(backbone, tokenizer, ids + think_ids(tokenizer, dream), 20))
        how: dict[str, Any] = {"dreamer": "engine", "temperature": 0, "max_length": 20}
        assert model.generate(prompt, images=seen, **how) == expected
        blind = engine(1, KEEP_ALL)(states, real)
        assert not torch.equal(blind.dreams.logits, drafted.dreams.logits), "the engine saw nothing"
        for same in (seen.numpy(), seen.double().numpy(), [seen[0]], [seen[0].numpy()], seen.tolist()):
            assert model.generate(prompt, images=same, **how) == expected
    rows = model.generate(images=torch.randn(3, 2, 512), output_mode="image")
    assert rows[0].shape == (3, 512)
    assert len(model.generate(images=torch.randn(2, 1, 512), dreamer="backbone", max_length=3)) == 2


# What can't be done.


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompt": None}, "nothing is asked"),
        ({"prompt": "  "}, "is empty"),
        ({"prompt": []}, "is empty"),
        ({"prompt": "x" * 300}, "leave no room for an answer in a context of 256"),
        ({"output_mode": "sound"}, "output_mode='sound': choose one of text, image, both"),
        ({"dreamer": "me"}, "dreamer='me': choose one of engine, checked, backbone, none"),
        ({"dreamer": "none", "output_mode": "image"}, "output_mode='image' needs a dream"),
        ({"dreamer": "none", "guide": "a cup"}, "a guide needs a dream"),
        (
            {"dreamer": "none", "dream": "⟨causal⟩" + "⟨a cup⟩" * 3},
            "dream: one is given, and dreamer='none' reads none",
        ),
        ({"retrieve": "all"}, "retrieve='all': choose one of neighbourhood, walk, sample"),
        ({"retrieve": "walk"}, "there is no knowledge graph; give a run that has one"),
        ({"guide": "⟨a cop⟩"}, "⟨a cop⟩ is no image token; the nearest are ⟨a cup⟩"),
        ({"guide": "⟨falling rain⟩"}, r"is no image token; the nearest are .*⟨the rain⟩"),
        ({"guide": "⟨a cup⟩" * 4}, "4 image tokens; give one to three"),
        ({"guide": "⟨⟩"}, "guide: '⟨⟩' has an image token without words; write it as"),
        ({"guide": "  "}, "guide: '  ' has an image token without words; write it as"),
        ({"guide": ["a cup"]}, "guide: list instead of text"),
        ({"guide": "a \udc80"}, "guide: character 3 is half of one"),
        ({"prompt": "A \ud83d cup"}, "prompt: character 3 is half of one"),
        ({"prompt": ["A cup", 7]}, "prompt: int instead of text"),
        ({"guide": "⟨a cup⟩ please"}, "is not written as image tokens alone"),
        ({"dream": "⟨causal⟩⟨a cup⟩⟨push⟩"}, "⟨causal⟩ has 2 image tokens; give whole triplets"),
        ({"dream": "⟨a cup⟩⟨causal⟩"}, "dream: begins with ⟨a cup⟩; a lens stands first, one of ⟨spatial⟩"),
        ({"dream": "⟨causal⟩⟨temporal⟩"}, "its lenses are ⟨causal⟩⟨temporal⟩; each stands once at most, in the order"),
        ({"dream": "⟨causal⟩⟨causal⟩"}, "each stands once at most"),
        ({"dream": "⟨causal⟩" + "⟨a cup⟩" * 18}, "⟨causal⟩ has 6 triplets; this student dreams at most 5"),
        ({"dream": "⟨causal⟩⟨a\ncop⟩⟨push⟩⟨push⟩"}, "dream: ⟨a cop⟩ is no image token; the nearest are ⟨a cup⟩"),
        ({"dream": ""}, "dream: '' has an image token without words"),
        ({"dream": 7}, "dream: int instead of text"),
        ({"dream": "none", "guide": "a cup"}, "guide: it begins a dream of the student's own, and one is given"),
        ({"dream": "none", "replace": {1: "a cup"}}, "token 1: there is none to replace; the dream is empty"),
        ({"replace": {0: "a cup"}, "dreamer": "engine"}, "token 0: there is none to replace; the dream has"),
        ({"replace": {"1": "a cup"}}, "no numbers of tokens; count them from 1"),
        ({"replace": {1: "⟨a cup⟩⟨push⟩"}}, "token 1: 2 image tokens in its place; give one"),
        ({"replace": {1: None}}, "token 1: NoneType instead of text"),
        ({"replace": {1: "a cup"}, "dreamer": "none"}, "a replacement needs a dream"),
        ({"max_length": 0}, "max_length=0: must be at least 1"),
        ({"temperature": -1.0}, "sampling: temperature -1.0"),
        ({"temperature": float("nan")}, "sampling: temperature nan"),
        ({"temperature": float("inf"), "stream": True}, "sampling: temperature inf"),
        ({"images": torch.zeros(1, 3, 64, 64)}, "this student can't see"),
        ({"images": torch.zeros(1, 2, 768)}, r"shape \(1, 2, 768\); give embeddings"),
        ({"images": torch.full((1, 1, 512), float("nan"))}, "not all values are finite"),
        ({"images": [np.zeros((1, 512)), np.zeros((2, 512))]}, "images: no numbers of one shape"),
        ({"images": "cup.png"}, "images: this student can't see"),
        ({"images": [["cup.png"]]}, "images: no numbers of one shape"),
        ({"images": []}, "images: no numbers of one shape"),
        ({"images": torch.zeros(2, 1, 512)}, "2 sets of images for 1 prompts"),
        ({"stream": True, "return_dreams": True}, "stream: gives the text of one prompt"),
        ({"stream": True, "prompt": ["a", "b"]}, "stream: gives the text of one prompt"),
    ],
)
def test_what_cannot_be_done_is_one_line(model: DreamingReasoningLLM, how: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        model.generate(**{"prompt": "A cup", **how})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "how",
    [{"dreamer": "engine"}, {"dreamer": "backbone", "guide": GUIDE}, {"dream": "⟨causal⟩" + "⟨a cup⟩" * 15}],
)
def test_a_dream_that_does_not_fit_is_not_called_the_prompt(model: DreamingReasoningLLM, how: dict[str, Any]) -> None:
    tokenizer, context = model.parts.tokenizer, model.parts.model.config.context
    prompt = "A cup"
    while len(prompt_ids(tokenizer, f"{prompt} cup")) < context - 10:
        prompt += " cup"
    with pytest.raises(BadInput, match=f"with its dream it fills a context of {context}, and leaves no room"):
        model.generate(prompt, **how)
    assert model.generate(prompt, dreamer="none", max_length=1) is not None


def test_what_a_student_lacks_is_said() -> None:
    bare = make(engine=None, codebook=None)
    for how, message in (
        ({"dreamer": "engine"}, "has no engine; train one"),
        ({"images": torch.zeros(1, 1, 512)}, "has no codebook"),
        ({"output_mode": "image", "temperature": 0}, "dreamed nothing that could be shown"),
        ({"guide": "a cop"}, "the nearest are ⟨a cup⟩"),
    ):
        with pytest.raises(BadInput, match=message):
            bare.generate(PROMPTS[0], **how)
    assert bare.generate(PROMPTS[0], temperature=0) == ANSWER
    with pytest.raises(BadInput, match="enable_dream_viewer=True"):
        bare.get_dream_viewer()
    backbone, tokenizer, codebook = parts()
    with pytest.raises(BadInput, match="both its backbone and its tokenizer"):
        DreamingReasoningLLM(backbone=backbone)
    with pytest.raises(BadInput, match="device='toaster'"):
        DreamingReasoningLLM(backbone=backbone, tokenizer=tokenizer, device="toaster")
    other = starter_tokenizer(codebook.labels[:-1])
    with pytest.raises(RunMismatch, match=r"the tokenizer has \d+ tokens, the weights \d+"):
        DreamingReasoningLLM(backbone=backbone, tokenizer=other)


def test_an_engine_must_fit_the_other_parts() -> None:
    codebook, made = parts()[2], engine()
    order = np.roll(np.arange(len(codebook)), 1)
    permuted = Codebook(
        [codebook.labels[i] for i in order], codebook.centroids[order], codebook.counts[order], codebook.encoder
    )
    fewer = Codebook(codebook.labels[:-2], codebook.centroids[:-2], codebook.counts[:-2], codebook.encoder)
    hidden = parts()[0].config.hidden
    another = f"the student: its engine was trained with another codebook of {len(codebook)} image tokens"
    for config, how, message in (
        (DreamingConfig(num_dream_sequences=8), {"engine": made}, "made for dreaming.num_dream_sequences=4, not 8"),
        (DreamingConfig(dream_length=3), {"engine": made}, "made for dreaming.dream_length=5, not 3"),
        (DreamingConfig(graph_reasoning_hops=1), {"engine": made}, "made for dreaming.graph_reasoning_hops=3, not 1"),
        (KEEP_ALL, {"engine": DreamEngine(KEEP_ALL, 2 * hidden, codebook)}, f"of hidden size {2 * hidden}, this one"),
        (KEEP_ALL, {"engine": DreamEngine(KEEP_ALL, hidden, permuted)}, another),
        (KEEP_ALL, {"engine": DreamEngine(KEEP_ALL, hidden, fewer)}, f"codebook of {len(fewer)} image tokens"),
        (KEEP_ALL, {"engine": DreamEngine(KEEP_ALL, hidden, fewer), "codebook": None}, "use the one it came with"),
    ):
        with pytest.raises(RunMismatch, match=message) as raised:
            make(config, **how)
        assert "\n" not in str(raised.value)
    assert make(DreamingConfig(keep_above=0.7), engine=made).config.keep_above == 0.7


@pytest.mark.filterwarnings("ignore:no student was given")
@pytest.mark.parametrize(("paths", "steps"), [(1, 1), (2, 7), (8, 3)])
def test_other_numbers_of_paths_and_steps(paths: int, steps: int) -> None:
    config = DreamingConfig(num_dream_sequences=paths, dream_length=steps, keep_above=0.0)
    model = make(config, engine=engine(1, config))
    found = model.generate("A cup", max_length=4, return_dreams=True, dreamer="engine")
    assert [len(branch.steps) for branch in found["dreams"]] == [steps] * paths
    assert [branch.lens for branch in found["dreams"]] == [LENSES[path % 4] for path in range(paths)]
    assert sum(branch.kept for branch in found["dreams"]) == min(paths, 4)
    assert len(model.generate("A cup", max_length=4, return_dreams=True, dreamer="backbone")["dreams"]) == 4
    for name in ("num_dream_sequences", "dream_length", "graph_reasoning_hops"):
        with pytest.raises(BadInput, match=f"dreaming.{name}=0: must be at least 1"):
            DreamingReasoningLLM(replace(config, **{name: 0}))
    with pytest.raises(BadInput, match=r"dreaming\.output_mode='video': choose one of text, image, both"):
        DreamingReasoningLLM(replace(config, output_mode="video"))


def test_an_untrained_student_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = DreamingReasoningLLM(device="cpu", seed=4)
        first = model.generate("A ball", max_length=6)
    assert [str(warning.message) for warning in caught] == [
        "no student was given: this one is untrained, and what it says means nothing"
    ]
    with pytest.warns(UserWarning, match="untrained"):
        assert DreamingReasoningLLM(device="cpu", seed=4).generate("A ball", max_length=6) == first
    assert {len(model.generate("A ball", return_dreams=True, max_length=2)["dreams"])} == {4}


# Folders.


@pytest.fixture(scope="module")
def saved(model: DreamingReasoningLLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Don't alter it."""
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / "student")


def same(one: DreamingReasoningLLM, other: DreamingReasoningLLM) -> None:
    for how in ({}, {"dreamer": "backbone"}, {"guide": GUIDE}):
        a, b = (m.generate(PROMPTS[1], seed=3, max_length=12, return_dreams=True, **how) for m in (one, other))
        assert (a["output"], a["dreams"]) == (b["output"], b["dreams"])


def test_saved_and_loaded_it_is_the_same(model: DreamingReasoningLLM, saved: Path, tmp_path: Path) -> None:
    again = DreamingReasoningLLM.load_pretrained(saved, device="cpu")
    same(model, again)
    assert again.config == model.config
    again.save_pretrained(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    again.save_pretrained(tmp_path / "again")  # in the place of one saved before
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(BadInput, match="holds something else than a saved student"):
        again.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("how", ["altered", "missing"])
def test_no_file_of_it_can_change_unnoticed(saved: Path, tmp_path: Path, how: str) -> None:
    for name in sorted(path.name for path in saved.iterdir()):
        copy = Path(shutil.copytree(saved, tmp_path / name))
        data = (copy / name).read_bytes()
        middle = len(data) // 2
        (copy / name).unlink()
        if how == "altered":
            (copy / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        if name == "dreaming.json":
            continue  # what tells of the others; broken, it is tested below
        with pytest.raises(DistillError) as raised:
            DreamingReasoningLLM.load_pretrained(copy)
        assert "\n" not in str(raised.value)
        assert str(copy) in str(raised.value)


def test_a_broken_description_is_noticed(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    about = json.loads((copy / "dreaming.json").read_text(encoding="utf-8"))
    for content in ("", "[]", "{}", '{"files": 3}', json.dumps({**about, "config": {"colour": "red"}})):
        (copy / "dreaming.json").write_text(content, encoding="utf-8")
        with pytest.raises(CorruptFile, match=r"dreaming\.json: .*; save the student again"):
            DreamingReasoningLLM.load_pretrained(copy)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BadInput, match="is no saved student, checkpoint or bundle"):
            DreamingReasoningLLM.load_pretrained(folder)


def checkpoint_with(folder: Path, codebook: Codebook) -> Path:
    """A checkpoint, as training leaves it, with a codebook in its tokenizer/."""
    backbone, tokenizer, _ = parts()
    write_checkpoint(folder, backbone, tokenizer)
    codebook.save(folder / "tokenizer")
    return folder


def test_a_codebook_must_fit_the_checkpoint(tmp_path: Path) -> None:
    codebook = parts()[2]
    fewer = Codebook(codebook.labels[:-2], codebook.centroids[:-2], codebook.counts[:-2], codebook.encoder)
    renamed = replace(codebook, labels=["a stranger", *codebook.labels[1:]])
    count = len(codebook)
    for i, (wrong, message) in enumerate(
        (
            (fewer, f"the codebook has {count - 2} image tokens, the tokenizer {count}; put back the codebook"),
            (renamed, f"the codebook's image token 0 is ⟨a stranger⟩, the tokenizer's ⟨{codebook.labels[0]}⟩"),
        )
    ):
        with pytest.raises(RunMismatch, match=message) as raised:
            DreamingReasoningLLM.load_pretrained(checkpoint_with(tmp_path / str(i), wrong))
        assert "\n" not in str(raised.value)
    engine(1).save(tmp_path / "0")
    again = checkpoint_with(tmp_path / "2", codebook)
    assert (
        DreamingReasoningLLM.load_pretrained(again, engine=tmp_path / "0").generate("A cup", max_length=2) is not None
    )
    DreamEngine.new(DreamingConfig(), 64, replace(codebook, centroids=-codebook.centroids), 0).save(tmp_path / "1")
    with pytest.raises(RunMismatch, match="trained with another codebook"):
        DreamingReasoningLLM.load_pretrained(again, engine=tmp_path / "1")


def finished_run(folder: Path) -> Run:
    """A run as training leaves it: best checkpoint, and an engine trained on it."""
    run = Run.create(folder, Settings(capture=CaptureSettings(system="Be brief."), dreaming=KEEP_ALL))
    checkpoint = checkpoint_with(run.checkpoints / "step-000001", parts()[2])
    (checkpoint / "loop.json").write_text(json.dumps({"step": 1, "best_step": 1}), encoding="utf-8")
    run.engine.mkdir()
    engine(1, KEEP_ALL).save(run.engine)
    backbone = sha256_file(checkpoint / "model.safetensors")
    (run.engine / "loop.json").write_text(json.dumps({"backbone": backbone}), encoding="utf-8")
    outputs = {"engine/engine.safetensors": sha256_file(run.engine / "engine.safetensors")}
    run.record("engine", {}, outputs, {}, 1.0)
    return run


def test_a_run_loads_with_its_engine_and_system_message(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    loaded = load_dreaming(run.path, device="cpu")
    same(make(system="Be brief."), loaded)
    (run.engine / "loop.json").write_text(json.dumps({"backbone": "another"}), encoding="utf-8")
    alone = load_dreaming(str(run.path), device="cpu")
    assert alone.parts.engine is None
    assert alone.config == KEEP_ALL
    assert alone.generate(PROMPTS[0], seed=1) == make(engine=None, system="Be brief.").generate(PROMPTS[0], seed=1)
    run.settings.mine.steps, run.settings.train.retrieve_limit = 9, 2
    Run.create(run.path, run.settings)
    longer = load_dreaming(run.path, device="cpu")
    longer.save_pretrained(tmp_path / "saved")
    checkpoint = load_dreaming(run.checkpoints / "step-000001", device="cpu")
    assert (checkpoint.config, checkpoint.parts.system) == (KEEP_ALL, "Be brief.")
    for each in (longer, checkpoint, DreamingReasoningLLM.load_pretrained(tmp_path / "saved", "cpu")):
        assert each.parts.longest == 9, "it may dream as long as it learned, and not as long as an engine drafts"
        assert each.parts.facts == 2


def test_a_bundle_loads_and_its_digests_are_checked(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "bundle"))
    (folder / "dreaming.json").unlink()
    write_manifest(folder, Manifest("small", "f16", {"system": "Be brief."}, {"dream_steps": 7}, []))
    assert load_dreaming(folder, device="cpu").parts.longest == 7
    write_manifest(folder, Manifest("small", "f16", {"system": "Be brief."}, {}, []))
    same(make(system="Be brief."), load_dreaming(folder, device="cpu"))
    same(make(system="Be brief."), DreamingReasoningLLM.load_pretrained(folder, device="cpu"))
    for name in ("engine.safetensors", "codebook.json", "model.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        for load in (load_dreaming, DreamingReasoningLLM.load_pretrained):
            with pytest.raises(CorruptFile, match=f"{name}: was altered"):
                load(folder)
        (folder / name).write_bytes(data)
    with pytest.raises(BadInput, match="no such run, checkpoint or bundle"):
        load_dreaming(tmp_path / "nothing")


# What is kept of dreams.


def test_dreams_are_remembered_within_a_bound_and_give_context_back(tmp_path: Path) -> None:
    model = make().remember(tmp_path / "graph.graphml", max_nodes=12)
    model.generate("A cup?", max_length=2, guide="⟨a cup⟩⟨push⟩⟨breaks⟩")
    graph: Any = nx.read_graphml(tmp_path / "graph.graphml")
    assert 0 < len(graph) <= 12
    assert "what:a cup" in graph
    model.generate(list(PROMPTS), max_length=2)
    assert len(nx.read_graphml(tmp_path / "graph.graphml")) <= 12
    again = make().remember(tmp_path / "graph.graphml", max_nodes=12)
    assert again.knowledge is not None
    assert len(again.knowledge) <= 12
    assert again.generate("A cup?", retrieve="sample", max_length=2) is not None


def test_what_a_graph_knows_stands_after_the_prompt(tmp_path: Path) -> None:
    path, how = tmp_path / "graph.graphml", {"dreamer": "none", "max_length": 30, "temperature": 0}
    chains = {"causal": [("a cup", "push", "breaks"), ("a red cup", "push", "breaks")]}
    DreamGraphReasoner.save_important_knowledge_to_graphml([chains], path)
    before = path.read_bytes()
    model, prompt, codebook = make().know(path), "Push a cup", parts()[2]
    for way in ("neighbourhood", "walk", "sample"):
        found = Retriever(load_graph(path)).retrieve(prompt, way, limit=4, seed=5)
        assert found
        known = list(dict.fromkeys(tuple(codebook.encode(chain).tolist()) for chain in found))
        context = "".join(f"⟨{codebook.labels[code]}⟩" for chain in known for code in chain)
        told = model.generate(prompt, retrieve=way, seed=5, **how)
        assert told == model.generate(f"{prompt}\n{context}", **how)
        assert told != model.generate(prompt, **how), "these prompts tell nothing apart"
    assert model.generate("Nothing of it", retrieve="walk", **how) == model.generate("Nothing of it", **how)
    assert path.read_bytes() == before, "what is known stays as it is"
    model.save_pretrained(tmp_path / "student")
    loaded = DreamingReasoningLLM.load_pretrained(tmp_path / "student", device="cpu")
    assert loaded.generate(prompt, retrieve="walk", seed=5, **how) == model.generate(
        prompt, retrieve="walk", seed=5, **how
    )
    grown = tmp_path / "other" / "grown.graphml"
    (tmp_path / RETRIEVAL).write_bytes(b"of the graph that was mined")
    with pytest.warns(UserWarning, match=r"grown\.graphml: .* no more from .*graph\.graphml, which stays"):
        model.remember(grown)
    assert model.memory.recall(model.parts, prompt, "walk", 5) == []
    model.save_pretrained(tmp_path / "student")
    assert load_graph(tmp_path / "student" / "knowledge.graphml").nodes == load_graph(path).nodes
    assert (tmp_path / "student" / RETRIEVAL).read_bytes() == (tmp_path / RETRIEVAL).read_bytes()
    (tmp_path / "broken.graphml").write_text("<graphml><node>", encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"broken\.graphml.*; name another graph"):
        make().know(tmp_path / "broken.graphml").generate(prompt, retrieve="walk")
    with pytest.raises(CorruptFile, match=r"broken\.graphml"):
        make().remember(tmp_path / "broken.graphml")


def test_dreams_are_recorded_shown_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(enable_dream_viewer=True)
    said = list(model.generate(PROMPTS[0], stream=True, watch_dreams=True, max_length=6))
    told = capsys.readouterr().out
    (record,) = model.get_dream_viewer().records
    assert record.answer == "".join(said)
    assert all(f"⟨{step.what.label}⟩" in told for branch in record.branches for step in branch.steps)
    model.generate(PROMPTS[1], dreamer="backbone", max_length=2)
    model.generate(PROMPTS[1], dreamer="none", max_length=2)
    assert model.get_dream_viewer().get_dream_summary()["total_dreams"] == 2
    assert (
        len(json.loads(model.export_recorded_dreams(tmp_path / "dreams.json").read_text(encoding="utf-8"))["dreams"])
        == 2
    )
    assert model.visualize_dream_evolution(tmp_path / "dreams.png").read_bytes().startswith(b"\x89PNG")
    thought = model.visualize_thinking(PROMPTS[0], tmp_path / "one.html", dreamer="engine", max_length=2)
    assert (tmp_path / "one.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert thought["graph_data"]["num_nodes"] == sum(len(branch["steps"]) for branch in thought["branches"]) == 20
    json.dumps(thought)


def test_parts_of_a_larger_vocabulary_are_refused() -> None:
    _, tokenizer, _ = parts()
    larger = small_model(starter_tokenizer(["one"]))
    with pytest.raises(RunMismatch, match="put back the tokenizer"):
        Parts(larger, tokenizer).check("here")
