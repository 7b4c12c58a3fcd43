"""Scales hold their values, ticks are round and few."""

import math

import pytest

from lillama.report.svg import Axes, Line, Scale, chart


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[3.0], [0.001, 0.0011], [1e-9, 5.0], [1.0, 7.0, 1000.0], [math.nan, 2.0], []])
def test_values_and_ticks_lie_within_the_scale(values, log):
    scale = Scale.over(values, log)
    finite = [value for value in values if math.isfinite(value)]
    assert all(-1e-9 <= scale(value) <= 1 + 1e-9 for value in [*finite, *scale.ticks()])
    assert len(scale.ticks()) <= 12


def test_points_that_a_log_axis_cannot_show_are_left_out():
    drawn = chart(
        "losses", Axes("x", "y", log_y=True), [Line("a", [(0, 0.0), (1, math.nan), (2, 3.0)], "kept", marks=True)]
    )
    assert drawn.count("<circle") == 1 and "nan" not in drawn
