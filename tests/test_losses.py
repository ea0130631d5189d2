"""The distillation loss and its hand-made gradients, against float64 written straight from the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill.learning.divergence import LEAST, divergence
from distill.training import losses
from distill.training.losses import ChunkTargets, Targets, chunked_distillation, fused_distillation

V, D = 37, 8


def make_targets(count: int, slots: int, seed: int, soft: float = 0.7, words: int = 0, strict: float = 0.0) -> Targets:
    """Random teachers of so many words (0: V); every third position is hard-only, every fourth has an unused slot.
    Each position has one of three grammars, which never forbid its label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(words or V, generator=generator)[:slots] for _ in range(count)])
    full = torch.log_softmax(2 * torch.randn(count, words or V, generator=generator), -1)
    logprobs = full.gather(1, ids)
    logprobs[3::4, -1] = -math.inf
    ids[3::4, -1] = ids[3::4, 0]
    a = torch.full((count,), soft)
    a[::3] = 0.0
    logprobs[::3, 1:] = -math.inf
    logprobs[::3, 0] = 0.0
    ids[::3, 1:] = ids[::3, :1]
    weight = torch.rand(count, generator=generator)
    which = torch.randint(3, (count,), generator=generator)
    free = torch.rand(3, V, generator=generator) < 0.5
    free[which, ids[:, 0]] = True
    forbidden = torch.where(free, 0.0, -math.inf)
    costs = strict * torch.rand(count, generator=generator) if strict else None
    return Targets(ids[:, 0].clone(), ids, logprobs, a, weight, words, forbidden, which, costs)


def reference(hidden: Tensor, projection: Tensor, targets: Targets, beta: float = 0.0) -> Tensor:
    """The loss of the modules' docstrings, position by position, in float64 and with autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(hidden.shape[0]):
        log_q = torch.log_softmax(hidden[i] @ projection.t(), -1)
        used = {
            int(s): float(lp) for s, lp in zip(targets.slots[i], targets.logprobs[i], strict=True) if lp > -math.inf
        }
        tail = [j for j in range(targets.words or V) if j not in used]
        p_tail = 1 - sum(math.exp(lp) for lp in used.values())
        kl = sum(math.exp(lp) * (lp - log_q[j]) for j, lp in used.items())
        if p_tail > 1e-12:
            kl = kl + p_tail * (math.log(p_tail) - torch.logsumexp(log_q[tail], 0))
        if beta > 0:
            classes = [[j] for j in used] + [tail] + ([[*range(targets.words, V)]] if targets.words else [])
            q = torch.stack([log_q[each].exp().sum() for each in classes])
            p = torch.tensor([*map(math.exp, used.values()), p_tail, *[0.0] * bool(targets.words)], dtype=torch.float64)
            m = (beta * p + (1 - beta) * q).clamp_min(LEAST)
            kl = (q * (q / m).log()).sum() / beta
            if beta < 1:
                kl = kl + (p[p > 0] * (p[p > 0] / m[p > 0]).log()).sum() / (1 - beta)
        a = float(targets.soft_weight[i])
        ce = -log_q[int(targets.labels[i])]
        assert targets.forbidden is not None
        assert targets.which is not None
        kept = torch.logsumexp(log_q[targets.forbidden[targets.which[i]] == 0], 0)
        strict = 0.0 if targets.strict is None else float(targets.strict[i])
        total = total + float(targets.weight[i]) * ((a * kl if a > 0 else 0.0) + (1 - a) * ce) - strict * kept
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(2, 12),
    st.integers(0, 10_000),
    st.floats(0.5, 4.0),
    st.sampled_from((0, 25)),
    st.sampled_from((0.0, 3.0)),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
)
def test_loss_and_gradients_equal_the_definition(
    count: int, slots: int, seed: int, scale: float, words: int, strict: float, beta: float
) -> None:
    targets = make_targets(count, slots, seed, words=words, strict=strict)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = scale * torch.randn(count, D, generator=generator)
    projection = torch.randn(V, D, generator=generator)
    ours = (hidden.clone().requires_grad_(), projection.clone().requires_grad_())
    theirs = (hidden.double().requires_grad_(), projection.double().requires_grad_())
    loss, _, _ = fused_distillation(*ours, targets, divergence(beta))
    expected = reference(*theirs, targets, beta)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5, abs=2e-5)
    for mine, theirs_ in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert theirs_.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs_.grad, rtol=2e-4, atol=2e-5)


def test_the_divergence_goes_over_into_forward_kl() -> None:
    targets = make_targets(20, 5, 0, soft=1.0, words=25)
    generator = torch.Generator().manual_seed(0)
    both = [0.3 * torch.randn(size, D, generator=generator) for size in (20, V)]
    grads: list[Tensor] = []
    for beta in (0.0, 1e-4):
        hidden, projection = (each.clone().requires_grad_() for each in both)
        fused_distillation(hidden, projection, targets, divergence(beta))[0].backward()
        assert hidden.grad is not None
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=0.02)


def test_what_is_no_word_is_pushed_away_where_the_teacher_speaks() -> None:
    """In one tail with the words it would only share their probability: nothing would tell it from them."""
    logprobs = torch.log(torch.tensor([[0.5, 0.2]]))
    targets = Targets(torch.tensor([0]), torch.tensor([[0, 1]]), logprobs, torch.ones(1), torch.ones(1), words=4)
    logits = torch.log(torch.tensor([[0.3, 0.1, 0.2, 0.1, 0.3]]))  # the tail is as likely as the teacher's: 0.3
    hidden = torch.eye(1, requires_grad=True)
    projection = logits.t().clone().requires_grad_()
    fused_distillation(hidden, projection, targets)[0].backward()
    assert projection.grad is not None
    torch.testing.assert_close(projection.grad[4], torch.tensor([0.3]))
    assert projection.grad[2:4].abs().max() < 1e-6
    far = projection.detach().clone()
    far[4] = 300.0  # words underflow beside it: still a finite gradient that pushes it down
    projection = far.requires_grad_()
    fused_distillation(hidden, projection, targets)[0].backward()
    assert projection.grad is not None
    assert projection.grad.isfinite().all()
    torch.testing.assert_close(projection.grad[4], torch.tensor([1.0]))


def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = make_targets(50, 6, 1)
    hidden, projection = torch.randn(50, D), torch.randn(V, D)
    whole, kl, ce = fused_distillation(hidden, projection, targets)
    monkeypatch.setattr(losses, "CHUNK", 7)
    parts, kl_parts, ce_parts = fused_distillation(hidden, projection, targets)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(kl, kl_parts)
    torch.testing.assert_close(ce, ce_parts)


def test_what_learns_nothing_makes_no_gradient() -> None:
    targets = make_targets(50, 6, 1, strict=1.0)
    hidden, projection = torch.randn(50, D), torch.randn(V, D, requires_grad=True)
    expected = fused_distillation(hidden, projection, targets)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        found = fused_distillation(hidden, projection, targets)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert counted.get_total_flops() == 2 * 50 * V * D, "the logits alone"


@pytest.mark.parametrize("positions", [1, 511, 512, 2048, 5 * 512, 40_000])
def test_a_gpu_projects_more_at_once_in_two_shapes(positions: int) -> None:
    parts = list(losses.chunks(positions, 32_768, torch.device("cuda")))
    sizes = [part.stop - part.start for part in parts]
    assert [part.start for part in parts] == [sum(sizes[:i]) for i in range(len(parts))]
    assert sizes == positions // 2048 * [2048] + -(-(positions % 2048) // 512) * [512]
    assert {part.stop - part.start for part in losses.chunks(positions, 10**6, torch.device("cuda"))} == {512}


def test_student_equal_to_teacher_has_no_divergence() -> None:
    hidden, projection = torch.randn(9, D), torch.randn(V, D)
    log_q = torch.log_softmax(hidden @ projection.t(), -1)
    top = log_q.topk(5)
    targets = Targets(top.indices[:, 0].clone(), top.indices, top.values, torch.ones(9), torch.ones(9))
    _, kl, _ = fused_distillation(hidden, projection, targets)
    assert kl.abs().max() < 1e-5


def test_a_vanishing_tail_stays_finite() -> None:
    """The student is sure of a slot (q_τ about e⁻⁸⁰), the teacher is not."""
    projection = torch.zeros(V, D)
    projection[3] = 80.0
    hidden = torch.ones(1, D, requires_grad=True)
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2)]])
    targets = Targets(torch.tensor([3]), torch.tensor([[3, 4]]), logprobs, torch.ones(1), torch.ones(1))
    loss, _, _ = fused_distillation(hidden, projection, targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert loss.item() > 100


def test_probabilities_that_sum_to_more_than_one_are_scaled() -> None:
    logprobs = torch.log(torch.tensor([[0.7, 0.31]]))
    targets = Targets(torch.tensor([0]), torch.tensor([[0, 1]]), logprobs, torch.ones(1), torch.ones(1))
    _, kl, _ = fused_distillation(torch.zeros(1, D), torch.zeros(V, D), targets)
    p = torch.tensor([0.7, 0.31], dtype=torch.float64) / 1.01
    assert float(kl[0]) == pytest.approx(float((p * (p * V).log()).sum()), rel=1e-5)


def test_chunk_loss_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, V, (10,), generator=generator)
    chunk = torch.tensor([0, 0, -1, 1, 2, 2, 2, -1, 3, -1])
    teacher = torch.tensor([-0.3, -2.0, -1.1, -0.05])
    weight = torch.rand(10, generator=generator)
    forbidden = torch.where((torch.arange(V) % 2 == 1) & ~torch.isin(torch.arange(V), labels), -math.inf, 0.0)[None]
    hard = (torch.zeros(10, 1), torch.zeros(10))
    which = torch.zeros(10, dtype=torch.int64)
    targets = Targets(labels, labels[:, None], *hard, weight, forbidden=forbidden, which=which, strict=2.0 * weight)
    hidden = torch.randn(10, D, generator=generator)
    projection = torch.randn(V, D, generator=generator)
    ours = (hidden.clone().requires_grad_(), projection.clone().requires_grad_())
    theirs = (hidden.double().requires_grad_(), projection.double().requires_grad_())
    loss, _, _ = chunked_distillation(*ours, targets, ChunkTargets(chunk, teacher, 0.6))
    every = torch.log_softmax(theirs[0] @ theirs[1].t(), -1)
    log_q = every.gather(1, labels[:, None]).squeeze(1)
    expected = -2.0 * (weight * every[:, forbidden[0] == 0].logsumexp(1)).sum()
    for c, log_p in enumerate(teacher.double()):
        member = chunk == c
        p, q = log_p.exp(), log_q[member].sum().exp()
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        expected = expected + 0.6 * weight[member].sum() * divergence
    share = torch.where(chunk >= 0, 0.4, 1.0)
    expected = expected - (weight * share * log_q).sum()
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs_ in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert theirs_.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs_.grad, rtol=1e-4, atol=1e-5)
