"""Datasets in pictures: what is asked of a picture is in it, and what is held out stays out."""

import io
import json
import re
import tarfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from distill.config import Settings
from distill.corpus.capture import capture
from distill.corpus.datasets import causal_world as world
from distill.corpus.datasets import emoji, emoji_scenes, synthetic
from distill.corpus.datasets.questions import Drawn, Question
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, CorruptFile, MissingDependency
from distill.events import Event, silent
from distill.knowledge.mine import mine
from distill.mining.triplets import read_triplets
from distill.run import Run

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
    return list(emoji_scenes.questions(200, 20, 3, str(package)))


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
    kinds = {name: emoji.KINDS[GROUPS[i // 4]] for i, name in enumerate(NAMES)}
    asked: Counter[str] = Counter()
    for question in drawn:
        (picture,) = question.pictures
        there = seen_in(picture)
        assert set(there) == set(picture.labels)
        assert question.depth == len(there)
        text = question.prompt.removesuffix(f" {picture.path}")
        asked[" ".join(text.split()[:2])] += 1
        for lens, steps in question.dream.items():
            for step in steps:
                if lens == "abstract":
                    assert kinds[step.what] == step.result
                elif step.action != "is":
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
            assert all(name in question.answer for name in there)
        else:
            first = question.dream["spatial"][0]
            relation = f"{first.action} the {first.result}" if first.action != "is" else first.result
            beside = re.fullmatch(r"What is (.+) the (.+)\?", text)
            thing = f"A{'n' * (first.result[0] in 'aeiou')} {first.result}."
            assert question.answer == (f"The {first.what} is {relation}." if beside is None else thing)
            if beside is not None:
                assert (beside[1], beside[2]) == (emoji_scenes.OPPOSITE[first.action], first.what)
    assert min(asked[kind] for kind in ("What is", "Where is", "Is there")) > 50


def test_things_and_pairs_are_held_out(drawn: list[Question], package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counter(question.split for question in drawn)
    assert counts == {"train": 200, "familiar": 20, "thing": 20, "combination": 20}
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
    again = list(emoji_scenes.questions(200, 20, 3, str(package)))
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


def test_synthetic_pictures_show_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pictures as states, no two alike; what is asked of them is what the causal world says."""
    drawn = list(synthetic.questions(900, 20, 1))
    counts = Counter(question.split for question in drawn)
    assert counts == {"train": 900, "familiar": 20, "combination": 20, "depth": 20}
    pictures = {picture.name: picture for question in drawn for picture in question.pictures}
    assert len({picture.png() for picture in pictures.values()}) == len(pictures) > 300
    for question in drawn:
        *_, last = question.pictures
        thing, place, temperature, condition = last.labels
        if "become" in question.prompt:
            before = world.State(place, temperature, condition)
            actions = {words: action for action, words in world.WORDS.items()}
            told = question.prompt.split("It is ")[1].split(". What")[0].split(", then ")
            for words in told:
                before = world.act(world.material_of(thing), before, actions[words])
            assert question.answer == f"The {thing} is {before.place}, {before.temperature} and {before.condition}."
        elif "changed" in question.prompt:
            pairs = zip(question.pictures[0].labels[1:], last.labels[1:], strict=True)
            changes = [f"was {a} and is {b} now" for a, b in pairs if a != b]
            assert question.answer == (f"The {thing} {', '.join(changes)}." if changes else "Nothing changed.")
        else:
            assert question.answer == f"A {thing} {place}, {temperature} and {condition}."
        assert all(word not in question.prompt for word in last.labels)
    monkeypatch.setattr(synthetic.world, "questions", lambda *_: drawn[:0])
    with pytest.raises(BadInput, match="ask for fewer"):
        list(synthetic.questions(1, 1, 0))


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
        (path,) = line["pictures"]
        assert prompts[line["key"]].endswith(f" {path}")
        assert Image.open(run.path / path).size == (128, 128)
    mine(run, silent)
    assert {triplet.action for triplet in read_triplets(run.triplets)} >= {"left of", "is a"}
    before = run.path / "run.json"
    again = before.read_bytes()
    capture(run, silent)
    assert before.read_bytes() == again


def test_the_real_emoji() -> None:
    try:
        path = emoji.emoji_files("", silent)
    except MissingDependency as error:
        pytest.skip(f"no emoji: {error}")
    things = emoji.read_emoji(path)
    assert len(things) > 200
    assert {"hammer", "cat", "violin"} <= {thing.name for thing in things}
    assert all(Image.open(io.BytesIO(thing.png)).size == (64, 64) for thing in things)
