"""Settings: text is taken as it is written, and nothing is lost or changed on its way to disk and back."""

import contextlib
import dataclasses
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.address import Address
from distill.config import Settings
from distill.errors import BadInput
from distill.ranges import CHOICES
from distill.settings import kind_of, load_settings, settings_yaml
from distill.sweep.plan import read_plan
from distill.written import dump_yaml, read_yaml

ODD = ["Be brief #short", "no", "007", "12:30", "1e3", "${oc.env:HOME}", "???", 'Answer: "yes"', "a\nb", " null ", "~"]
NAMES = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Settings())
    if dataclasses.is_dataclass(section.default_factory)
    for field in dataclasses.fields(section.default_factory)
]
TEXTS = [name for name in NAMES if kind_of(name) is str]


def read_back(tree: Settings, folder: Path) -> Settings:
    path = folder / "config.yaml"
    path.write_text(settings_yaml(tree), encoding="utf-8")
    return load_settings(path)


@pytest.mark.parametrize("text", [*ODD, "", "='=", "日本語\u2028\x85\ufeff\x00\t", "x" * 300 + "  y"])
def test_text_is_taken_as_it_is_written(text: str, tmp_path: Path) -> None:
    given = load_settings(None, [f"capture.system={text}"])
    assert given.capture.system == text
    assert read_back(given, tmp_path) == given
    # What only changes another setting leaves it as it is.
    assert load_settings(None, ["seed=3"], base=given).capture.system == text


def test_text_in_files_is_text_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text in ("no", "007", "12:30", "1e3", "${oc.env:HOME}", "???", "2024-01-01", "0x1F"):
        file.write_text(
            f"capture:\n  system: {text}\n  prompts:\n  - {text}\ntrain.lr: 1e-3\ntrain:\n", encoding="utf-8"
        )
        found = load_settings(file)
        assert (found.capture.system, found.capture.prompts, found.train.lr) == (text, [text], 1e-3)
    file.write_text("capture:\n  system:\n", encoding="utf-8")
    with pytest.raises(BadInput, match=r"mine\.yaml: capture\.system: is empty"):
        load_settings(file)


def test_text_in_a_sweep_is_text_too(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    texts = ("no", "007", "12:30", "'${x}'", "1e3")
    file.write_text(
        "settings: {export.system: off}\nname: 007\nvariants:\n"
        + "".join(f"  v{i}: {{capture.system: {text}}}\n" for i, text in enumerate(texts)),
        encoding="utf-8",
    )
    plan = read_plan(file)
    assert [cell.settings.capture.system for cell in plan.cells] == ["no", "007", "12:30", "${x}", "1e3"]
    assert (plan.common.export.system, plan.name) == ("off", "007")


def test_passwords_of_hosts_are_not_kept(tmp_path: Path) -> None:
    given = load_settings(None, ["teacher.hosts=['http://me:secret@gpu', 'you:s@cret@box:1']"])
    assert given.teacher.hosts[0].login == ("me", "secret")
    assert "cret" not in settings_yaml(given) + repr(given)
    assert read_back(given, tmp_path).teacher.hosts == ["http://me:***@gpu", "you:***@box:1"]
    with pytest.raises(BadInput) as caught:
        load_settings(None, ["teacher.hosts=[http://me:secret@gpu:x]"])
    assert "secret" not in str(caught.value)
    assert "teacher.hosts: 'http://me:***@gpu:x': is no server's address" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr=nan", "should be a number"),
        ("train.lr=1e999", "should be a number"),
        ("train.steps=", "is empty"),
        ("train.steps=1.0", "should be a whole number"),
        ("train.dreams=maybe", "should be true or false"),
        ("capture.prompts=a.txt", "should be a list"),
        ("train=3", "it is a section"),
        ("train.lr.x=1", "no such setting"),
        ("capture.system=\udc80", "half of a surrogate pair"),
        ("capture.system=😀\ud800", r"holds \\ud800, half of a surrogate pair"),
        ('capture.prompts=["\\ud83d"]', "half of a surrogate pair"),
        ('capture.prompts=["\\UFFFFFFFF"]', "is not YAML"),
        (f"capture.prompts={'[' * 600}", "nested too deeply"),
        ("train={lr: 1, lr: 2}", "'lr' is there twice"),
    ],
)
def test_what_is_no_value_is_refused(override: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        load_settings(None, [override])


anything = st.text(st.characters(codec=None, categories=None), max_size=30) | st.sampled_from(ODD)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(NAMES) | anything, anything)
def test_fuzz_overrides_are_stored_or_refused(name: str, text: str) -> None:
    try:
        tree = load_settings(None, [f"{name}={text}"])
    except BadInput:
        strange = any("\ud800" <= c <= "\udfff" for c in text) or text not in CHOICES.get(name, (text,))
        assert name not in TEXTS or strange
        return
    if name in TEXTS:
        assert attrgetter(name)(tree) == text.encode("utf-16", "surrogatepass").decode("utf-16")


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=60))
def test_fuzz_texts_come_back_from_disk(text: str) -> None:
    """By our reader, and by libyaml as another one."""
    tree = {"capture": {"system": text, "prompts": [text, ""]}}
    written = dump_yaml(tree)
    assert read_yaml(written, "config.yaml") == yaml.load(written, Loader=yaml.CSafeLoader) == tree


@settings(max_examples=500, deadline=None)
@given(st.text("[]{}:,-#&*!|>'\"%@`?\n ab0", max_size=60))
def test_fuzz_yaml_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(BadInput):
        load_settings(None, [f"train={text}"])


def test_hosts_are_addresses() -> None:
    assert all(isinstance(host, Address) for host in load_settings(None, ["teacher.hosts=[gpu]"]).teacher.hosts)
