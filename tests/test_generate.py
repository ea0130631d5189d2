"""Native decoding and scoring against transformers on the same random weights, and against exact distributions."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from support.small_student import enlarge
from transformers import LlamaConfig, LlamaForCausalLM

from distill.backbone.generate import Sampler, generate, log_likelihood, stream
from distill.backbone.model import Backbone, BackboneConfig
from distill.errors import BadInput

CONFIG = BackboneConfig(vocab_size=97, hidden=64, layers=3, heads=4, kv_heads=2, ffn=96, context=64)
LENGTHS = (5, 1, 17, 9, 30, 2, 17)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Backbone:
    return enlarge(Backbone(CONFIG).initialize(3)).eval()


@pytest.fixture(scope="module")
def reference(model: Backbone) -> Any:
    settings = {key: value for key, value in CONFIG.to_hf().items() if key != "architectures"}
    reference = LlamaForCausalLM(LlamaConfig(**settings))
    reference.load_state_dict(model.state_dict())
    return reference.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, CONFIG.vocab_size, length).tolist() for length in LENGTHS]


def test_greedy_equals_transformers(model: Backbone, reference: Any, prompts: list[list[int]]) -> None:
    ours = generate(model, prompts, max_tokens=30)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
        assert answer == theirs[0, len(prompt) :].tolist()
        assert len(set(answer)) > 8, "the weights are degenerate: this compares little"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neighbours_change_nothing(model: Backbone, prompts: list[list[int]], temperature: float) -> None:
    how: dict[str, Any] = {"max_tokens": 20, "temperature": temperature, "top_p": 0.9}
    together = generate(model, prompts, seed=11, **how)
    assert generate(model, prompts, seed=11, batch_rows=3, **how) == together
    alone = [generate(model, [prompt], seed=11 + i, **how)[0] for i, prompt in enumerate(prompts)]
    assert alone == together
    backwards = generate(model, prompts[::-1], seed=[11 + i for i in reversed(range(len(prompts)))], **how)
    assert backwards[::-1] == together
    assert [list(stream(model, prompt, seed=11 + i, **how)) for i, prompt in enumerate(prompts)] == together


def test_stop_ids_end_a_row_and_no_other(model: Backbone, prompts: list[list[int]]) -> None:
    free = generate(model, prompts, max_tokens=24)
    stop = free[2][6]
    stopped = generate(model, prompts, max_tokens=24, stop_ids=[stop])
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert stopped == expected
    assert len(stopped[2]) < 24
    assert any(len(row) == 24 for row in stopped), "all rows stopped: nothing is shown about the others"


def test_prompt_and_answer_end_with_the_context(model: Backbone, prompts: list[list[int]]) -> None:
    full = (prompts[4] * 3)[: CONFIG.context - 3]
    answers = generate(model, [prompts[0], full], max_tokens=40)
    assert len(answers[1]) == 3
    assert answers[0] == generate(model, [prompts[0]], max_tokens=40)[0]
    assert len(answers[0]) == 40
    assert generate(model, [full], max_tokens=0) == [[]]
    with pytest.raises(BadInput, match="64 tokens leave no room"):
        generate(model, [[1] * CONFIG.context], max_tokens=1)
    with pytest.raises(BadInput, match="empty"):
        generate(model, [[]], max_tokens=1)
    assert generate(model, [], max_tokens=4) == []


def test_seeds(model: Backbone, prompts: list[list[int]]) -> None:
    def answer(seed: int) -> list[list[int]]:
        return generate(model, prompts[:1] * 3, max_tokens=16, temperature=1.5, seed=seed)

    first = answer(0)
    assert answer(0) == first
    assert first[0] != first[1] != first[2], "rows of one prompt must draw differently"
    assert answer(1)[0] == first[1]
    with pytest.raises(BadInput, match="2 seeds for 3 prompts"):
        generate(model, prompts[:3], max_tokens=1, seed=[1, 2])


def exact(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution by definition: temperature, then the k likeliest, then the smallest set with mass top_p."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weights, kind="stable")
    kept = order[: top_k or len(order)]
    mass = np.cumsum(weights[kept]) / weights[kept].sum()
    kept = kept[: int(np.sum(mass < top_p)) + 1]
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 7, 1.0), (1.3, 0, 0.8), (0.9, 12, 0.7), (2.0, 1, 0.5)]
)
def test_sampling_follows_the_exact_distribution(temperature: float, top_k: int, top_p: float) -> None:
    draws = 20_000
    logits = np.random.default_rng(1).normal(0, 2, 40)
    expected = exact(logits, temperature, top_k, top_p)
    sampler = Sampler(temperature, top_k, top_p)
    uniforms = sampler.uniforms(range(draws), 1)
    rows = torch.tensor(logits, dtype=torch.float32).expand(draws, -1)
    counts = np.bincount(sampler.choose(rows, uniforms).numpy(), minlength=40)
    assert counts[expected == 0].sum() == 0
    likely = expected * draws >= 5
    if likely.sum() > 1:
        seen = np.append(counts[likely], counts[~likely].sum())
        wanted = np.append(expected[likely], expected[~likely].sum()) * draws
        assert chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


@given(
    st.lists(st.integers(-80, 80), min_size=1, max_size=20, unique=True),
    st.floats(0.1, 3),
    st.integers(0, 25),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.3, 0.999, 1 - 2**-53]),
)
@settings(deadline=None, max_examples=200)
def test_only_what_may_be_drawn_is(
    eighths: list[int], temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    logits = [number / 8 for number in eighths]  # none so close to another that both have one probability
    chosen = Sampler(temperature, top_k, top_p).choose(
        torch.tensor([logits]), torch.tensor([[uniform]], dtype=torch.float64)
    )
    # A hair of room where a cumulative sum meets top_p.
    assert exact(np.array(logits), temperature, top_k, min(1.0, top_p * (1 + 1e-9)))[int(chosen)] > 0


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for top_k, top_p in ((0, 1.0), (2, 0.9), (0, 0.5)):
        drawn = Sampler(1e-310, top_k, top_p).choose(logits, torch.tensor([[0.9]], dtype=torch.float64))
        assert drawn.tolist() == [1]


def test_sampling_refuses_nonsense(model: Backbone) -> None:
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(BadInput, match="sampling"):
            generate(model, [[1]], max_tokens=1, **bad)  # pyright: ignore[reportArgumentType]


def test_log_likelihood_equals_transformers(model: Backbone, reference: Any, prompts: list[list[int]]) -> None:
    continuations = [prompts[-1 - i] for i in range(len(prompts))]
    continuations[3] = []
    scores = log_likelihood(model, prompts, continuations)
    narrow = log_likelihood(model, prompts, continuations, batch_tokens=40)
    for prompt, continuation, score, other in zip(prompts, continuations, scores, narrow, strict=True):
        assert score.dtype == np.float64
        assert score.shape == (len(continuation),)
        if continuation:
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + continuation])).logits[0].double()
            table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            np.testing.assert_allclose(score, table[range(len(continuation)), continuation].numpy(), atol=2e-5)
            np.testing.assert_allclose(score, other, atol=2e-5)


def test_log_likelihood_reaches_the_end_of_the_context(model: Backbone) -> None:
    (scores,) = log_likelihood(model, [[1] * 60], [[2] * 5])
    assert len(scores) == 5
    with pytest.raises(BadInput, match="don't fit a context of 64"):
        log_likelihood(model, [[1] * 60], [[2] * 6])
    with pytest.raises(BadInput, match="empty"):
        log_likelihood(model, [[]], [[2]])
