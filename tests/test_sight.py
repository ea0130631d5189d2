"""Reading pictures themselves: natively, as transformers computes it, and by llama.cpp through mmproj.gguf."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.dinov2 import dinov2
from support.fake_ollama import engine
from support.small_student import small_model, small_tokenizer

from bundle.export import Origin, write_bundle
from bundle.install import install
from bundle.load import Student, load_student
from bundle.manifest import list_files, read_manifest, write_manifest
from bundle.verify import verify
from distill.backbone.generate import generate
from distill.config import ExportSettings
from distill.errors import BadInput, CorruptFile
from distill.events import silent
from distill.teacher.gguf_file import read_metadata
from distill.tokens.chat import PICTURE, picture_ids, render
from distill.vision import naming
from distill.vision.sight import Sight, showing

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count: int) -> list[Image.Image]:
    """Of smooth colours, some larger than it sees, some longer than wide."""
    random = np.random.default_rng(0)
    small = [Image.fromarray(random.integers(0, 256, (3, 4, 3), np.uint8)) for _ in range(count)]
    return [image.resize((28 + 9 * i, 28 + 5 * i), Image.Resampling.BICUBIC) for i, image in enumerate(small)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dinov2(tmp_path_factory.mktemp("dinov2"))


def test_features_are_transformers_own_without_the_class_token(weights: Path, tmp_path: Path) -> None:
    import transformers

    model: Any = transformers.Dinov2Model.from_pretrained(weights).eval()
    sight = Sight.new(str(weights), 42, 64, 0)
    assert (sight.patch, sight.patches) == (7, 36)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (42, 42, 3), np.uint8))
    pixels = sight.pixels(image)[None]
    with torch.no_grad():
        patches = model.embeddings.patch_embeddings(pixels)
        places = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 32), 42, 42)
        wanted = model.layernorm(model.encoder(patches + places[:, 1:]).last_hidden_state)
    assert torch.allclose(sight.features([image]), wanted, atol=1e-4)
    sight.save(tmp_path / "mmproj.gguf", "f32")
    again = Sight.load(tmp_path / "mmproj.gguf")
    assert torch.equal(again.rows([image]), sight.rows([image]))
    sight.save(tmp_path / "mmproj.gguf")
    apart = Sight.load(tmp_path / "mmproj.gguf").rows([image]) - sight.rows([image])
    assert 0 < apart.norm() < 1e-2 * sight.rows([image]).norm()
    first = Sight.new(str(weights), 42, 64, 0, share=0.5)
    with torch.no_grad():
        half = model.encoder.layer[0](patches + places[:, 1:])
    half = half[0] if isinstance(half, tuple) else half
    assert torch.allclose(first.features([image]), torch.nn.functional.layer_norm(half, (32,), eps=1e-6), atol=1e-4)
    with pytest.raises(BadInput, match=r"^see\.image_size=40: not a multiple of 7"):
        Sight.new(str(weights), 40, 64, 0)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "mmproj.gguf").read_bytes()[:-2000])
    with pytest.raises(CorruptFile, match="is cut short"):
        Sight.load(tmp_path / "cut.gguf")


def test_patches_are_named_in_the_students_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is known of each: near a thing's middle that thing and its place, far from all nothing."""
    monkeypatch.setattr(naming, "STEPS", 300)
    random, side, split = np.random.default_rng(0), 6, 4
    pictures: list[tuple[Path, dict[str, tuple[float, float]]]] = []
    for i, size in enumerate([(60, 60), (60, 30), (60, 60), (60, 60)]):
        Image.new("RGB", size).save(path := tmp_path / f"{i}.png")
        pictures.append(
            (path, {"cat": (0.26, 0.5), "owl": (0.76, 0.5)} if i < 2 else {"oboe": (0.5, 0.2 + 0.3 * (i > 2))})
        )
    what, where = naming.patch_truths(pictures, {"cat": 0, "owl": 1, "oboe": 2}, side)
    for i, (path, found) in enumerate(pictures):
        flat = Image.open(path).size[1] / 60  # it lies in the middle of a square
        for y, x in np.ndindex(side, side):
            at = ((x + 0.5) / side, 0.5 + ((y + 0.5) / side - 0.5) / flat)
            apart = {name: max(abs(at[0] - u), flat * abs(at[1] - v)) for name, (u, v) in found.items()}
            name = min(apart, key=lambda name: apart[name])
            place = {"cat": 1, "owl": 2, "oboe": 3 if i == 2 else 5}[name]
            known = ["cat", "owl", "oboe"].index(name) + 1, place
            wanted = known if apart[name] <= 0.15 else (0, 0) if apart[name] > 0.3 else (-1, -1)
            assert (what[(i * side + y) * side + x], where[(i * side + y) * side + x]) == wanted
    assert set(what) == {-1, 0, 1, 2, 3}
    told = np.concatenate([np.eye(4)[what], np.eye(6)[where]], axis=1) + random.normal(0, 0.05, (len(what), 10))
    rows = torch.from_numpy(random.normal(size=(split + 5, 64))).float()
    features = torch.from_numpy(told * random.uniform(0.2, 5, 10) + random.normal(size=10)).half()
    projector = naming.name_patches(features, (what, where), rows, 5, 0, silent)
    again = naming.name_patches(features, (what, where), rows, 5, 0, silent)
    said, known = projector(features.float()).detach(), torch.from_numpy(what >= 0)
    assert torch.equal(again(features.float()).detach(), said)
    thing, place = torch.from_numpy(what), torch.from_numpy(where)
    wanted = rows[thing] + torch.where(place[:, None] > 0, rows[split - 1 + place], 0)
    alike = torch.cosine_similarity(said, wanted, dim=1)[known]
    assert alike.min() > 0.9, alike


@pytest.fixture(scope="module")
def published(smollm2: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verified bundle of a student that reads pictures. Don't alter it."""
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = small_tokenizer(smollm2)
    sight = Sight.new(str(weights), 28, 64, 0)
    with torch.no_grad():
        sight.projector[2].get_parameter("weight").mul_(8)  # so that what it sees matters to what it says
    sight.save(folder / "mmproj.gguf")
    asked: list[tuple[str, Path]] = []
    for number, image in enumerate(pictures(20)):
        image.save(path := folder / f"{number}.png")
        asked.append((["What happens?", "Is it wet?", "A ball?"][number % 3], path))
    origin = Origin("seer", extras={"mmproj.gguf": folder / "mmproj.gguf"}, pictures=asked)
    student = Student("seer", small_model(tokenizer), tokenizer)
    write_bundle(folder / "bundle", student, ExportSettings(), origin)
    return folder / "bundle"


def test_the_pair_reads_pictures_in_llama_cpp_as_natively(published: Path) -> None:
    manifest = read_manifest(published)
    assert manifest.parity["pictures"] == 20
    assert 0 < manifest.parity["picture_error"] < 1e-3
    checks = manifest.parity["checks"]
    assert checks["greedy tokens about pictures, f32 pair"].startswith("ok: 20 of 20 prompts identical")
    assert "over 20 pictures × 16 embeddings" in checks["picture embeddings, f32 mmproj"]
    told = read_metadata(published / "mmproj.gguf")
    assert (told["general.architecture"], told["general.type"]) == ("clip", "mmproj")
    assert told["clip.vision.feature_layer"] == [told["clip.vision.block_count"]] == [2]
    assert "general.block_count" not in told
    assert "clip.block_count" not in told
    modelfile = (published / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./model.gguf\nFROM ./mmproj.gguf\n" in modelfile
    assert "DINOv2-S/14 by Meta (Apache-2.0)" in modelfile
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "DINOv2-S/14 by Meta (Apache-2.0)" in card
    assert "- `mmproj.gguf` (" in card


def test_a_student_reads_what_is_shown_before_the_question(published: Path) -> None:
    student, images = load_student(published), pictures(3)
    assert student.sight is not None
    sight, model, size = Sight.load(student.sight), student.model, student.model.config.vocab_size
    rows = sight.rows(images[:2])
    text = render([{"role": "user", "content": f"{PICTURE}{PICTURE}What happens?"}])
    ids = picture_ids(student.tokenizer, text, [range(size, size + 16), range(size + 16, size + 32)])
    before, after = (student.tokenizer.encode(part, special=True) for part in text.split(PICTURE * 2))
    assert ids == [*before, *range(size, size + 32), *after]
    # The same as embeddings in the place of ids.
    table = torch.cat([model.model.embed_tokens.weight, rows])
    wanted = model.lm_head(model.hidden(torch.zeros(1, len(ids), dtype=torch.long), embeds=table[ids][None]))[0, -1]
    shown = showing(model, rows)
    assert torch.allclose(shown(torch.tensor([ids]))[0, -1], wanted, atol=1e-4)
    assert torch.equal(shown.lm_head.weight, model.lm_head.weight)
    assert generate(shown, [ids], max_tokens=3)[0][0] == int(wanted.argmax())

    said = [student.shown(some).answer("What happens?", temperature=0.0, max_tokens=8) for some in ([], images[:1])]
    assert said[0] != said[1]
    assert said[1] == student.shown(images[:1]).answer("What happens?", temperature=0.0, max_tokens=8)
    messages: Any = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]
    asked = student.shown(images[:1]).prompt_ids([*messages, {"role": "user", "content": "C?"}], True)
    assert [id >= size for id in asked].count(True) == 16
    assert asked[: asked.index(size)] == student.prompt_ids([*messages, {"role": "user", "content": ""}], True)[:-6]


def test_more_pictures_than_the_context_holds_are_counted_as_pictures(published: Path) -> None:
    student = load_student(published)
    context = student.model.config.context
    with pytest.raises(
        BadInput, match=f"--image: {context // 16} pictures take {context // 16 * 16} tokens of a context"
    ):
        student.shown(pictures(context // 16))


def test_an_altered_projector_is_found(published: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    (copy / "mmproj.gguf").write_bytes((copy / "model.gguf").read_bytes())
    write_manifest(copy, read_manifest(copy))
    found = verify(copy)
    assert not found.ok
    assert "not a projector that we wrote" in found.summary


def test_ollama_is_sent_both_files(published: Path) -> None:
    assert "pictures/0.png" in list_files(published)
    with engine({}) as server:
        install(published, host=server.url)
        created = server.asked("/api/create")[0]
    digests = {
        name: f"sha256:{read_manifest(published).files[name]['sha256']}" for name in ("model.gguf", "mmproj.gguf")
    }
    assert created["files"] == digests
    assert "DINOv2-S/14 by Meta (Apache-2.0)" in json.dumps(created["license"])
