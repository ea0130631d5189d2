"""The page of a comparison: whole without a network or a script, readable on a phone, and deaf to hostile answers."""

import json
import re
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.browser import Browser, Page
from support.comparison_sample import HOSTILE, QUESTIONS, bare, big, small

from distill.exam.metrics.catalogue import METRICS, metric_of
from distill.report.findings import difference_text
from distill.report.page import render_html

VOID = {"meta", "input", "br", "img", "link"}
SECTIONS = ["found", "believe", "differences", "measured", "prompts", "judge", "cost", "training", "seen"]


class Outline(HTMLParser):
    """Elements with their attributes, the text outside of scripts, and what doesn't nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: dict[str, str] = {}
        self.wrong: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        self.wrong += [tag for tag, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if len(attributes) != len(attrs):
            self.wrong.append(f"{tag}: an attribute twice")
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("id", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.wrong.append(f"</{tag}> in {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            self.scripts[self._open[-1][1]] = data
        elif self._open and self._open[-1][0] != "style":
            self.text.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


# Without a browser.


@pytest.mark.parametrize("sample", [small, big])
def test_the_page_is_well_formed_and_fetches_nothing(sample: Any) -> None:
    page = render_html(sample())
    outline = Outline(page)
    assert outline.wrong == []
    assert not re.search(r"https?:|@import|\burl\((?!#)", page.replace("http://www.w3.org/2000/svg", ""))
    assert not any({"src", "srcset", "action", "data"} & found.keys() for _, found in outline.elements)
    assert all(found["href"].startswith("#") for _, found in outline.elements if "href" in found)
    ids = [found["id"] for _, found in outline.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for found in outline.all("a"):
        assert found["href"].removeprefix("#") in ids
    for _, found in outline.elements:
        if "aria-labelledby" in found:
            assert found["aria-labelledby"] in ids
    (policy,) = [found["content"] for found in outline.all("meta") if "http-equiv" in found]
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_every_part_is_named() -> None:
    outline = Outline(render_html(big()))
    assert [found["id"] for found in outline.all("section")] == [*SECTIONS, "reading"]
    assert [found["id"] for found in Outline(render_html(small())).all("section")] == [
        name for name in [*SECTIONS, "reading"] if name != "judge"
    ]
    assert len(outline.all("caption")) == len(outline.all("table")) == 7
    for found in outline.all("svg", role="img"):
        assert len(found["aria-label"]) > 10
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-4]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_pictures_stand_beside_the_answers() -> None:
    results = small()
    assert "img-src" not in render_html(results)
    results["disagreements"][0]["pictures"] = ["aGk=", '"><script>']
    outline = Outline(page := render_html(results))
    assert outline.wrong == []
    assert "img-src data:;" in page
    sources = [found["src"] for found in outline.all("img")]
    assert sources == ["data:image/jpeg;base64,aGk=", 'data:image/jpeg;base64,"><script>']


def test_without_a_script_all_is_there() -> None:
    results = big()
    text = " ".join(" ".join(Outline(render_html(results)).text).split())
    for difference in results["differences"]:
        assert difference_text(difference) in text
    for each in results["disagreements"]:
        assert " ".join(each["teacher"].split()) in text
    assert "Ollama's API gives no likelihood of a given answer" in text
    assert "1 exact, 2 near copies, 1 contained in another text" in text
    assert "no usable verdict" in text
    assert "⟨spatial⟩⟨a glass ball⟩⟨lies on⟩⟨the shelf⟩" in text


@cache
@cache
def elements(said: str) -> list[str]:
    """Of a page on which that text stands wherever a text may."""
    results = small()
    results["disagreements"] = results["disagreements"][:2]
    for each in results["disagreements"]:
        each["prompt"] = each["teacher"] = f"a{said}"
        for answers in each["systems"].values():
            answers |= {"answer": f"a{said}", "dream": ""}
    results["title"] = results["exam"]["name"] = said
    results["warnings"] = [said]
    results["systems"]["hard"]["missing"] = {"chrf": said}
    results["systems"]["soft"]["trained_on"]["settings"] = {said: said}
    return [tag for tag, _ in Outline(render_html(results)).elements if tag != "bdi"]


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=40).map(lambda said: HOSTILE[: len(said)] + said))
def test_nothing_said_becomes_markup(said: str) -> None:
    """The same elements as for a harmless text, wherever it stands."""
    assert elements(said) == elements("harmless")


def test_systems_of_any_name() -> None:
    results = small()
    name = '"><script>window.owned = 1</script>'
    told = json.loads(json.dumps(results).replace('"hard"', json.dumps(name)))
    outline = Outline(render_html(told))
    assert outline.wrong == []
    assert len(outline.all("script")) == 1
    assert outline.all("article", class_="finding")[0]["data-system"] == name


def test_a_page_of_hardly_anything() -> None:
    page = render_html(bare())
    assert Outline(page).wrong == []
    assert "There is nothing to compare with" in page
    assert ">None<" not in page


# In a browser.


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    written: dict[str, Path] = {}
    for name, sample in (("small", small), ("big", big)):
        written[name] = folder / f"{name}.html"
        written[name].write_text(render_html(sample()), encoding="utf-8")
    return written


def choose(page: Page, selector: str, value: str) -> None:
    page.eval(
        f"(() => {{ const s = document.querySelector('{selector}'); s.value = {json.dumps(value)};"
        "s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change')); })()"
    )


CONTRAST = """(() => {
  const parse = (c) => { const v = c.match(/[\\d.]+/g).map(Number); return v.length > 3 ? v : [...v, 1]; };
  const linear = (v) => (v <= .03928 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
  const light = (c) => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const ground = (n) => { for (; n; n = n.parentElement) {
    const c = parse(getComputedStyle(n).backgroundColor); if (c[3] > .99) return c; } return [255, 255, 255, 1]; };
  const poor = new Set(), small = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), n = walk.currentNode.parentElement;
    if (!text || n.closest('script, [hidden], .sr, option, .skip')) continue;
    const style = getComputedStyle(n);
    const [a, b] = [light(parse(n.closest('svg') ? style.fill : style.color)), light(ground(n))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.add(`${ratio.toFixed(2)} ${n.tagName} ${text.slice(0, 30)}`);
    if (parseFloat(style.fontSize) < 14) small.add(`${style.fontSize} ${n.tagName} ${text.slice(0, 30)}`);
  }
  const marks = new Set();
  for (const n of document.querySelectorAll('.key')) {
    const [a, b] = [light(parse(getComputedStyle(n).color)), light(ground(n))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 3) marks.add(`${ratio.toFixed(2)} ${n.className}`);
  }
  return { poor: [...poor], small: [...small], marks: [...marks] };
})()"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_quietly_and_reads_well(browser: Browser, paths: dict[str, Path], width: int, dark: bool) -> None:
    page = browser.open(paths["big"], width=width, height=844, dark=dark)
    assert page.eval("document.scrollingElement.scrollWidth") <= width
    ground = sum(map(int, re.findall(r"\d+", page.eval("getComputedStyle(document.body).backgroundColor"))[:3]))
    assert (ground < 120) == dark
    for name in [*SECTIONS, "reading"]:
        assert page.eval(f"document.querySelector('#{name}').getBoundingClientRect().height") > 40, name
    page.eval("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.eval("document.scrollingElement.scrollWidth") <= width
    assert page.eval(CONTRAST) == {"poor": [], "small": [], "marks": []}
    wide = page.eval(
        "[...document.querySelectorAll('main *')].filter((n) => !n.closest('.scroll')"
        f" && n.getBoundingClientRect().right > {width} + 1).map((n) => n.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert page.errors == []
    assert page.requests == [paths["big"].as_uri()]


def test_hostile_answers_stay_text(browser: Browser, paths: dict[str, Path]) -> None:
    page = browser.open(paths["big"])
    page.eval("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.click("#more")
    assert page.eval("typeof window.owned") == "undefined"
    assert page.eval("document.scripts.length") == 1
    assert page.eval("document.images.length") == 0
    shown = page.eval("document.querySelector('#prompt-0 .said .text').textContent")
    assert shown.startswith("</script><script>window.owned = 1</script><img src=x")
    rtl = page.eval(f"[...document.querySelectorAll('.prompt h3')].find((h) => h.textContent === {QUESTIONS[6]!r}).dir")
    assert rtl == "auto"
    assert page.errors == []


def test_prompts_are_found_ordered_and_opened(browser: Browser, paths: dict[str, Path]) -> None:
    page = browser.open(paths["big"])
    shown = "[...document.querySelectorAll('.prompt')].filter((n) => !n.hidden)"
    assert page.eval(f"{shown}.length") == 6
    page.click("#more")
    assert page.eval(f"{shown}.length") == 24
    choose(page, "#search", "ARABIC-nowhere")
    assert page.eval(f"{shown}.length") == 0
    assert page.eval("document.querySelector('#count').textContent") == "0 of 24 match, 0 shown"
    choose(page, "#search", "question 1")
    found = page.eval(f"{shown}.map((n) => n.textContent.toLowerCase().includes('question 1'))")
    assert found
    assert all(found)
    choose(page, "#search", "")
    choose(page, "#order", "text")
    assert page.eval(f"{shown}.map((n) => n.dataset.place)") != [str(i) for i in range(24)]
    page.click("#dreams")
    assert page.eval("[...document.querySelectorAll('.dream')].every((dream) => dream.open)")
    assert page.errors == []


def test_a_system_and_a_metric_are_chosen(browser: Browser, paths: dict[str, Path]) -> None:
    page = browser.open(paths["big"])
    choose(page, "#highlight", "nodream")
    dim = "getComputedStyle(document.querySelector('.measured td[data-system=\"{}\"]')).opacity"
    assert float(page.eval(dim.format("nodream"))) == 1
    assert float(page.eval(dim.format("hard"))) < 0.5
    choose(page, "#highlight", "")
    assert float(page.eval(dim.format("hard"))) == 1
    choose(page, "#metric", "chrf")
    assert page.eval("[...document.querySelectorAll('figure[data-metric]')].filter((n) => !n.hidden).length") == 1
    assert page.eval("[...document.querySelectorAll('.measured tr[data-metric]')].filter((n) => !n.hidden).length") == 1
    choose(page, "#metric", "dream_recall_chance")
    assert (
        page.eval("document.querySelector('figure[data-metric=dream_recall_chance]').getBoundingClientRect().height")
        > 50
    )
    choose(page, "#metric", "")
    page.click("#seeds")
    seeds = "document.querySelector('.measured .seeds')"
    assert page.eval(f"{seeds}.getBoundingClientRect().height") > 10
    values = big()["systems"]["soft"]["metrics"]["bits_per_byte"]["seeds"]
    assert page.eval(f"{seeds}.textContent") == "seeds " + " · ".join(f"{value:.3f}" for value in values)
    assert page.errors == []


def test_a_heading_sorts_its_table(browser: Browser, paths: dict[str, Path]) -> None:
    page = browser.open(paths["big"])
    page.eval("document.querySelector('.differences-table').closest('details').open = true")
    column = (
        "[...document.querySelectorAll('.differences-table tbody tr')].map((r) => r.cells[2].dataset.value ?? null)"
    )
    page.click(".differences-table th:nth-child(3) button")
    up = page.eval(column)
    page.click(".differences-table th:nth-child(3) button")
    down = page.eval(column)
    known = [difference["value"] for difference in big()["differences"] if difference["value"] is not None]
    assert up == [*map(str, sorted(known)), None]
    assert down == [*map(str, sorted(known, reverse=True)), None]
    assert page.eval("document.querySelector('.differences-table th[aria-sort]').ariaSort") == "descending"
    assert page.errors == []


def test_the_focus_is_seen_and_the_small_page_is_quiet(browser: Browser, paths: dict[str, Path]) -> None:
    page = browser.open(paths["small"], width=390)
    page.press("Tab")
    assert page.eval("document.activeElement.className") == "skip"
    page.press("Tab")
    outline = page.eval(
        "(() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth; })()"
    )
    assert outline == "solid3px"
    assert page.errors == []
    assert page.requests == [paths["small"].as_uri()]


def test_every_metric_has_a_plot() -> None:
    results = small()
    (like,) = [d for d in results["differences"] if d["metric"] == "chrf"]
    results["metrics"] = list(METRICS)
    results["differences"] = [{**like, "metric": name} for name in METRICS]
    outline = Outline(render_html(results))
    drawn = [found["data-metric"] for found in outline.all("figure") if "data-metric" in found]
    assert sorted(drawn) == sorted(METRICS)
    assert all(metric_of(name).label in " ".join(outline.text) for name in METRICS)
