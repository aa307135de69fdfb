"""Charts: values are drawn at their places, axes have few round ticks, text is escaped."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_mini.plots import svg
from crate_mini.plots.svg import Plot, count_ticks


def test_the_corners_of_the_data_are_the_corners_of_the_chart():
    plot = Plot((-5, 0), (0, 10), "title")
    assert (plot.x(-5), plot.x(0)) == (svg.LEFT, svg.WIDTH - svg.RIGHT)
    assert (plot.y(0), plot.y(10)) == (svg.HEIGHT - svg.BOTTOM, svg.TOP)


def test_steps_go_up_and_down_with_the_counts():
    plot = Plot((0, 2), (0, 4), "title")
    plot.steps("bars", [4, 1], [0, 1, 2])
    chart = plot.svg({}, {})
    path = re.search(r'<path class="bars" d="([^"]*)"', chart)[1]
    heights = [float(y) for y in re.findall(r"V([\d.]+)", path)]
    assert heights == [plot.y(4), plot.y(1), plot.y(0)]


def test_a_line_goes_through_its_points():
    plot = Plot((0, 1), (0, 1), "title")
    plot.line("null", [(0, 0), (1, 1)], "opacity:.5")
    path = f"M{plot.x(0)} {plot.y(0)}L{plot.x(1)} {plot.y(1)}"
    assert f'<path class="null" style="opacity:.5" d="{path}"/>' in plot.svg({}, {})


def test_the_title_is_escaped():
    assert 'aria-label="a &lt; &quot;b&quot;"' in Plot((0, 1), (0, 1), 'a < "b"').svg({}, {})


@given(st.integers(0, 10**7))
def test_counts_have_at_most_five_ticks_from_zero(highest):
    ticks = list(count_ticks(highest))
    assert ticks[0] == 0 and len(ticks) <= 5
    assert ticks[-1] <= highest
    steps = {after - before for before, after in zip(ticks, ticks[1:])}
    assert len(steps) <= 1
    assert highest == 0 or ticks[-1] >= highest / 2


@pytest.mark.parametrize("highest, ticks", [(1, [0, 1]), (7, [0, 2, 4, 6]), (90, [0, 50])])
def test_ticks_of_counts_are_round(highest, ticks):
    assert list(count_ticks(highest)) == ticks
