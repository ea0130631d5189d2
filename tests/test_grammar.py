"""The grammar of replies: whatever the weights, dreams are well formed and answers are of words."""

import codecs
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_student import small_model

from bench.training import synthetic_documents
from bundle.load import Student
from distill.backbone.generate import Sampler, generate, stream
from distill.backbone.model import Backbone
from distill.config import Settings
from distill.dream.model import DreamingReasoningLLM
from distill.mining.triplets import LENSES
from distill.student.grammar import ANSWER, FIRST_PATH, INSIDE, DreamGrammar, dream_size, longest_path, steps_within
from distill.teacher.gguf_tokenizer import byte_alphabet
from distill.teacher.pre_tokenizers import byte_level_bpe
from distill.tokens.bpe import Origin, StudentTokenizer
from distill.tokens.chat import parse_dream, prompt_ids, think_ids
from distill.tokens.sentence_piece import from_model, train_model
from distill.training.drafts import dream_on

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ["a ball", "release", "falls", "the rain", "wets", "the street", "spatial hint"]
PARTS = (*(b"\xe2\x82", b"\x82\xac", b"\xac!", b"\xa9 \xc3", b" \xf0\x9f"), *(b"\x98\x80\xe2", b"\xff a", b"\x80\xa0"))


def of_parts() -> StudentTokenizer:
    """The 256 bytes, and tokens that are more and less than characters."""
    symbols = {byte: symbol for symbol, byte in byte_alphabet().items()}
    tokens = [*byte_alphabet(), *("".join(map(symbols.__getitem__, part)) for part in PARTS)]
    base = byte_level_bpe({token: id for id, token in enumerate(tokens)}, [], "gpt-2")
    return StudentTokenizer.assemble(base, LABELS, Origin("aligned", "gpt-2"))


TOKENIZER = of_parts()
STEPS = 2


@pytest.fixture(scope="module", params=[0, 1])
def model(request: pytest.FixtureRequest) -> Backbone:
    return small_model(TOKENIZER, seed=request.param)


def told_apart(tokenizer: StudentTokenizer, reply: list[int], steps: int) -> tuple[list[int], list[int]]:
    """(what stands between the think tags, the answer) of a reply that is spelled as it should be; fails for others."""
    rest = list(reply)

    def take(*wanted: int) -> None:
        assert tuple(rest[: len(wanted)]) == wanted, tokenizer.decode(reply)
        del rest[: len(wanted)]

    take(tokenizer.think_id, tokenizer.newline_id)
    dream: list[int] = []
    if rest[0] != tokenizer.end_think_id:
        for lens_id in tokenizer.lens_ids:
            take(lens_id)
            dream.append(lens_id)
            images = 0
            while tokenizer.image_code(rest[0]) is not None:
                dream.append(rest.pop(0))
                images += 1
            assert images % 3 == 0
            assert images <= 3 * steps
        assert len(dream) > len(tokenizer.lens_ids), "a dream without a step says nothing"
        take(tokenizer.newline_id)
    take(tokenizer.end_think_id, tokenizer.newline_id)
    assert_of_words(tokenizer, rest)
    return dream, rest


def assert_of_words(tokenizer: StudentTokenizer, answer: list[int]) -> None:
    assert all(id < tokenizer.base_size for id in answer[:-1])
    ended = answer[-1] == tokenizer.eos_id
    assert answer[-1] < tokenizer.base_size or ended
    said = b"".join(map(tokenizer.token_bytes, answer[: len(answer) - ended]))
    # Strictly; only what was cut off may end within a character, and it is taken back.
    assert codecs.utf_8_decode(said, "strict", ended)[0] == tokenizer.decode(answer, skip_special=True)


sampled = st.one_of(st.just(0.0), st.floats(0.05, 20))


@given(sampled, st.integers(0, 400), st.floats(0.05, 1), st.integers(0, 2**31), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_any_model_dreams_by_the_grammar_and_answers_in_words(
    model: Backbone, temperature: float, top_k: int, top_p: float, seed: int, steps: int
) -> None:
    prompts = [prompt_ids(TOKENIZER, text) for text in ("A ball?", "Why ⟨a ball⟩⟨release⟩?", "x")]
    replies = generate(
        model,
        prompts,
        max_tokens=2 + dream_size(steps) + 20,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=[TOKENIZER.eos_id],
        grammar=DreamGrammar(TOKENIZER, steps),
    )
    for reply in replies:
        told_apart(TOKENIZER, reply, steps)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=90, max_size=90), st.integers(1, 4), sampled)
@settings(deadline=None, max_examples=60)
def test_any_logits_leave_something_to_say(draws: list[float], steps: int, temperature: float) -> None:
    """Rows that are in different states, drawn from random logits, with most of the mass on what is forbidden."""
    grammar, sampler = DreamGrammar(TOKENIZER, steps), Sampler(temperature, 5, 0.9)
    random = torch.Generator().manual_seed(int(1e6 * draws[0]))
    states = torch.tensor([grammar.start, grammar.inside.start, grammar.answering.start])
    written: list[list[int]] = [[], [TOKENIZER.think_id, TOKENIZER.newline_id], think_ids(TOKENIZER, None)]
    for draw in draws:
        logits = torch.randn(3, TOKENIZER.vocab_size, generator=random) * 10
        logits[:, TOKENIZER.base_size :] += 40 * draw
        masked = grammar.mask(logits, states)
        assert bool(masked.isfinite().any(1).all())
        uniform = None if temperature == 0 else torch.full((3, 1), draw, dtype=torch.float64)
        chosen = sampler.choose(masked, uniform)
        states = grammar.advance(states, chosen)
        for row, token in enumerate(chosen.tolist()):
            written[row].append(token)
    for row in written:
        end = row.index(TOKENIZER.eos_id) if TOKENIZER.eos_id in row else len(row)
        told_apart(TOKENIZER, row[: end + 1], steps)


def test_every_state_allows_something_and_every_token_leads_somewhere() -> None:
    for steps in (1, 2, 5):
        grammar = DreamGrammar(TOKENIZER, steps)
        masks, _, _, after = grammar._tables
        every = torch.arange(len(after))
        allowed = grammar.mask(torch.zeros(len(after), TOKENIZER.vocab_size), every) == 0
        assert bool(allowed.any(1).all())
        assert 0 <= int(after.min()) <= int(after.max()) < len(after)
        for state, allows in zip(every.tolist(), allowed, strict=True):
            tokens = allows.nonzero().squeeze(1)
            reached = grammar.advance(torch.full_like(tokens, state), tokens)
            assert ANSWER <= state < FIRST_PATH or state not in reached.tolist(), "a dream always goes on"
        assert len(masks) <= 14 + len(range(ANSWER + 1, FIRST_PATH)), "states that allow the same share a mask"


def states_of(grammar: DreamGrammar, ids: list[int], start: int) -> tuple[list[bool], int]:
    """Whether each token was allowed in its place, and the state at the end."""
    state, allowed = torch.tensor([start]), list[bool]()
    for id in ids:
        masked = grammar.mask(torch.zeros(1, TOKENIZER.vocab_size), state)
        allowed.append(bool(masked[0, id] == 0))
        state = grammar.advance(state, torch.tensor([id]))
    return allowed, int(state)


codes = st.integers(0, len(LABELS) - 1)
steps_of_a_lens = st.lists(st.tuples(codes, codes, codes), max_size=STEPS)


@given(st.none() | st.dictionaries(st.sampled_from(LENSES), steps_of_a_lens), st.text("ab ⟨⟩é\n<", max_size=9))
@settings(deadline=None, max_examples=60)
def test_all_that_training_writes_is_allowed(dream: Any, answer: str) -> None:
    grammar = DreamGrammar(TOKENIZER, STEPS)
    reply = [*think_ids(TOKENIZER, dream), *TOKENIZER.encode(answer), TOKENIZER.eos_id]
    allowed, state = states_of(grammar, reply, grammar.start)
    assert all(allowed)
    assert state == ANSWER
    assert states_of(grammar, reply[2:], INSIDE) == (allowed[2:], ANSWER)


def test_training_is_told_what_a_mask_would_forbid() -> None:
    grammar = DreamGrammar(TOKENIZER, STEPS)
    reply = [*think_ids(TOKENIZER, {"spatial": [(0, 1, 2)], "causal": [(2, 1, 0)]}), *b"It falls.", TOKENIZER.eos_id]
    state, logits = torch.tensor([grammar.start]), torch.zeros(1, TOKENIZER.vocab_size)
    for id, row in zip(reply, grammar.rows(reply), strict=True):
        assert torch.equal(grammar.forbidden[row], grammar.mask(logits, state)[0])
        state = grammar.advance(state, torch.tensor([id]))
    with torch.profiler.profile() as profile:  # no tensor: each of its elements would take far longer than a token
        grammar.rows(reply)
    assert not profile.key_averages()


def test_what_is_forbidden_changes_no_state_but_a_closing_tag() -> None:
    grammar, lens, image = DreamGrammar(TOKENIZER, STEPS), TOKENIZER.lens_ids[0], int(TOKENIZER.image_ids[0])
    here = states_of(grammar, [lens, image], INSIDE)[1]
    for odd in (TOKENIZER.lens_ids[1], TOKENIZER.newline_id, TOKENIZER.eos_id, TOKENIZER.think_id, 65):
        assert states_of(grammar, [lens, image, odd], INSIDE) == ([True, True, False], here)
    woken = [lens, image, TOKENIZER.newline_id, TOKENIZER.end_think_id, TOKENIZER.newline_id]
    assert states_of(grammar, woken, INSIDE)[1] == ANSWER
    assert states_of(grammar, [lens, *[image] * 7], INSIDE)[0] == [True] * 7 + [False], "a lens is full"
    assert states_of(grammar, [TOKENIZER.end_think_id, image], ANSWER) == ([False, False], ANSWER)


def test_a_character_is_gone_on_with_or_given_up() -> None:
    """Only what goes on with it is allowed, not even the end; where something else was read, that counts."""
    grammar, end = DreamGrammar(TOKENIZER, STEPS), TOKENIZER.eos_id
    known = {TOKENIZER.token_bytes(id): id for id in range(TOKENIZER.base_size)}

    def read(*tokens: bytes | int) -> tuple[list[bool], int]:
        return states_of(grammar, [known[token] if isinstance(token, bytes) else token for token in tokens], ANSWER)

    assert read(*TOKENIZER.encode("é€🙂"), end) == ([True] * 10, ANSWER)
    assert read(b"\xe2\x82", b"\xac", b"A") == ([True] * 3, ANSWER)
    assert read(b"\xe2", b"\x82\xac", end) == ([True] * 3, ANSWER)
    assert read(b" \xf0\x9f", b"\x98\x80\xe2") == ([True] * 2, read(b"\xe2")[1])
    for odd in (end, b"\n", b"A", b"\xc3", b" \xf0\x9f", b"\xff", TOKENIZER.lens_ids[0], TOKENIZER.end_think_id):
        assert read(b"\xe2", odd) == ([True, False], read(odd)[1])
    for never in (b"\xff a", b"\xc0", b"\xff", b"\x80", b"\xac!"):
        assert read(never) == ([False], ANSWER)


def test_batches_and_streams_say_what_single_rows_say(model: Backbone) -> None:
    grammar = DreamGrammar(TOKENIZER, STEPS)
    prompts = [prompt_ids(TOKENIZER, "What falls?" * count) for count in (1, 3, 2, 1)]
    how: dict[str, Any] = {"max_tokens": 60, "temperature": 0.8, "stop_ids": [TOKENIZER.eos_id], "grammar": grammar}
    together = generate(model, prompts, seed=3, **how)
    assert generate(model, prompts, seed=3, batch_rows=3, **how) == together
    for row, prompt in enumerate(prompts):
        assert list(stream(model, prompt, seed=3 + row, **how)) == together[row]
    assert len({tuple(reply) for reply in together}) == len(together)
    dreams = [told_apart(TOKENIZER, reply, STEPS)[0] for reply in together]
    assert any(any(steps for steps in parse_dream(TOKENIZER, dream).values()) for dream in dreams)


def test_the_sampler_sees_only_what_is_allowed() -> None:
    """top_k and top_p are of the allowed tokens, in their own proportions."""
    grammar = DreamGrammar(TOKENIZER, STEPS)
    logits = torch.zeros(1, TOKENIZER.vocab_size)
    logits[0, :256] = 30.0
    first = int(TOKENIZER.image_ids[0])
    logits[0, first : first + len(LABELS)] = torch.arange(len(LABELS)).float()
    state = torch.tensor([states_of(grammar, [TOKENIZER.lens_ids[0], first], INSIDE)[1]])
    masked = grammar.mask(logits, state).expand(4000, -1)
    sampler = Sampler(1.0, 3, 1.0)
    drawn = sampler.choose(masked, sampler.uniforms(range(4000), 1)).numpy() - first
    counts = np.bincount(drawn, minlength=len(LABELS)) / 4000
    expected = np.exp([0.0, 1.0, 2.0])
    np.testing.assert_allclose(counts[-3:], expected / expected.sum(), atol=0.03)
    assert counts[:-3].sum() == 0


def test_a_sentence_piece_vocabulary_has_words_too() -> None:
    texts = ["The ball falls to the floor.", "Plants take water and light.", "Why is it wet?"] * 20
    tokenizer = from_model(train_model(texts, 320), LABELS)
    model = small_model(tokenizer)
    replies = generate(
        model,
        [prompt_ids(tokenizer, "Why?")] * 4,
        max_tokens=60,
        temperature=3.0,
        stop_ids=[tokenizer.eos_id],
        grammar=DreamGrammar(tokenizer, 1),
    )
    for reply in replies:
        _, answer = told_apart(tokenizer, reply, 1)
        assert 0 not in answer, "<unk> is nothing to say"


# Where it is used.


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_chats_and_dreaming_models_keep_to_it(model: Backbone, temperature: float) -> None:
    student = Student("small", model, TOKENIZER, steps=STEPS)
    dreaming = DreamingReasoningLLM(device="cpu", backbone=model, tokenizer=TOKENIZER)
    for think in (True, False):
        said = student.answer("A ball?", think=think, temperature=temperature, max_tokens=60, seed=4)
        assert not set("⟨⟩\ufffd") & set(said.text)
        assert "think>" not in said.text
        assert bool(said.dream_text) <= think
        pieces = student.chat([{"role": "user", "content": "A ball?"}], think=think, temperature=temperature, seed=4)
        assert said.text in "".join(text for part, text in pieces if part == "content") or said.tokens == 60
    begun = [{"role": "user", "content": "A ball?"}, {"role": "assistant", "content": "It"}]
    assert {part for part, _ in student.chat(begun, temperature=temperature, max_tokens=9)} <= {"content"}  # pyright: ignore[reportArgumentType]
    for how in ({"dreamer": "backbone"}, {"dreamer": "none"}, {"guide": "⟨a ball⟩⟨release⟩"}):
        found = dreaming.generate("A ball?", temperature=temperature, return_dreams=True, max_length=40, **how)
        assert not set("⟨⟩\ufffd") & set(found["output"])
        for branch in found["dreams"]:
            assert len(branch.steps) <= dreaming.config.dream_length
            assert "guide" not in how or [slot.label for slot in branch.steps[0].slots][:2] == ["a ball", "release"]


def test_drafts_are_whole_dreams(model: Backbone) -> None:
    drafts = dream_on(model, synthetic_documents(TOKENIZER.vocab_size).prompt, TOKENIZER, STEPS, 0, range(0, 512, 8))
    assert drafts
    for ids in drafts.values():
        reply = [TOKENIZER.think_id, TOKENIZER.newline_id, *ids, *think_ids(TOKENIZER, {})[-3:], 65]
        assert told_apart(TOKENIZER, reply, STEPS)[0] == ids


def test_sizes_of_dreams() -> None:
    lenses: dict[str, list[tuple[int, int, int]]] = {lens: [(0, 1, 2)] * 5 for lens in LENSES}
    assert dream_size(5) == len(think_ids(TOKENIZER, lenses)) - len((TOKENIZER.think_id, "⏎", "⏎")) == 66
    assert [steps_within(dream_size(steps)) for steps in (1, 4, 9)] == [1, 4, 9]
    assert steps_within(3) == 1
    assert steps_within(dream_size(4) + 1) == 5
    settings = Settings()
    settings.mine.steps = 7
    assert longest_path(settings) == 7
    settings.mine.steps = 1
    assert longest_path(settings) == settings.dreaming.dream_length
