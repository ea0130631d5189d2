"""The plots of a report: the data where it belongs, better where it is said to be, and one page's plots apart."""

import re
from xml.etree import ElementTree

from support.comparison_sample import small

from distill.report.plots import forest, looks


def numbers(plot: str, drawn: str) -> list[list[float]]:
    """Of the paths that a pattern of their style finds: x, y, x, y …"""
    root = ElementTree.fromstring(plot)
    paths = [path.attrib for path in root.iter("path") if re.search(drawn, path.get("style", ""))]
    return [[float(number) for number in re.findall(r"-?[\d.]+", path["d"])] for path in paths]


def test_a_forest_stands_right_of_zero_where_the_difference_is_positive() -> None:
    results = small()
    plot = forest(results, "bits_per_byte")
    assert "hard: +0.137 [+0.070, +0.204], corrected p &lt; 0.001 · clearly worse" in plot
    ((low, _, high, _),) = numbers(plot, r"stroke: var\(--s1\); stroke-width: 3")
    (marker,) = [
        float(use.attrib["x"]) for use in ElementTree.fromstring(plot).iter("use") if "--s1" in use.get("style", "")
    ]
    zero = float(re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL \1 [^"]*"[^>]*var\(--soft\)', plot)[0])
    assert zero < low < marker < high
    assert "← better" in plot
    assert "▼ +0.137" in plot
    assert "fill: var(--s1)" in plot  # filled: clear
    unclear = forest(results, "chrf")
    assert "fill: var(--card); stroke: var(--s1)" in unclear
    assert "better →" in unclear
    assert forest(results, "kl") == ""
    results["baseline"] = "another"
    assert "hard − soft" in forest(results, "chrf")


def test_more_systems_than_colours_differ_in_shape_or_colour() -> None:
    results = small()
    results["systems"] = {f"system {i}": results["systems"]["soft"] for i in range(20)} | results["systems"]
    found = looks(results)
    assert len(set(found.values())) == len(results["systems"])
    assert found["soft"] == (0, 0)


def test_a_page_draws_the_same_each_time_and_its_plots_share_no_id() -> None:
    results = small()
    drawn = [forest(results, name) for name in ("bits_per_byte", "chrf")]
    assert drawn == [forest(results, name) for name in ("bits_per_byte", "chrf")]
    ids = [re.findall(r' id="([^"]*)"', plot) for plot in drawn]
    assert not set(ids[0]) & set(ids[1])
    for plot in drawn:
        assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', plot))
        assert "#00f" not in plot  # every colour is one of the page's
