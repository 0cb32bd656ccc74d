"""Ticks are round, thinning keeps peaks, smoothing is fair."""

import math

import pytest

from mtx.reports.svg import Series, draw_chart, find_ticks, smooth, thin


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (2.93, 6.8, 5, [3, 4, 5, 6]),
        (0, 3e-4, 5, [0, 1e-4, 2e-4, 3e-4]),
        (-1.2, 1.1, 5, [-1, -0.5, 0, 0.5, 1]),
        (5, 5, 5, [5]),
        (0, 2000, 8, [0, 250, 500, 750, 1000, 1250, 1500, 1750, 2000]),
        (1e-9, 4e-9, 4, [1e-9, 2e-9, 3e-9, 4e-9]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, ticks: list[float]) -> None:
    assert find_ticks(low, high, count) == pytest.approx(ticks, rel=1e-12, abs=1e-20)


def test_thinning_keeps_every_peak() -> None:
    points = [(float(x), math.sin(x / 900)) for x in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[8765] = (8765.0, -50.0)
    thinned = thin(points)
    assert len(thinned) <= 800
    assert {points[4321], points[8765]} <= set(thinned)
    assert thinned == sorted(thinned)
    assert thin(points[:10]) == points[:10]


def test_smoothing_keeps_a_line_a_line_and_ends_where_the_curve_ends() -> None:
    line = [(float(x), 3.0 - 0.5 * x) for x in range(601)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    noisy = [(x, y + (-1) ** int(x)) for x, y in line]
    spread = [abs(a[1] - b[1]) for a, b in zip(smooth(noisy), line)]
    assert max(spread[30:-30]) < 0.1
    assert smooth(noisy)[-1] == noisy[-1]


def test_chart_shows_values_under_the_pointer_and_escapes_names() -> None:
    curve = Series(label="<b>", points=[(1.0, 2.0), (2.0, 4.0)])
    validation = Series(label="v", points=[(2.0, 3.0)], dashed=True)
    chart = draw_chart("t", [curve, validation, Series(label="empty", points=[])], width=500, height=200)
    assert "<title>step 1   &lt;b&gt; 2</title>" in chart
    assert "<title>step 2   &lt;b&gt; 4   v 3</title>" in chart
    assert "<b>" not in chart
    assert "empty" not in chart
