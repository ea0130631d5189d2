"""Each architecture that we read against transformers' own class and llama.cpp, on the same random weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import LLAMA3, VARIANTS, reference, saved
from support.small_student import small_tokenizer

from bundle.export import Origin, write_bundle
from bundle.gguf import write_gguf
from bundle.load import Student
from bundle.parity import largest_difference, weight_errors
from bundle.verify import verify
from distill.backbone.architecture import BackboneConfig, RopeScaling
from distill.backbone.attention import Documents
from distill.backbone.model import Backbone, load_backbone, save_backbone
from distill.backbone.session import Session
from distill.config import ExportSettings
from distill.errors import BadInput
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.open_source import open_source
from distill.tokens.bpe import StudentTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> StudentTokenizer:
    return small_tokenizer(smollm2)


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-4 of the largest."""
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = saved(variant, tmp_path / "theirs", tied=tied)
    ids = torch.randint(0, 97, (2, 200), generator=torch.Generator().manual_seed(1))
    model = load_backbone(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(ids).logits
        assert_equal_logits(model(ids), expected)
    (tmp_path / "ours").mkdir()
    save_backbone(model, tmp_path / "ours")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True).eval()
    assert type(again).__name__.lower().startswith({"qwen2": "qwen2", "qwen3": "qwen3"}.get(variant, "llama"))
    with torch.no_grad():
        assert_equal_logits(again(ids).logits, expected)
        assert torch.equal(load_backbone(tmp_path / "ours")(ids), model(ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_part_of_an_architecture_matters(variant: str, tmp_path: Path) -> None:
    """The test above would show nothing of a part whose weights change nothing."""
    saved(variant, tmp_path)
    model = load_backbone(tmp_path)
    ids = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids)
        if model.config.rope_scaling:
            plain = Backbone(replace(model.config, rope_scaling=None))
            plain.load_state_dict(model.state_dict())
            assert float((plain(ids) - before).abs().max()) > 0.01 * float(before.abs().max())
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.1.self_attn"):
                kept = parameter.clone()
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
                # A bias of keys adds the same to all scores of a query, but for the rotations.
                assert float((model(ids) - before).abs().max()) > 0.001 * float(before.abs().max()), name
                parameter.copy_(kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_session_equals_the_full_forward_pass(variant: str, tmp_path: Path) -> None:
    saved(variant, tmp_path)
    model = load_backbone(tmp_path)
    ids = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(3))
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :7] = False
    with torch.no_grad():
        expected = [model(ids[:1]), model(ids[1:, 7:])]
        session = Session(model, 2)
        states, logits = session.append(ids[:, :20], real)
        assert_equal_logits(model.lm_head(states[0]), expected[0][0, :20])
        assert_equal_logits(model.lm_head(states[1, 7:]), expected[1][0, :13])
        for end in range(21, 61):
            _, logits = session.append(ids[:, end - 1 : end])
            assert_equal_logits(logits[0], expected[0][0, end - 1])
            assert_equal_logits(logits[1], expected[1][0, end - 8])


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_training_on_packed_documents_gives_transformers_gradients(variant: str, tmp_path: Path) -> None:
    theirs = saved(variant, tmp_path).train()
    model = load_backbone(tmp_path).train()
    ids = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(4))
    documents = Documents(1, 50, [(0, 0, 20), (0, 20, 50)], torch.device("cpu"))
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    model(ids, positions, documents).logsumexp(-1).sum().backward()
    sum(theirs(part).logits.logsumexp(-1).sum() for part in (ids[:, :20], ids[:, 20:])).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        largest = max(float(expected[name].grad.abs().max()), 1e-2)
        assert float((parameter.grad - expected[name].grad).abs().max()) <= 1e-3 * largest, name


def test_random_weights_begin_without_biases() -> None:
    config = BackboneConfig(97, 64, 2, 4, 2, 96, 32, architecture="qwen2")
    state = Backbone(config).initialize(0).state_dict()
    assert {float(state[f"model.layers.0.self_attn.{x}_proj.bias"].abs().max()) for x in "qkv"} == {0.0}


# The files that other programs run.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same(variant: str, tied: bool, tokenizer: StudentTokenizer, tmp_path: Path) -> None:
    saved(variant, tmp_path, tied=tied, vocab_size=tokenizer.vocab_size)
    model, path = load_backbone(tmp_path), tmp_path / "x.gguf"
    write_gguf(model.state_dict(), model.config, tokenizer, path, "f32")
    errors = weight_errors(path, model.state_dict(), model.config)
    assert {error for _, error in errors.values()} == {0.0}
    assert len(errors) == len(model.state_dict()) - tied
    long = torch.randint(20, tokenizer.vocab_size, (200,), generator=torch.Generator().manual_seed(5)).tolist()
    with LlamaCpp(path, exact=True, context=256, threads=1) as engine:
        worst, positions = largest_difference(model, engine, [[5, 6, 7], long], [[30] * 8, [31] * 8])
    assert positions >= 3
    assert worst < 1e-3
    source = open_source(path)
    assert source.config == replace(model.config, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id)
    assert source.parameters == sum(parameter.numel() for parameter in model.parameters())
    weights = source.weights()
    assert weights.keys() == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
    ids = torch.tensor([long])
    with torch.no_grad():
        assert torch.equal(source.backbone()(ids), model(ids))


@pytest.mark.parametrize("variant", ["llama3", "qwen2", "qwen3"])
def test_a_bundle_of_each_architecture_passes_verification(
    variant: str, tokenizer: StudentTokenizer, tmp_path: Path
) -> None:
    saved(variant, tmp_path / "theirs", vocab_size=tokenizer.vocab_size)
    model = load_backbone(tmp_path / "theirs")
    model.config = replace(model.config, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    student = Student("tiny", model, tokenizer)
    origin = Origin("tiny", verification_prompts=["What happens when you drop a ball?"])
    write_bundle(tmp_path / "bundle", student, ExportSettings(), origin)
    report = verify(tmp_path / "bundle")
    assert report.ok, report.rows()
    said = json.loads((tmp_path / "bundle" / "config.json").read_text(encoding="utf-8"))
    assert said["model_type"] == {"llama3": "llama"}.get(variant, variant)


# Rotary scaling.


@settings(max_examples=40, deadline=None)
@given(st.floats(1.5, 64), st.floats(1.5, 16), st.integers(16, 16384), st.sampled_from([64, 128]), st.floats(1e4, 1e6))
def test_llama_3_scaling_is_recognized_by_its_divisors(
    factor: float, high: float, original: int, size: int, theta: float
) -> None:
    """What the divisors don't tell (too few frequencies between the bounds) is refused, never read wrongly."""
    config = BackboneConfig(10, 128, 1, 2, 2, 8, 64, rope_theta=theta, head_size=size)
    true = RopeScaling("llama3", factor, 1.0, high, original)
    frequencies = config.frequencies()
    found = RopeScaling.fitted(true.divisors(frequencies), frequencies)
    if found is not None:
        np.testing.assert_allclose(found.divisors(frequencies), true.divisors(frequencies), rtol=2e-4)


@pytest.mark.parametrize(("size", "factor"), [(64, 32.0), (128, 8.0)])
def test_the_scalings_of_llama_3_1_and_3_2_are_recognized(size: int, factor: float) -> None:
    config = BackboneConfig(10, 128, 1, 2, 2, 8, 64, rope_theta=500_000.0, head_size=size)
    divisors = RopeScaling("llama3", factor).divisors(config.frequencies())
    assert RopeScaling.fitted(divisors, config.frequencies()) == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


# What is refused, and what is harmless.


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (
            "llama",
            {"model_type": "gemma3"},
            r"'gemma3' can't be read; llama \(Mistral too\), qwen2 and qwen3",
        ),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' can't be read"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "has no 'low_freq_factor'"),
        ("llama", {"hidden_size": "big"}, "something unusable"),
        ("qwen3", {"rope_parameters": LLAMA3}, "can't be exported"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen3", {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation 'gelu_pytorch_tanh'.*; silu is"),
        ("llama", {"mlp_bias": True}, "mlp_bias True is not supported; False is"),
        ("llama", {"logits_scaling": 8.0}, r"logits_scaling 8\.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "each kind of layer"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "contradict each other"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused(variant: str, change: dict[str, Any], message: str) -> None:
    said = {**reference(variant).config.to_dict(), **change}
    with pytest.raises(BadInput, match=message):
        BackboneConfig.from_hf(said)


def test_what_changes_nothing_is_taken() -> None:
    said = reference("llama").config.to_dict()
    plain = {"hidden_act": "swish", "attention_bias": None, "logit_scale": 1, "attn_logit_softcapping": None}
    assert BackboneConfig.from_hf({**said, **plain}) == BackboneConfig.from_hf(said)


def test_a_factor_without_a_kind_is_linear_as_llama_cpp_reads_it(tokenizer: StudentTokenizer, tmp_path: Path) -> None:
    saved("linear", tmp_path, vocab_size=tokenizer.vocab_size)
    model, path = load_backbone(tmp_path), tmp_path / "x.gguf"
    write_gguf(model.state_dict(), model.config, tokenizer, path, "f32")
    path.write_bytes(path.read_bytes().replace(b"llama.rope.scaling.type", b"llama.rope.scaling.kind"))
    with LlamaCpp(path, exact=True, context=256, threads=1) as engine:
        worst, _ = largest_difference(model, engine, [list(range(20, 120))], [[30] * 8])
    assert worst < 1e-3
    assert open_source(path).config.rope_scaling == model.config.rope_scaling


def test_within_a_sliding_window_everything_is_seen(tmp_path: Path) -> None:
    theirs = saved("mistral", tmp_path, sliding_window=24)
    model = load_backbone(tmp_path)
    assert model.config.context == 24
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        assert_equal_logits(model(ids[:, :24]), theirs(ids[:, :24]).logits)
    assert load_backbone_of_qwen2(tmp_path / "qwen2", use_sliding_window=True, sliding_window=24) == 24
    assert load_backbone_of_qwen2(tmp_path / "unused", use_sliding_window=False, sliding_window=24) == 256


def load_backbone_of_qwen2(folder: Path, **how: Any) -> int:
    saved("qwen2", folder, **how)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, **how}), encoding="utf-8")
    return load_backbone(folder).config.context
