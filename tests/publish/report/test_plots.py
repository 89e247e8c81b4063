"""Drawings: what is inside a limit is drawn inside it, and axes have round numbers."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.publish.report.figures import Figure
from exporter.publish.report.nodes import CHANGE, NATS, PERCENT, Node
from exporter.publish.report.plots import Point, bars, columns, deviations, dots, interval_bar, quantiles
from exporter.publish.report.svg import tag, ticks
from tests.publish.report.page import Page

IDEALS = {"within": 0.0, "at_most": 0.0, "at_least": 1.0}


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(IDEALS)),
    value=st.floats(0, 1),
    limit=st.floats(0.001, 0.999),
    reach=st.floats(0, 0.5),
)
def test_a_value_is_drawn_on_its_side_of_the_limit(kind: str, value: float, limit: float, reach: float) -> None:
    ends = value - reach, value + reach
    figure = Figure("f", "", Node(value, "/f"), PERCENT, ends, limit=Node(limit), kind=kind, ideal=IDEALS[kind])
    page = Page.of(interval_bar(figure).encode())
    (allowed,) = page.all("rect", "allowed")
    start = float(allowed.attributes["x"])
    end = start + float(allowed.attributes["width"])
    (drawn,) = [one for one in page.elements if "data-at" in one.attributes]
    low, high = figure.allowed
    if drawn.tag == "path":
        # An arrow: far beyond the limit.
        assert not low <= value <= high
        return
    x = float(drawn.attributes["cx"])
    assert 0 <= x <= 168
    # Pixels are rounded, and a limit has a width.
    assert (start - 0.02 <= x <= end + 1.02) if low <= value <= high else (x <= start + 0.02 or x >= end - 1.02)
    whisker = page.all("line", "whisker")[0].attributes
    assert 10 <= float(whisker["x1"]) <= float(whisker["x2"]) <= 158


@given(low=st.floats(-1e3, 1e3), span=st.floats(1e-6, 1e6), most=st.integers(3, 8))
def test_ticks_are_round_and_inside(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most)
    assert 3 <= len(found) <= max(most + 1, 7)
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in found)
    steps = {f"{right - left:.1e}"[0] for left, right in pairwise(found)}
    assert steps <= {"1", "2", "5"} or span < 1e-3 * abs(low)


def test_ticks_of_nothing() -> None:
    assert ticks(1.0, 1.0) == [1.0]


@settings(max_examples=200, deadline=None)
@given(off=st.lists(st.floats(-1, 1), min_size=1, max_size=40), power=st.integers(-9, 3))
def test_ticks_tell_how_far_dots_are_off(off: list[float], power: int) -> None:
    """At least three, none written as another, and none where the frame cuts it off."""
    points = [Point(str(at), Node(1 + far * 10.0**power, f"/{at}")) for at, far in enumerate(off)]
    page = Page.of(dots("d", points, PERCENT, "layer", 1).encode())
    labels = [one for one in page.all("text") if one.attributes["text-anchor"] == "end"]
    assert len({one.text for one in labels}) == len(labels) >= 3
    assert len({one.attributes["y"] for one in labels}) == len(labels)
    assert all(float(one.attributes["x"]) >= 6 * len(one.text) for one in labels)
    values = [float(one.text.removesuffix("%").replace("\N{MINUS SIGN}", "-")) for one in labels]
    steps = [right - left for left, right in pairwise(values)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


@pytest.mark.parametrize(("spread", "labels"), [(1.0, "0.001 0.002 0.005 0.01"), (100.0, "0.001 0.01 0.1 1")])
def test_divergences_of_one_decade_have_ticks_too(spread: float, labels: str) -> None:
    pairs = Node([[0.0, 0.002], [0.5, 0.004], [1.0, 0.006 * spread]], "/pairs")
    page = Page.of(quantiles("q", pairs).encode())
    assert [one.text for one in page.all("text") if one.attributes["text-anchor"] == "end"] == labels.split()


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [None], [1e-9, 1e9], [0.5, None, 0.25] * 40])
def test_any_numbers_can_be_drawn(values: list[float | None]) -> None:
    points = [Point(str(index), Node(value, f"/{index}")) for index, value in enumerate(values)]
    for drawing in (
        bars("b", points, PERCENT.text),
        deviations("d", points, PERCENT.text, 1),
        columns("c", points, NATS, "layer"),
        dots("e", points, PERCENT, "layer", 1),
    ):
        assert Page.of(drawing.encode()).all("svg")
        assert not re.search(r"nan|inf\b", drawing)


def test_an_element_escapes() -> None:
    assert tag("text", "<&", class_='"') == '<text class="&#34;">&lt;&amp;</text>'


def test_numbers_have_the_digits_that_their_interval_leaves() -> None:
    assert CHANGE.fixed(0.0049)(0.0078481) == "+0.78%"
    assert CHANGE.fixed(0.0049)(-0.1) == "\N{MINUS SIGN}10.00%"
    assert PERCENT.text(0.0067176) == "0.672%"
    assert PERCENT.fixed(0.1)(-0.0003) == "0%"
    assert CHANGE.text(-0.00001, 1) == "+0.0%"
    assert NATS.text(0.0) == "0"
    assert NATS.text(1.7e308) == "1.70e+308"
    assert PERCENT.limit(0.0212929) == "2.129%"
