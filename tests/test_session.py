"""Reading in parts, in ragged batches and token by token, against one plain forward pass."""

from copy import copy, deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_student import enlarge

from distill.backbone.generate import generate, stream
from distill.backbone.model import Backbone, BackboneConfig, pad_left
from distill.backbone.session import Session
from distill.errors import BadInput

CONFIG = BackboneConfig(vocab_size=97, hidden=64, layers=3, heads=4, kv_heads=2, ffn=96, context=64)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Backbone:
    return enlarge(Backbone(CONFIG).initialize(3)).eval()


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=6).filter(
        lambda parts: all(any(part[row] for part in parts) for row in (0, 1))
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_parts_read_one_after_another_equal_one_pass(model: Backbone, parts: list[list[int]], seed: int) -> None:
    """parts: tokens that each of two rows reads at a time; a row may read none."""
    generator = torch.Generator().manual_seed(seed)
    session = Session(model, 2)
    read: list[list[int]] = [[], []]
    for counts in parts:
        if not max(counts):
            continue
        new = [torch.randint(0, 97, (count,), generator=generator).tolist() for count in counts]
        ids, real = pad_left(new, 0)
        twin = copy(session)
        twin.cache = session.cache.clone()
        states, logits = session.append(ids, None if bool(real.all()) else real)
        alone, same = twin.append(ids, None if bool(real.all()) else real, last=True)
        torch.testing.assert_close((alone, same), (states[:, -1:], logits), rtol=1e-5, atol=1e-5)
        for row, (before, tokens) in enumerate(zip(read, new, strict=True)):
            before.extend(tokens)
            if tokens:
                with torch.inference_mode():
                    expected = model.hidden(torch.tensor([before]))[0, -len(tokens) :]
                    torch.testing.assert_close(states[row, -len(tokens) :], expected, rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(logits[row], model.lm_head(expected[-1]), rtol=1e-4, atol=1e-4)
    assert session.lengths == [len(row) for row in read]


def test_log_probabilities_of_single_tokens_equal_the_forward_pass(model: Backbone) -> None:
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    session = Session(model, 3)
    session.append(ids[:, :9])
    for end in range(10, 41):
        _, logits = session.append(ids[:, end - 1 : end])
        with torch.inference_mode():
            expected = model(ids[:, :end])[:, -1].log_softmax(-1)
        assert float((logits.log_softmax(-1) - expected).abs().max()) < 1e-5


def test_answers_go_on_from_what_a_session_has_read(model: Backbone) -> None:
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [1, 2, 3, 4]]
    middles = [[20], [21, 22, 23], [24, 25]]
    for how in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 30}):
        whole = [prompt + middle for prompt, middle in zip(prompts, middles, strict=True)]
        expected = generate(model, whole, max_tokens=20, seed=4, **how)  # pyright: ignore[reportArgumentType]
        session = Session(model, 3)
        session.append(*pad_left(prompts, 0))
        assert generate(session, middles, max_tokens=20, seed=4, **how) == expected  # pyright: ignore[reportArgumentType]
        for row in range(3):
            session = Session(model, 1)
            session.append(torch.tensor([prompts[row]]))
            answer = list(stream(session, middles[row], max_tokens=20, seed=4 + row, **how))  # pyright: ignore[reportArgumentType]
            assert answer == expected[row]
            # All but its last token has been read: what comes next goes on from there.
            assert session.lengths == [len(whole[row]) + len(answer) - 1]
            again = list(stream(session, [answer[-1], 9], max_tokens=5))
            assert again == generate(model, [[*whole[row], *answer, 9]], max_tokens=5)[0]


def test_a_session_knows_its_bounds(model: Backbone) -> None:
    session = Session(model, 1)
    session.append(torch.ones((1, 60), dtype=torch.long))
    with pytest.raises(BadInput, match="65 tokens don't fit a context of 64"):
        session.append(torch.ones((1, 5), dtype=torch.long))
    assert session.lengths == [60]
    assert len(list(stream(session, [3], max_tokens=9))) == 3
    with pytest.raises(BadInput, match="64 tokens leave no room"):
        list(stream(session, [3], max_tokens=9))
    with pytest.raises(BadInput, match="2 prompts for a session of 1 row"):
        generate(session, [[1], [2]], max_tokens=1)


def test_weights_that_changed_are_read_anew() -> None:
    from distill.training.step import make_optimizer

    model = enlarge(Backbone(CONFIG).initialize(5))
    other = Backbone(CONFIG).initialize(6).state_dict()
    optimizer = make_optimizer(model, 0.01, (0.9, 0.95), 0.0)
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    seen: list[torch.Tensor] = []

    def check(again: bool = False) -> None:
        _, logits = Session(model, 1).append(ids)
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(ids)[:, -1], rtol=1e-4, atol=1e-4)
        assert any(torch.allclose(logits, before) for before in seen) == again
        seen.append(logits)

    model.eval()
    check()
    for _ in range(2):
        model.train()
        model(ids).logsumexp(-1).sum().backward()
        optimizer.step()
        check()
        model.eval()
        check(again=True)
        assert model.for_decoding is not None, "made anew for each session: this shows nothing"
    model.load_state_dict(other)
    check()
    model.model.norm.weight = torch.nn.Parameter(torch.full((64,), 3.0))
    check()
    assert torch.equal(Session(deepcopy(model), 1).append(ids)[1], Session(model, 1).append(ids)[1])
