"""Datasets in pictures: what is asked of a picture is in it, and what is held out stays out."""

import base64
import gzip
import importlib
import io
import json
import math
import re
import sys
import tarfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from support.dinov2 import dinov2

from bench import seeing
from cli.main import dream
from distill.config import ImageTokenizerConfig, Settings, StudentSettings
from distill.corpus.capture import capture
from distill.corpus.datasets import emoji, emoji_scenes
from distill.corpus.datasets.questions import Drawn, Question, Step
from distill.corpus.datasets.stage import DATASETS, capture_dataset
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, CorruptFile, MissingDependency
from distill.events import Event, silent
from distill.exam.questions import load_exam
from distill.knowledge.mine import mine
from distill.mining.triplets import Triplet, read_triplets
from distill.run import Run
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import prompt_ids, render
from distill.tokens.image_tokens import Codebook, build_codebook
from distill.tokens.packing import Documents, pack
from distill.tokens.shown import PLACES
from distill.vision import naming
from distill.vision.album import Album, paint
from distill.vision.codebook import STRENGTHS, PictureCodebook
from distill.vision.gallery import gallery, image_tokens
from distill.vision.image_tokenizer import ImageTokenizer
from distill.vision.tokenize import tokenize
from distill.vision.triplets import learn_triplets, retrieval, shown_triplets
from distill.vision.vision_encoder import TripletEncoder, VisionEncoder

NAMES = (
    *("rat", "cow", "tiger", "rabbit", "wrench", "hammer", "clamp", "dagger", "pear", "peach", "mango", "lemon"),
    *("violin", "harp", "flute", "banjo", "door", "elevator", "chair", "mirror", "tulip", "rose", "axe", "owl"),
)
GROUPS = ["animal-mammal", "tool", "food-fruit", "musical-instrument", "household", "plant-flower"]


def colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each thing: what is to be seen can be told from pixels."""
    return (10 + 40 * (number % 5), 10 + 40 * (number // 5), 250)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package like emoji-datasource-google, unpacked: 24 things, and what is to be left out."""
    folder = tmp_path_factory.mktemp("emoji")
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    left_out = [("black tiger", "animal-mammal"), ("jeans", "clothing"), ("cow face", "animal-mammal"), ("it", "flags")]
    things = [(name, GROUPS[i // 4]) for i, name in enumerate(NAMES)]
    index: list[dict[str, Any]] = []
    for number, (name, group) in enumerate([*things, *left_out]):
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).ellipse((0, 0, 63, 63), colour(number))
        image.save(pictures / f"{number}.png")
        index.append({"name": name.upper(), "subcategory": group, "image": f"{number}.png"})
    index.append({"name": "GHOST", "subcategory": "tool", "image": "missing.png"})
    (folder / "emoji.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def drawn(package: Path) -> list[Question]:
    return list(emoji_scenes.questions(350, 20, 3, str(package)))


@cache
def seen_in(picture: Drawn) -> dict[str, tuple[float, float]]:
    """Name → the middle of its pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.png())), np.int64)
    found: dict[str, tuple[float, float]] = {}
    for number, name in enumerate(NAMES):
        y, x = np.nonzero((np.abs(pixels - colour(number)) <= 3).all(2))
        if len(x) > 300:
            found[name] = (float(x.mean()), float(y.mean()))
    return found


def test_answers_are_what_the_picture_shows(drawn: list[Question]) -> None:
    asked: Counter[str] = Counter()
    for question in drawn:
        (picture,) = question.pictures
        there = seen_in(picture)
        assert set(there) == set(picture.labels)
        assert question.depth == len(there)
        text = question.prompt.removesuffix(f" {picture.path}")
        asked[" ".join(text.split()[:2])] += 1
        for step in question.dream["spatial"]:
            if step.action != "is":
                (x, y), (u, v) = there[step.what], there[step.result]
                far = {"left of": u - x, "right of": x - u, "above": v - y, "below": y - v}[step.action]
                assert far > 40
            else:
                x, y = there[step.what]
                away = {"the left": x < 45, "the right": x > 83, "the top": y < 45, "the bottom": y > 83}
                assert away.get(step.result[3:], abs(x - 64) + abs(y - 64) < 20)
        if text.startswith("Is there"):
            name = re.sub("^an? ", "", text.removeprefix("Is there ").removesuffix(" in this picture?"))
            assert name in NAMES
            assert question.answer.startswith("Yes" if name in there else "No")
        elif text.startswith("What is in"):
            first = question.dream["spatial"][0]
            assert re.sub("an? ", "", question.answer.lower())[:-1] == " ".join(
                [first.what, first.result] if first.action == "is" else [first.what, first.action, first.result]
            )
        else:
            first = next(step for step in question.dream["spatial"] if text.endswith(f"the {step.what}?"))
            relation = f"{first.action} the {first.result}" if first.action != "is" else first.result
            beside = re.fullmatch(r"What is (.+) the (.+)\?", text)
            thing = f"A{'n' * (first.result[0] in 'aeiou')} {first.result}."
            assert question.answer == (f"The {first.what} is {relation}." if beside is None else thing)
            if beside is not None:
                assert (beside[1], beside[2]) == (emoji_scenes.OPPOSITE[first.action], first.what)
    assert min(asked[kind] for kind in ("What is", "Where is", "Is there")) > 20


def test_things_and_pairs_are_held_out(drawn: list[Question], package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counter(question.split for question in drawn)
    assert counts == {"train": 350, "familiar": 20, "thing": 20, "combination": 20}
    assert len({question.prompt for question in drawn}) == len(drawn)
    labels: dict[str, set[tuple[str, ...]]] = {}
    for question in drawn:
        labels.setdefault(question.split, set()).add(question.pictures[0].labels)
    shown = {name for pair in labels["train"] for name in pair}
    assert all(set(pair) - shown for pair in labels["thing"])
    trained = {frozenset(pair) for pair in labels["train"]}
    assert not {frozenset(pair) for pair in labels["combination"]} & trained
    assert {name for pair in labels["combination"] for name in pair} <= shown
    training = [question.answer for question in drawn if question.split == "train"]
    absent = [answer[len("No, there is no ") : -1] for answer in training if answer.startswith("No")]
    assert absent
    assert set(absent) <= shown
    again = list(emoji_scenes.questions(350, 20, 3, str(package)))
    assert [question.prompt for question in again] == [question.prompt for question in drawn]
    assert again[0].pictures[0].png() == drawn[0].pictures[0].png()
    monkeypatch.setattr(emoji_scenes, "UNSEEN_PAIRS", 0.0)
    with pytest.raises(BadInput, match="ask for fewer"):
        list(emoji_scenes.questions(20, 5, 3, str(package)))


def test_the_package_as_an_archive_or_a_folder(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(package, "package")
    things = emoji.read_emoji(package)
    assert emoji.read_emoji(path) == things
    assert [thing.name for thing in things] == sorted(NAMES)
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(path.read_bytes()[:2000])
    empty = tmp_path / "folder"
    empty.mkdir()
    (tmp_path / "text.tgz").write_text("no archive", encoding="utf-8")
    for wrong in (cut, empty, tmp_path / "text.tgz"):
        with pytest.raises(CorruptFile, match=r"not a package of emoji .*capture\.dataset_files"):
            emoji.read_emoji(wrong)
    with pytest.raises(BadInput, match=r"capture\.dataset_files=.*nowhere: is not there"):
        emoji.emoji_files(str(tmp_path / "nowhere"), silent)


def npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm of our own, first on the PATH."""
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("DREAM_CACHE", str(folder / "cache"))


def test_npm_fetches_and_its_refusals_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path, 'echo "$@" > "$(dirname "$0")/asked"; echo "npm error code E404" >&2; exit 1', monkeypatch)
    with pytest.raises(
        MissingDependency, match=r"npm can't fetch it \(npm error code E404\); .*capture\.dataset_files"
    ):
        emoji.emoji_files("", silent)
    assert (tmp_path / "asked").read_text(encoding="utf-8").startswith(f"pack {emoji.PACKAGE} --pack-destination ")
    npm(tmp_path, f"echo other > {emoji.FILE}", monkeypatch)
    with pytest.raises(CorruptFile, match="has SHA-256"):
        emoji.emoji_files("", silent)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(MissingDependency, match="isn't there; install it"):
        emoji.emoji_files("", silent)
    assert not list((tmp_path / "cache").iterdir())


# Pictures as image tokens.


def vectors_of(tokenizer: ImageTokenizer, pictures: list[Drawn]) -> Any:
    tokens = tokenizer.tokenize([picture.png() for picture in pictures])
    return torch.stack([token for token in tokens if token is not None]).numpy()


@pytest.fixture(scope="module")
def learnt(package: Path) -> tuple[PictureCodebook, dict[str, tuple[Any, list[tuple[str, ...]]]]]:
    """A map learnt from training pictures, and of each split its pictures' embeddings and labels."""
    pictures: dict[str, dict[str, Drawn]] = {}
    triplets: list[Triplet] = []
    for question in emoji_scenes.questions(940, 70, 3, str(package)):
        pictures.setdefault(question.split, {})[question.pictures[0].name] = question.pictures[0]
        for lens, steps in question.dream.items():
            triplets += [Triplet(s.what, s.action, s.result, lens, i, "", -1, "dataset") for i, s in enumerate(steps)]
    codebook, _ = build_codebook(triplets, size=64)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(embedding_dim=0, image_size=64), "cpu", "lite")
    of = {
        split: (vectors_of(tokenizer, list(own.values())), [picture.labels for picture in own.values()])
        for split, own in pictures.items()
    }
    return PictureCodebook.learn(codebook, tokenizer.config, *of["train"]), of


def test_a_pictures_tokens_name_what_is_in_it(learnt: Any) -> None:
    codebook, of = learnt
    for split in ("familiar", "combination"):
        told = codebook.recall(*of[split])
        assert told["chance"] == pytest.approx(3 / len(codebook.codebook), abs=1e-5)
        assert told["recall"] > 5 * told["chance"], split
    embeddings, labels = of["train"]
    codes = codebook.tokens(embeddings)
    assert codes.shape == (len(labels), 3)
    assert all(len(set(row)) == 3 for row in codes.tolist())
    assert codebook.shown(codes[0]) == "".join(f"⟨{codebook.codebook.labels[code]}⟩" for code in codes[0])
    hits = [codebook.codebook.encode(own)[0] in row for own, row in zip(labels, codes.tolist(), strict=True)]
    assert np.mean(hits) > 0.8


def test_the_map_is_the_ridge_regression_of_centroids(learnt: Any) -> None:
    """Normal equations in float64, of embeddings of length 1; of all strengths none is better by leave-one-out."""
    codebook, of = learnt
    embeddings, labels = of["train"]
    x = embeddings / np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    y = np.stack([codebook.codebook.centroids[sorted(set(codebook.codebook.encode(own)))].sum(0) for own in labels])
    x0, y0 = x - x.mean(0), y.astype(np.float64) - y.mean(0)
    errors, maps = [], []
    for strength in STRENGTHS:
        inverse = np.linalg.inv(x0.T @ x0 + strength * np.eye(x.shape[1]))
        leverage = (x0 @ inverse * x0).sum(1) + 1 / len(x)
        maps.append(inverse @ x0.T @ y0)
        errors.append(np.square((y0 - x0 @ maps[-1]) / (1 - leverage)[:, None]).mean())
    wanted = x0 @ maps[int(np.argmin(errors))] + y.mean(0)
    np.testing.assert_allclose(codebook.vectors(embeddings), wanted, atol=2e-4)


def test_tokens_pursue_what_is_left_and_the_report_says_how_much(learnt: Any) -> None:
    codebook, of = learnt
    embeddings = of["combination"][0][:20]
    vectors, centroids = codebook.vectors(embeddings).astype(np.float64), codebook.codebook.centroids.astype(np.float64)
    left, codes = vectors.copy(), []
    for row in left:
        own: list[int] = []
        for _ in range(4):
            strength = np.array([-np.inf if code in own else row @ centroids[code] for code in range(len(centroids))])
            own.append(int(strength.argmax()))
            row -= max(strength[own[-1]], 0) * centroids[own[-1]]
        codes.append(own)
    assert codebook.tokens(embeddings, 4).tolist() == codes
    told = codebook.report(embeddings, 4)
    assert told["error"] == pytest.approx((left**2).sum() / (vectors**2).sum(), abs=1e-4)
    assert told["used"] == pytest.approx(len({code for own in codes for code in own}) / len(centroids), abs=1e-5)
    assert codebook.report(embeddings, 1)["error"] > told["error"]


def test_a_map_on_disk_and_what_does_not_fit(learnt: Any, tmp_path: Path) -> None:
    codebook, of = learnt
    embeddings, labels = of["familiar"]
    codebook.save(tmp_path)
    again = PictureCodebook.load(tmp_path, codebook.codebook)
    assert again.vision == codebook.vision
    assert again.tokens(embeddings).tolist() == codebook.tokens(embeddings).tolist()
    with pytest.raises(BadInput, match=r"embeddings of shape \(\d+, 5\): lite has 768 numbers"):
        codebook.vectors(embeddings[:, :5])
    with pytest.raises(BadInput, match="two or more"):
        PictureCodebook.learn(codebook.codebook, codebook.vision, embeddings[:1], labels[:1])
    with pytest.raises(BadInput, match="encoder is local"):
        PictureCodebook.shared(codebook.codebook)
    (tmp_path / "pictures.safetensors").write_bytes(b"cut")
    with pytest.raises(CorruptFile, match=r"pictures\.json: not a map of pictures"):
        PictureCodebook.load(tmp_path, codebook.codebook)


@pytest.mark.parametrize("width", [24, 530])
def test_clip_shares_its_space(tmp_path: Path, width: int) -> None:
    """Phrases embedded as transformers does, and a picture's first token the nearest of them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(width)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**small, "vocab_size": len(NAMES) + 3, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    model: Any = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text,  # pyright: ignore
            vision_config={**small, "image_size": 16, "patch_size": 8},  # pyright: ignore
            projection_dim=width,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, **{n: i + 3 for i, n in enumerate(NAMES)}}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])  # pyright: ignore
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", eos_token="</s>")
    own.save_pretrained(tmp_path)
    triplets = [Triplet(a, b, c, "causal", 0, "", -1, "test") for a, b, c in zip(*[iter(NAMES)] * 3, strict=True)]
    codebook, _ = build_codebook(triplets, size=64, encoder=f"clip:{tmp_path}")
    with torch.no_grad():
        features = model.get_text_features(**own(codebook.labels, padding=True, return_tensors="pt")).pooler_output
    wanted = torch.nn.functional.normalize(features, dim=1)
    # By centred PCA where there are more than 512: 24 phrases span fewer dimensions, so that distances stay.
    apart = torch.cdist(wanted, wanted).numpy()
    encoded = codebook.encoder.encode(codebook.labels)
    if width <= 512:
        np.testing.assert_allclose(encoded[:, :width], wanted.numpy(), atol=1e-5)
        np.testing.assert_allclose(torch.cdist(torch.tensor(encoded), torch.tensor(encoded)).numpy(), apart, atol=1e-3)
    codebook.save(tmp_path / "kept")
    shared = PictureCodebook.shared(Codebook.load(tmp_path / "kept"))
    tokenizer = ImageTokenizer(ImageTokenizerConfig("clip", str(tmp_path), embedding_dim=0), "cpu")
    tokens = torch.stack([token for token in tokenizer.tokenize(torch.rand(5, 3, 16, 16)) if token is not None])
    assert shared.vision == tokenizer.config
    seen = torch.nn.functional.normalize(tokens, dim=1) - torch.tensor(codebook.encoder.mean)  # pyright: ignore
    space = seen @ torch.tensor(codebook.encoder.components.T)  # pyright: ignore
    nearest = (space @ torch.tensor(codebook.centroids[:, : space.shape[1]]).T).argmax(1)
    assert shared.tokens(tokens.numpy(), 1)[:, 0].tolist() == nearest.tolist()


def small_run(folder: Path, name: str, **capture: Any) -> Run:
    settings = Settings()
    settings.capture.dataset, settings.capture.dataset_size = name, 60
    for key, value in capture.items():
        setattr(settings.capture, key, value)
    return Run.create(folder, settings)


def test_a_run_has_its_pictures_and_goes_on_where_it_was_killed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.corpus.datasets import stage

    monkeypatch.setattr(stage, "HELD_OUT", 10)
    run = small_run(tmp_path / "run", "emoji-scenes", dataset_files=str(package))
    taken = emoji_scenes.Scene.png
    count = 0

    def killed(scene: emoji_scenes.Scene) -> bytes:
        nonlocal count
        count += 1
        if count > 7:
            raise KeyboardInterrupt
        return taken(scene)

    monkeypatch.setattr(emoji_scenes.Scene, "png", killed)
    with pytest.raises(KeyboardInterrupt):
        capture(run, silent)
    kept = {path.name: path.stat().st_mtime_ns for path in (run.path / "pictures").glob("*.png")}
    assert len(kept) == 7
    monkeypatch.setattr(emoji_scenes.Scene, "png", taken)
    told: list[Event] = []
    assert capture(run, told.append)["licence"] == emoji.LICENCE
    assert emoji.LICENCE in [event.message for event in told]
    assert all((run.path / "pictures" / name).stat().st_mtime_ns == time for name, time in kept.items())
    lines = [json.loads(line) for line in (run.path / "dataset.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 90
    with TraceStore(run.traces, readonly=True) as store:
        prompts = {trace.key: trace.prompt for trace in store.traces()}
    for line in lines:
        ((path, labels),) = line["pictures"].items()
        assert labels
        assert set(labels) <= set(NAMES)
        assert prompts[line["key"]].endswith(f" {path}")
        assert Image.open(run.path / path).size == (128, 128)
    mine(run, silent)
    assert {triplet.action for triplet in read_triplets(run.triplets)} >= {"left of", "above"}
    before = run.path / "run.json"
    again = before.read_bytes()
    capture(run, silent)
    assert before.read_bytes() == again


def test_prompts_show_what_is_in_their_pictures(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's and the exam's from the run's map, a user's pictures through the same; what can't see says so."""
    from bundle.load import Student
    from distill.corpus.datasets import stage
    from distill.dream.model import DreamingReasoningLLM
    from distill.student.initialize import new_student

    monkeypatch.setattr(stage, "HELD_OUT", 12)
    run = small_run(tmp_path / "run", "emoji-scenes", dataset_files=str(package), dataset_size=280)
    settings = run.settings
    settings.vision = ImageTokenizerConfig("lite", embedding_dim=0, image_size=32)
    settings.tokenize.vocab_size = 600
    settings.student = StudentSettings(init="chance", hidden=32, layers=1, heads=2, kv_heads=1, ffn=32, context=128)
    for perform in (capture, mine):
        perform(run, silent)
    told: list[Event] = []
    summary = tokenize(run, told.append)
    assert summary["pictures_recall"] > 5 * summary["pictures_chance"]
    assert [event for event in told if event.unit == "picture"][-1].done == summary["pictures_pictures"] / 5
    before = (run.path / "run.json").read_bytes()
    assert tokenize(run, silent) == summary
    assert (run.path / "run.json").read_bytes() == before

    tokenizer, hits = StudentTokenizer.load(run.tokenizer), 0
    lines = [json.loads(line) for line in (run.path / "dataset.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = {path: found for line in lines for path, found in line["pictures"].items()}
    assert tokenizer.shown.keys() == pictures.keys()
    for path, found in pictures.items():
        places = {name: min(PLACES, key=lambda place: math.dist(PLACES[place], at)) for name, at in found.items()}
        hits += sum(f"⟨{name}⟩ {place}" in tokenizer.shown[path] for name, place in places.items())
    assert hits > 0.8 * sum(map(len, pictures.values()))
    path, shown = next((path, text) for path, text in tokenizer.shown.items() if text)
    wanted = tokenizer.encode(render([{"role": "user", "content": f"What? {shown}"}]), special=True)
    assert prompt_ids(tokenizer, f"What? {path}") == wanted
    pack(run)
    documents = Documents.load(run.data / "train")
    texts = [tokenizer.decode(documents.prompt(i).tolist()) for i in range(len(documents))]
    assert sum("⟨" in text for text in texts) > 0.9 * len(texts)
    assert not any(".png" in text for text in texts)

    model = new_student(settings.student, tokenizer, 0)
    student = Student("seer", model, tokenizer, folder=run.tokenizer)
    asked = load_exam(run).questions
    assert sum("⟨" in question.prompt for question in asked) > 0.9 * len(asked)
    assert not any(".png" in question.prompt for question in asked)
    assert all(len(question.pictures) == 1 and question.pictures[0].is_file() for question in asked)
    assert student.asked("What?", [str(run.path / path)]) == f"What? {shown}"
    assert student.asked("What?", []) == "What?"
    with pytest.raises(BadInput, match=r"none\.png: can't be read"):
        student.asked("What?", ["none.png"])
    with pytest.raises(BadInput, match="this student can't see"):
        Student("blind", model, tokenizer).asked("What?", [str(run.path / path)])
    codebook = Codebook.load(run.tokenizer)
    parts: dict[str, Any] = {"backbone": model, "tokenizer": tokenizer, "codebook": codebook}
    DreamingReasoningLLM(**parts, eyes=PictureCodebook.of(run.tokenizer, codebook)).save_pretrained(tmp_path / "kept")
    seer = DreamingReasoningLLM.load_pretrained(tmp_path / "kept", "cpu")
    with Image.open(run.path / path) as image:
        found = seer.generate("What?", images=[image], max_length=2, dreamer="none", return_dreams=True)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    assert found["record"].prompt == f"What? {shown}"
    how: dict[str, Any] = {"max_length": 2, "dreamer": "none", "return_dreams": True}
    assert seer.generate("What?", images=pixels, **how)["record"].prompt == f"What? {shown}"
    things = {str(run.path / path): name for path, found in pictures.items() if len(found) == 1 for name in found}
    (what, action, result), names = zip(*list(things.items())[:3], strict=True)
    said = seer.generate("Then?", image_triplets=[(what, action, result)], **how)["record"].prompt
    assert said == f"Then? {''.join(f'⟨{name}⟩' for name in names)}"
    with Image.open(io.BytesIO(base64.b64decode(found["record"].pictures[0]))) as small:
        assert small.size == (128, 128)
    tokens = {token.label: token for token in image_tokens(run)}
    assert [token.code for token in tokens.values()] == list(range(len(codebook)))
    assert sum(token.used for token in tokens.values()) == codebook.counts.sum() > 0
    assert {phrase for token in tokens.values() for phrase in token.phrases} >= {"left of", "above"}
    files = {file for token in tokens.values() for file, _ in token.pictures}
    assert files <= {run.path / name for name in pictures}
    page = tmp_path / "tokens.html"
    told = CliRunner().invoke(dream, ["tokens", str(run.path), "--html", str(page), "--most", "2"]).stdout.splitlines()
    assert (told[0].split()[:3], len(told), told[-1]) == (["image", "token", "used"], 4, str(page))
    assert page.read_bytes() == gallery("run", sorted(tokens.values(), key=lambda token: -token.used))
    listed = json.loads(CliRunner().invoke(dream, ["tokens", str(run.path), "--json"]).stdout)["tokens"]
    assert {one["label"]: one["pictures"] for one in listed} == {k: len(t.pictures) for k, t in tokens.items()}
    assert [one["used"] for one in listed] == sorted((token.used for token in tokens.values()), reverse=True)
    single = next(token for token in tokens.values() if token.label in things.values())
    assert all(single.label in pictures[f"./pictures/{file.name}"] for file, _ in single.pictures)
    assert f"⟨{single.label}⟩" in gallery("run", [single]).decode()
    mixed = seer.generate("Then?", image_triplets=[(pixels, pixels / 255, pixels)], **how)["record"].prompt
    assert re.fullmatch(r"Then\? (⟨[^⟩]+⟩)\1\1", mixed)
    for triplet, match in [(("a", "b"), "each is three"), (("a", 1, "b"), "tuples of three")]:
        with pytest.raises(BadInput, match=match):
            seer.generate("Then?", image_triplets=[triplet])
    with pytest.raises(BadInput, match="this student can't see"):
        DreamingReasoningLLM(**parts).generate("What?", images=[str(run.path / path)])
    _shows_outcomes(run, seer, tmp_path, monkeypatch)
    _triplets_are_learnt(run, codebook, tmp_path)
    _learns_to_see(run, model, tokenizer, tmp_path, monkeypatch)


def _shows_outcomes(run: Run, seer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dream's outcome the picture is one of which it is true; a painter says what it needs."""
    how: dict[str, Any] = {"max_length": 2, "output_mode": "both", "picture": folder / "out.png"}
    with pytest.raises(BadInput, match=r"there are none to choose from.*dreaming-student\[paint\]"):
        seer.generate("What?", **how)
    seer.album = Album.of(run, seer.parts.codebook)
    lines = [json.loads(line) for line in (run.path / "dataset.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = [next(iter(line["pictures"].items())) for line in lines]
    scenes = [(path, found) for path, found in drawn if len(found) == 2]
    for path, found in scenes[:6]:
        (one, (x, y)), (other, (u, v)) = found.items()
        relation = ("left of" if u > x else "right of") if abs(u - x) > abs(v - y) else "above" if v > y else "below"
        seer.generate("What?", dream=f"⟨spatial⟩⟨{one}⟩⟨{relation}⟩⟨{other}⟩", **how)
        with Image.open(folder / "out.png") as shown:
            same = [name for name, _ in scenes if Image.open(run.path / name).tobytes() == shown.tobytes()]
        assert path in same or set(dict(scenes)[same[0]]) == {one, other}
    with pytest.raises(BadInput, match=r"out\.jpg is no \.png"):
        seer.generate("What?", **how | {"picture": "out.jpg"})
    with pytest.raises(BadInput, match=r"no file is no \.png; name one"):
        seer.generate("What?", painter="some/model")
    with pytest.raises(BadInput, match="is of one prompt's outcome"):
        seer.generate(["What?", "Who?"], **how)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'dreaming-student\[paint\]'"):
        seer.generate("What?", dream="⟨spatial⟩⟨rat⟩⟨left of⟩⟨cow⟩", painter="some/model", **how)


def _triplets_are_learnt(run: Run, codebook: Codebook, folder: Path) -> None:
    """Three pictures find what they mean, those held out too; the same seed learns the same."""
    shown = shown_triplets(run, codebook)
    assert len(set(shown)) == len(shown)
    for one in shown[:20]:
        what, action, result = one.views()
        assert action.size == (128, 128)
        assert {what.size, result.size} <= {(64, 64), (128, 128)}
    config = ImageTokenizerConfig(image_size=32, patch_size=8)
    made: list[TripletEncoder] = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(TripletEncoder(config, "resnet"))
        assert learn_triplets(made[-1], codebook, shown, steps=2, batch=4).keys() == {"contrastive", "tokens"}
    assert all(torch.equal(one, other) for one, other in zip(*(own.parameters() for own in made), strict=True))
    encoder, told = made[0], list[Event]()
    before = retrieval(encoder, codebook, [one for one in shown if one.split == "train"])
    lost = learn_triplets(encoder, codebook, shown, steps=60, batch=16, listen=told.append)
    assert (told[-1].done, told[-1].total, told[-1].unit) == (60, 60, "step")
    after = retrieval(encoder, codebook, [one for one in shown if one.split == "train"])
    assert after["first"] > 5 * after["chance"]
    assert after["first"] > 3 * before["first"], (before, after, lost)
    held_out = [one for one in shown if one.split in ("familiar", "combination")]
    found = retrieval(encoder, codebook, held_out)
    assert (found["pictures"], found["chance"]) == (len(held_out), 1 / found["triplets"])
    assert found["five"] > 5 * found["chance"], found
    encoder.save(folder / "encoder")
    again = TripletEncoder.load(folder / "encoder")
    views = [[view] for view in held_out[0].views()]
    assert torch.equal(again(*views), encoder(*views))
    (folder / "encoder" / "triplet_encoder.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptFile, match="not an encoder of triplets"):
        TripletEncoder.load(folder / "encoder")
    with pytest.raises(BadInput, match="0 triplets, 2 steps of 4"):
        learn_triplets(encoder, codebook, held_out, steps=2, batch=4)
    with pytest.raises(BadInput, match="embedding_dim=100: not a multiple of 8"):
        TripletEncoder(ImageTokenizerConfig(embedding_dim=100))
    with pytest.raises(BadInput, match="no triplets"):
        retrieval(encoder, codebook, [])
    with pytest.raises(BadInput, match="embedding_dim=64: the codebook has 512"):
        learn_triplets(TripletEncoder(ImageTokenizerConfig(embedding_dim=64)), codebook, shown)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_encoders_of_pictures_and_triplets(kind: str, tmp_path: Path) -> None:
    """Any kind of picture, any size; the roles matter, and so does every picture."""
    config = ImageTokenizerConfig(image_size=32, patch_size=8)
    vision = VisionEncoder(config, kind).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    image.save(tmp_path / "a.png")
    alike = vision([image, str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()])
    assert alike.shape == (3, 512)
    assert torch.allclose(alike[0], alike[1], atol=1e-5)
    encoder = TripletEncoder(config, kind).eval()
    three = torch.rand(3, 2, 3, 40, 40)
    whole = encoder(*three)
    assert whole.shape == (2, 512)
    assert torch.allclose(whole.norm(dim=-1), torch.ones(2))
    assert encoder.roles(*three).shape == (2, 3, 512)
    for changed in (
        three.flip(0),
        *(torch.cat([three[:i], torch.rand(1, 2, 3, 40, 40), three[i + 1 :]]) for i in range(3)),
    ):
        assert not torch.allclose(encoder(*changed), whole, atol=1e-4)
    with pytest.raises(BadInput, match="not equally many"):
        encoder(three[0], three[1], three[2, :1])
    with pytest.raises(BadInput, match="choose one of vit, resnet"):
        VisionEncoder(config, "mamba")
    with pytest.raises(BadInput, match=r"image_size=30: not a multiple of vision\.patch_size=8"):
        VisionEncoder(ImageTokenizerConfig(image_size=30, patch_size=8))


def test_a_model_of_diffusers_paints(tmp_path: Path) -> None:
    """A whole pipeline of its own making, as small as can be, loaded from safetensors."""
    diffusers: Any = pytest.importorskip("diffusers")
    import transformers

    torch.manual_seed(0)
    (tmp_path / "words").mkdir()
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {f"{letter}</w>": i for i, letter in enumerate("abcd", 2)}
    (tmp_path / "words" / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (tmp_path / "words" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(vocab_size=6, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
        ),
        tokenizer=transformers.CLIPTokenizer(
            str(tmp_path / "words" / "vocab.json"), str(tmp_path / "words" / "merges.txt"), model_max_length=77
        ),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            **blocks,
        ),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    )
    pipeline.save_pretrained(tmp_path / "painter")
    painted = [paint(str(tmp_path / "painter"), "a b", torch.device("cpu"), seed) for seed in (0, 0, 1)]
    assert painted[0].size == (32, 32)
    assert painted[0].tobytes() == painted[1].tobytes() != painted[2].tobytes()
    with pytest.raises(BadInput, match="diffusers can't paint with it"):
        paint(str(tmp_path / "words"), "a b", torch.device("cpu"), 0)


def _learns_to_see(run: Run, model: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of the `see` stage: both learn, tokens are read as before, and the bundle is a verified pair."""
    from bundle.export import export
    from bundle.load import load_student
    from distill.learning import see
    from distill.training import checkpoint

    weights = str(dinov2(folder / "dinov2"))
    monkeypatch.setattr(see, "dinov2_small", lambda listen: weights)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(see, "ASKED", 4)
    monkeypatch.setattr(naming, "STEPS", 30)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save_checkpoint(run, model, optimizer, checkpoint.LoopState(5, best_step=5), {}, {})
    run.record("train", {}, {"checkpoints/step-000005": "0"}, {}, 1.0)
    assert CliRunner().invoke(dream, ["see", str(run.path)]).stdout == "see: skipped, see.steps is 0\n"
    run.settings.see.steps, run.settings.see.image_size = 8, 28
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary = see.see(run)
    assert (summary["steps"], summary["patches"], summary["asked"]) == (8, 16, 4)
    assert see.see(run) == summary
    assert checkpoint.stage_of(checkpoint.best(run)) == "see"
    whole = {path.name: path.read_bytes() for path in checkpoint.best(run).glob("m*")}
    assert whole.keys() == {"model.safetensors", "mmproj.gguf"}
    monkeypatch.setattr(see, "EVERY", 3)
    steps: list[float] = []

    def killed(event: Event) -> None:
        if event.unit == "steps":
            steps.append(event.done)
            if len(steps) == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        see.see(run, killed, force=True)
    assert {path.name: path.read_bytes() for path in checkpoint.best(run).glob("m*")} == whole, "until another is there"
    assert see.see(run, killed) == summary
    assert steps == [1, 2, 3, 4, 5, 6, 7, 7, 8]
    assert {path.name: path.read_bytes() for path in checkpoint.best(run).glob("m*")} == whole
    assert not (run.path / "see").exists()
    student = load_student(run.path)
    assert student.sight is not None
    assert student.model.state_dict().keys() == before.keys()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in student.model.state_dict().items())
    picture = next((run.path / "pictures").glob("*.png"))
    assert student.shown([str(picture)]).answer("What?", max_tokens=2)
    run.settings.export.dtype = "f32"
    found = export(run)
    assert found["pictures_identical"] == found["pictures"] == 6
    assert seeing.measure(run, "picture") == seeing.measure(run, "llama.cpp")
    heard: list[Event] = []
    monkeypatch.setattr(see, "MOST", 2)
    seeing_on = see.Seeing(run, {}, heard.append)
    seeing_on.asked[0] = seeing_on.asked[0]._replace(prompt="so " * 2000 + seeing_on.asked[0].prompt)
    seeing_on._rows("tokens")  # pyright: ignore[reportPrivateUsage]
    many, left_out = [event.message for event in heard if event.kind == "warning"]
    assert "only the first 2 are looked at" in many
    assert left_out.startswith("1 prompts, read by tokens, fill the context of")
    undone = CliRunner().invoke(dream, ["see", str(run.path), "--undo"])
    assert undone.stdout == "see: 1 checkpoints deleted\n"
    assert load_student(run.path).sight is None


def test_the_real_emoji() -> None:
    try:
        path = emoji.emoji_files("", silent)
    except MissingDependency as error:
        pytest.skip(f"no emoji: {error}")
    things = emoji.read_emoji(path)
    assert len(things) > 200
    assert {"hammer", "cat", "violin"} <= {thing.name for thing in things}
    assert all(Image.open(io.BytesIO(thing.png)).size == (64, 64) for thing in things)


def jpeg(path: Path, side: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), "red").save(path)


@pytest.fixture
def brought(tmp_path: Path) -> dict[str, Path]:
    """Small files as users bring them: dataset → its folder."""
    things = [f"thing {i}" for i in range(60)]
    rows = [f"/a/{i}\t/r/IsA\t/c/en/{name.replace(' ', '_')}/n\t/c/en/toy\t" for i, name in enumerate(things)]
    rows = [row + '{"weight": 1.0}' for row in rows] + ['/a/x\t/r/IsA\t/c/fr/chat\t/c/en/toy\t{"weight": 1.0}']
    rows += ['/a/y\t/r/Causes\t/c/en/rain\t/c/en/wet_street\t{"weight": 2.0}', "/a/z\t/r/IsA\t/c/en/a\t/c/en/b\t{}"]
    rows += ['/a/w\t/r/IsA\t/c/en/doubt\t/c/en/toy\t{"weight": 0.5}', "/a/v\t/r/Synonym\t/c/en/a\t/c/en/b\t{}"]
    folders = {name: tmp_path / name for name in ("conceptnet", "visual-genome", "coco")}
    for folder in folders.values():
        folder.mkdir()
    with gzip.open(folders["conceptnet"] / "conceptnet-assertions-5.7.0.csv.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")
    for i in range(60):
        jpeg(folders["visual-genome"] / "VG_100K" / f"{i}.jpg")
        jpeg(folders["coco"] / "train2017" / f"{i:012}.jpg")
    box = {"x": 0, "y": 0, "w": 20, "h": 20}
    relation = {"predicate": "ON", "subject": {"name": "Cup", **box}, "object": {"names": ["table"], **box, "y": 20}}
    graphs = [
        {"image_id": i, "relationships": [{**relation, "object": relation["subject"]}, relation]} for i in range(70)
    ]
    (folders["visual-genome"] / "relationships.json").write_text(json.dumps(graphs), encoding="utf-8")
    notes = folders["coco"] / "annotations"
    notes.mkdir()
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in range(70)]
    said = [{"image_id": i, "caption": f'A dog by a "bus" {i}. \\"annotations\\": ['} for i in range(70)]
    captions = {"info": {"a": ["["]}, "images": images, "annotations": said + said[:3]}
    (notes / "captions_train2017.json").write_text(json.dumps(captions), encoding="utf-8")
    boxes = [{"image_id": i, "category_id": c, "bbox": [20 * c, 0, 9 + c, 9]} for i in range(70) for c in (0, 1)]
    instances = {"annotations": boxes, "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "bus"}]}
    (notes / "instances_train2017.json").write_text(json.dumps(instances, indent=1), encoding="utf-8")
    return folders


def test_files_that_users_bring(brought: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions with true dreams, some held out; read in small pieces as in large ones."""
    asked = {name: list(module(name).questions(40, 10, 1, str(folder))) for name, folder in brought.items()}
    monkeypatch.setattr("distill.corpus.datasets.brought.CHUNK", 7)
    for name, questions in asked.items():
        again = list(module(name).questions(40, 10, 1, str(brought[name])))
        assert [(q.prompt, q.answer, q.split) for q in again] == [(q.prompt, q.answer, q.split) for q in questions]
        splits = Counter(question.split for question in questions)
        assert splits["train"] == 40
        assert 0 < splits["subject" if name == "conceptnet" else "picture"] <= 10
        assert len({question.prompt for question in questions}) == len(questions)
    facts = {question.answer: question for question in asked["conceptnet"]}
    assert all(re.fullmatch(r"Thing \d+ is a kind of toy\.|Rain causes wet street\.|A is .*", fact) for fact in facts)
    seen = asked["visual-genome"][0]
    assert seen.answer == "Cup on table."
    assert seen.dream == {"spatial": [Step("cup", "on", "table")]}
    assert seen.pictures[0].labels == ("cup", "table")
    assert seen.pictures[0].at == ((0.25, 0.25), (0.25, 0.75))
    assert Image.open(io.BytesIO(seen.pictures[0].png())).size == (40, 40)
    beside = asked["coco"][0]
    assert beside.dream == {"spatial": [Step("bus", "right of", "dog")]}
    assert re.fullmatch(r'A dog by a "bus" \d+\. \\"annotations\\": \[', beside.answer)


def test_all_files_of_a_folder_are_asked_about_or_told(brought: dict[str, Path]) -> None:
    """COCO's annotations come in two parts; of others one is taken, and that is said."""
    notes = brought["coco"] / "annotations"
    (notes / "captions_val2017.json").write_text(
        json.dumps(
            {"images": [{"id": 99, "file_name": "v.jpg"}], "annotations": [{"image_id": 99, "caption": "Two."}]}
        ),
        encoding="utf-8",
    )
    boxes = [{"image_id": 99, "category_id": c, "bbox": [20 * c, 0, 9 + c, 9]} for c in (0, 1)]
    instances = {"annotations": boxes, "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "cup"}]}
    (notes / "instances_val2017.json").write_text(json.dumps(instances), encoding="utf-8")
    before = module("coco").digest(str(brought["coco"]))
    jpeg(brought["coco"] / "val2017" / "v.jpg")
    assert module("coco").digest(str(brought["coco"])) != before, "pictures decide what is asked"
    answers = {question.answer for question in module("coco").questions(60, 10, 1, str(brought["coco"]))}
    assert "Two." in answers
    assert len(answers) == 61
    second = brought["visual-genome"] / "relationships_v1_2.json"
    second.write_bytes((brought["visual-genome"] / "relationships.json").read_bytes())
    said: list[Event] = []
    list(module("visual-genome").questions(4, 1, 0, str(brought["visual-genome"]), said.append))
    (told,) = [event.message for event in said if event.kind == "warning"]
    assert "relationships.json is taken; 1 more relationships*.json* beside it" in told


def test_a_dataset_without_a_question_is_refused(brought: dict[str, Path], tmp_path: Path) -> None:
    for path in (brought["coco"] / "train2017").iterdir():
        path.unlink()
    jpeg(brought["coco"] / "val2017" / "v.jpg")
    settings = Settings()
    settings.capture.dataset, settings.capture.dataset_files = "coco", str(brought["coco"])
    run = Run.create(tmp_path / "run", settings)
    with pytest.raises(BadInput, match="no question came of it to train on"):
        capture_dataset(run, silent)
    assert "capture" not in run.records()


def test_files_that_are_none_are_one_line(brought: dict[str, Path], tmp_path: Path) -> None:
    for name, pattern in [("conceptnet", "assertions"), ("visual-genome", "relationships"), ("coco", "captions_")]:
        with pytest.raises(BadInput, match=rf"needs \*?{pattern}.*download it from .* capture\.dataset_files"):
            list(module(name).questions(4, 1, 0))
        with pytest.raises(BadInput, match=rf"empty: is not there, so there is no \*?{pattern}"):
            list(module(name).questions(4, 1, 0, str(tmp_path / "empty")))
    archive = tmp_path / "zipped" / "relationships.json.zip"
    archive.parent.mkdir()
    archive.write_bytes(b"PK")
    for files in (archive, archive.parent):
        with pytest.raises(BadInput, match=r"relationships\.json\.zip: is an archive; unpack it"):
            list(module("visual-genome").questions(4, 1, 0, str(files)))
    csv = tmp_path / "assertions.csv"
    for text, match in [("a\tb\n", r"assertions\.csv:1: not a row"), ("", "no English facts")]:
        csv.write_text(text, encoding="utf-8")
        with pytest.raises((BadInput, CorruptFile), match=match):
            list(module("conceptnet").questions(4, 1, 0, str(csv)))
    graph = brought["visual-genome"] / "relationships.json"
    whole = graph.read_text(encoding="utf-8")
    for text, match in [
        ("{}", "no array"),
        (whole[:-90], "70: not as it should be"),
        ("[3]", "1: .*no object"),
        ('[{"image_id": 1}]', "1: no picture's"),
    ]:
        graph.write_text(text, encoding="utf-8")
        with pytest.raises(CorruptFile, match=match):
            list(module("visual-genome").questions(4, 1, 0, str(graph.parent)))
    (brought["coco"] / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(BadInput, match=r"instances_train2017\.json: is not there"):
        list(module("coco").questions(4, 1, 0, str(brought["coco"])))


def module(name: str) -> Any:
    return importlib.import_module(DATASETS[name])
