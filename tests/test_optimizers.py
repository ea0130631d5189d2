"""Muon beside torch's own, and the mean of the weights beside its definition."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.backbone.model import Backbone, BackboneConfig
from distill.config import TrainSettings
from distill.errors import BadInput, CorruptFile
from distill.training import checkpoint
from distill.training.average import Average
from distill.training.muon import Muon, orthogonalize
from distill.training.plan import learning_rate, optimizer_for
from distill.training.step import make_optimizer

CONFIG = BackboneConfig(vocab_size=32, hidden=16, layers=1, heads=2, kv_heads=1, ffn=48, context=8)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonalized_matrices_keep_their_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix, torch.float64)
    singular = torch.linalg.svdvals(result)
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.25
    inner = u.T @ result @ vh.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-9, rtol=0)


def test_muon_moves_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's rounds are in bfloat16, so matrices agree as far as that goes; the rest moves by AdamW."""
    monkeypatch.setattr(Muon, "precision", torch.bfloat16)
    ours = Backbone(CONFIG).initialize(0)
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours.state_dict())
    optimizer = make_optimizer(ours, 0.02, (0.9, 0.95), 0.1, muon=True)
    matrices = [p for name, p in theirs.named_parameters() if "proj" in name]
    others = [p for name, p in theirs.named_parameters() if "proj" not in name]
    assert len(matrices) == 7
    muon = torch.optim.Muon(matrices, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, 0.02, (0.9, 0.95), weight_decay=0.0)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            two.grad = one.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        apart = float(((one - two).norm() / (two - start[name]).norm()).detach())
        assert apart < (0.04 if "proj" in name else 1e-5), name


def test_an_update_is_as_large_as_adamws() -> None:
    model = Backbone(CONFIG).initialize(0)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()  # pyright: ignore
    optimizer = make_optimizer(model, 0.01, (0.9, 0.95), 0.0, muon=True)
    model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    moved = model.model.layers[0].mlp.up_proj.weight.detach() - before  # pyright: ignore
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.35)


@pytest.mark.parametrize("muon", [False, True])
def test_an_optimizer_is_kept_to_the_bit(muon: bool, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Backbone(CONFIG).initialize(0)
    optimizer = make_optimizer(model, 0.01, (0.9, 0.95), 0.1, muon)
    model(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    tensors = checkpoint.optimizer_tensors(model, optimizer)
    assert any(name.endswith("momentum_buffer") for name in tensors) == muon
    save_file(tensors, tmp_path / "optimizer.safetensors")
    other = make_optimizer(model, 0.01, (0.9, 0.95), 0.1, muon)
    checkpoint.load_optimizer(tmp_path, model, other)
    again = checkpoint.optimizer_tensors(model, other)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    del tensors["model.norm.weight.exp_avg"]
    save_file(tensors, tmp_path / "optimizer.safetensors")
    with pytest.raises(CorruptFile, match=r"optimizer\.safetensors: has exp_avg_sq, step of model\.norm\.weight"):
        checkpoint.load_optimizer(tmp_path, model, other)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_mean_is_as_old_as_asked(share: float) -> None:
    """Of weights that are the step's number the mean is their mean number."""
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, share)
    steps = 400
    for step in range(1, steps + 1):
        nn.init.constant_(model.weight, step)
        average.update(step)
    with average.shipped():
        assert steps - float(model.weight.detach()) == pytest.approx(share * (steps - 1), rel=1e-3)
        assert float(average.beside["weight"].detach()) == steps
    assert float(model.weight.detach()) == steps


def test_no_mean_costs_nothing() -> None:
    model = nn.Linear(2, 2)
    average = Average(model, 0.0)
    before = model.weight
    average.update(1)
    with average.shipped():
        assert model.weight is before
    assert not average.beside


def test_the_rate_rises_and_falls_by_one_measure() -> None:
    by_steps = TrainSettings(lr=1.0, warmup=0.1, steps=100)
    rates = [learning_rate(by_steps, 1.0, step, step / 100) for step in (0, 4, 9, 50, 79, 90)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5])
    by_clock = TrainSettings(lr=1.0, warmup=0.1, minutes=1.0)
    for steps in (20, 1000):
        rates = [learning_rate(by_clock, 1.0, step, step / steps) for step in range(steps)]
        assert rates[0] == 0.0, "how long a step takes isn't known yet"
        assert max(rates[: steps // 20]) <= 0.5
        assert rates[steps // 10 : 8 * steps // 10] == [1.0] * (7 * steps // 10), "however few steps there are"
        assert rates[9 * steps // 10] == pytest.approx(0.5)
    assert learning_rate(TrainSettings(lr=1.0, warmup=0.0), 1.0, 0, 0.0) == 1.0


def test_the_optimizer_follows_from_where_weights_begin() -> None:
    assert [optimizer_for(TrainSettings(), inherited) for inherited in (False, True)] == ["muon", "adamw"]
    assert optimizer_for(TrainSettings(optimizer="adamw"), inherited=False) == "adamw"
    assert optimizer_for(TrainSettings(optimizer="muon"), inherited=True) == "muon"


def test_an_unknown_optimizer_is_refused() -> None:
    from distill.training.plan import check_settings

    with pytest.raises(BadInput, match=r"train\.optimizer: 'sgd' is none of auto, adamw, muon"):
        check_settings(TrainSettings(optimizer="sgd"))
    with pytest.raises(BadInput, match=r"train\.average: 0\.9"):
        check_settings(TrainSettings(average=0.9))
    with pytest.raises(BadInput, match=r"train\.strict=-1: must be 0 or more"):
        check_settings(TrainSettings(strict=-1.0))
