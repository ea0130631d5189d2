"""The backbone against transformers, and attention by document against one masked product."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.backbone.attention import DocumentAttention, Documents
from distill.backbone.model import PRESETS, Backbone, BackboneConfig, config_for, load_backbone, save_backbone
from distill.config import StudentSettings
from distill.errors import BadInput, CorruptFile

SMALL = BackboneConfig(vocab_size=97, hidden=32, layers=2, heads=4, kv_heads=2, ffn=64, context=64, eos_id=2, pad_id=0)


def spans(lengths: list[list[int]]) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            found.append((row, start, start + size))
            start += size
    return found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 999))
def test_attention_by_document_equals_masked_attention(lengths: list[list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    longest = max(sum(sizes) for sizes in lengths)
    lengths = [[*sizes, longest - sum(sizes)] if sum(sizes) < longest else sizes for sizes in lengths]
    hidden: dict[tuple[int, int, int], tuple[int, int, int]] = {}  # of some, what stands before a third of it
    for row, start, end in spans(lengths):
        begin, until, after = sorted(torch.randint(0, end - start + 1, (3,)).tolist())
        if after % 3:
            hidden[row, start, end] = (after, begin, until)
    documents = Documents(len(lengths), longest, spans(lengths), torch.device("cpu"), hidden)
    seen = torch.zeros(len(lengths), 1, longest, longest, dtype=torch.bool)
    for row, start, end in spans(lengths):
        after, begin, until = hidden.get((row, start, end), (0, 0, 0))
        for query in range(end - start):
            for key in range(query + 1):
                seen[row, 0, start + query, start + key] = not (query >= after and begin <= key < until)
    assert torch.equal(documents.mask, seen)
    shapes = ((4, longest, 6), (2, longest, 6), (2, longest, 6))
    ours = [torch.randn(len(lengths), *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    out = DocumentAttention.apply(*ours, documents)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(expected)
    out.backward(direction)
    expected.backward(direction)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tied: bool, tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import LlamaForCausalLM

    model = Backbone(replace(SMALL, tie_embeddings=tied, rope_theta=5000.0)).initialize(3).eval()
    save_backbone(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-6)
        loaded = load_backbone(tmp_path)
        assert torch.equal(loaded(ids), model(ids))
    eager = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = eager(ids, output_attentions=True).attentions
        for start in (0, 17, 39):
            for ours, wanted in zip(model.attention(ids, start), expected, strict=True):
                torch.testing.assert_close(ours, wanted[:, :, start:], rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "again")(ids), model(ids))


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = Backbone(SMALL).initialize(1).eval()
    first, second = torch.randint(0, 97, (1, 11)), torch.randint(0, 97, (1, 20))
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(11), torch.arange(20)])[None]
    documents = Documents(1, 31, spans([[11, 20]]), torch.device("cpu"))
    with torch.no_grad():
        together = model(packed, positions, documents)
        torch.testing.assert_close(together[:, :11], model(first), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[:, 11:], model(second), rtol=1e-5, atol=1e-6)


def test_embeddings_can_be_given_instead_of_ids() -> None:
    """Gradients reach whoever made them."""
    model = Backbone(SMALL).initialize(0)
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    given = model.hidden(torch.zeros_like(ids), embeds=embeds)
    assert torch.equal(given, model.hidden(ids))
    given.square().sum().backward()
    assert embeds.grad is not None
    assert (embeds.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("preset", "millions"), [("nano", 5), ("micro", 25), ("small", 100), ("large", 1000)])
def test_presets_have_their_size_and_quantize_well(preset: str, millions: int) -> None:
    config = config_for(StudentSettings(preset=preset), 4096, 0, 1)
    with torch.device("meta"):
        count = sum(p.numel() for p in Backbone(config).parameters())
    assert 0.8 < count / 1e6 / millions < 1.3
    assert config.hidden % 256 == 0
    assert config.ffn % 256 == 0
    assert set(PRESETS[preset]) == {"hidden", "layers", "heads", "kv_heads", "ffn"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' can't be read; llama"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "scaled as 'dynamic'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 5}, "head_dim"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_backbone(Backbone(SMALL), tmp_path)
    content = {**json.loads((tmp_path / "config.json").read_text(encoding="utf-8")), **change}
    content = {key: value for key, value in content.items() if value is not None or key not in change}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        load_backbone(tmp_path)


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        load_backbone(tmp_path)
    save_backbone(Backbone(SMALL), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        load_backbone(tmp_path)
    weights.unlink()
    with pytest.raises(BadInput, match="pickled weights are never loaded"):
        load_backbone(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"don't fit config\.json"):
        load_backbone(tmp_path)
    with pytest.raises(BadInput, match=r"student\.preset: 'tiny'"):
        config_for(StudentSettings(preset="tiny"), 10, 0, 1)
    with pytest.raises(BadInput, match=r"student\.heads"):
        config_for(StudentSettings(heads=7), 10, 0, 1)
