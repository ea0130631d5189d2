"""The plots of a report: the data where it belongs, better where it is said to be, and one page's plots apart."""

import re
from xml.etree import ElementTree

import pytest
from support.comparison_sample import big, small

from distill.report.plots import Looks, curves, forest, frontier


def places(plot: str) -> dict[str, list[tuple[float, float]]]:
    """What a marker tells on hovering → where its marks stand, in pixels from the left and from the top."""
    root = ElementTree.fromstring(plot)
    return {
        mark.findtext("title") or "": [(float(use.attrib["x"]), float(use.attrib["y"])) for use in mark.iter("use")]
        for mark in root.iter("g")
        if mark.get("class") == "mark"
    }


def lines(plot: str, system: str) -> list[list[float]]:
    """The numbers of the paths that are a system's and no marker: x, y, x, y …"""
    root = ElementTree.fromstring(plot)
    paths = [
        path.attrib["d"]
        for group in root.iter("g")
        if group.get("data-system") == system and group.get("class") == ""
        for path in group.iter("path")
    ]
    return [[float(number) for number in re.findall(r"-?[\d.]+", path)] for path in paths]


def test_a_forest_stands_right_of_zero_where_the_difference_is_positive() -> None:
    results = small()
    plot = forest(results, "bits_per_byte", Looks(results))
    ((told, [(marker, _)]),) = places(plot).items()
    assert told == "hard: +0.137 [+0.070, +0.204], corrected p < 0.001 · clearly worse"
    ((low, _, high, _),) = lines(plot, "hard")
    zero = float(re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL \1 [^"]*"[^>]*var\(--soft\)', plot)[0])
    assert zero < low < marker < high
    assert "← better" in plot
    assert "▼ +0.137" in plot
    assert "fill: var(--s1)" in plot  # filled: clear
    unclear = forest(results, "chrf", Looks(results))
    assert "fill: var(--card); stroke: var(--s1)" in unclear
    assert "better →" in unclear
    assert forest(results, "kl", Looks(results)) == ""


def test_a_line_a_training_ends_where_its_loss_ends() -> None:
    results = big()
    plot = curves(results, "validation_loss", Looks(results))
    assert len(places(plot)) == sum(len(lines(plot, name)) for name in results["systems"]) == 12
    last = results["systems"]["hard"]["curves"][1]["points"][-1]["validation_loss"]
    assert f"runs/hard-1: {last:.3f} after 983,040 tokens" in places(plot)
    assert curves(small(), "loss", Looks(small())) == ""
    results["systems"]["hard"]["curves"][0]["points"] = [{"step": 1, "tokens": None, "loss": None}]
    assert len(places(curves(results, "validation_loss", Looks(results)))) == 11


def test_the_frontier_leaves_out_what_has_no_quality() -> None:
    results = big()
    found = places(frontier(results, "bytes", Looks(results)))
    assert len(found) == 4
    up = {told.split(":")[0]: -place[1] for told, (place,) in found.items()}
    assert max(up, key=lambda name: up[name]) == "a-student-with-a-rather-long-name"  # the fewest bits
    results["frontier"]["points"][0] |= {"quality": None}
    results["frontier"]["points"][1] |= {"tokens_per_second": None}
    assert len(places(frontier(results, "tokens_per_second", Looks(results)))) == 2
    results["frontier"]["points"] = []
    assert frontier(results, "bytes", Looks(results)) == ""


def test_more_systems_than_colours_differ_in_shape_or_colour() -> None:
    results = small()
    results["systems"] = {f"system {i}": results["systems"]["soft"] for i in range(20)} | results["systems"]
    looks = Looks(results)
    assert len({(looks.colour(name), looks.glyph(name)) for name in results["systems"]}) == len(results["systems"])
    assert looks.place("soft") == 0


@pytest.mark.parametrize(
    ("speed", "told"), [("alone", "faster, one prompt at a time →"), ("in batches", "faster, in batches →")]
)
def test_a_plot_says_whose_speed_it_shows(speed: str, told: str) -> None:
    results = small()
    results["frontier"]["speed_of"] = speed
    assert told in frontier(results, "tokens_per_second", Looks(results))
    results["frontier"]["points"][0] |= {"quality": 1.0, "low": 0.875, "high": 1.125}
    assert "soft: 1.000 [0.875, 1.125], 16.8 MB" in frontier(results, "bytes", Looks(results))


def test_a_page_draws_the_same_each_time_and_its_plots_share_no_id() -> None:
    results = small()
    looks = Looks(results)
    drawn = [forest(results, name, looks) for name in ("bits_per_byte", "chrf")]
    again = Looks(results)
    assert drawn == [forest(results, name, again) for name in ("bits_per_byte", "chrf")]
    ids = [re.findall(r' id="([^"]*)"', plot) for plot in drawn]
    assert not set(ids[0]) & set(ids[1])
    for plot in drawn:
        assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', plot))
        assert "#00f" not in plot  # every colour is one of the page's
