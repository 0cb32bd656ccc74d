"""Line charts and bars as inline SVG, drawn here so that a report is one file that needs nothing else.

Decides geometry, ticks and what is shown under the pointer; colours come from the page's style sheet (`s0` .. `s7`).

Invariant: every text that comes from outside is escaped, and every number that is drawn lies inside its plot.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from mtx.reports.units import format_count

Point = tuple[float, float]

NUM_COLORS = 8
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 58, 14, 26, 34
_MAX_POINTS = 800  # more than the pixels of a plot
_MAX_COLUMNS = 120


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: its points by growing x, and the colour it has on the page."""

    label: str
    points: Sequence[Point]
    color: int = 0
    dashed: bool = False
    """Dashed with a dot at each point, for values measured now and then."""
    smooth: bool = False
    """Drawn faintly, with its moving average over it."""
    faint: bool = False
    """Drawn faintly alone and not shown under the pointer, for what was undone."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at a step: a vertical line in a chart."""

    x: float
    label: str
    name: str
    """Class in the page's style sheet."""


def draw_chart(
    title: str,
    series: Sequence[Series],
    *,
    width: int,
    height: int,
    from_zero: bool = False,
    clip_quantile: float = 1.0,
    format_y: Callable[[float], str] = format_count,
    marks: Sequence[Mark] = (),
) -> str:
    """A line chart over steps.

    Args:
        title: Name of the value, for those who cannot see the chart.
        series: Curves; those without points are left out.
        width: Of the whole picture, pixels at scale 1.
        height: Likewise.
        from_zero: Whether the y axis begins at 0.
        clip_quantile: Share of the values that the y axis must reach; curves leave through the top beyond.
        format_y: From a value to its text under the pointer and on the axis.
        marks: What happened at steps; those outside of the curves are left out.
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return f'<p class="none">No {escape(title.lower())} recorded.</p>'
    xs = [x for curve in series for x, _ in curve.points]
    ys = sorted(y for curve in series for _, y in curve.points)
    reached = ys[min(len(ys) - 1, math.ceil(clip_quantile * len(ys)))]
    low = min(0.0, ys[0]) if from_zero else ys[0]
    margin = 0.06 * (reached - low) or 0.5 * abs(reached) or 1.0
    high, low = reached + margin, low if from_zero else low - margin
    plot = _Plot(
        x_low=min(0.0, *xs),
        x_high=max(xs),
        y_low=low,
        y_high=high,
        left=_MARGIN_LEFT,
        right=width - _MARGIN_RIGHT,
        top=_MARGIN_TOP,
        bottom=height - _MARGIN_BOTTOM,
    )
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for y in find_ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{plot.left}" x2="{plot.right}" y1="{plot.y(y)}" y2="{plot.y(y)}"/>')
        parts.append(f'<text class="tick end" x="{plot.left - 8}" y="{plot.y(y) + 4:.1f}">{escape(format_y(y))}</text>')
    for x in find_ticks(plot.x_low, plot.x_high, 8 if width > 700 else 5):
        place = f'x="{plot.x(x)}" y="{plot.bottom + 18}"'
        parts.append(f'<text class="tick middle" {place}>{escape(format_count(x))}</text>')
    parts.append(f'<line class="axis" x1="{plot.left}" x2="{plot.right}" y1="{plot.bottom}" y2="{plot.bottom}"/>')
    # A picture within the picture cuts off what leaves it; with room for dots on its edge.
    left, top, across, down = plot.left - 5, plot.top - 5, plot.right - plot.left + 10, plot.bottom - plot.top + 10
    view = f"{left} {top} {across} {down}"
    parts.append(f'<svg x="{left}" y="{top}" width="{across}" height="{down}" viewBox="{view}">')
    for mark in marks:
        if plot.x_low <= mark.x <= plot.x_high:
            ends = f'x1="{plot.x(mark.x)}" x2="{plot.x(mark.x)}" y1="{plot.top}" y2="{plot.bottom}"'
            parts.append(f'<line class="mark {mark.name}" {ends}/>')
    for curve in series:
        parts.extend(_draw_curve(curve, plot))
    parts.append("</svg>")
    parts.extend(_draw_columns([curve for curve in series if not curve.faint], plot, format_y, marks))
    parts.append("</svg>")
    return "".join(parts)


def draw_bar(segments: Sequence[tuple[str, float, str]]) -> str:
    """One horizontal bar of segments (label, size, class), drawn in proportion; empty segments are left out."""
    total = sum(size for _, size, _ in segments)
    parts = ['<svg class="bar" viewBox="0 0 1000 22" preserveAspectRatio="none" role="img" aria-label="wall time">']
    x = 0.0
    for label, size, name in segments:
        if size > 0:
            width = 1000 * size / total
            shape = f'x="{x:.2f}" y="0" width="{max(width - 1.5, 0.5):.2f}" height="22"'
            parts.append(f'<rect class="{name}" {shape}><title>{escape(label)}</title></rect>')
            x += width
    return "".join(parts) + "</svg>"


def find_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    gap = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [round(index * gap, 12 - math.floor(math.log10(gap))) for index in range(first, last + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Mean over a window around each point, a thirtieth of the curve wide and narrower towards the ends.

    Symmetric, so that a curve that falls is not drawn late.
    """
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(index, len(points) - 1 - index, len(points) // 60)
        smoothed.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return smoothed


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `_MAX_POINTS` points that keep every peak: the lowest and the highest of each stretch."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stretches = _MAX_POINTS // 2
    kept: list[Point] = []
    for index in range(stretches):
        stretch = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """From values to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: int
    right: int
    top: int
    bottom: int

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return round(self.left + (value - self.x_low) / span * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        span = (self.y_high - self.y_low) or 1.0
        return round(self.bottom - (value - self.y_low) / span * (self.bottom - self.top), 1)


def _draw_curve(curve: Series, plot: _Plot) -> list[str]:
    color = f"s{curve.color % NUM_COLORS}"

    def path(points: Sequence[Point], name: str) -> str:
        places = "L".join(f"{plot.x(x)} {plot.y(y)}" for x, y in thin(points))
        return f'<path class="{name} {color}" d="M{places}"/>'

    if curve.faint:
        return [path(curve.points, "line faint")]
    if curve.smooth and len(curve.points) > 100:
        return [path(curve.points, "line faint"), path(smooth(curve.points), "line")]
    parts = [path(curve.points, "line dashed" if curve.dashed else "line")]
    if curve.dashed or len(curve.points) == 1:
        parts += [f'<circle class="dot {color}" cx="{plot.x(x)}" cy="{plot.y(y)}" r="3"/>' for x, y in curve.points]
    return parts


def _draw_columns(
    series: Sequence[Series], plot: _Plot, format_y: Callable[[float], str], marks: Sequence[Mark]
) -> list[str]:
    """Invisible columns that show the values at their step while the pointer is over them, and what happened there."""
    steps = sorted({x for curve in series for x, _ in curve.points})
    steps = steps[:: math.ceil(len(steps) / _MAX_COLUMNS) or 1]
    edges = [plot.left, *((plot.x(a) + plot.x(b)) / 2 for a, b in itertools.pairwise(steps)), plot.right]
    parts = []
    for index, step in enumerate(steps):
        x, left, right = plot.x(step), edges[index], edges[index + 1]
        texts, dots = [f"step {step:,.0f}"], []
        for curve in series:
            near_step, value = _nearest(curve.points, step)
            if curve.dashed and not left <= plot.x(near_step) <= right:
                continue
            texts.append(f"{curve.label} {format_y(value)}".strip())
            near, y = plot.x(near_step), plot.y(value)
            if y >= plot.top - 5:
                dots.append(f'<circle class="dot s{curve.color % NUM_COLORS}" cx="{near}" cy="{y}" r="3.5"/>')
        texts += [mark.label for mark in marks if left <= plot.x(mark.x) < right][:3]
        text = escape("   ".join(texts))
        shape = f'x="{left:.1f}" y="{plot.top}" width="{right - left:.1f}"'
        parts.append(
            f'<g class="column"><rect {shape} height="{plot.bottom - plot.top}"/>'
            f'<line x1="{x}" x2="{x}" y1="{plot.top}" y2="{plot.bottom}"/>{"".join(dots)}'
            f'<text class="readout end" x="{plot.right}" y="{plot.top - 10}">{text}</text><title>{text}</title></g>'
        )
    return parts


def _nearest(points: Sequence[Point], x: float) -> Point:
    index = bisect.bisect_left(points, (x, -math.inf))
    return min(points[max(0, index - 1) : index + 1], key=lambda point: abs(point[0] - x))
