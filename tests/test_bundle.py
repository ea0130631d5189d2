"""A bundle in its three worlds: transformers, llama.cpp and ourselves give the same ids and the same answers."""

import ast
import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.small_student import LABELS, TEXTS, small_model, small_tokenizer, write_checkpoint

from bundle import parity
from bundle.card import render_card
from bundle.export import Origin, describe_run, export, write_bundle
from bundle.gguf import DTYPES, write_gguf
from bundle.load import Student, load_student
from bundle.manifest import NATIVE, Manifest, check_files, list_files, read_manifest, write_manifest
from bundle.modelfile import ollama_settings, render_modelfile
from bundle.parity import TOLERANCE, weight_errors
from bundle.verify import verify
from cli.runs import bundle_to_ship
from distill.backbone.architecture import BackboneConfig
from distill.backbone.generate import generate
from distill.backbone.gguf_names import interleave
from distill.backbone.model import rotary_tables, rotate, save_backbone
from distill.config import CaptureSettings, DreamingConfig, ExportSettings, Settings
from distill.corpus.traces import TraceStore
from distill.dream.output_decoder import Splitter
from distill.errors import BadInput, CorruptFile, MissingStage, ParityError, RunMismatch
from distill.events import Event
from distill.run import Run, sha256_file
from distill.student.grammar import dream_size
from distill.teacher.licenses import License
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.protocol import TeacherInfo
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import go_template, prompt_ids
from distill.tokens.sentence_piece import from_model, train_model
from distill.training.checkpoint import write_checksums
from distill.training.start import start_settings
from distill.turns import joined

PROMPTS = ["What happens when you drop a ball?", "Is it wet? Dream of ⟨the rain⟩ wetting a café.", "12 + 30 = 42!"]
SYSTEM = "Answer in one sentence."
ANSWERS = [
    [PROMPTS[0], "The ball falls to the floor."],
    [PROMPTS[1], "In the street, it is wet 🙂."],
    ["Long", "rain " * 90],
]
TERMS = "Apache License\nVersion 2.0, January 2004\n\nYou may reproduce $it and distribute copies."


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> StudentTokenizer:
    return small_tokenizer(smollm2)


@pytest.fixture(scope="module")
def student(tokenizer: StudentTokenizer) -> Student:
    return Student("tiny", small_model(tokenizer), tokenizer, SYSTEM)


@pytest.fixture(scope="module")
def published(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified bundle. Don't alter it."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    provenance = {
        "teacher": {"name": "smollm2", "digest": "sha256:1"},
        "began_as": "teacher",
        "prompts": ["everyday"],
        "checkpoint": "step-1",
    }
    license = License("apache-2.0", link="https://www.apache.org/licenses/LICENSE-2.0", text=TERMS)
    origin = Origin("tiny", provenance, None, PROMPTS, ANSWERS, license=license)
    write_bundle(folder, student, ExportSettings(system=SYSTEM), origin)
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def pieces_of(answer: Any) -> dict[str, str]:
    parts = {"thinking": "", "content": ""}
    for kind, text in answer:
        parts[kind] += text
    return parts


# The three worlds.


def test_transformers_loads_it_and_answers_alike(published: Path, student: Student) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(published, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(published, local_files_only=True)
    for prompt in PROMPTS:
        ids = prompt_ids(student.tokenizer, prompt, True)
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert inputs["input_ids"][0].tolist() == ids
        theirs = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
        ours = generate(student.model, [ids], max_tokens=32, stop_ids=[student.tokenizer.eos_id])[0]
        assert theirs == ours
        assert tokenizer.decode(ours) == student.tokenizer.decode(ours)


def test_a_batch_in_transformers_answers_as_each_prompt_alone(published: Path, student: Student) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(published, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(published, local_files_only=True)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", student.model.config.context)
    chats = [[{"role": "user", "content": prompt}] for prompt in (*PROMPTS, "Hm")]
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    answers = [
        model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
        for inputs in (
            tokenizer.apply_chat_template(chats, padding=True, **how),
            *(tokenizer.apply_chat_template(chat, **how) for chat in chats),
        )
    ]
    pad = tokenizer.pad_token_id
    together, *alone = [[[i for i in row if i != pad] for row in batch] for batch in answers]
    assert together == [row for (row,) in alone]
    assert len({tuple(row) for row in together}) == len(chats)


def test_conversations_have_the_same_ids_everywhere(published: Path) -> None:
    talk = [("user", PROMPTS[0]), ("assistant", "It falls."), ("user", PROMPTS[1])]
    report = verify(published, prompts=[joined(talk), joined([("system", "Be kind."), *talk])])
    assert report.ok, report.checks
    assert report.numbers["prompts"] == 2


def test_verify_blesses_it(published: Path) -> None:
    report = verify(published)
    assert report.ok, report.rows()
    assert report.numbers["identical"] == len(PROMPTS)
    assert report.numbers["largest_difference"] < 1e-4
    names = [name for name, _, _ in report.rows()]
    assert "prompt ids, transformers" in names
    assert {"greedy tokens, shipped f16", "prompt ids, shipped f16"} <= {*names}
    assert read_manifest(published).parity["identical"] == len(PROMPTS)


def test_prompts_that_leave_no_room_shorten_nothing(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none leaves all, those that leave some are asked, and other questions where none does; where these leave
    nothing either, all that fit."""
    found = list[tuple[int, int]]()
    monkeypatch.setattr(
        "bundle.verify._Verification.run", lambda self, *_: found.append((len(self.asked), self.max_tokens))
    )
    student = load_student(published)
    around = len(prompt_ids(student.tokenizer, "", True, student.system))

    def leaving(room: int) -> str:
        word = len(student.tokenizer.encode(" rain"))
        return " rain" * ((student.model.config.context - around - room) // word)

    some, less, none = leaving(30), leaving(8), leaving(0) + " rain"
    for prompts in ([PROMPTS[0], some], [some] * 10, [some, less], [less], [none]):
        verify(published, prompts=prompts)
    verify(published, prompts=[none, *PROMPTS, some], most=2)
    monkeypatch.setattr("bundle.verify.QUESTIONS", (none,))
    verify(published, prompts=[less, less, none])
    assert found == [(1, 48), (10, 30), (1, 30), (4, 48), (4, 48), (2, 48), (2, 8)]


def test_bits_per_byte_are_those_of_transformers(published: Path, student: Student) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(published, local_files_only=True)
    nats, size = 0.0, 0
    for prompt, answer in ANSWERS:
        context, said = prompt_ids(student.tokenizer, prompt, False, SYSTEM), student.tokenizer.encode(answer)[:64]
        labels = torch.tensor([[-100] * len(context) + said])
        nats += model(torch.tensor([context + said]), labels=labels).loss.item() * len(said)
        size += len(b"".join(student.tokenizer.token_bytes(token) for token in said))
    expected = nats / np.log(2) / size
    manifest = read_manifest(published)
    assert manifest.verification_answers == ANSWERS
    assert manifest.parity["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert manifest.parity["shipped_bits_per_byte"] == pytest.approx(expected, rel=1e-2)
    assert f"{expected:.3f} in float32 (3 answers, without a dream)" in (published / "README.md").read_text(
        encoding="utf-8"
    )


def test_four_bits_pass_the_gate_and_tell_what_they_cost(student: Student, tmp_path: Path) -> None:
    origin = Origin("tiny", verification_prompts=PROMPTS, verification_answers=ANSWERS)
    summary = write_bundle(tmp_path / "small", student, ExportSettings(dtype="q4_0", system=SYSTEM), origin)
    assert summary["shipped_bits_per_byte"] != summary["bits_per_byte"]
    assert summary["gguf_bytes"] < (tmp_path / "small" / "model.safetensors").stat().st_size / 3
    checks = read_manifest(tmp_path / "small").parity["checks"]
    assert checks["bits per byte, shipped q4_0"].startswith("ok: ")


def test_what_ships_may_not_cost_much_more(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = parity.engine_nats
    monkeypatch.setattr("bundle.parity.engine_nats", lambda *given: 1.05 * real(*given))
    report = verify(published)
    assert not report.ok
    assert report.summary.startswith("bits per byte, shipped f16: ")
    assert "on 3 held-out answers" in report.summary


def test_a_bundle_of_before_without_answers_still_verifies(copy: Path) -> None:
    path = copy / "bundle.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["verification_answers"]
    path.write_text(json.dumps(content), encoding="utf-8")
    report = verify(copy)
    assert report.ok
    assert "shipped_bits_per_byte" not in report.numbers


def test_the_command_offers_every_dtype() -> None:
    from distill.ranges import CHOICES

    assert tuple(DTYPES) == CHOICES["export.dtype"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_loads_in_llama_cpp(dtype: str, student: Student, tmp_path: Path) -> None:
    path, model = tmp_path / "x.gguf", student.model
    write_gguf(model.state_dict(), model.config, student.tokenizer, path, dtype, {"general.name": "tiny"})
    errors = weight_errors(path, model.state_dict(), model.config)
    vocabulary = "Q8_0" if dtype[:2] in ("q4", "q5") else DTYPES[dtype][0].name
    assert errors["model.embed_tokens.weight"][0] == vocabulary
    assert {kind for kind, _ in errors.values()} == {DTYPES[dtype][0].name, vocabulary, "F32"}
    assert all(error <= TOLERANCE[kind] for kind, error in errors.values())
    with LlamaCpp(path, exact=True, context=256, threads=1) as engine:
        for prompt in PROMPTS:
            ids = prompt_ids(student.tokenizer, prompt, False)
            assert engine.tokenize(student.tokenizer.decode(ids)) == ids
            theirs = engine.complete(ids, max_tokens=24).ids
            if dtype == "f32":
                assert theirs == generate(model, [ids], max_tokens=24, stop_ids=[student.tokenizer.eos_id])[0]
            assert len(theirs) > 1
    assert list(tmp_path.iterdir()) == [path]


def test_untied_weights_and_rows_that_do_not_quantize(tokenizer: StudentTokenizer, tmp_path: Path) -> None:
    model = small_model(tokenizer, ffn=72, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.5)
    notes: list[Event] = []
    for dtype in ("f32", "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        write_gguf(model.state_dict(), model.config, tokenizer, path, dtype, listen=notes.append)
        kinds = {name: kind for name, (kind, _) in weight_errors(path, model.state_dict(), model.config).items()}
        with LlamaCpp(path, exact=True, context=256, threads=1) as engine:
            ids = prompt_ids(tokenizer, PROMPTS[0])
            theirs = engine.complete(ids, max_tokens=24).ids
        if dtype == "f32":
            assert theirs == generate(model, [ids], max_tokens=24, stop_ids=[tokenizer.eos_id])[0]
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "F16"
    assert kinds["model.layers.0.mlp.up_proj.weight"] == kinds["lm_head.weight"] == "Q8_0"
    assert [note.message for note in notes] == [
        f"model.layers.{layer}.mlp.down_proj.weight: rows of 72 don't fit Q8_0; kept in F16" for layer in (0, 1)
    ]


def test_the_sentencepiece_kind_is_bundled_too(tmp_path: Path) -> None:
    tokenizer = from_model(train_model(TEXTS * 3, 340), LABELS)
    student = Student("pieces", small_model(tokenizer), tokenizer)
    origin = Origin("pieces", verification_prompts=[*PROMPTS, "naïve 中文 🙂 tabs\tand\nlines"])
    write_bundle(tmp_path / "bundle", student, ExportSettings(dtype="q8_0"), origin)
    assert verify(tmp_path / "bundle").ok
    fields = GGUFReader(tmp_path / "bundle" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False


def test_gguf_says_what_a_loader_needs(published: Path, student: Student) -> None:
    fields = {name: field.contents() for name, field in GGUFReader(published / "model.gguf").fields.items()}
    config, tokenizer = student.model.config, student.tokenizer
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "tiny"
    assert fields["distill.teacher"] == "smollm2"
    assert fields["llama.rope.dimension_count"] == config.head_dim
    assert fields["llama.attention.head_count_kv"] == config.kv_heads
    assert fields["llama.context_length"] == config.context
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.pad_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    types = fields["tokenizer.ggml.token_type"]
    assert [types[i] for i in (tokenizer.pad_id, tokenizer.start_id, tokenizer.eos_id)] == [3, 3, 3]
    assert [types[i] for i in (tokenizer.think_id, *tokenizer.lens_ids, *tokenizer.image_ids)] == [4] * (
        5 + len(LABELS)
    )
    assert all(tensor.name != "output.weight" for tensor in GGUFReader(published / "model.gguf").tensors)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_interleaving_keeps_attention_scores(heads: int, half: int, place: int) -> None:
    """Rotating neighbouring pairs (llama.cpp) of reordered rows gives the scores of rotating halves (ours)."""
    size = 2 * half
    generator = np.random.default_rng(place)
    q, k = generator.normal(size=(2, heads * size, 5)).astype(np.float32)
    x = generator.normal(size=5).astype(np.float32)
    config = BackboneConfig(10, heads * size, 1, heads, heads, 8, 64, rope_theta=10_000.0)
    cos, sin = (table[[place, 3]] for table in rotary_tables(config, place + 4))

    def halves(weight: np.ndarray, row: int) -> np.ndarray:
        vectors = torch.from_numpy(weight @ x).reshape(heads, size)
        return rotate(vectors, cos[row], sin[row]).numpy()

    def pairs(weight: np.ndarray, row: int) -> np.ndarray:
        vectors = (interleave(weight, heads) @ x).reshape(heads, half, 2)
        numbers = vectors[..., 0] + 1j * vectors[..., 1]
        turned = numbers * (cos[row, :half] + 1j * sin[row, :half]).numpy()
        return np.stack((turned.real, turned.imag), -1).reshape(heads, size)

    ours, theirs = (np.sum(f(q, 0) * f(k, 1), axis=-1) for f in (halves, pairs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


# What is refused.


def test_a_tokenizer_read_in_another_encoding_is_not_blessed(copy: Path) -> None:
    """All digests fit: it was read as Latin-1 before it was written."""
    path, meta = copy / "tokenizer.json", copy / "dream_tokenizer.json"
    path.write_text(path.read_bytes().decode("iso-8859-1"), encoding="utf-8")
    about = json.loads(meta.read_text(encoding="utf-8"))
    about["files"][path.name] = sha256_file(path)
    meta.write_text(json.dumps(about), encoding="utf-8")
    write_manifest(copy, read_manifest(copy))
    report = verify(copy)
    assert not report.ok
    assert "dream_tokenizer.json: can't be read" in report.summary


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "tokenizer.json", "Modelfile"])
def test_an_altered_byte_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    report = verify(copy)
    assert not report.ok
    assert name in report.summary
    assert "SHA-256" in report.summary
    if name in NATIVE:
        with pytest.raises(CorruptFile, match=name):
            load_student(copy)


def test_missing_cut_and_foreign_files_are_refused(copy: Path) -> None:
    manifest = read_manifest(copy)
    check_files(copy, manifest)
    (copy / "tokenizer.model").write_text("wins over tokenizer.json in Ollama", encoding="utf-8")
    with pytest.raises(CorruptFile, match="not listed"):
        check_files(copy, manifest)
    (copy / "tokenizer.model").unlink()
    (copy / "model.gguf").write_bytes((copy / "model.gguf").read_bytes()[:-7])
    with pytest.raises(CorruptFile, match=r"model\.gguf: has \d+ bytes, not \d+"):
        check_files(copy, manifest)
    (copy / "config.json").unlink()
    with pytest.raises(CorruptFile, match=r"config\.json: is missing"):
        load_student(copy)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 1, "files": 3}', '{"version": 1, "files": {"../x": {}}}']
)
def test_a_broken_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content, encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"bundle\.json: can't be read") as raised:
        read_manifest(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_newer_bundle_and_no_bundle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="dream export"):
        read_manifest(tmp_path)
    (tmp_path / "bundle.json").write_text('{"version": 2}', encoding="utf-8")
    with pytest.raises(BadInput, match="version 2"):
        verify(tmp_path)


def test_another_students_gguf_is_not_blessed(copy: Path, tokenizer: StudentTokenizer) -> None:
    other = small_model(tokenizer, seed=1)
    write_gguf(other.state_dict(), other.config, tokenizer, copy / "model.gguf", "f16")
    write_manifest(copy, read_manifest(copy))
    report = verify(copy)
    assert not report.ok
    assert "weights" in report.summary


def test_a_gguf_that_reads_prompts_otherwise_is_not_blessed(copy: Path, smollm2: Path, student: Student) -> None:
    """The weights are the student's; two words of its vocabulary have changed places."""
    labels = [LABELS[1], LABELS[0], *LABELS[2:]]
    other, model = small_tokenizer(smollm2, labels=labels), student.model
    write_gguf(model.state_dict(), model.config, other, copy / "model.gguf", "f16")
    manifest = read_manifest(copy)
    asked = [f"Dream of ⟨{LABELS[0]}⟩."]
    write_manifest(copy, replace(manifest, verification_prompts=asked))
    report = verify(copy)
    assert not report.ok
    assert report.summary == f"prompt ids, shipped f16: 6 of 8 identical; other ids for {asked[0]!r}"


def test_an_export_whose_parity_fails_is_not_published(
    copy: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy / "bundle.json").read_bytes()
    monkeypatch.setattr("bundle.gguf.to_gguf", lambda name, weight, config: weight)
    with pytest.raises(ParityError, match=r"not published: weights: .*; greedy tokens, f32 GGUF: 0 of 3"):
        write_bundle(copy, student, ExportSettings(dtype="f32"), Origin("tiny", verification_prompts=PROMPTS))
    assert (copy / "bundle.json").read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_tokenizer_that_does_not_fit_is_refused(student: Student, smollm2: Path, tmp_path: Path) -> None:
    other = small_tokenizer(smollm2, labels=LABELS[:-1])
    folder = write_checkpoint(tmp_path / "step-000001", student.model, other)
    with pytest.raises(RunMismatch, match="tokenizer has 434 tokens, the weights 435"):
        load_student(folder)
    with pytest.raises(RunMismatch, match="434"):
        write_gguf(student.model.state_dict(), student.model.config, other, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_what_is_no_student_is_named(tmp_path: Path, student: Student) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "bare").mkdir()
    save_backbone(student.model, tmp_path / "bare")
    for path, words in (
        ("nowhere", "no such run"),
        ("model.gguf", "is a file"),
        ("", "is no run"),
        ("bare", "no tokenizer/"),
    ):
        with pytest.raises(BadInput, match=words):
            load_student(tmp_path / path)
    write_checkpoint(tmp_path / "cut", student.model, student.tokenizer)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        load_student(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "q4"}, "export.dtype"),
        ({"temperature": -1.0}, "export.temperature"),
        ({"context": 512}, "export.context"),
        ({"system": 'say """'}, "export.system"),
    ],
)
def test_settings_that_cannot_be_shipped(change: dict[str, Any], words: str, student: Student, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        write_bundle(tmp_path / "bundle", student, ExportSettings(**change), Origin("tiny"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_asked_as_its_run(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(capture=CaptureSettings(system="Be brief."), dreaming=DreamingConfig(sure=0.9))
    settings.mine.steps = 9
    run = Run.create(tmp_path / "run", settings)
    checkpoint = write_checkpoint(run.checkpoints / "step-000007", student.model, student.tokenizer)
    monkeypatch.chdir(run.checkpoints)
    for path in (checkpoint, Path("step-000007")):
        found = load_student(path)
        assert (found.name, found.system, found.steps, found.sure) == ("step-000007", "Be brief.", 9, 0.9)
    alone = load_student(Path(shutil.copytree(checkpoint, tmp_path / "alone")))
    assert (alone.system, alone.steps, alone.sure) == ("", student.steps, 1.0)


# The export stage.


def test_a_run_is_exported_and_exported_again_only_when_it_changed(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "my-student", Settings(capture=CaptureSettings(system="Be brief.")))
    with pytest.raises(MissingStage, match="dream train"):
        export(run)
    with pytest.raises(MissingStage):
        load_student(run.path)
    checkpoint = write_checkpoint(run.checkpoints / "step-000007", student.model, student.tokenizer)
    (checkpoint / "loop.json").write_text(json.dumps({"step": 7, "best_step": 7}), encoding="utf-8")
    write_checksums(checkpoint)
    run.record("capture", {"system": "Be brief."}, {}, {}, 1.0)
    run.record("mine", {"steps": run.settings.mine.steps}, {}, {}, 1.0)
    run.record("train", {"retrieve_limit": 3, "pause": True}, {"checkpoints/step-000007": "0"}, {}, 1.0)
    summary = export(run)
    assert summary["checkpoint"] == "step-000007"
    told_of_it = read_manifest(run.bundle).provenance
    assert (told_of_it["facts"], told_of_it["dreams"]) == (3, False)
    # As a command leaves them that was stopped before it made such a student.
    run.settings.capture.system, run.settings.mine.steps, run.settings.train.retrieve_limit = "Be long.", 9, 5
    Run.create(run.path, run.settings)
    assert summary["identical"] == summary["prompts"]
    stamp = (run.bundle / "bundle.json").stat().st_mtime_ns
    assert export(run) == summary
    run.settings.dreaming.sure = 0.9
    export(run)
    assert read_manifest(run.bundle).provenance["sure"] == 0.9, "when it dreams is a part of the bundle"
    run.settings.dreaming.sure = 1.0
    assert export(run) == summary
    stamp = (run.bundle / "bundle.json").stat().st_mtime_ns
    assert run.stale("export") == []
    told = list[Event]()
    other = Run.open(shutil.copytree(run.path, tmp_path / "other"))
    assert [bundle_to_ship(one.path, told.append) for one in (run, other)] == [run.bundle, other.bundle]
    assert ["the run was called my-student" in event.message for event in told] == [True]

    def refuse(_final: Path, made: Student, *_: object) -> None:
        raise ParityError(made.name)

    with monkeypatch.context() as patched:
        patched.setattr("bundle.export.write_bundle", refuse)
        with pytest.raises(ParityError, match=r"^other$"):
            export(other)
    assert (run.bundle / "bundle.json").stat().st_mtime_ns == stamp
    whole = (run.bundle / "model.gguf").read_bytes()
    (run.bundle / "model.gguf").write_bytes(b"x" + whole[1:])
    said = list[Event]()
    assert export(run, said.append) == summary
    assert "model.gguf: was altered" in next(event.message for event in said if event.kind == "warning")
    check_files(run.bundle, read_manifest(run.bundle))
    for folder in (run.path, run.bundle):
        found = load_student(folder)
        assert (found.name, found.system, found.steps) == ("my-student", "Be brief.", student.steps)
    assert "step-000007" in (run.bundle / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in "".join(
        path.read_text(encoding="utf-8") for path in run.bundle.iterdir() if path.suffix in (".json", ".md", "")
    )
    run.settings.export.dtype = "f32"
    export(run)
    assert read_manifest(run.bundle).dtype == "f32"
    stamp = (run.bundle / "bundle.json").stat().st_mtime_ns
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] *= 1.25
    save_file(weights, checkpoint / "model.safetensors")
    (checkpoint / "checksums.json").unlink()
    write_checksums(checkpoint)
    export(run)
    assert (run.bundle / "bundle.json").stat().st_mtime_ns != stamp, "another student of as many steps"
    shutil.rmtree(run.checkpoints)
    assert load_student(run.path).name == "my-student", "without checkpoints the bundle serves"


def test_what_is_not_the_bundles_is_kept_hidden_or_not(student: Student, tmp_path: Path) -> None:
    final, said = tmp_path / "bundle", list[Event]()
    how = ExportSettings(dtype="f32"), Origin("a"), said.append
    (final / "notes").mkdir(parents=True)
    (final / "notes" / "one.md").write_text("mine", encoding="utf-8")
    write_bundle(final, student, *how)
    kept = tmp_path / "bundle.kept"
    assert (kept / "notes" / "one.md").read_text(encoding="utf-8") == "mine", "a folder without a manifest was not ours"
    for number in range(3):
        (final / ".git").mkdir(exist_ok=True)
        (final / ".git" / f"{number}").write_text("mine", encoding="utf-8")
    for name in ("README.md", "notes/README.md", "model.gguf"):  # a card, one edits; weights, no
        (final / name).parent.mkdir(exist_ok=True)
        (final / name).write_text("mine", encoding="utf-8")
    said.clear()
    write_bundle(final, student, *how)
    assert sorted(path.name for path in (kept / ".git").iterdir()) == ["0", "1", "2"]
    told, edited, other = [event.message for event in said if event.kind == "warning"]
    assert ".git/0 and 2 more in its folder: none of the bundle's files; kept in" in told
    assert edited == f"{final / 'README.md'}: was edited; kept in {kept / 'README.md'}"
    assert (kept / "README.md").read_text(encoding="utf-8") == "mine"
    assert "notes/README.md: none of the bundle's files; kept in" in other
    assert {path.name for path in kept.iterdir()} == {"notes", ".git", "README.md"}, "nothing of the bundle's own"


def test_modelfile_holds_the_template_and_the_parameters(published: Path) -> None:
    text = (published / "Modelfile").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert "FROM ./model.gguf" in lines
    assert f'TEMPLATE """{go_template()}"""' in text
    assert f'SYSTEM """{SYSTEM}"""' in lines
    assert {"PARAMETER stop <|im_end|>", "PARAMETER temperature 0.7", "PARAMETER num_ctx 256"} <= set(lines)
    assert "SYSTEM" not in render_modelfile("x", "./x.gguf", ollama_settings("", 0.5, 100))
    assert not any(path.suffix in (".pkl", ".pt", ".bin") for path in published.rglob("*"))
    assert set(read_manifest(published).files) == set(list_files(published)) >= set(NATIVE)


# Whose it is.


def test_inherited_weights_carry_their_licence(published: Path) -> None:
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "Use `model.gguf`, as the Modelfile does." in card
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "apache-2.0",
        "license_link": "https://www.apache.org/licenses/LICENSE-2.0",
    }
    assert "began as those of smollm2, and carry its licence: apache-2.0 (whole in `LICENSE`)." in card
    assert (published / "LICENSE").read_text(encoding="utf-8") == f"{TERMS}\n"
    assert f'LICENSE """{TERMS}"""' in (published / "Modelfile").read_text(encoding="utf-8")
    assert GGUFReader(published / "model.gguf").fields["general.license"].contents() == "apache-2.0"
    assert read_manifest(published).provenance["license"]["name"] == "apache-2.0"


def card_of(license: License, architecture: str = "llama", asked: str = "", **provenance: Any) -> str:
    about = {"teacher": {"name": "t", "is_model": True}, **provenance, "license": license.to_json()}
    manifest = Manifest("tiny", "f16", {}, about, [asked] if asked else [])
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden": 8,
        "layers": 1,
        "heads": 1,
        "kv_heads": 1,
        "ffn": 8,
        "context": 16,
    }
    return render_card(manifest, BackboneConfig(**sizes, architecture=architecture), 1, {}, [])


def test_the_card_names_the_architecture() -> None:
    for kind, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")):
        assert f"1 × 8 ({name} architecture)" in card_of(License(), kind)


@pytest.mark.parametrize("asked", ['Sum up:\n"a\tball" \\ falls', "Ein Ball fällt 🙂\u2028Was dann?", "{a}"])
def test_the_cards_example_is_python_whatever_is_asked(asked: str) -> None:
    (line,) = (line for line in card_of(License(), asked=asked).split("\n") if line.startswith("    chat = "))
    assert ast.literal_eval(line.partition(" = ")[2]) == [{"role": "user", "content": asked}]


def test_the_card_tells_unknown_terms_odd_ones_and_a_beginning_from_chance() -> None:
    unknown = card_of(License(), began_as="teacher")
    assert yaml.safe_load(unknown.split("---\n")[1]) == {"license": "unknown"}
    assert "carry its licence, which is unknown" in unknown
    odd = card_of(License("other", "My: terms", "https://x.org"), began_as="checkpoint")
    front = {"license": "other", "license_name": "My: terms", "license_link": "https://x.org"}
    assert yaml.safe_load(odd.split("---\n")[1]) == front
    assert "began as those of checkpoint" in odd
    chance = card_of(License(), began_as="", teacher={"name": "t", "is_model": True, "license": {"name": "mit"}})
    assert chance.startswith("# tiny")
    assert "began from chance: none of another model are in it. The licence of its teacher, t: mit." in chance
    assert "licence of its teacher" not in card_of(License(), began_as="", teacher={"name": "causal-world"})


def test_a_run_tells_whose_weights_it_ships(student: Student, small_run: Run, tmp_path: Path) -> None:
    """Inherited: the licence is that of the traces' teacher. From chance: none is claimed. Else the other model's."""
    run = Run.create(tmp_path / "r", Settings(teacher=small_run.settings.teacher))
    shutil.copyfile(small_run.traces, run.traces)
    checkpoint = write_checkpoint(run.checkpoints / "step-000007", student.model, student.tokenizer)
    run.record("start", start_settings(run), {"config.yaml": sha256_file(run.path / "config.yaml")}, {}, 1.0)
    origin = describe_run(run, checkpoint)
    assert origin.provenance["began_as"] == "teacher"
    assert origin.license.name == origin.provenance["teacher"]["license"]["name"] == "apache-2.0"
    assert [prompt for prompt, _ in origin.verification_answers] == origin.verification_prompts
    with TraceStore(run.traces, readonly=True) as store:
        said = {prompt: answer for _, prompt, answer in store.answers(held_out=True)}
    assert dict(origin.verification_answers) == said
    run.record("start", start_settings(run), {}, {}, 1.0)  # nothing could be read
    origin = describe_run(run, checkpoint)
    assert not origin.license.name
    assert origin.provenance["began_as"] == ""
    assert origin.provenance["teacher"]["license"]["name"] == "apache-2.0"
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "LICENSE").write_text("MIT License", encoding="utf-8")
    run.settings.student.init = str(tmp_path / "llama")
    origin = describe_run(run, checkpoint)
    assert (origin.license.name, origin.provenance["began_as"]) == ("mit", "llama")


def test_whose_weights_it_ships_is_told_by_the_checkpoint(student: Student, small_run: Run, tmp_path: Path) -> None:
    """Whatever was mined or set since, and though its start is gone."""
    run = Run.create(tmp_path / "r", Settings(teacher=small_run.settings.teacher))
    shutil.copyfile(small_run.traces, run.traces)
    checkpoint = write_checkpoint(run.checkpoints / "step-000007", student.model, student.tokenizer)
    fixed: dict[str, Any] = {"start": "5" * 64, "student": {"init": "teacher"}}
    (checkpoint / "loop.json").write_text(json.dumps({"step": 7, "settings": fixed}), encoding="utf-8")
    run.settings.student.init = "chance"
    run.record("mine", {}, {}, {}, 1.0)
    origin = describe_run(run, checkpoint)
    assert (origin.provenance["began_as"], origin.license.name) == ("teacher", "apache-2.0")
    fixed["start"] = None
    (checkpoint / "loop.json").write_text(json.dumps({"step": 7, "settings": fixed}), encoding="utf-8")
    run.record("start", start_settings(run), {"start/model.safetensors": "5"}, {}, 1.0)
    assert describe_run(run, checkpoint).provenance["began_as"] == ""


def test_a_datasets_student_carries_the_licence_of_the_weights_that_were_named(
    student: Student, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "r", Settings(capture=CaptureSettings(dataset="causal-world")))
    with TraceStore(run.traces) as store:
        store.put_teacher(TeacherInfo("dataset:causal-world", "causal-world", "1", "2", "3", False), None)
    checkpoint = write_checkpoint(run.checkpoints / "step-000007", student.model, student.tokenizer)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "LICENSE").write_text("MIT License", encoding="utf-8")
    settings = {**start_settings(run), "weights": str(tmp_path / "llama")}
    run.record("start", settings, {"start/model.safetensors": "5"}, {"license": "mit"}, 1.0)
    for text in ("MIT License", ""):
        origin = describe_run(run, checkpoint)
        assert (origin.provenance["began_as"], origin.license.name, origin.license.text) == ("llama", "mit", text)
        shutil.rmtree(tmp_path / "llama", ignore_errors=True)  # its start tells the licence's name still
    card = card_of(origin.license, **origin.provenance)
    assert "Its weights began as those of llama, and carry its licence: mit" in card


# Talking.


def test_chat_streams_what_answer_gives_whole(published: Path) -> None:
    student = load_student(published)
    assert student.system == SYSTEM
    for think in (True, False):
        how: dict[str, Any] = {"think": think, "temperature": 0.9, "max_tokens": 120, "seed": 3}
        parts = pieces_of(student.chat([{"role": "user", "content": PROMPTS[0]}], **how))
        answer = student.answer(PROMPTS[0], **how)
        assert (parts["thinking"], parts["content"]) == (answer.dream_text, answer.text)
        assert answer.text


def test_tokens_asked_for_are_of_the_answer_alone(published: Path) -> None:
    """A dream, which has dozens of tokens, doesn't shorten the answer after it."""
    student = load_student(published)
    tries: list[dict[str, Any]] = [{"temperature": 1.0, "seed": seed} for seed in range(40)]
    how = next(how for how in tries if student.answer(PROMPTS[0], max_tokens=3, **how).dream_text)
    for think in (True, False):
        one, three = (student.answer(PROMPTS[0], think=think, max_tokens=n, **how) for n in (1, 3))
        assert one.dream_text == three.dream_text
        assert bool(one.dream_text) == think
        assert one.text
        assert three.text.startswith(one.text)


def test_what_was_cut_or_left_out_is_noted(published: Path) -> None:
    student = load_student(published)
    question = {"role": "user", "content": PROMPTS[0]}
    greedy: dict[str, Any] = {"temperature": 0.0, "think": False}

    def noted(turns: list[Any], **how: Any) -> tuple[str, list[str]]:
        notes: list[str] = []
        return pieces_of(student.chat(turns, **greedy, **how, note=notes.append))["content"], notes

    cut = "cut: it didn't end within its tokens, or within the context"
    assert noted([question], max_tokens=2)[1] == [cut]
    assert noted([question], max_tokens=2, dream={})[1] == [cut]
    turns = [question, {"role": "assistant", "content": "word " * 100}] * 3
    left = f"the first 6 messages are left out: all don't fit a context of {student.model.config.context} tokens"
    assert noted([*turns, question], max_tokens=2)[1][0] == left
    assert noted([{"role": "system", "content": "Be kind."}], max_tokens=2)[1] in ([], [cut])
    mute = deepcopy(student.model)  # whose every answer ends at once
    ids = torch.tensor([student.prompt_ids([question], False)])
    states = [mute.hidden(ids)[0, -1], mute.hidden(torch.cat((ids, ids[:, -1:]), 1))[0, -1]]
    mute.lm_head = torch.nn.Linear(mute.config.hidden, mute.config.vocab_size, bias=False)
    mute.lm_head.weight.data.zero_()[student.tokenizer.eos_id] = sum(states)
    notes: list[str] = []
    for how in ({}, {"dream": {}}):
        pieces = replace(student, model=mute).chat([question], **greedy, max_tokens=2, note=notes.append, **how)
        assert pieces_of(pieces)["content"] == ""
    assert notes == []


def split(tokenizer: StudentTokenizer, ids: list[int]) -> tuple[dict[str, str], Splitter]:
    splitter = Splitter(tokenizer)
    return pieces_of(piece for token in ids if (piece := splitter.push(token))), splitter


def test_dream_and_answer_are_parted_by_their_tokens(tokenizer: StudentTokenizer) -> None:
    written = (
        "<think>\n⟨spatial⟩⟨a ball⟩⟨release⟩⟨falls to the floor⟩⟨temporal⟩\n</think>\nIt falls.\n\nSo <think> I do.\n"
    )
    ids = [*tokenizer.encode(written, special=True), tokenizer.eos_id]
    parts, splitter = split(tokenizer, ids)
    assert parts["thinking"] == "⟨spatial⟩⟨a ball⟩⟨release⟩⟨falls to the floor⟩⟨temporal⟩"
    assert parts["content"] == "It falls.\n\nSo <think> I do."
    assert splitter.thought[1] == tokenizer.lens_ids[0]
    assert split(tokenizer, tokenizer.encode("<think>\n</think>\nYes", special=True))[0] == {
        "thinking": "",
        "content": "Yes",
    }
    assert split(tokenizer, tokenizer.encode("Only an answer"))[0]["content"] == "Only an answer"


@given(st.text(), st.text())
@settings(deadline=None, max_examples=200)
def test_characters_come_whole(tokenizer: StudentTokenizer, dream: str, answer: str) -> None:
    format = (
        [tokenizer.think_id, tokenizer.newline_id],
        [tokenizer.newline_id, tokenizer.end_think_id, tokenizer.newline_id],
    )
    ids = [*format[0], *tokenizer.encode(dream), *format[1], *tokenizer.encode(answer), tokenizer.eos_id]
    splitter = Splitter(tokenizer)
    pieces = [piece for token in ids if (piece := splitter.push(token))]
    parts = pieces_of(pieces)
    assert parts == {"thinking": dream.strip(), "content": answer.strip()}


def test_half_a_character_at_the_end_is_dropped(tokenizer: StudentTokenizer) -> None:
    ids = tokenizer.encode("fine 🙂")
    assert len(ids) > 3
    assert split(tokenizer, ids[:-1])[0]["content"] == "fine"


def test_a_long_conversation_leaves_room_for_an_answer_after_a_dream(student: Student) -> None:
    messages: list[Any] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It falls."}] * 20
    context, question = student.model.config.context, [{"role": "user", "content": "And then?"}]
    alone = student.prompt_ids(question, None)
    turn = len(student.prompt_ids([*messages[:2], *question], None)) - len(alone)
    for think, room in ((None, 3 + dream_size(student.steps) + 32), (True, 101), (False, 32)):
        left = context - len(student.prompt_ids([*messages, *question], think))
        assert room <= left < room + turn, think
    begun = [*question, {"role": "assistant", "content": "It"}]
    assert context - len(student.prompt_ids([*messages, *begun], None)) < 32 + turn, "its dream is written already"
    small = student.prompt_ids([*messages, *question], None, 110)
    assert len(alone) < len(small) <= 55, "half of a small context is for what was said before"


def test_a_long_conversation_forgets_its_oldest_turns(student: Student) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    for i in range(20):
        messages += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "The ball falls."}]
    messages.append({"role": "user", "content": "And then?"})
    text = student.tokenizer.decode(student.prompt_ids(messages, None))
    assert len(student.prompt_ids(messages, None)) < student.model.config.context
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion ")
    assert "Question 0?" not in text
    assert text.endswith("And then?<|im_end|>\n<|im_start|>assistant\n")
    short, whole = student.prompt_ids(messages, None, 100), student.prompt_ids(messages, None, whole=True)
    assert len(short) < 100
    assert student.tokenizer.decode(short).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert len(whole) > student.model.config.context
    assert "Question 0?" in student.tokenizer.decode(whole)
    with pytest.raises(BadInput, match="leave no room"):
        list(student.chat([{"role": "user", "content": "word " * 300}]))
    for begun in ({"content": "word " * 200}, {"content": "", "thinking": "word " * 200}):
        text = student.tokenizer.decode(student.prompt_ids([*messages, {"role": "assistant", **begun}], None))
        assert "And then?" in text, "what was begun keeps its question"
        assert "Question 19?" not in text
