"""Pictures of a comparison: bars per system, and ratios with the range of their pairs.

Decides geometry alone; the numbers are those of `comparison.summarize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtx.reports.canvas import (
    TEXT_WIDTH,
    WIDTH,
    Scale,
    Swatch,
    draw_box,
    draw_picture,
    draw_swatches,
    draw_text,
    draw_x_axis,
    format_tick,
)
from mtx.reports.svg import NUM_COLORS

_ROW, _BAR, _GAP = 24, 16, 14
_LEFT = 12


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One value, and the lowest and highest of its rounds."""

    case: str
    system: str
    value: float
    low: float
    high: float
    note: str = ""
    """Behind the value, as text."""


def color_systems(systems: Sequence[str]) -> dict[str, str]:
    """A colour class for each, the same in all pictures of a page."""
    return {name: f"s{index % NUM_COLORS}" for index, name in enumerate(systems)}


def draw_bars(
    bars: Sequence[Bar],
    colors: dict[str, str],
    *,
    title: str,
    unit: str,
    format_value: Callable[[float], str],
    limit: float | None = None,
) -> str:
    """Horizontal bars, grouped by case, with a line from the lowest to the highest round.

    Args:
        bars: At least one, those of a case together.
        colors: System -> class.
        title: For those who cannot see it.
        unit: Under the axis.
        format_value: From a value to its text.
        limit: Where the axis ends at least, e.g. 1.0 for shares.
    """
    left, top, rows, parts = _lay_out(bars, colors)
    bottom = rows[-1][1] + _ROW
    longest = max(len(format_value(bar.value) + bar.note) for bar in bars)
    right = WIDTH - 40 - TEXT_WIDTH * longest
    scale = Scale(0.0, max(limit or 0.0, *(bar.high for bar in bars)) * 1.02, left, right)
    parts += draw_x_axis(scale, top, bottom, format_tick, unit)
    for bar, y in rows:
        end = scale(bar.value)
        told = (
            f"{bar.case}, {bar.system}: {format_value(bar.value)} ({format_value(bar.low)} to {format_value(bar.high)})"
        )
        parts.append(draw_box(colors[bar.system], left, y + 4, end - left, _BAR, told))
        parts.append(_draw_range(scale, bar, y + 4 + _BAR / 2))
        parts.append(draw_text(max(end, scale(bar.high)) + 8, y + 16.5, format_value(bar.value) + bar.note, "caption"))
    return draw_picture(title, bottom + 44, parts)


def draw_ratios(bars: Sequence[Bar], colors: dict[str, str], *, title: str, unit: str) -> str:
    """A dot per ratio with the range of its pairs, and a line at 1, where both are equally fast."""
    left, top, rows, parts = _lay_out(bars, colors)
    bottom = rows[-1][1] + _ROW
    right = WIDTH - 30 - TEXT_WIDTH * max(len(f"{bar.value:.2f}x{bar.note}") for bar in bars)
    scale = Scale(0.0, max(1.25, *(bar.high for bar in bars)) * 1.05, left, right)
    parts += draw_x_axis(scale, top, bottom, format_tick, unit)
    one = scale(1.0)
    parts.append(f'<line class="limit" x1="{one}" x2="{one}" y1="{top}" y2="{bottom}"/>')
    for bar, y in rows:
        middle = y + 4 + _BAR / 2
        parts.append(_draw_range(scale, bar, middle))
        parts.append(f'<circle class="fill {colors[bar.system]}" r="5" cx="{scale(bar.value)}" cy="{middle}"/>')
        text = f"{bar.value:.2f}x{bar.note}"
        parts.append(draw_text(scale(bar.high) + 10, y + 16.5, text, "caption strong halo"))
    return draw_picture(title, bottom + 44, parts)


def _lay_out(bars: Sequence[Bar], colors: dict[str, str]) -> tuple[float, float, list[tuple[Bar, float]], list[str]]:
    """Legend and names of cases; where the plot begins from the left and above, and the top of each bar's row."""
    shown = [name for name in colors if any(bar.system == name for bar in bars)]
    left = _LEFT + 16 + TEXT_WIDTH * max(len(bar.case) for bar in bars)
    parts, top = draw_swatches([Swatch(colors[name], name) for name in shown], left, 8)
    rows: list[tuple[Bar, float]] = []
    y, case = top, None
    for bar in bars:
        if bar.case != case:
            y += _GAP if case is not None else 4
            parts.append(draw_text(left - 10, y + 16.5, bar.case, "caption strong end"))
            case = bar.case
        rows.append((bar, y))
        y += _ROW
    return left, top, rows, parts


def _draw_range(scale: Scale, bar: Bar, y: float) -> str:
    low, high = scale(bar.low), scale(bar.high)
    return f'<path class="cross" d="M{low} {y}H{high}M{low} {y - 4}v8M{high} {y - 4}v8"/>'
