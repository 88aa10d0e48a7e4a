"""Drawings: places of numbers, round ticks, and marks that are all there."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.page import svg
from ftexp.page.svg import Dot, Scale, Series

NS = "{http://www.w3.org/2000/svg}"
finite = st.floats(-1e12, 1e12)


def parsed(text):
    return ElementTree.fromstring(text)


def test_ends_of_an_axis_are_its_places():
    axis = Scale(2, 6, 100, 200)
    assert [axis.at(v) for v in (2, 3, 6)] == [100, 125, 200]
    assert Scale(1, 10000, 0, 4, log=True).at(100) == 2


@given(st.lists(finite, min_size=1, max_size=20))
def test_every_number_lies_within_its_axis(values):
    axis = svg.scale(values, 10, 90)
    assert all(9.9 <= axis.at(v) <= 90.1 for v in values)
    assert len(svg.ticks(axis)) <= 8


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 7, [-2, 0, 2, 4, 6]), (0.21, 0.24, [0.21, 0.22, 0.23, 0.24])],
)
def test_ticks_are_round(low, high, wanted):
    assert svg.ticks(Scale(low, high, 0, 1)) == wanted


def test_span_decides_whether_an_axis_is_logarithmic():
    assert svg.scale([1, 9], 0, 1).log
    assert not svg.scale([1, 7], 0, 1).log
    assert not svg.scale([0, 100], 0, 1).log


def test_curve_is_drawn_where_its_numbers_are():
    drawn = svg.lines([Series("a", [(0, 0.0), (5, 0.5), (10, 1.0)])], "x", "y", "t")
    path = next(e for e in parsed(drawn).iter(f"{NS}path") if e.get("class") == "line").get("d")
    (a, b), (c, d), (e, f) = [tuple(map(float, p.split())) for p in path[1:].split("L")]
    assert c == pytest.approx((a + e) / 2, abs=0.1) and d == pytest.approx((b + f) / 2, abs=0.1)
    assert a < e and b > f  # upwards is smaller in SVG


def test_ends_are_marked_and_what_is_not_finite_is_left_out():
    drawn = svg.lines(
        [Series("p", [(1, 1.0), (2, math.nan)], "pruned", "", "cross"), Series("f", [(1, math.inf)], "failed")],
        "x",
        "y",
        "t",
    )
    runs = [e.get("class") for e in parsed(drawn).iter(f"{NS}g")]
    assert runs == ["run pruned"]
    assert "sign pruned" in drawn and "nan" not in drawn and "inf" not in drawn


def test_thinning_keeps_both_ends():
    points = [(float(n), float(n)) for n in range(5000)]
    thin = svg._thinned(points)
    assert len(thin) == svg.MOST_STEPS and (thin[0], thin[-1]) == (points[0], points[-1])


def test_front_goes_across_before_it_goes_down():
    drawn = svg.dots([Dot("a", 1, 3), Dot("b", 2, 1)], "x", "y", "t", front=[(1, 3), (2, 1)])
    steps = re.search(r'class="line front" d="([^"]*)"', drawn)[1]
    assert re.fullmatch(r"M[\d.]+ [\d.]+H[\d.]+V[\d.]+", steps)


def test_strip_shows_interval_only_where_there_is_one():
    axis = Scale(0, 1, 0, svg.STRIP)
    assert 'class="span plain"' in svg.strip(0.5, 0.4, 0.6, axis)
    assert "span" not in svg.strip(0.5, math.nan, math.nan, axis)
    assert 'aria-hidden="true"' in svg.strip(0.5, 0.4, 0.6, axis)


def test_names_are_escaped():
    hostile = '"><script>'
    drawn = svg.lines([Series(hostile, [(1, 1.0)], tag=hostile)], hostile, hostile, hostile, (hostile, 1.0))
    drawn += svg.dots([Dot(hostile, 1, 1, tag=hostile)], hostile, hostile, hostile)
    assert "<script" not in drawn
    for one in drawn.split("</svg>")[:-1]:
        parsed(one + "</svg>")


def test_picture_of_a_notebook_brings_its_colours():
    alone = svg.lines([Series("a", [(0, 1.0), (1, 2.0)])], "x", "y", "t")._repr_svg_()
    assert "--accent:" in alone and 'class="paper"' in alone
    parsed(alone)


@pytest.mark.parametrize(("low", "high"), [(0.30490, 0.30531), (5e-5, 5.01e-5), (4_884_480, 4_884_520), (0.1, 900)])
def test_no_two_marks_of_an_axis_read_the_same(low, high):
    marks = svg.ticks(svg.scale([low, high], 0, 100))
    assert len(marks) > 1 and len(set(svg.apart(marks))) == len(marks)


def test_three_digits_alone_would_read_the_same():
    marks = svg.ticks(svg.scale([0.30490, 0.30531], 0, 100))
    assert len({svg.short(v) for v in marks}) < len(marks)
