"""Fewer layers, narrower feed-forwards: against brute force in float64, and on a model whose right cut is known."""

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch

from distill.backbone.attention import Documents
from distill.backbone.model import Backbone, BackboneConfig
from distill.errors import BadInput
from distill.student import cut
from distill.student.cut import Sample, drop_layers, final_states, head_surgeon, keep_layers, narrow, quality, surgeon

CONFIG = BackboneConfig(vocab_size=31, hidden=16, layers=5, heads=4, kv_heads=2, ffn=24, context=32)


def model(seed: int = 0) -> Backbone:
    made = Backbone(CONFIG).initialize(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(8)
    return made.eval()


def sample_of(teacher: Backbone, rows: int = 12, seed: int = 1) -> Sample:
    """Random texts, two a row, whose labels are what the teacher finds likeliest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 31, (rows, 20), generator=generator)
    spans = [(row, start, start + 10) for row in range(rows) for start in (0, 10)]
    documents = Documents(rows, 20, spans, torch.device("cpu"))
    positions = torch.arange(10).repeat(rows, 2)
    where = torch.arange(rows * 20)
    with torch.no_grad():
        labels = teacher(ids, positions, documents).flatten(0, 1).argmax(-1)
    return Sample(ids, positions, documents, where, labels)


def test_quality_is_that_of_the_whole_model() -> None:
    teacher = model()
    sample = sample_of(teacher)
    found = quality(teacher, [sample, sample])
    logits = teacher(sample.ids, sample.positions, sample.documents).flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(logits, sample.labels)
    assert found.nats == pytest.approx(float(expected), rel=1e-5)
    assert found.top1 == 1.0


def best_rest(gram: torch.Tensor, weight: torch.Tensor, kept: Sequence[int]) -> tuple[float, torch.Tensor]:
    """Least squares in float64: how far X_kept W' is from X W at best, and that W'."""
    rows = torch.tensor(kept)
    solved = torch.linalg.solve(gram[rows][:, rows], gram[rows] @ weight)
    change = weight.clone()
    change[rows] -= solved
    gone = [i for i in range(len(gram)) if i not in kept]
    change[gone] = weight[gone]
    return float((change * (gram @ change)).sum()), solved


def test_the_surgeon_mends_as_least_squares_does() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(7, dtype=torch.float64) + 0.5 * torch.randn(7, 7, generator=generator, dtype=torch.float64))
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    gram = x.t() @ x
    kept, mended = surgeon(gram.float(), weight.float(), 6)
    error, solved = best_rest(gram, weight, kept.tolist())
    torch.testing.assert_close(mended.double(), solved, rtol=0.05, atol=0.05)  # but for the damping
    best = min(best_rest(gram, weight, rest)[0] for rest in itertools.combinations(range(7), 6))
    assert error <= 1.05 * best, "with one row to leave out, the rule finds the cheapest"


def test_rows_that_say_the_same_are_told_once() -> None:
    generator = torch.Generator().manual_seed(4)
    half = torch.randn(100, 5, generator=generator)
    x = torch.cat((half, half), dim=1)
    weight = torch.randn(10, 3, generator=generator)
    kept, mended = surgeon(x.t() @ x, weight, 5)
    assert sorted(int(i) % 5 for i in kept) == [0, 1, 2, 3, 4], "one of each pair stays"
    torch.testing.assert_close(x[:, kept] @ mended, x @ weight, rtol=2e-2, atol=2e-2)


def test_a_narrow_model_speaks_nearly_as_the_wide_one_where_neurons_are_doubled() -> None:
    teacher = model()
    with torch.no_grad():
        for block in teacher.model.layers:
            for matrix in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                matrix[12:] = matrix[:12]
    sample = sample_of(teacher)
    before = quality(teacher, [sample])
    smaller = narrow(teacher, [sample], 12, 4)
    assert smaller.config.ffn == 12
    assert [tuple(block.mlp.down_proj.weight.shape) for block in smaller.model.layers] == [(16, 12)] * 5
    assert quality(smaller, [sample]).nats == pytest.approx(before.nats, abs=0.02)


def test_the_surgeon_of_heads_takes_the_cheapest_of_each_group() -> None:
    generator = torch.Generator().manual_seed(4)
    x = (
        torch.randn(200, 16, generator=generator, dtype=torch.float64)
        @ torch.randn(16, 16, generator=generator).double()
    )
    gram, weight = x.t() @ x / 100, torch.randn(16, 16, generator=generator, dtype=torch.float64)
    kept, mended = head_surgeon(gram.float(), weight.float(), CONFIG, 2)
    heads = kept[::4] // 4
    assert kept.tolist() == [4 * head + row for head in heads.tolist() for row in range(4)]
    assert (heads // 2).tolist() == [0, 1]
    torch.testing.assert_close(mended.double(), best_rest(gram, weight, kept.tolist())[1], rtol=0.05, atol=0.02)
    # The first that goes is the cheapest of all, the second the cheapest of the other group, given the first.
    rows = {head: range(4 * head, 4 * head + 4) for head in range(4)}

    def cost(*gone: int) -> float:
        return best_rest(gram, weight, [i for head in range(4) if head not in gone for i in rows[head]])[0]

    first = min(range(4), key=cost)
    second = min((head for head in range(4) if head // 2 != first // 2), key=lambda head: cost(first, head))
    assert {first, second} == {*range(4)} - {*heads.tolist()}


def test_a_model_with_fewer_heads_speaks_nearly_as_the_whole_where_heads_are_doubled() -> None:
    teacher = model()
    with torch.no_grad():
        for block in teacher.model.layers:
            block.self_attn.q_proj.weight.view(2, 2, 4, 16)[:, 1] = block.self_attn.q_proj.weight.view(2, 2, 4, 16)[
                :, 0
            ]
    sample = sample_of(teacher)
    before = quality(teacher, [sample])
    smaller = narrow(teacher, [sample], 24, 2)
    assert (smaller.config.heads, smaller.config.kv_heads, smaller.config.head_dim) == (2, 2, 4)
    assert quality(smaller, [sample]).nats == pytest.approx(before.nats, abs=0.02)


def test_without_time_fewer_samples_are_looked_at() -> None:
    teacher = model()
    found = [sample_of(teacher, rows=2, seed=seed) for seed in range(10)]
    hurried = narrow(copy.deepcopy(teacher), found, 12, 4, seconds=0.0)
    patient = narrow(copy.deepcopy(teacher), found, 12, 4)
    few = narrow(copy.deepcopy(teacher), found[:2], 12, 4)
    first, last = ([m.model.layers[i].mlp.down_proj.weight for m in (hurried, patient, few)] for i in (0, -1))
    assert torch.equal(first[0], first[1]), "the first layer tells how long one takes"
    assert not torch.equal(last[0], last[1])
    assert not torch.equal(first[0], first[2])


def test_later_layers_make_up_for_what_earlier_ones_got_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = model()
    seen, new = sample_of(teacher, rows=40), sample_of(teacher, rows=40, seed=2)
    wanted = final_states(teacher, [new])[0]

    def error(mended: float) -> float:
        monkeypatch.setattr(cut, "MENDED", mended)
        return float((final_states(narrow(copy.deepcopy(teacher), [seen], 12, 4), [new])[0] - wanted).square().mean())

    assert error(0.5) < 0.97 * error(0.0)


def test_layers_go_whose_loss_costs_least() -> None:
    teacher = model()
    with torch.no_grad():
        for layer in (1, 3):  # these do nothing at all
            teacher.model.layers[layer].self_attn.o_proj.weight.zero_()
            teacher.model.layers[layer].mlp.down_proj.weight.zero_()
    sample = sample_of(teacher)
    told: list[tuple[int, int]] = []
    kept, path = drop_layers(teacher, [sample], 3, 60.0, lambda done, total: told.append((done, total)))
    assert kept == [0, 2, 4]
    assert told[-1] == (2, 2)
    whole = quality(teacher, [sample])
    assert path[3] == pytest.approx(whole.nats, rel=1e-5)
    smaller = keep_layers(teacher, kept)
    assert smaller.config.layers == 3
    assert quality(smaller, [sample]).top1 == whole.top1
    hurried, _ = drop_layers(teacher, [sample], 3, 0.0)
    assert hurried == [0, 2, 4], "without time, all go in one round"


def test_more_than_there_is_can_not_stay() -> None:
    teacher = model()
    with pytest.raises(BadInput, match=r"student\.layers=6: the teacher has 5"):
        drop_layers(teacher, [], 6, 1.0)
    with pytest.raises(BadInput, match=r"student\.ffn=25: the teacher's feed-forwards have 24"):
        narrow(teacher, [], 25, 4)
    with pytest.raises(BadInput, match=r"student\.heads=3: of the teacher's 4 keep 2 or 4"):
        narrow(teacher, [], 24, 3)
