"""The plots of a comparison: round ticks, the data inside, and better where it is said to be."""

import math
import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison_sample import big, small

from distill.report.plots import bars, curves, dots, forest, frontier
from distill.report.svg import Style, axis, log_axis, tick_text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.integers(3, 6), st.booleans())
def test_ticks_are_round_and_the_data_inside(values: list[float], count: int, zero: bool) -> None:
    scale = axis(values, count, zero)
    assert all(scale.low <= value <= scale.high for value in [*values, *([0.0] if zero else [])])
    assert 1 <= len(scale.ticks) <= 2 * count + 1
    steps = {float(f"{b - a:.6g}") for a, b in pairwise(scale.ticks)}
    for step in steps:
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3
    assert [0 <= scale.at(value) <= 100 for value in values]
    labels = [tick_text(tick, scale.ticks) for tick in scale.ticks]
    assert len(set(labels)) == len(labels)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=8))
def test_logarithmic_ticks(values: list[float]) -> None:
    scale = log_axis(values)
    assert 1 <= len(scale.ticks) <= 16
    assert all(scale.low <= value <= scale.high for value in values)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places)  # values that are equal but for rounding may share a place


def test_a_forest_stands_right_of_zero_where_the_difference_is_positive() -> None:
    results = small()
    plot = forest(results, "bits_per_byte", Style(results))
    zero = float(re.findall(r'class="grid zero" x1="([\d.]+)%"', plot)[0])
    (marker,) = re.findall(r'class="mark s1" x="([\d.]+)%"', plot)  # filled: clear
    (low, high) = re.findall(r'class="bar s1" x1="([\d.]+)%" y1="[\d.]+" x2="([\d.]+)%"', plot)[0]
    assert zero < float(low) < float(marker) < float(high)
    assert "← better" in plot
    assert "▼ +0.137" in plot
    unclear = forest(results, "chrf", Style(results))
    assert 'class="mark s1 hollow"' in unclear
    assert "better →" in unclear
    assert forest(results, "kl", Style(results)) == ""


def test_bars_share_the_prompts_out() -> None:
    results = big()
    for metric in ("bits_per_byte", "chrf"):
        plot = bars(results, metric)
        for row in plot.split('<g class="row"')[1:]:
            widths = [float(width) for width in re.findall(r'width="([\d.]+)%"', row)]
            assert abs(sum(widths) - 100) < 0.1
    assert bars(results, "length_ratio") == ""
    assert ">58 · 1 · 141<" in bars(results, "bits_per_byte")


def test_dots_are_above_the_line_where_the_system_is_better() -> None:
    results = big()
    for system in ("hard", "a-student-with-a-rather-long-name"):
        plot = dots(results, system, Style(results))
        zero = float(re.findall(r'class="grid zero" x1="0" y1="([\d.]+)"', plot)[0])
        found = re.findall(r'y="([\d.]+)"[^>]*data-at="(\d+)"', plot)
        assert len(found) == len(results["disagreements"])
        for y, place in found:
            values = results["disagreements"][int(place)]["values"]
            assert (float(y) <= zero) == (values[system] <= values["soft"])  # fewer bits are better


def test_a_line_a_training_ends_where_its_loss_ends() -> None:
    results = big()
    plot = curves(results, "validation_loss", Style(results))
    assert plot.count("<polyline") == 12
    last = results["systems"]["hard"]["curves"][1]["points"][-1]["validation_loss"]
    assert f"runs/hard-1: {last:.3f} after 983,040 tokens" in plot
    assert curves(small(), "loss", Style(small())) == ""
    results["systems"]["hard"]["curves"][0]["points"] = [{"step": 1, "tokens": None, "loss": None}]
    assert curves(results, "validation_loss", Style(results)).count("<polyline") == 11


def test_the_frontier_leaves_out_what_has_no_quality() -> None:
    results = big()
    plot = frontier(results, "bytes", Style(results))
    assert plot.count('class="ring"') == sum(point["on_frontier"] for point in results["frontier"]["points"]) == 2
    assert plot.count("<title>") == 4
    results["frontier"]["points"][0] |= {"quality": None}
    results["frontier"]["points"][1] |= {"tokens_per_second": None}
    assert frontier(results, "tokens_per_second", Style(results)).count("<title>") == 2
    results["frontier"]["points"] = []
    assert frontier(results, "bytes", Style(results)) == ""


def test_more_systems_than_colours_differ_in_shape_or_colour() -> None:
    results = small()
    results["systems"] = {f"system {i}": results["systems"]["soft"] for i in range(20)} | results["systems"]
    style = Style(results)
    looks = {style.colour(name) + style.key(name) for name in results["systems"]}
    assert len(looks) == len(results["systems"])
    assert style.colour("soft") == "s0"


def test_a_plot_says_whose_speed_it_shows() -> None:
    results = small()
    for speed, told in (("alone", "faster, one prompt at a time →"), ("in batches", "faster, in batches →")):
        results["frontier"]["speed_of"] = speed
        assert told in frontier(results, "tokens_per_second", Style(results))
    results["frontier"]["points"][0] |= {"quality": 1.0, "low": 0.875, "high": 1.125}
    assert "soft: 1.000 [0.875, 1.125], 16.8 MB" in frontier(results, "bytes", Style(results))
