"""Dreams that are looked at: their summary, their files, the heatmap, the page in a browser and without one."""

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont
from support.browser import Browser, Page
from support.dream_samples import HOSTILE, as_it_forms, backbone_record, engine_record, hostile_record

from distill.dream.record import Branch, DreamRecord, Edge, Slot, Step, Word
from distill.dream.view.heatmap import MATTERS, SURE, _font, _warn_of_boxes, heatmap
from distill.dream.view.lanes import LiveLanes, clip, visible, width
from distill.dream.view.page import page
from distill.dream.view.records import winner
from distill.dream.view.viewer import DreamViewer
from distill.errors import BadInput, CorruptFile, DistillError
from distill.mining.triplets import LENSES
from distill.vision.gallery import Token, gallery
from distill.vision.pictures import thumbnail


def vectors(seed: int = 0, paths: int = 4, steps: int = 5) -> np.ndarray[Any, Any]:
    drawn = np.random.default_rng(seed).normal(size=(paths, steps, 3, 512)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def viewer_of(*records: DreamRecord) -> DreamViewer:
    viewer = DreamViewer()
    for record in records:
        viewer.record(record)
    return viewer


# What is remembered, and the summary.


def test_the_summary_counts_what_was_dreamed() -> None:
    viewer = viewer_of(engine_record(), backbone_record())
    viewer.record(engine_record(), vectors(1))
    viewer.record(engine_record(), vectors(2) + 1)
    summary = viewer.get_dream_summary()
    means = [vectors(1).astype(np.float64).mean(), vectors(2).astype(np.float64).mean() + 1]
    assert summary["avg_mean"] == pytest.approx(sum(means) / 2, abs=1e-6)
    assert (summary["total_dreams"], summary["remembered"]) == (4, 4)
    assert summary["dreamers"] == {"engine": 3, "backbone": 1}
    assert (summary["paths"], summary["steps"]) == (3 * 4 + 2, 3 * 17 + 3)
    assert summary["kept_share"] == pytest.approx((3 * 2 + 2) / 14)
    assert summary["mean_score"] == pytest.approx((0.31 + 0.94 + 0.87 + 0.46) / 4)  # nobody judged the backbone's
    assert summary["mean_seconds"] == pytest.approx((3 * 0.0431 + 1.25) / 4)
    assert sum(summary["lens_shares"].values()) == pytest.approx(1)
    assert summary["lens_shares"]["spatial"] == pytest.approx((3 * 5 + 1) / 54)
    assert summary["top_tokens"][0] == ("a glass ball", 30)
    assert sum(summary["gate_load"].values()) == pytest.approx(1, abs=1e-3)
    assert f"{summary['avg_mean']:.4f}" == "0.5000"


def test_an_empty_viewer_sums_up_nothing() -> None:
    summary = DreamViewer().get_dream_summary()
    assert summary["total_dreams"] == 0
    assert math.isnan(summary["avg_mean"])
    assert summary["top_tokens"] == []


def test_what_is_held_is_bounded() -> None:
    viewer = DreamViewer(limit=5, vectors_limit=2)
    for i in range(12):
        viewer.record(DreamRecord(f"prompt {i}", "engine"), np.full((1, 1, 3, 512), i, np.float32))
    assert [record.prompt for record in viewer.records] == [f"prompt {i}" for i in range(7, 12)]
    held = [None if vector is None else float(vector.mean()) for vector in viewer.vectors]
    assert held == [None, None, None, 10.0, 11.0]
    summary = viewer.get_dream_summary()
    assert (summary["total_dreams"], summary["remembered"]) == (12, 5)
    assert summary["avg_mean"] == pytest.approx(9)  # the means outlive the vectors


def test_the_winner_is_the_best_of_those_read() -> None:
    record = engine_record()
    assert winner(record) == 1
    aside = [Branch(b.lens, b.steps, b.score, b.lens == "causal", b.provenance) for b in record.branches]
    assert winner(DreamRecord("", "engine", aside)) == 2
    assert winner(backbone_record()) is None
    assert winner(DreamRecord("", "none")) is None


# JSON.

unit = st.floats(0, 1)
labels = st.text(max_size=12)
slots = st.builds(Slot, labels, st.integers(0, 1023), unit)
steps = st.builds(Step, slots, slots, slots, unit)
branches = st.builds(
    Branch,
    st.sampled_from(LENSES),
    st.lists(steps, max_size=3),
    unit,
    st.booleans(),
    labels,
    st.dictionaries(st.sampled_from(LENSES), unit),
)
places = st.tuples(st.integers(0, 3), st.integers(0, 3))
edges = st.builds(Edge, places, places, st.sampled_from(("temporal", "causal")), unit)
records = st.builds(
    DreamRecord, st.text(max_size=30), labels, st.lists(branches, max_size=3), st.lists(edges, max_size=4), labels, unit
)


@settings(max_examples=60, deadline=None)
@given(st.lists(records, max_size=3))
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, dreamed: list[DreamRecord]) -> None:
    path = viewer_of(*dreamed).export(tmp_path_factory.getbasetemp() / "dreams.json")
    assert DreamViewer.load(path).records == dreamed


def test_the_json_is_versioned_and_readable(tmp_path: Path) -> None:
    path = viewer_of(hostile_record(), engine_record()).export(tmp_path / "deep" / "dreams.json")
    value = json.loads(path.read_text(encoding="utf-8"))
    assert (value["format"], value["version"]) == ("dreams", 1)
    assert [DreamRecord.from_json(record) for record in value["dreams"]] == [hostile_record(), engine_record()]
    assert "日本語" in path.read_text(encoding="utf-8")
    for record in value["dreams"]:  # as it was written before attention was noted
        del record["words"]
    path.write_text(json.dumps(value), encoding="utf-8")
    assert DreamViewer.load(path).records == [replace(r, words=[]) for r in (hostile_record(), engine_record())]


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    viewer = viewer_of(engine_record())
    with pytest.raises(BadInput, match="no format 'gif' to export dreams in; choose one of json, png, html"):
        viewer.export(tmp_path / "dreams.gif")
    with pytest.raises(BadInput, match="no format ''"):
        viewer.export(tmp_path / "dreams")
    assert viewer.export(tmp_path / "dreams", format="json").read_text(encoding="utf-8").startswith("{")
    with pytest.raises(DistillError, match="can't write it"):
        viewer.export("/proc/nowhere.json")
    with pytest.raises(BadInput, match="can't read it"):
        DreamViewer.load(tmp_path / "none.json")
    whole = (tmp_path / "dreams").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.json"
    for text in ("", "[]", "7", "{}", '{"format": "x"}', whole[:-20], whole.replace('"lens"', '"lenz"', 1)):
        wrong.write_text(text, encoding="utf-8")
        with pytest.raises(CorruptFile, match=r"wrong\.json: not a file of dreams"):
            DreamViewer.load(wrong)
    for part, spoiled in [
        ('"score": 0.31', '"score": "x"'),
        ('"score": 0.31', f'"score": 1{"0" * 400}'),
        ('"kept": true', '"kept": 1'),
        ('"code": ', '"code": 0.5'),
        ('"label": "', '"label": null, "_": "'),
        ('"prompt": "', '"prompt": 7, "_": "'),
        ('"seconds": ', '"seconds": true, "_": '),
        ('"question": ', '"question": null, "_": '),
        ('"tokens": [', '"tokens": [0.5, '),
        ('"tokens": [', '"tokens": ["x"], "_": ['),
        ('"kind": "temporal"', '"kind": "odd\\" onload=\\"x"'),
    ]:
        assert part in whole
        wrong.write_text(whole.replace(part, spoiled, 1), encoding="utf-8")
        with pytest.raises(CorruptFile, match=r"wrong\.json: not a file of dreams"):
            DreamViewer.load(wrong)
    for name, spoiled in [("gates", {"causal": "x"}), ("gates", "x"), ("source", [0]), ("target", ["a", "b"])]:
        value = json.loads(whole)
        value["dreams"][0]["branches" if name == "gates" else "edges"][0][name] = spoiled
        wrong.write_text(json.dumps(value), encoding="utf-8")
        with pytest.raises(CorruptFile, match=r"wrong\.json: not a file of dreams"):
            DreamViewer.load(wrong)
    wrong.write_text(whole.replace('"version": 1', '"version": 2'), encoding="utf-8")
    with pytest.raises(BadInput, match="version 2"):
        DreamViewer.load(wrong)


# PNG.


def colours(png: bytes) -> set[tuple[int, ...]]:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    found = image.getcolors(1 << 24)
    assert found is not None
    return {colour for count, colour in found if count > 200 and isinstance(colour, tuple)}


def shade(ramp: tuple[str, ...], value: float) -> tuple[int, ...]:
    """What numpy interpolates between the ramp's colours."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in ramp], float)
    at = np.linspace(0, 1, len(ramp))
    return tuple(round(np.interp(value, at, stops[:, channel])) for channel in range(3))


def test_every_value_has_its_colour_in_the_heatmap() -> None:
    seen = colours(heatmap([engine_record()]))
    for branch in engine_record().branches:
        for step in branch.steps:
            assert any(np.abs(np.subtract(shade(MATTERS, step.importance), c)).max() <= 1 for c in seen)
            for slot in step.slots:
                assert any(np.abs(np.subtract(shade(SURE, slot.probability), c)).max() <= 1 for c in seen)
    for word in engine_record().words:
        for share in word.steps:
            assert any(np.abs(np.subtract(shade(SURE, share), c)).max() <= 1 for c in seen)


def test_the_heatmap_shows_likeness_where_there_are_vectors(tmp_path: Path) -> None:
    viewer = viewer_of(engine_record())
    viewer.export(tmp_path / "without.png")
    viewer.record(engine_record(), vectors())
    viewer.export(tmp_path / "with.png")
    sizes = [Image.open(tmp_path / name).size for name in ("without.png", "with.png")]
    assert sizes[1][0] >= sizes[0][0] + 17 * 24  # a square of the 17 steps that there are
    assert sizes[1][1] > 1.8 * sizes[0][1]


class Drawn:
    """A font of some characters."""

    def __init__(self, characters: str) -> None:
        self.characters = characters

    def getmask(self, text: str) -> bytes:
        return text.encode() if text in self.characters else b"box"


def test_characters_have_the_font_that_draws_them_or_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Drawn("мяч"), Drawn("球落下мяч")]
    monkeypatch.setattr("distill.dream.view.heatmap._fonts", lambda size: both)
    assert [both.index(_font(16, text)) for text in ("ball", "мяч", "球", "球 мяч")] == [0, 0, 1, 1]
    latin = [ImageFont.load_default(16)]
    monkeypatch.setattr("distill.dream.view.heatmap._fonts", lambda size: latin)
    slot = Slot("球", 0, 0.5)
    record = DreamRecord("ball 落下", "engine", [Branch("causal", [Step(slot, slot, slot, 0.5)], 0.5, True, "x")])
    with pytest.warns(UserWarning, match="the picture has boxes for 下球落, which no font here has"):
        heatmap([record])
    both = [Drawn("мяч"), Drawn("球落下")]
    monkeypatch.setattr("distill.dream.view.heatmap._fonts", lambda size: both)
    with pytest.warns(UserWarning, match="boxes for 下球落, which"):
        _warn_of_boxes([DreamRecord("球落下 мяч", "none"), DreamRecord("мяч", "none")])


def test_the_heatmap_stays_a_picture() -> None:
    """Whatever the records: none, none with steps, text of any kind, more than it shows, values of a diverged model."""
    slot = Slot("nan", 0, math.nan)
    broken = DreamRecord("?", "engine", [Branch("causal", [Step(slot, slot, slot, math.inf)], 0.5, True, "x")])
    one = Image.open(io.BytesIO(heatmap([engine_record()]))).size
    many = [engine_record()] * 50
    for shown, height in [([], 20), ([DreamRecord("p", "none")], 60), ([hostile_record()], 60), ([broken], 60)]:
        assert Image.open(io.BytesIO(heatmap(shown))).size[1] >= height
    picture = heatmap(many)
    assert Image.open(io.BytesIO(picture)).size[1] < 6.5 * one[1]
    assert len(picture) < 1 << 21


# The page, without a browser.


class Outline(HTMLParser):
    """Elements with their attributes, the text of each script, and whether every tag is closed in order."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)

    def having(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]


def test_the_page_holds_every_step_and_edge() -> None:
    record = engine_record()
    outline = Outline(page([record]).decode())
    nodes = {(node["data-branch"], node["data-step"]): node["aria-label"] for node in outline.having("node")}
    assert len(nodes) == len(outline.having("node")) == 17
    for i, branch in enumerate(record.branches):
        for t, step in enumerate(branch.steps):
            told = nodes[str(i), str(t)]
            assert told.startswith(f"{branch.lens}, step {t + 1} of {len(branch.steps)}: ")
            assert all(f"{slot.label} ({100 * slot.probability:.0f} %)" in told for slot in step.slots)
            assert told.endswith(f"importance {step.importance:.2f}")
    drawn = {
        (edge["data-from"], edge["data-to"], edge["data-kind"], float(edge["data-importance"]))
        for edge in outline.having("edge")
    }
    assert drawn == {
        (f"{e.source[0]}.{e.source[1]}", f"{e.target[0]}.{e.target[1]}", e.kind, e.importance) for e in record.edges
    }
    lanes = outline.having("lane")
    assert [lane["data-lens"] for lane in lanes] == list(LENSES)
    assert [lane["class"] for lane in lanes] == ["lane", "lane kept won", "lane kept", "lane"]
    assert [lane["aria-label"] for lane in lanes][1] == "temporal, ★ won"
    reads = [(int(n["data-branch"]), int(n["data-step"])) for n in outline.having("node") if "data-read" in n]
    assert reads == record.read
    assert len(outline.having("word")) == len(record.words) == 25
    text = "".join(outline.text)
    assert all(part in text for part in (record.prompt, record.answer, "score 0.94", "engine path 1", "43 ms"))
    assert next(gate["aria-label"] for gate in outline.having("gates")).startswith("Experts: spatial 0.7")


def test_the_page_holds_its_records() -> None:
    dreamed = [engine_record(), hostile_record(), backbone_record()]
    outline = Outline(page(dreamed).decode())
    assert len(outline.scripts) == 2
    island = json.loads(outline.scripts[0])
    assert [DreamRecord.from_json(value) for value in island["dreams"]] == dreamed
    articles = [attributes for tag, attributes in outline.elements if tag == "article"]
    assert ["hidden" in article for article in articles] == [False, True, True]
    assert sum(tag == "option" for tag, _ in outline.elements) == 3
    assert all(tag != "select" for tag, _ in Outline(page([engine_record()]).decode()).elements)


def test_a_page_of_many_dreams_holds_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.dream.view.page.SHOWN", 2)
    outline = Outline(page([DreamRecord(f"prompt {i}", "engine") for i in range(5)]).decode())
    text = "".join(outline.text)
    assert sum(tag == "article" for tag, _ in outline.elements) == 2
    assert "3 earlier left out" in text
    assert "4. prompt 3" in text
    assert "prompt 2" not in text


def test_the_page_fetches_nothing() -> None:
    text = page([engine_record(), backbone_record()]).decode()
    assert not re.search(r"https?:|//[a-z]|@import|\burl\((?!#)", text)
    outline = Outline(text)
    assert not any(
        {"src", "href", "srcset", "action", "data"} & attributes.keys() for _, attributes in outline.elements
    )
    (policy,) = [a["content"] for tag, a in outline.elements if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40).map(lambda text: HOSTILE[:20] + text))
def test_nothing_said_becomes_markup(said: str) -> None:
    """The same elements as for a harmless record, whatever its texts."""

    def elements(text: str) -> list[str]:
        slot = Slot(text, 0, 0.5)
        branch = Branch(text, [Step(slot, slot, slot, 0.5)], 0.5, True, text, {text: 1.0})
        record = DreamRecord(text, text, [branch], [], text or "x", words=[Word(text, 0.5, 0.3, 0.2, [0.5, 0.3, 0.2])])
        return [tag for tag, _ in Outline(page([record] * 2).decode()).elements]

    assert elements(said) == elements("harmless")


def test_a_hostile_record_stays_text() -> None:
    outline = Outline(page([hostile_record()]).decode())
    assert sum(tag == "script" for tag, _ in outline.elements) == 2
    kind: Any = '"><img src=x onerror=alert(1)>'
    record = engine_record()
    edged = Outline(page([DreamRecord("", "engine", record.branches, [Edge((0, 0), (0, 1), kind, 0.5)])]).decode())
    assert [edge["data-kind"] for tag, edge in edged.elements if "data-from" in edge] == [kind]
    assert not any(tag == "img" for tag, _ in outline.elements)
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert "</script><script>alert(1)</script>" in "".join(outline.text)


def test_edges_to_steps_that_are_not_there_are_left_out() -> None:
    record = backbone_record()
    edges = [
        Edge((2, 0), (2, 1), "temporal", 0.0),
        Edge((2, 1), (2, 2), "temporal", 1.0),
        Edge((9, 0), (0, 0), "causal", 1),
    ]
    outline = Outline(page([DreamRecord(record.prompt, "backbone", record.branches, edges)]).decode())
    assert [(edge["data-from"], edge["data-weight"]) for edge in outline.having("edge")] == [("2.0", "0.0")]
    assert b"No dream yet" in page([])


# The page, in a browser.


def marked(page: Page, selector: str) -> set[str]:
    """Places ("branch.step") of the steps that match, or "from>to" of the edges."""
    name = "n.dataset.from ? `${n.dataset.from}>${n.dataset.to}` : `${n.dataset.branch}.${n.dataset.step}`"
    return set(page.eval(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => {name})"))


def test_pictures_beside_their_tokens_and_the_gallery_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    Image.new("RGB", (300, 150), "#c02040").save(picture := tmp_path / "a <b>.png")
    record = replace(engine_record(), prompt="What? ⟨dog⟩ left", pictures=[thumbnail(picture, 192)])
    assert DreamRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(TypeError, match="pictures"):
        DreamRecord.from_json({**record.to_json(), "pictures": [1]})
    page = browser.open(viewer_of(record).export(tmp_path / "dreams.html"))
    size = "document.querySelector('h1 + .pictures img').naturalWidth"
    assert page.eval(size) == 192
    assert page.errors == []
    hostile = Token("</li><script>", 1, 3, ["</li><script>", "a & b"], [(picture, (0.0, 0.0, 0.5, 1.0))])
    (tmp_path / "tokens.html").write_bytes(gallery("run", [Token("dog", 0, 9, ["dog", "hound"], []), hostile]))
    page = browser.open(tmp_path / "tokens.html")
    headings = "[...document.querySelectorAll('li:not([hidden]) h2')].map((node) => node.textContent)"
    assert page.eval(headings) == ["⟨dog⟩", "⟨</li><script>⟩"]
    assert page.eval("[...document.querySelectorAll('img')].map((node) => node.naturalWidth)") == [56]
    for words, left in (("HOUND", ["⟨dog⟩"]), ("a & b", ["⟨</li><script>⟩"]), ("none", [])):
        page.eval(f"(find.value = {json.dumps(words)}, find.dispatchEvent(new Event('input')), 0)")
        assert page.eval(headings) == left
        assert page.eval("document.querySelector('#shown').textContent") == str(len(left))
    assert page.errors == []
    assert all(address.startswith(("file:", "data:")) for address in page.requests)


def test_following_a_step_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    record = engine_record()
    path = viewer_of(record, backbone_record()).export(tmp_path / "dreams.html")
    page = browser.open(path)
    shown = "article:not([hidden])"
    assert page.eval(f"document.querySelectorAll('{shown} .edge[d]').length") == len(record.edges)
    assert marked(page, ".following *") == set()

    def into(place: tuple[int, int]) -> set[str]:
        return {f"{e.source[0]}.{e.source[1]}>{place[0]}.{place[1]}" for e in record.edges if e.target == place}

    def out_of(place: tuple[int, int]) -> set[str]:
        return {f"{place[0]}.{place[1]}>{e.target[0]}.{e.target[1]}" for e in record.edges if e.source == place}

    page.click('.node[data-branch="1"][data-step="2"]')
    assert marked(page, ".edge.in") == into((1, 2)) != set()
    assert marked(page, ".edge.out") == out_of((1, 2)) != set()
    assert marked(page, ".node.source") == {edge.split(">")[0] for edge in into((1, 2))}
    assert marked(page, ".node.way") == {f"1.{t}" for t in range(5)}
    assert page.eval("document.querySelector('.detail h3').textContent").startswith("temporal, step 3: a glass ball")
    page.press("ArrowRight")
    assert marked(page, ".node.here") == {"1.3"}
    page.press("ArrowDown")
    assert marked(page, ".node.here") == {"2.3"}
    assert marked(page, ".edge.out") == out_of((2, 3))
    assert page.eval("document.activeElement.dataset.branch + document.activeElement.ariaPressed") == "2true"
    page.hover('.node[data-branch="0"][data-step="0"]')
    assert marked(page, ".edge.out") == out_of((0, 0))
    assert page.eval("document.querySelector('.detail h3').textContent").startswith("causal, step 4")  # chosen still
    page.click(".detail .from ~ button")
    assert marked(page, ".node.here") == {"2.2"}
    page.press("Escape")
    page.hover("h1")
    assert marked(page, ".edge.in, .edge.out, .node.here") == set()
    page.eval("document.querySelector('#save').focus()")
    page.press("Tab")
    assert marked(page, ".node.here") == {"2.2"}  # one stop for Tab: where the walk was left
    assert marked(page, ".edge.in") == into((2, 2))
    page.press("Escape")
    page.click('.word[data-word="7"]')
    shares = dict(zip(record.read, record.words[7].steps, strict=True))
    lit = "parseFloat(getComputedStyle(n).getPropertyValue('--r') || 0)"
    shone = page.eval(
        f"[...document.querySelectorAll('{shown} .node[data-read]')].map((n) => [+n.dataset.branch, "
        f"+n.dataset.step, {lit}])"
    )
    assert {(i, t): part for i, t, part in shone} == pytest.approx(
        {place: part / max(shares.values()) for place, part in shares.items()}
    )
    assert page.eval("document.querySelector('.detail').textContent").startswith(
        "“breaks”Read question 50 %, dream 30 %"
    )
    page.press("ArrowRight")
    assert page.eval("document.querySelector('.word.here').textContent") == "into"
    page.click('.node[data-branch="2"][data-step="2"]')
    read = [word.steps[record.read.index((2, 2))] for word in record.words]
    shone = page.eval(f"[...document.querySelectorAll('{shown} .word')].map((n) => {lit})")
    assert shone == pytest.approx([part / max(read) for part in read])
    assert marked(page, ".node.here") == {"2.2"}
    page.press("Escape")
    page.hover("h1")
    assert page.eval(f"[...document.querySelectorAll('.word, .node')].every((n) => !{lit})")
    page.eval("document.querySelector('#causal').click()")
    assert marked(page, ".edge.weak") == marked(page, f"{shown} .edge.causal")
    page.eval("location.hash = '#dream-2'")
    page.wait(f"document.querySelector('{shown}').id === 'dream-2' && document.querySelector('#picker').value === '1'")
    assert page.errors == []
    assert page.requests == [path.as_uri()]


def test_a_hostile_record_in_a_browser_and_a_phone(browser: Browser, tmp_path: Path) -> None:
    path = viewer_of(engine_record(), hostile_record()).export(tmp_path / "dreams.html")
    page = browser.open(path, width=390, height=844, dark=True)
    ground = page.eval("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 120  # dark
    for number in (1, 2):
        page.eval(f"location.hash = '#dream-{number}'")
        page.wait(f"!document.querySelector('#dream-{number}').hidden")
        assert page.eval("document.documentElement.scrollWidth") <= 390  # the board scrolls, the page doesn't
        page.click("article:not([hidden]) .node")
        assert page.eval("document.querySelectorAll('.here').length") == 1
    assert page.eval("document.scripts.length") == 2
    assert page.eval("document.querySelector('#dream-2 .label').textContent.startsWith('</script><script>alert(1)')")
    assert page.errors == []
    assert page.requests == [path.as_uri()]


def test_a_page_without_a_dream_is_quiet(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(DreamViewer().export(tmp_path / "dreams.html"))
    page.press("Escape")
    page.hover("main")
    assert page.eval("document.querySelector('main').textContent.trim()") == "No dream yet."
    assert page.errors == []


# Live lanes.


def live(record: DreamRecord, **options: Any) -> str:
    """All that is written of a dream as it forms."""
    out: list[str] = []
    lanes = LiveLanes(out.append, **options)
    *partial, whole = as_it_forms(record)
    for part in partial:
        lanes.draw(part)
    lanes.finish(whole)
    return "".join(out)


def screen(text: str, rows: int = 200) -> list[str]:
    """What a terminal shows of it: SGR, cursor previous line, erase to the end of line and screen."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;]*[A-Za-z]|\n)", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row] if row < len(lines) else ""
        elif part.endswith("F") and part.startswith("\x1b"):
            row -= int(part[2:-1])
            assert row >= max(0, len(lines) - rows), "drawn over what has scrolled away"
            column = 0
            lines[row] = lines[row][column:]
        elif part == "\x1b[J":
            del lines[row + 1 :]
            lines[row] = ""
        elif part.endswith("m") or part == "\x1b[K":
            continue
        elif part:
            lines[row] = part
    return lines


def test_plain_lines_say_each_step_once() -> None:
    record = engine_record()
    text = live(record, ansi=False)
    assert "\x1b" not in text
    first, *lines = text.splitlines()
    assert first == record.prompt
    told = [line for line in lines if "⟨" in line]
    assert len(told) == 17
    assert told[0] == "spatial 1: ⟨a glass ball⟩ ⟨lies on⟩ ⟨the shelf⟩"
    assert told[4] == "spatial 2: ⟨the shelf⟩ ⟨is above⟩ ⟨the stone floor⟩"  # as they form: step by step
    assert lines[-4:-2] == [
        "spatial: set aside, steps 5, score 0.31, gates spatial 0.75 temporal 0.06 causal 0.11 abstract 0.07, "
        "engine path 0",
        "temporal: ★ won, steps 5, score 0.94, gates spatial 0.09 temporal 0.75 causal 0.10 abstract 0.06, "
        "engine path 1",
    ]
    assert live(backbone_record(), ansi=False).splitlines()[-1] == "abstract: nothing dreamed"


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
@pytest.mark.parametrize("rows", [10, 24, 60])
def test_a_terminal_shows_the_last_drawing_alone(columns: int, rows: int) -> None:
    for record in (engine_record(), backbone_record(), hostile_record()):
        text = live(record, ansi=True, size=lambda: (columns, rows))
        shown = screen(text, rows)
        whole: list[str] = []
        LiveLanes(whole.append, ansi=True, size=lambda: (columns, rows)).finish(record)
        assert shown == screen("".join(whole))
        assert len(shown) <= max(rows, 2 + len(record.branches) + 1)
        assert all(width(line) < max(columns, 25) for line in shown)
        assert sum(line.count("│") for line in shown) >= len(record.branches)


def test_the_last_drawing_has_verdicts_and_gates() -> None:
    shown = screen(live(engine_record(), ansi=True, size=lambda: (100, 40)))
    text = "\n".join(shown)
    for part in ("★ won 0.94", "✓ read 0.87", "✗ 0.31", "⟨into pieces⟩", "▂▆▂▁"):
        assert part in text
    before: list[str] = []
    LiveLanes(before.append, ansi=True, size=lambda: (100, 40)).draw(as_it_forms(engine_record())[1])
    assert "⟨rolls⟩" in before[0]
    assert "⟨falls⟩" not in before[0]
    assert "★" not in before[0]


def test_a_low_terminal_keeps_the_latest_tokens_and_the_verdict() -> None:
    text = "\n".join(screen(live(engine_record(), ansi=True, size=lambda: (50, 12))))
    assert "⟨into pieces⟩" in text
    assert "…" in text
    assert "★ won 0.94" in text


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_what_each_word_read_is_told_below_the_answer(columns: int) -> None:
    for record in (engine_record(), hostile_record()):
        out: list[str] = []
        LiveLanes(out.append, ansi=True, colour=False, size=lambda: (columns, 40)).words(record)
        lines = "".join(out).splitlines()
        assert all(width(line) < max(columns, 25) and visible(line) == " ".join(line.split()) for line in lines)
        assert lines[0].startswith("read: question 50 %")
        coloured: list[str] = []
        LiveLanes(coloured.append, ansi=True, colour=True, size=lambda: (columns, 40)).words(record)
        assert re.sub(r"\x1b\[[0-9;]*m", "", "".join(coloured)).splitlines() == lines
    out = []
    LiveLanes(out.append, ansi=False).words(record := engine_record())
    _, *lines = "".join(out).splitlines()
    marks = [max(range(9), key=word.steps.__getitem__) + 1 for word in record.words]
    words = [word.text.strip() for word in record.words]
    told = [f"[{m}] {w}" if m != before else w for before, m, w in zip([0, *marks], marks, words, strict=False)]
    assert " ".join(lines[:-9]) == " ".join(told)
    mean = sum(word.steps[1] for word in record.words) / len(words)
    assert lines[-8].split("  ", 1) == [
        f"[2] temporal {100 * mean:.0f} %",
        " 4 ⟨a glass ball⟩  5 ⟨rolls⟩  6 ⟨to the edge⟩",
    ]
    out.clear()
    LiveLanes(out.append, ansi=False).words(backbone_record())
    assert out == [], "no attention was noted"


def test_colours_are_asked_for() -> None:
    plain = live(engine_record(), ansi=True, colour=False)
    assert not re.search(r"\x1b\[[0-9;]*m", plain)
    coloured = live(engine_record(), ansi=True, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert "\x1b[1;36mspatial\x1b[0m" in coloured


def test_nothing_that_a_terminal_obeys_comes_from_a_record() -> None:
    for ansi in (False, True):
        text = re.sub(r"\x1b\[\d*[FKJ]", "", live(hostile_record(), ansi=ansi))
        assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("text", "columns"), [("⟨a ball⟩", 8), ("日本語", 6), ("cafe\u0301", 4), ("🎈x", 3), ("→…│▆", 4), ("", 0)]
)
def test_widths_are_those_of_a_terminal(text: str, columns: int) -> None:
    assert width(text) == columns


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.integers(3, 20))
def test_clipped_text_fits(text: str, columns: int) -> None:
    text = visible(text)
    clipped = clip(text, columns)
    assert width(clipped) <= columns
    assert clipped == text or clipped.endswith("…")
    token = clip(f"⟨{text}⟩", columns)
    assert width(token) <= columns
    assert token.endswith("⟩")
