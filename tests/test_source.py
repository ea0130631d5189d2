"""A teacher's weights out of GGUFs and folders: real ones, tiny ones, and broken ones."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.architectures import LLAMA3, saved
from support.small_student import small_model, small_tokenizer

from bundle.gguf import write_gguf
from distill.backbone.model import load_backbone
from distill.backbone.weights import INDEX
from distill.errors import BadInput, CorruptFile, DistillError
from distill.teacher import gguf_file, source_gguf
from distill.teacher.gguf_file import dequantized, read_gguf
from distill.teacher.gguf_tokenizer import NORMAL, read_tokenizer
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.open_source import open_source
from distill.teacher.pre_tokenizers import PRE_TOKENIZATIONS, name_of
from distill.teacher.source import Source
from distill.tokens.aligned import byte_level_bpe

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "The ball falls to the floor because of gravity, bounces twice, and then settles."


@pytest.fixture(scope="module")
def teacher(smollm2: Path) -> Source:
    return open_source(smollm2)


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small GGUF. Don't alter it."""
    tokenizer = small_tokenizer(smollm2)
    model, path = small_model(tokenizer), tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(model.state_dict(), model.config, tokenizer, path, "f16", {"general.license": "mit"})
    return path


# A real model.


def test_smollm2_is_described(teacher: Source) -> None:
    assert (teacher.license, teacher.parameters) == ("apache-2.0", 134_515_008)
    config = teacher.config
    assert (config.layers, config.hidden, config.context, config.eos_id, config.bos_id) == (30, 576, 8192, 2, 1)
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings) == (1e-05, 100_000.0, True)
    assert teacher.tokenizer == read_tokenizer(teacher.path)


def test_smollm2_thinks_here_as_in_llama_cpp_and_transformers(teacher: Source) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    model = teacher.backbone(context=128)
    assert model.config.context == 128
    with LlamaCpp(teacher.path, exact=True, context=128, threads=1) as engine:
        ids = engine.tokenize(TEXT)
        forced = engine.force(ids[:4], ids[4:], n_probs=5)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))
        log_p = logits[0].double().log_softmax(-1).numpy()
    ours = log_p[np.arange(3, len(ids) - 1), ids[4:]]
    # llama.cpp rounds what it multiplies with quantized weights to eight bits.
    assert np.abs(ours - forced.logprobs).max() < 0.4
    assert np.abs(ours - forced.logprobs).mean() < 0.1
    assert (log_p[3:-1].argmax(-1) == forced.top_ids[:, 0]).mean() > 0.85
    said: dict[str, Any] = {**model.config.to_hf(), "num_hidden_layers": 30}
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):
        theirs: Any = loader.from_config(AutoConfig.for_model(**said)).eval()
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_layers_can_be_read_alone(teacher: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = teacher.weights([29, 3])
    assert {name.split(".")[2] for name in chosen if ".layers." in name} == {"3", "29"}
    assert {name for name in chosen if ".layers." not in name} == {"model.embed_tokens.weight", "model.norm.weight"}
    with pytest.raises(BadInput, match="has layers 0 to 29, no 30"):
        teacher.weights([0, 30])
    monkeypatch.setattr("distill.teacher.source.available_memory", lambda: 200_000_000)
    assert teacher.weights([3]).keys() < chosen.keys()
    with pytest.raises(BadInput, match=r"need 0\.5 GB of memory, and 0\.2 GB are free") as error:
        teacher.backbone()
    assert "\n" not in str(error.value)


def test_memory_is_asked_of_the_system() -> None:
    from distill.teacher.memory import available_memory

    found = available_memory()
    assert found is not None
    assert 1e8 < found < 1e14


# The container.


def dequantizable() -> list[GGMLQuantizationType]:
    found: list[GGMLQuantizationType] = []
    for kind in GGMLQuantizationType:
        try:
            gguf_file.blocks_of(kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


def test_the_usual_quantizations_can_be_read() -> None:
    usual = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ3_S IQ4_NL IQ4_XS"
    assert {kind.name for kind in dequantizable()} >= set(usual.split())


@pytest.mark.parametrize("kind", dequantizable(), ids=lambda kind: kind.name)
def test_blocks_are_dequantized_as_the_library_does(
    kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    blocks, rows = -(-256 // block), 37
    random = np.random.default_rng(int(kind)).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("before.weight", np.ones(3, np.float32))
    writer.add_tensor("x.weight", random, raw_shape=random.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_file, "AT_ONCE", 5 * block)
    _, tensor = gguf_file.whole_gguf(tmp_path / "x.gguf").tensors
    with np.errstate(all="ignore"):
        found, expected = dequantized(tmp_path / "x.gguf", tensor), dequantize(random, kind)
    assert found.shape == (rows, blocks * block)
    np.testing.assert_array_equal(found, expected)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_gguf_is_refused_in_one_line_or_read(tiny: Path, data: st.DataObject) -> None:
    whole = tiny.read_bytes()
    header = read_gguf(tiny).tensors[0].start
    damaged = bytearray(whole[: data.draw(st.sampled_from([len(whole), header, header // 2, 40, 9]))])
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, min(len(damaged), header) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tiny.parent / "damaged.gguf"
    path.write_bytes(damaged)
    said = ""
    try:
        source = open_source(path)
        assert len(damaged) == len(whole)
        assert source.parameters > 0
    except DistillError as error:
        said = str(error)
    assert "\n" not in said
    assert not said or "damaged.gguf" in said


def field(path: Path, key: str, value: bytes) -> bytes:
    """The file with the bytes of a key's value replaced."""
    whole = bytearray(path.read_bytes())
    at = whole.index(key.encode()) + len(key) + 4
    whole[at : at + len(value)] = value
    return bytes(whole)


def text(path: Path, before: str, after: str) -> bytes:
    assert len(before) == len(after)
    return path.read_bytes().replace(before.encode(), after.encode())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda path: text(path, "\x05\0\0\0\0\0\0\0llama", "\x05\0\0\0\0\0\0\0gemma"), BadInput,
         r"architecture 'gemma' can't be read; llama \(Mistral too\), qwen2 and qwen3 can"),
        (lambda path: path.read_bytes()[:-100], CorruptFile, r"is cut short: .* ends at byte"),
        (lambda path: field(path, "llama.embedding_length", struct.pack("<I", 128)), CorruptFile,
         "weights don't fit its description as a plain llama"),
        (lambda path: field(path, "llama.block_count", struct.pack("<I", 3)), CorruptFile,
         "describes 3 layers, and there are 2"),
        (lambda path: text(path, "blk.1.attn_q.weight", "blk.1.attn_z.weight"), CorruptFile, "attn_z.* unknown"),
        (lambda path: text(path, "llama.block_count", "llama.block_cound"), CorruptFile, "lack .*'llama.block_count'"),
        (lambda path: field(path, "llama.rope.dimension_count", struct.pack("<I", 8)), BadInput, "count is 8"),
        (lambda path: b"PK" + path.read_bytes()[2:], CorruptFile, "is not a GGUF"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_said(
    change: Callable[[Path], bytes], error: type[DistillError], message: str, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(change(tiny))
    with pytest.raises(error, match=message) as raised:
        open_source(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "plain", "other"),
    [
        ("logit_scale", 1.0, 0.0625),
        ("attention.causal", True, False),
        ("final_logit_softcapping", 0.0, 30.0),
        ("expert_count", 0, 8),
        ("rope.scaling.attn_factor", 1.0, 1.2),
    ],
)
def test_arithmetic_that_we_do_not_do_is_refused(
    key: str, plain: Any, other: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else a GGUF of a known architecture asks for; what asks for nothing is taken."""
    whole = read_gguf(tiny)
    wanted = open_source(tiny).config
    for value in (plain, other):
        changed = replace(whole, fields={**whole.fields, f"llama.{key}": value})
        monkeypatch.setattr(source_gguf, "whole_gguf", lambda _path, file=changed: file)
        if value == plain:
            assert open_source(tiny).config == wanted
        else:
            with pytest.raises(BadInput, match=f"llama.{key} is {value}, which can't be computed"):
                open_source(tiny)


def test_parts_of_a_split_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00003.gguf"
    shutil.copy(tiny, part)
    with pytest.raises(BadInput, match="is one of 3 parts of a model; join them"):
        open_source(part)
    only = tmp_path / "model-00001-of-00001.gguf"
    shutil.copy(tiny, only)
    assert open_source(only).license == "mit"
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadInput, match="is one of 2 parts"):
        open_source(tmp_path / "x.gguf")
    with pytest.raises(BadInput, match="no such model file"):
        open_source(tmp_path / "nowhere.gguf")


# Folders.


def equal(source: Source, folder: Path) -> bool:
    wanted = load_backbone(folder).state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in source.weights().items())


def shard(folder: Path, index: bool) -> None:
    """Split model.safetensors in two."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for file, held in files.items():
        save_file({name: tensors[name].clone() for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    if index:
        placed = {name: file for file, held in files.items() for name in held}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")


@pytest.mark.parametrize("how", ["whole", "index", "shards"])
def test_stray_weights_are_not_merged_in(how: str, tmp_path: Path) -> None:
    """As other checkpoints, copies and adapters that lie about."""
    saved("qwen3", tmp_path)
    wanted = load_backbone(tmp_path).state_dict()
    if how != "whole":
        shard(tmp_path, how == "index")
    stray = {name: tensor + 1 for name, tensor in wanted.items()}
    names = ["model-copy", "adapter_model", "model_old"] + (["model", "model-00003-of-00009"] if how == "index" else [])
    for name in names:
        save_file(stray, tmp_path / f"{name}.safetensors")
    source = open_source(tmp_path)
    assert source.parameters == sum(tensor.numel() for tensor in wanted.values())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in source.weights().items())
    assert equal(source, tmp_path)


def test_what_two_files_say_differently_is_refused(tmp_path: Path) -> None:
    """Two whole sets of shards; an output layer that config.json calls the embedding."""
    saved("llama", tmp_path, tied=True)
    whole = load_file(tmp_path / "model.safetensors")
    rows = whole["model.embed_tokens.weight"]
    save_file({**whole, "lm_head.weight": rows.clone()}, tmp_path / "model.safetensors")
    assert open_source(tmp_path).weights().keys() == whole.keys()
    save_file({**whole, "lm_head.weight": 2 * rows}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"lm_head\.weight is another than .*; set tie_word_embeddings to false"):
        open_source(tmp_path)
    save_file(whole, tmp_path / "model.safetensors")
    shard(tmp_path, index=False)
    assert open_source(tmp_path).weights().keys() == whole.keys()
    save_file(whole, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(BadInput, match="holds two models, in 00001 and in 00002 files"):
        open_source(tmp_path)


def test_halves_are_read_in_float32(tmp_path: Path) -> None:
    saved("llama", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    weights = open_source(tmp_path).weights()
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in weights.items())


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        open_source(tmp_path)
    saved("llama", tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads(config), "intermediate_size": 100}), encoding="utf-8"
    )
    with pytest.raises(CorruptFile, match=r"don't fit config\.json \(.*proj.weight has the shape"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(config), "model_type": "phi3"}), encoding="utf-8")
    with pytest.raises(BadInput, match="'phi3' can't be read; llama"):
        open_source(tmp_path)
    for content, says in (("[]", "is no JSON object"), ("3", "is no JSON object"), ("[" * 100_000, "is not JSON")):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises((BadInput, CorruptFile), match=rf"config\.json: {says}"):
            open_source(tmp_path)
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(CorruptFile, match=r"model\.safetensors: can't be read"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    shard(tmp_path, index=True)
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptFile, match="has no model-00002-of-00002"):
        open_source(tmp_path)
    (tmp_path / INDEX).write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptFile, match="weight_map"):
        open_source(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere"}}), encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"has no \.\./elsewhere"):
        open_source(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CorruptFile, match="has no model-00002-of-00002"):
        open_source(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"holds only pytorch_model\.bin, .*pickled weights are never loaded"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "license"),
    [
        ({}, ""),
        ({"README.md": "---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: llama3.2\n---\n"}, "llama3.2"),
        ({"README.md": "no header\nlicense: mit\n", "LICENSE": "\n  MIT License\n\nCopyright"}, "mit"),
        ({"README.md": "---\n[\n---\n", "LICENSE.txt": "Apache License\nVersion 2.0"}, "apache-2.0"),
        ({"LICENSE": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nLlama"}, "llama3.2"),
    ],
)
def test_a_licence_is_found(files: dict[str, str], license: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    saved("llama", tmp_path)
    assert open_source(tmp_path).license == license


def test_a_folder_tells_the_vocabulary_that_the_gguf_tells(teacher: Source, smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2's, as its tokenizer.json has it: control tokens both in the vocabulary and added."""
    wanted = read_tokenizer(smollm2)
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in wanted.merges)]
    vocabulary = {token: i for i, token in enumerate(wanted.tokens)}
    tokenizer = byte_level_bpe(vocabulary, merges, "smollm")
    tokenizer.add_special_tokens([wanted.tokens[i] for i, kind in enumerate(wanted.types) if kind != NORMAL])
    saved("llama", tmp_path, vocab_size=len(wanted.tokens) + 3, eos_token_id=[0, 2], bos_token_id=1)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}}), encoding="utf-8"
    )
    found = open_source(tmp_path).tokenizer
    assert found.tokens == [*wanted.tokens, "[PAD49152]", "[PAD49153]", "[PAD49154]"]
    assert found.types[-4:] == [NORMAL, 5, 5, 5]
    assert found.types[:-3] == wanted.types
    assert (found.merges, found.pre, found.model) == (wanted.merges, wanted.pre, wanted.model)
    assert (found.eos_id, found.bos_id, found.extra_stop_ids) == (2, 1, (0,))


@pytest.mark.parametrize("name", PRE_TOKENIZATIONS)
def test_ways_of_splitting_are_recognized(name: str) -> None:
    way = PRE_TOKENIZATIONS[name]
    said = json.loads(byte_level_bpe({"a": 0}, [], name).to_str())["pre_tokenizer"]
    assert PRE_TOKENIZATIONS[name_of(said, way.ignore_merges)] == way


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str, **how: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **how}
    return {"type": "Sequence", "pretokenizers": [step, {**BYTES, "use_regex": False}]}


@pytest.mark.parametrize(
    ("said", "ignore_merges", "name"),
    [
        (BYTES, False, "gpt-2"),
        (split(CL100K % "{1,3}"), True, "llama-bpe"),
        (split(CL100K % ""), False, "qwen2"),
        (split(CL100K % "{1,3}"), False, "dbrx"),
        (split(CL100K % "{1,2}"), True, ""),
        (split(CL100K % "", behavior="Removed"), False, ""),
        ({**BYTES, "add_prefix_space": True}, False, ""),
        ({"type": "Metaspace"}, False, ""),
        (None, False, ""),
    ],
)
def test_files_of_well_known_models_say_how_they_split(said: Any, ignore_merges: bool, name: str) -> None:
    assert name_of(said, ignore_merges) == name


def test_vocabularies_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    source = open_source(tmp_path)
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        _ = source.tokenizer
    path = tmp_path / "tokenizer.json"
    for content, error, message in (
        ('{"model": {"type": "Unigram"}}', BadInput, "of the kind 'Unigram'"),
        ('{"model": {"type": "BPE", "vocab": {"a": 98}, "merges": []}}', CorruptFile, "can't be read"),
        ("[", CorruptFile, "can't be read"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(error, match=message):
            _ = source.tokenizer


def test_a_sentencepiece_vocabulary_keeps_its_bytes(tmp_path: Path) -> None:
    saved("mistral", tmp_path)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "▁a": 6}
    added = [{"id": i, "content": token, "special": True} for token, i in vocabulary.items() if i < 3]
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocabulary, "merges": ["▁ a"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}), encoding="utf-8")
    found = open_source(tmp_path).tokenizer
    assert (found.model, found.pre, found.types[:7]) == ("llama", "", [3, 3, 3, 6, 1, 1, 1])
    assert math.prod((len(found.tokens), found.eos_id)) == 97 * 2


def test_llama_3_survives_the_way_from_a_folder(tmp_path: Path) -> None:
    saved("llama3", tmp_path)
    scaling = open_source(tmp_path).config.rope_scaling
    assert scaling is not None
    assert scaling.to_hf() == LLAMA3
