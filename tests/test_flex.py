"""FlexAttention in the place of a masked product: what it reads, what comes out, and that it isn't compiled anew.

Without a GPU the kernel is torch's own formula of it, eagerly, behind the same compiler's front.
"""

import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from distill.backbone import flex
from distill.backbone.attention import Documents, attend_rows

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def packed(rows: int, length: int, longest: int, share: float, seed: int, device: str = "cpu") -> Documents:
    """Documents of random lengths, some rows filled up and some not; of a share of them something is hidden."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(0, most + 1, (), generator=generator))

    spans, hidden = list[tuple[int, int, int]](), dict[tuple[int, int, int], tuple[int, int, int]]()
    for row in range(rows):
        start, full = 0, length - draw(longest) * draw(1)
        while start < full:
            end = min(start + 1 + draw(longest - 1), full)
            spans.append((row, start, end))
            begin, until, after = sorted(draw(end - start) for _ in range(3))
            if draw(99) < 100 * share:
                hidden[spans[-1]] = (after, begin, until)
            start = end
    return Documents(rows, length, spans, torch.device(device), hidden)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 37), st.sampled_from([3, 12, 37]), st.sampled_from([0, 0.5]), st.integers(0, 999)
)
def test_blocks_and_pairs_are_those_that_are_read(
    rows: int, length: int, longest: int, share: float, seed: int
) -> None:
    documents = packed(rows, length, min(longest, length), share, seed)
    with patch.object(flex, "BLOCK", 4):
        found = documents.blocks
    owner = torch.full((rows, length), -1)
    for number, (row, start, end) in enumerate(documents.spans):
        owner[row, start:end] = number
    row, query, key = torch.meshgrid(*(torch.arange(n) for n in (rows, length, length)), indexing="ij")
    seen = found.mask_mod(row, torch.tensor(0), query, key)
    expected = (owner[:, :, None] == owner[:, None]) & (owner >= 0)[:, None] & (key <= query) | (query == key)
    for (at, start, end), (after, begin, until) in documents.hidden.items():
        expected[at, start + after : end, start + begin : start + until] = False
    assert torch.equal(seen, expected)
    assert torch.equal(documents.mask[:, 0], expected)
    tiles = F.pad(expected, (0, -length % 4, 0, -length % 4)).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
    some, whole = tiles.any(4).any(2), tiles.all(4).all(2)
    part_of = listed(found.kv_num_blocks, found.kv_indices)
    whole_of = listed(found.full_kv_num_blocks, found.full_kv_indices)
    assert not (part_of & whole_of).any()
    assert not (whole_of & ~whole).any(), "pairs of whole blocks aren't looked at"
    assert not (some & ~part_of & ~whole_of).any(), "blocks of neither kind aren't read"
    if not documents.hidden:
        assert torch.equal(part_of | whole_of, some)
        assert torch.equal(whole_of, whole & ~torch.eye(whole.shape[1], dtype=torch.bool))
    assert (found.shape, found.seq_lengths) == ((rows, 1, length, length), (length, length))


def listed(counts: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """(B, N, N) bool of a BlockMask's lists."""
    found = torch.zeros_like(which[:, 0], dtype=torch.bool)
    for row, query in torch.cartesian_prod(*(torch.arange(n) for n in found.shape[:2])).tolist():
        found[row, query, which[row, 0, query, : counts[row, 0, query]]] = True
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """How often the kernel is compiled: on a CPU for nothing but its formula, which then has gradients, too."""
    counter = CompileCounterWithBackend("inductor" if torch.cuda.is_available() else "eager")
    compiled = torch.compile(flex_attention.flex_attention, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "kernel", lambda: compiled)
    monkeypatch.setattr(flex, "tried", {})
    monkeypatch.setattr(flex_attention, "_validate_device", lambda q, k, v: None)  # pyright: ignore[reportUnknownLambdaType]
    torch.compiler.reset()
    return counter


def inputs(rows: int, length: int, device: str) -> list[torch.Tensor]:
    """q, k, v of 4 heads, of which two share keys, laid out as projections leave them."""
    shapes = [(rows, length, heads, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, device=device).transpose(1, 2).requires_grad_() for shape in shapes]


def test_it_is_tried_within_a_layer_that_is_recomputed(counted: CompileCounterWithBackend) -> None:
    documents, q, k, v = packed(2, 300, 200, 0.5, 0), *inputs(2, 300, "cpu")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=True)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    out = checkpoint(lambda: attend_rows(q, k, v, packed(2, 300, 200, 0.5, 0)), use_reentrant=False)
    assert counted.frame_count == 1
    for mine, reference in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_outputs_and_gradients_are_those_of_the_masked_product(device: str, counted: CompileCounterWithBackend) -> None:
    apart = 1e-5 if device == "cpu" else 2e-2  # a GPU may multiply in TF32
    frames = list[int]()
    for rows, share, seed in ((3, 0.5, 0), (3, 0.5, 1), (3, 0, 2), (3, 0, 3), (2, 0.5, 4), (5, 0.5, 5)):
        documents = packed(rows, 300, 200, share, seed, device)
        ours = inputs(rows, 300, device)
        theirs = [part.detach().clone().requires_grad_() for part in ours]
        if not frames:  # tried out there, and not to the harm of what is to be learned from the same rows
            with torch.inference_mode():
                attend_rows(ours[0], ours[1], ours[2], documents)
        out = attend_rows(ours[0], ours[1], ours[2], documents)
        assert "mask" not in vars(documents), "all pairs"
        expected = F.scaled_dot_product_attention(*theirs, attn_mask=documents.mask, enable_gqa=True)
        torch.testing.assert_close(out, expected, rtol=10 * apart, atol=apart)
        assert out.isfinite().all()
        direction = torch.randn_like(expected)
        out.backward(direction)
        expected.backward(direction)
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, reference.grad, rtol=10 * apart, atol=apart)
        frames.append(counted.frame_count)
    one, _, two, _, *others = frames
    assert frames[:4] == [one, one, two, two], "another batch, the same kernel"
    assert others == [two + 1] * 2, "and one more for any number of rows"
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # as validation does with the rest
        attend_rows(ours[0], ours[1], ours[2], documents)
    assert counted.frame_count == others[-1] + 1


def test_where_it_cannot_run_there_is_one_note_and_the_masked_product(
    counted: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*parts: Any, **more: Any) -> torch.Tensor:
        raise NotImplementedError("heads of 16\nand much more")

    monkeypatch.setattr(flex, "kernel", lambda: broken)
    documents = packed(2, 50, 20, 0.5, 0)
    q, k, v = inputs(2, 50, "cpu")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=True)
    with pytest.warns(UserWarning, match=r"doesn't run here \(heads of 16\); masks of all pairs"):
        assert torch.equal(attend_rows(q, k, v, documents), expected)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(attend_rows(q, k, v, packed(2, 50, 20, 0.5, 0)), expected)
