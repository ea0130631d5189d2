"""Many rows at once, and the distributions after them."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.backbone.likeliest import draw, likeliest, top
from distill.backbone.model import Backbone, BackboneConfig
from distill.backbone.prepared import Prepared, prepare
from distill.backbone.rows import STEP, WORTH, Rows

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 300


def model(**sizes: int) -> Backbone:
    sizes = {"vocab_size": VOCABULARY, "hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 96, **sizes}
    made = Backbone(BackboneConfig(**sizes, context=256)).initialize(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(6)
    return made


def scale_of(x: Tensor) -> float:
    return float(x.detach().abs().max())


@pytest.mark.parametrize("worth", [2, WORTH])
def test_rows_that_come_and_go_read_what_they_would_alone(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order they join and leave in, and whether a common beginning is read once."""
    monkeypatch.setattr("distill.backbone.rows.WORTH", worth)
    backbone, chance = model(), random.Random(3)
    rows = Rows(prepare(backbone))
    texts: list[list[int]] = []
    for step in range(STEP + 10):
        if step % 7 == 0:
            beginning = [5, 6, 7] if step % 2 else [5, 6]
            new = [beginning + chance.choices(range(VOCABULARY), k=chance.randrange(30)) for _ in range(4)]
            rows.join(new[: 4 if step else 3])
            texts += new[: 4 if step else 3]
        tokens = chance.choices(range(VOCABULARY), k=len(texts))
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        states = rows.advance(torch.tensor(tokens))
        assert rows.lengths == [len(text) for text in texts]
        if step % 5 == 0:
            for text, state in zip(texts, states, strict=True):
                alone = backbone.hidden(torch.tensor([text]))[0, -1]
                assert scale_of(state - alone) < 1e-4 * scale_of(alone)
        if step % 3 == 0 and len(texts) > 3:
            row = chance.randrange(len(texts))
            rows.leave(row)
            texts[row] = texts[-1]
            texts.pop()


def test_a_beginning_that_all_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(prepare(model()))
    read: list[int] = []
    before = rows._read

    def counting(prompts: list[list[int]], places: list[int], start: int) -> None:
        read.append(sum(map(len, prompts)))
        before(prompts, places, start)

    monkeypatch.setattr(rows, "_read", counting)
    beginning = list(range(50))
    rows.join([[*beginning, i] for i in range(5)])
    assert sum(read) == 50 + 5
    rows.join([[*beginning, i] for i in range(5)])
    assert sum(read) == 50 + 5 + 5


def test_an_empty_prompt_has_no_past() -> None:
    backbone = model()
    rows = Rows(prepare(backbone))
    rows.join([[], [7, 8]])
    states = rows.advance(torch.tensor([9, 9]))
    for row, text in enumerate(([9], [7, 8, 9])):
        assert torch.allclose(states[row], backbone.hidden(torch.tensor([text]))[0, -1], atol=1e-4, rtol=1e-3)


def test_bfloat16_rounds_and_no_more() -> None:
    backbone = model()
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    states: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        rows = Rows(prepare(backbone, dtype))
        rows.join(prompts)
        states.append(rows.advance(torch.tensor([6, 6])))
    assert 0 < scale_of(states[0] - states[1]) < 0.1 * scale_of(states[0])


def weights_of(size: int, dtype: torch.dtype = torch.float32) -> Prepared:
    return prepare(model(vocab_size=size, hidden=32, layers=1), dtype)


@pytest.mark.parametrize("size", [70, 5000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_are_those_of_a_full_sort(size: int, dtype: torch.dtype) -> None:
    """Also where products are rounded to 8 bits: against float64, over the same weights."""
    weights = weights_of(size, dtype)
    states = 3 * torch.randn((6, 32), generator=torch.Generator().manual_seed(2))
    found = likeliest(weights, states, 20)
    expected, ids = torch.log_softmax(states.double() @ weights.unembed.double().T, -1).sort(descending=True)
    assert (found.top_ids == ids[:, :20]).all()
    error = scale_of(found.top_logprobs - expected[:, :20])
    assert error < (2e-6 if dtype == torch.float32 else 2e-3)
    if dtype == torch.float32:
        assert scale_of(found.logprobs.gather(1, ids) - expected) < 1e-5


def test_equal_values_are_all_found() -> None:
    values = torch.zeros((2, 4096))
    values[:, 100:130] = 1.0
    ids, found = top(values, 20)
    assert (found == 1).all()
    assert all(len(set(row)) == 20 for row in ids.tolist())


def slow_draw(logprobs: np.ndarray, top_k: int, top_p: float, temperature: float, uniform: float) -> int:
    """Top-k, top-p, temperature, one after the other, as llama.cpp's samplers are written."""
    kept = logprobs[:top_k]
    mass = np.exp(kept - kept.max()) / np.exp(kept - kept.max()).sum()
    nucleus = kept[: int(np.argmax(np.cumsum(mass) >= min(top_p, np.cumsum(mass)[-1]))) + 1]
    if temperature == 0:
        return 0
    heated = np.exp((nucleus - nucleus.max()) / temperature)
    return int(np.searchsorted(np.cumsum(heated) / heated.sum(), uniform, side="right"))


def test_a_draw_is_top_k_then_top_p_then_temperature() -> None:
    random = np.random.default_rng(4)
    count, size = 400, 40
    logprobs = -np.sort(random.exponential(2, (count, size)), axis=1).astype(np.float32)
    top_k = random.integers(1, size + 1, count)
    top_p = random.choice([0.3, 0.9, 0.95, 1.0], count)
    temperature = random.choice([0.0, 0.3, 0.7, 1.5], count)
    uniform = random.random(count)
    drawn = draw(*map(torch.from_numpy, (logprobs, top_k, top_p, temperature, uniform)))
    expected = [
        slow_draw(logprobs[i].astype(float), top_k[i], top_p[i], temperature[i], uniform[i]) for i in range(count)
    ]
    assert drawn.tolist() == expected
    assert len(set(expected)) > 10


def test_no_draw_leaves_the_nucleus() -> None:
    logprobs = torch.tensor([[0.0, -0.1, -50.0, -90.0]])
    almost = torch.tensor([np.nextafter(1.0, 0)])
    for top_p in (0.6, 1.0):
        place = draw(logprobs, torch.tensor([4]), torch.tensor([top_p]), torch.tensor([0.7]), almost)
        assert place.item() <= (1 if top_p < 1 else 3)
