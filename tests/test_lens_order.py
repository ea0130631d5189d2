"""A dream has its lenses in the order that the tokenizer was made with: in tokens, text, grammar and records alike."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_student import small_model

from distill.backbone.generate import generate
from distill.dream.editor import DreamEditor
from distill.dream.record import Branch, DreamRecord, Slot, Step
from distill.errors import BadInput, CorruptFile
from distill.exam.metrics.speech import Letters, is_dream, is_printed_dream
from distill.mining.triplets import LENSES
from distill.settings import load_settings
from distill.student.grammar import DreamGrammar
from distill.teacher.gguf_tokenizer import Vocabulary, byte_alphabet
from distill.teacher.pre_tokenizers import byte_level_bpe
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.bpe import Origin, StudentTokenizer, image_text
from distill.tokens.chat import Dream, dream_ids, dream_places, parse_dream, prompt_ids, think_ids, with_steps

LABELS = ["a ball", "falls", "the floor"]
ORDERS = [*permutations(LENSES)]
STEPS = 2


def tokenizer_of(lenses: tuple[str, ...]) -> StudentTokenizer:
    base = byte_level_bpe({symbol: id for id, symbol in enumerate(byte_alphabet())}, [], "gpt-2")
    return StudentTokenizer.assemble(base, LABELS, Origin("aligned", "gpt-2"), lenses=lenses)


TOKENIZERS = {lenses: tokenizer_of(lenses) for lenses in ORDERS}
TRIPLES = st.lists(st.tuples(*[st.integers(0, len(LABELS) - 1)] * 3), max_size=STEPS)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ORDERS), st.fixed_dictionaries(dict.fromkeys(LENSES, TRIPLES)))
def test_every_way_to_write_a_dream_has_its_tokenizers_order(lenses: tuple[str, ...], dream: Dream) -> None:
    tokenizer = TOKENIZERS[lenses]
    ids, editor = dream_ids(tokenizer, dream), DreamEditor(tokenizer, STEPS)
    assert parse_dream(tokenizer, ids) == dream
    if with_steps(dream) is None:
        return
    assert [id for id in ids if id in tokenizer.lens_ids] == [tokenizer.lens_ids[i] for i in range(4)]
    assert list(dream_places(tokenizer, ids)) == list(lenses)
    text = editor.text(dream)
    assert tokenizer.decode(ids) == text
    assert editor.written(text) == editor.said(text) == dream
    firsts = [code for lens in lenses for step in dream[lens] for code in step]
    changed = editor.replaced(dream, dict(enumerate([0] * len(firsts), 1)))
    assert {lens: len(steps) for lens, steps in changed.items()} == {k: len(v) for k, v in dream.items()}
    grammar, block = DreamGrammar(tokenizer, STEPS), think_ids(tokenizer, dream)
    assert bool((grammar.forbidden[torch.tensor(grammar.rows(block)), torch.tensor(block)] == 0).all())
    assert is_printed_dream(text, STEPS)
    record = DreamRecord("", "", [branch_of(lens, dream) for lens in LENSES], lenses=[*lenses])
    assert record.dream == text


def branch_of(lens: str, dream: Dream) -> Branch:
    steps = [Step(*(Slot(LABELS[code], code, 1.0) for code in step), importance=0.0) for step in dream[lens]]
    return Branch(lens, steps, 0.0, True, "", {})


def test_what_has_another_order_is_none_of_its_dreams() -> None:
    tokenizer = TOKENIZERS["abstract", "spatial", "temporal", "causal"]
    tokens = TeacherTokenizer("gpt2", "", tokenizer.tokens, [], tokenizer.types, tokenizer.eos_id)
    letters, step = Letters(Vocabulary(tokens)), "⟨a ball⟩⟨falls⟩⟨the floor⟩"
    for lenses in ORDERS:
        text = step.join(map(image_text, lenses)) + "\n</think>"
        is_its = lenses == tokenizer.lenses
        assert is_dream(letters(tokenizer.encode(text, special=True)), STEPS) == is_its
        if not is_its:
            with pytest.raises(BadInput, match="in the order ⟨abstract⟩⟨spatial⟩⟨temporal⟩⟨causal⟩"):
                DreamEditor(tokenizer, STEPS).written(text.removesuffix("\n</think>"))


@pytest.mark.usefixtures("one_thread")
def test_a_student_dreams_in_that_order() -> None:
    """An untrained one, which the grammar alone keeps in form."""
    tokenizer = TOKENIZERS["causal", "abstract", "temporal", "spatial"]
    grammar = DreamGrammar(tokenizer, STEPS)
    prompts = [prompt_ids(tokenizer, "Why?")] * 8
    model = small_model(tokenizer, seed=1)
    for ids in generate(model, prompts, max_tokens=60, temperature=1.0, seed=range(8), grammar=grammar):
        found = [id for id in ids if id in tokenizer.lens_ids]
        assert found == [*tokenizer.lens_ids][: len(found)]


def test_the_order_is_kept_with_the_tokenizer(tmp_path: Path) -> None:
    lenses = ("abstract", "spatial", "temporal", "causal")
    TOKENIZERS[lenses].save(tmp_path)
    assert StudentTokenizer.load(tmp_path).lenses == lenses
    other = StudentTokenizer.load(tmp_path)
    other.hf = type(other.hf).from_str(other.hf.to_str().replace("⟨causal⟩", "⟨casual⟩"))
    other.save(tmp_path)
    with pytest.raises(CorruptFile, match="its lenses are abstract, spatial, temporal, casual"):
        StudentTokenizer.load(tmp_path)


@pytest.mark.parametrize("lenses", ["[causal]", "[causal, causal, abstract, spatial]", "[]"])
def test_each_lens_stands_once(lenses: str) -> None:
    with pytest.raises(BadInput, match=r"tokenize.lenses=.*must be spatial, temporal, causal, abstract, each once"):
        load_settings(overrides=[f"tokenize.lenses={lenses}"])
