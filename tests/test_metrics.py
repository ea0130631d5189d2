"""Each metric against an independent implementation: brute force in float64, fractions, or numbers known by hand."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from distill.exam.metrics import likelihood as metrics
from distill.exam.metrics.statistics import HierarchicalBootstrap, PairedBootstrap, Ratio
from distill.teacher.protocol import UNKNOWN_ID, TokenTargets
from distill.tokens.aligner import Aligner
from distill.tokens.bpe import StudentTokenizer
from distill.training.losses import Targets, fused_distillation, tail_kernel


def brute_kl(logits: np.ndarray, named: dict[int, float]) -> float:
    """The design's formula in extended precision, one position, term by term; `named` maps id → teacher's p."""
    exact = np.exp(logits.astype(np.longdouble) - logits.max())
    q = exact / exact.sum()
    p_tail = 1 - math.fsum(named.values())
    q_tail = sum((q[i] for i in range(len(q)) if i not in named), np.longdouble(0))
    terms = [p * (math.log(p) - float(np.log(q[i]))) for i, p in named.items() if p > 0]
    if p_tail > 1e-12:
        terms.append(p_tail * (math.log(p_tail) - float(np.log(q_tail))))
    return math.fsum(terms)


def bucket_kl(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the exam takes it: named logits, and all others in one bucket."""
    places = metrics.named_places(ids)
    tail = logits.scatter(-1, places, -torch.inf).logsumexp(-1).double()
    return metrics.bucket_divergence(logits.gather(-1, places), tail, ids, logprobs)


def random_case(seed: int, scale: float, vocab: int = 50, slots: int = 6) -> tuple[np.ndarray, list[dict[int, float]]]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, scale, (4, vocab)).astype(np.float32)
    teacher = generator.normal(0, scale, (4, vocab))
    p = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    rows = [{int(i): float(row[i]) for i in np.argsort(-row)[: generator.integers(1, slots + 1)]} for row in p]
    return logits, rows


def packed(rows: list[dict[int, float]], slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(rows), slots), -1)
    logprobs = torch.full((len(rows), slots), -torch.inf, dtype=torch.float64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
        logprobs[i, : len(row)] = torch.tensor([math.log(p) for p in row.values()], dtype=torch.float64)
    return ids, logprobs


@pytest.mark.parametrize("scale", [0.1, 2.0, 12.0])
@pytest.mark.parametrize("seed", range(5))
def test_bucket_kl_equals_the_formula(seed: int, scale: float) -> None:
    logits, rows = random_case(seed, scale)
    want = [brute_kl(row, named) for row, named in zip(logits, rows, strict=True)]
    total = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        kl, normalizer = bucket_kl(torch.from_numpy(logits).to(dtype), *packed(rows, 6))
        np.testing.assert_allclose(kl.numpy(), want, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(normalizer.numpy(), total, rtol=tolerance)


def test_bucket_kl_normalizes_positions_without_targets() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    _, normalizer = bucket_kl(logits, torch.full((1, 2), -1), torch.full((1, 2), -torch.inf))
    assert normalizer.item() == pytest.approx(math.log(math.e + math.e**2 + math.e**0.5), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_bucket_kl_is_a_lower_bound_and_exact_when_nearly_everything_is_named(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits, teacher = generator.normal(0, 3, (2, 30))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (teacher, logits))
    full = float((p * np.log(p / q)).sum())
    order = np.argsort(-p)
    values = [
        bucket_kl(torch.from_numpy(logits)[None], *packed([{int(i): p[i] for i in order[:n]}], 30))[0].item()
        for n in (1, 5, 20, 29)
    ]
    assert values == sorted(values)
    assert values[0] < full
    assert values[-1] == pytest.approx(full, abs=1e-9)


def test_bucket_kl_survives_masses_over_one_and_tiny_tails() -> None:
    logits = torch.tensor([[40.0, 0.0, -40.0, -41.0]])
    ids = torch.tensor([[0, 1]])
    over, _ = bucket_kl(logits, ids, torch.tensor([[0.7, 0.4]]).log())
    assert over.item() == pytest.approx(brute_kl(logits[0].numpy(), {0: 0.7 / 1.1, 1: 0.4 / 1.1}), abs=1e-6)
    tail, _ = bucket_kl(logits, ids, torch.tensor([[0.5, 0.3]]).log())
    assert tail.item() == pytest.approx(brute_kl(logits[0].numpy(), {0: 0.5, 1: 0.3}), rel=1e-6)


def test_bucket_kl_equals_the_training_loss() -> None:
    logits, rows = random_case(3, 2.0)
    ids, logprobs = packed(rows, 6)
    slots = torch.where(ids < 0, ids[:, :1], ids)
    ones = torch.ones(len(rows))
    targets = Targets(ids[:, 0], slots, logprobs.float(), ones, ones)
    _, kl, _ = fused_distillation(torch.from_numpy(logits), torch.eye(logits.shape[1]), targets, tail_kernel)
    assert kl.min() > 0.01
    np.testing.assert_allclose(bucket_kl(torch.from_numpy(logits), ids, logprobs)[0].numpy(), kl, atol=2e-5)


class LettersOnly:
    """As much of a tokenizer as the alignment asks for: teacher id → student id."""

    kind, eos_id = "aligned", 9
    teacher_map = np.array([7, 8, -1, 3, 9, 9], np.int32)


def test_soft_targets_are_what_training_aligned() -> None:
    # Teacher ids 0…5; the student lacks 2, and has one end token, 9, for both 4 and 5.
    tokens = TokenTargets(
        ids=np.array([0, 3, 1, 4], np.int32),
        logprobs=np.log(np.array([0.5, 0.05, np.nan, 0.9], np.float32)),
        top_ids=np.array([[0, 2, UNKNOWN_ID], [4, 0, 1], [2, 1, 0], [4, 5, 0]], np.int32),
        top_logprobs=np.log(
            np.array([[0.5, 0.3, 0.1], [0.4, 0.2, 0.1], [0.6, 0.2, 0.1], [0.9, 0.05, 0.01]], np.float32)
        ),
        soft=np.array([True, True, False, True]),
    )
    aligned = Aligner(cast(StudentTokenizer, LettersOnly()), None).align("any", tokens, "stop")
    found = metrics.soft_targets(aligned, tokens, LettersOnly.teacher_map, length=3)
    assert found is not None

    def named(i: int) -> dict[int, float]:
        return {int(k): math.exp(v) for k, v in zip(found.ids[i], found.logprobs[i], strict=True) if k >= 0}

    assert named(0) == pytest.approx({7: 0.5}, rel=1e-3)
    assert named(1) == pytest.approx({9: 0.4, 7: 0.2, 8: 0.1, 3: 0.05}, rel=2e-3)
    assert named(2) == {}
    assert found.soft.tolist() == [True, True, False]
    assert found.top.tolist()[:2] == [7, 9]
    assert metrics.soft_targets(aligned, tokens, LettersOnly.teacher_map, length=0) is None


def test_bits_and_log_mean_exp() -> None:
    assert metrics.bits(np.log(np.array([0.5, 0.25]))) == pytest.approx(3)
    assert metrics.log_mean_exp([math.log(0.2), math.log(0.4)]) == pytest.approx(math.log(0.3))
    assert metrics.log_mean_exp([-2000.0, -2001.0]) == pytest.approx(-2000 + math.log((1 + math.exp(-1)) / 2))
    assert metrics.log_mean_exp([-5.0]) == -5.0


# Intervals.


def test_ratio_ignores_what_is_not_defined() -> None:
    ratio = Ratio.of([1.0, math.nan, 3.0], [2.0, 5.0, 2.0])
    assert ratio.value == 1.0
    assert not Ratio.of([math.nan], [1.0]).defined
    assert ratio.within(np.array([True, True, False])).value == 0.5
    assert PairedBootstrap(1, 10, 0).interval(Ratio.of([math.nan])) is None
    assert HierarchicalBootstrap(1, 2, 10, 0).contrast([Ratio.of([1.0, 1.0])], [Ratio.of([0.0, 0.0], [0, 0])]) is None


def test_bootstrap_equals_resampling_by_hand() -> None:
    generator = np.random.default_rng(1)
    top, bottom = generator.gamma(2, size=20), generator.gamma(3, size=20)
    bootstrap = PairedBootstrap(20, 500, seed=4)
    draws = []
    for weights in bootstrap.weights:
        chosen = [i for i, times in enumerate(weights) for _ in range(int(times))]
        assert len(chosen) == 20
        draws.append(sum(top[chosen]) / sum(bottom[chosen]))
    found = bootstrap.interval(Ratio.of(top, bottom))
    assert found is not None
    # Few prompts, and unequal denominators, widen it.
    n = bottom.sum() ** 2 / (bottom**2).sum()
    level = norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1))
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [level, 1 - level]).tolist())
    assert found.value == pytest.approx(top.sum() / bottom.sum())


def test_bootstrap_repeats_to_the_last_digit() -> None:
    ratio = Ratio.of(np.random.default_rng(0).normal(size=30))
    assert PairedBootstrap(30, 200, 5).interval(ratio) == PairedBootstrap(30, 200, 5).interval(ratio)
    assert PairedBootstrap(30, 200, 5).interval(ratio) != PairedBootstrap(30, 200, 6).interval(ratio)


def test_what_makes_a_prompt_hard_cancels_in_a_pair() -> None:
    generator = np.random.default_rng(0)
    lengths, hard = generator.integers(50, 400, 64).astype(float), generator.normal(0, 0.4, 64)
    a, b = (Ratio.of(lengths * (mean + hard + generator.normal(0, 0.1, 64)), lengths) for mean in (2.0, 2.1))
    bootstrap = HierarchicalBootstrap(1, 64, 600, 0)
    value, found = bootstrap.interval([a]), bootstrap.contrast([b], [a])
    assert value is not None
    assert found is not None
    difference = found[0]
    assert difference.high - difference.low < 0.7 * (value.high - value.low)
