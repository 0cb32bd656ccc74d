"""Plan against measurement, a dot each: on the diagonal the plan was right.

Decides that both axes are the same and logarithmic, so that equal distances from the diagonal are equal errors.

Invariant: the band around the diagonal is drawn to the same scale as the dots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from mtx.reports.canvas import (
    WIDTH,
    Scale,
    Swatch,
    draw_picture,
    draw_swatches,
    draw_text,
    draw_x_axis,
    draw_y_axis,
    format_tick,
)
from mtx.reports.svg import NUM_COLORS

BAND = 0.1
"""Relative error that the band around the diagonal shows."""
_HEIGHT, _LEFT, _RIGHT = 420, 66, 24


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One point.

    Attributes:
        label: What was measured.
        group: What its colour says, a size of model or a software.
        measured: Positive, in the picture's unit.
        planned: Likewise.
    """

    label: str
    group: str
    measured: float
    planned: float

    @property
    def error(self) -> float:
        """plan / measured - 1."""
        return self.planned / self.measured - 1


def draw_accuracy(
    comparisons: Sequence[Comparison],
    *,
    unit: str,
    format_value: Callable[[float], str] = format_tick,
    title: str = "Plan against measurement",
) -> str:
    """The points over the diagonal.

    Args:
        comparisons: At least one.
        unit: Of both values.
        format_value: From a value to its text.
        title: For those who cannot see it.
    """
    colors = {
        group: f"s{index % NUM_COLORS}" for index, group in enumerate(dict.fromkeys(c.group for c in comparisons))
    }
    parts, top = draw_swatches([Swatch(color, group) for group, color in colors.items()], _LEFT, 8)
    parts.append(draw_text(WIDTH - _RIGHT, 18.5, f"line: planned = measured; dotted: {BAND:.0%} off", "tick end"))
    top += 24
    bottom = top + _HEIGHT
    values = [value for c in comparisons for value in (c.measured, c.planned)]
    x_scale = Scale.around(values, _LEFT, WIDTH - _RIGHT, is_log=True)
    y_scale = Scale.around(values, bottom, top, is_log=True)
    parts += draw_x_axis(x_scale, top, bottom, format_value, f"measured, {unit}")
    parts += draw_y_axis(y_scale, _LEFT, WIDTH - _RIGHT, format_value, f"planned, {unit}")
    for factor, name in ((1 - BAND, "ideal"), (1.0, "axis"), (1 + BAND, "ideal")):
        low, high = max(x_scale.low, x_scale.low / factor), min(x_scale.high, x_scale.high / factor)
        ends = f'x1="{x_scale(low)}" y1="{y_scale(low * factor)}" x2="{x_scale(high)}" y2="{y_scale(high * factor)}"'
        parts.append(f'<line class="{name}" {ends}/>')
    for c in comparisons:
        told = f"{c.label}: measured {format_value(c.measured)}, planned {format_value(c.planned)} ({c.error:+.1%})"
        place = f'cx="{x_scale(c.measured)}" cy="{y_scale(c.planned)}"'
        parts.append(f'<circle class="fill {colors[c.group]}" r="4.5" {place}><title>{escape(told)}</title></circle>')
    return draw_picture(title, bottom + 44, parts)
