"""Each loss against its definition, spelled out in loops of float64."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.dream.generator import Dreams
from distill.training.engine import losses as dream_losses
from distill.training.engine.losses import DreamTargets

B, S, T, D, C, E = 3, 4, 5, 16, 7, 4


def some_targets(random: torch.Generator) -> DreamTargets:
    """Chains of 0 to T steps; of one step only a code is known, of no other is any missing."""
    lengths = torch.randint(0, T + 1, (B, S), generator=random)
    lengths[0, 0], lengths[0, 1] = T, 0
    steps = torch.arange(T) < lengths[..., None]
    codes = torch.randint(0, C, (B, S, T, 3), generator=random).masked_fill(~steps[..., None], -1)
    codes[0, 0, 2, 1] = -1
    phrases = torch.randn(B, S, T, 3, D, generator=random).masked_fill((codes < 0)[..., None], float("nan"))
    return DreamTargets(codes, phrases, steps)


def some_dreams(random: torch.Generator, requires_grad: bool = False) -> Dreams:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).requires_grad_(requires_grad)

    gates = draw(B, S, E).softmax(-1)
    return Dreams(draw(B, S, T, 3, D), draw(B, S, T, 3, C), draw(B, S, T), gates, draw(S, 8), draw(B, S, T, 3, D))


@pytest.fixture
def dreams() -> Dreams:
    return some_dreams(torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> DreamTargets:
    return some_targets(torch.Generator().manual_seed(1))


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def wide(x: Tensor) -> Any:
    return x.detach().double().numpy()


SLOTS = list(itertools.product(range(B), range(S), range(T), range(3)))


def test_code_loss_is_the_mean_cross_entropy_of_known_codes(dreams: Dreams, targets: DreamTargets) -> None:
    logits, codes = wide(dreams.logits), targets.codes.numpy()
    terms = [math.log(sum(np.exp(logits[i]))) - logits[i][codes[i]] for i in SLOTS if codes[i] >= 0]
    assert dream_losses.code_loss(dreams.logits, targets.codes).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_cosine_loss_is_the_mean_distance_to_known_phrases(dreams: Dreams, targets: DreamTargets) -> None:
    dreamed, true, codes = wide(dreams.embeddings), wide(targets.phrases), targets.codes.numpy()
    terms = [1 - cosine(dreamed[i], true[i]) for i in SLOTS if codes[i] >= 0]
    loss = dream_losses.cosine_loss(dreams.embeddings, targets.phrases, targets.codes >= 0)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_coherence_compares_neighbours_with_the_true_ones(dreams: Dreams, targets: DreamTargets) -> None:
    dreamed, true, codes = wide(dreams.embeddings), wide(targets.phrases), targets.codes.numpy()
    terms = [
        (cosine(dreamed[b, s, t, 2], dreamed[b, s, t + 1, 0]) - cosine(true[b, s, t, 2], true[b, s, t + 1, 0])) ** 2
        for b, s, t in itertools.product(range(B), range(S), range(T - 1))
        if codes[b, s, t, 2] >= 0 and codes[b, s, t + 1, 0] >= 0
    ]
    loss = dream_losses.coherence_loss(dreams.embeddings, targets.phrases, targets.codes >= 0)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_more_is_asked_up_to_the_end_of_each_chain(dreams: Dreams, targets: DreamTargets) -> None:
    more, steps = wide(dreams.more), targets.steps.numpy()
    terms: list[float] = []
    for b, s in itertools.product(range(B), range(S)):
        for t in range(T):
            terms.append(math.log1p(math.exp(-more[b, s, t] if steps[b, s, t] else more[b, s, t])))
            if not steps[b, s, t]:
                break
    assert dream_losses.more_loss(dreams.more, targets.steps).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_diversity_costs_where_two_paths_start_alike() -> None:
    offsets = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.1, 0.0], [0.0, 1.0, 1.0], [-1.0, 0.5, 0.0]])
    values = wide(offsets)
    hinges = [max(0.0, cosine(a, b) - dream_losses.MARGIN) for a, b in itertools.combinations(values, 2)]
    assert dream_losses.diversity_loss(offsets).item() == pytest.approx(np.mean(hinges), rel=1e-5)
    assert max(hinges) > 0
    assert dream_losses.diversity_loss(torch.eye(4)).item() == 0
    assert dream_losses.diversity_loss(torch.ones(1, 4)).item() == 0, "one path differs from none"


def test_balance_is_the_switch_loss(dreams: Dreams) -> None:
    gates = wide(dreams.gates).reshape(-1, E)
    share = [np.mean(gates.argmax(1) == e) for e in range(E)]
    expected = E * sum(f * p for f, p in zip(share, gates.mean(0), strict=True))
    assert dream_losses.balance_loss(dreams.gates).item() == pytest.approx(expected, rel=1e-5)
    assert dream_losses.balance_loss(torch.eye(E)[None]).item() == pytest.approx(1.0), "each path its own: balanced"
    one = torch.eye(E)[:1].expand(1, S, E)
    assert dream_losses.balance_loss(one).item() == pytest.approx(E), "all paths of one expert: the worst"


def test_engine_loss_is_the_weighted_sum_and_reaches_all_it_should(targets: DreamTargets) -> None:
    dreams = some_dreams(torch.Generator().manual_seed(2), requires_grad=True)
    losses = dream_losses.engine_loss(dreams, targets)
    expected = sum(weight * losses[name].item() for name, weight in dream_losses.WEIGHTS.items())
    assert losses.keys() == {"total", *dream_losses.WEIGHTS}
    assert losses["total"].item() == pytest.approx(expected, rel=1e-5)
    losses["total"].backward()
    for name in ("embeddings", "logits", "more"):
        gradient = getattr(dreams, name).grad
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), f"{name}: absent phrases may be anything"
    absent = targets.codes < 0
    logits_grad, embeddings_grad = dreams.logits.grad, dreams.embeddings.grad
    assert logits_grad is not None
    assert embeddings_grad is not None
    assert (logits_grad[absent] == 0).all(), "what is absent teaches nothing"
    assert (embeddings_grad[absent] == 0).all()


def test_without_a_single_step_only_the_end_is_learned() -> None:
    dreams = some_dreams(torch.Generator().manual_seed(3))
    nothing = torch.full((B, S, T, 3), -1)
    targets = DreamTargets(nothing, torch.zeros(B, S, T, 3, D), torch.zeros(B, S, T, dtype=torch.bool))
    losses = dream_losses.engine_loss(dreams, targets)
    assert losses["code"].item() == losses["cosine"].item() == losses["coherence"].item() == 0
    assert losses["more"].item() > 0
    assert torch.isfinite(losses["total"])


def right_dreams(targets: DreamTargets) -> Dreams:
    dreams = some_dreams(torch.Generator().manual_seed(4))
    dreams.logits = torch.nn.functional.one_hot(targets.codes.clamp_min(0), C).float()
    dreams.more = targets.steps.float() - 0.5
    return dreams


def test_a_path_is_right_if_all_its_codes_and_its_length_are(targets: DreamTargets) -> None:
    dreams = right_dreams(targets)
    assert dream_losses.right_paths(dreams, targets).all()
    dreams.logits[0, 0, 3, 2] = dreams.logits[0, 0, 3, 2].roll(1)  # one wrong code
    wrong = torch.zeros(B, S, dtype=torch.bool)
    wrong[0, 0] = True
    assert torch.equal(~dream_losses.right_paths(dreams, targets), wrong)
    dreams.more[0, 1, 0] = 1.0  # a step where the true chain has none
    wrong[0, 1] = True
    assert torch.equal(~dream_losses.right_paths(dreams, targets), wrong)


def shares(dreams: Dreams, targets: DreamTargets) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
    """By (prompt, path, step) and by (prompt, path): what share of the codes is right."""
    codes, live = dreams.codes(), dreams.live()
    steps: dict[tuple[int, ...], float] = {}
    paths: dict[tuple[int, ...], float] = {}
    for b, s in itertools.product(range(B), range(S)):
        length, true = int(live[b, s].sum()), int(targets.steps[b, s].sum())
        for t in range(length):
            same = [t < true and bool(codes[b, s, t, role] == targets.codes[b, s, t, role]) for role in range(3)]
            steps[b, s, t] = sum(same) / 3
        if length:
            paths[b, s] = sum(steps[b, s, t] for t in range(length)) / max(length, true)
    return steps, paths


def cross_entropy(logit: float, share: float) -> float:
    return share * math.log1p(math.exp(-logit)) + (1 - share) * math.log1p(math.exp(logit))


def test_the_graph_is_asked_what_share_of_each_path_and_step_is_right(targets: DreamTargets) -> None:
    random = torch.Generator().manual_seed(5)
    dreams = right_dreams(targets)
    changed = torch.rand(B, S, T, 3, generator=random) < 0.3
    dreams.logits = torch.where(changed[..., None], dreams.logits.roll(1, -1), dreams.logits)
    dreams.more = torch.where(torch.rand(B, S, T, generator=random) < 0.2, -dreams.more, dreams.more)
    path_logits, step_logits = torch.randn(B, S, generator=random), torch.randn(B, S, T, generator=random)
    reasoned = SimpleNamespace(score_logits=path_logits, importance_logits=step_logits)
    drafted: Any = SimpleNamespace(dreams=dreams, reasoned=reasoned)
    steps, paths = shares(dreams, targets)
    assert 0 < len(paths) < B * S, "a path without steps has nothing to be right about"
    assert len(set(paths.values())) > 3
    expected = np.mean([cross_entropy(float(path_logits[place]), share) for place, share in paths.items()])
    assert dream_losses.score_loss(drafted, targets).item() == pytest.approx(expected, rel=1e-5)
    expected = np.mean([cross_entropy(float(step_logits[place]), share) for place, share in steps.items()])
    assert dream_losses.importance_loss(drafted, targets).item() == pytest.approx(expected, rel=1e-5)
