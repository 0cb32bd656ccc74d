"""Scaling curves: a figure against the number of GPUs, with what perfect scaling would give.

Decides axes: GPUs are logarithmic, and so is what grows or falls with them; a share like MFU is linear, from 0.

Invariant: every number of GPUs that is drawn was planned or measured; nothing is extrapolated but the ideal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from mtx.reports.canvas import (
    WIDTH,
    Scale,
    Swatch,
    draw_picture,
    draw_swatches,
    draw_text,
    draw_y_axis,
    space_out,
)
from mtx.reports.svg import NUM_COLORS
from mtx.reports.units import format_count

Ideal = Literal["proportional", "inverse", "constant"]
_HEIGHT, _LEFT, _RIGHT = 300, 66, 24


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve.

    Attributes:
        label: What it is of.
        points: (number of GPUs, value), values positive; in any order.
        is_measured: Measured: dots alone. Planned: a line with dots.
        ideal: What perfect scaling from the first point does; None: not drawn.
    """

    label: str
    points: Sequence[tuple[float, float]]
    is_measured: bool = False
    ideal: Ideal | None = None


def draw_scaling(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str,
    is_log: bool = True,
    format_y: Callable[[float], str] = format_count,
    counted: str = "GPUs",
    names: Sequence[str] = (),
) -> str:
    """The curves over a logarithmic axis of GPUs; those without points are left out.

    Args:
        title: For those who cannot see it.
        curves: At least one of them with points.
        unit: Of the values, at the head of their axis.
        is_log: Whether the values' axis is logarithmic.
        format_y: From a value to its text.
        counted: What the axis counts.
        names: Of the colours of curves, in order; a plan and its measurement share one. Default: one each.
    """
    curves = [curve for curve in curves if curve.points]
    ideals = [_draw_ideal(curve) for curve in curves]
    gpus = sorted({x for curve in curves for x, _ in curve.points})
    values = [y for curve in curves for _, y in curve.points] + [y for ideal in ideals for _, y in ideal]
    colors = names or [f"s{index % NUM_COLORS}" for index in range(len(curves))]
    legend = {color: curve.label for color, curve in reversed(list(zip(colors, curves)))}
    parts, top = draw_swatches([Swatch(color, legend[color]) for color in dict.fromkeys(colors)], _LEFT, 8, WIDTH - 400)
    marks = {
        "full dots: measured, lines: planned": any(curve.is_measured for curve in curves),
        "dotted: perfect scaling from the first point": any(ideals),
    }
    note = "; ".join(text for text, is_drawn in marks.items() if is_drawn)
    parts.append(draw_text(WIDTH - _RIGHT, 18.5, note, "tick end"))
    top += 24
    bottom = top + _HEIGHT
    x_scale = Scale.around(gpus, _LEFT, WIDTH - _RIGHT, is_log=True)
    y_scale = Scale.around(values, bottom, top, is_log=is_log)
    parts += draw_y_axis(y_scale, _LEFT, WIDTH - _RIGHT, format_y, unit)
    places = [x_scale(count) for count in gpus]
    for index in space_out(places, 48):
        parts.append(draw_text(places[index], bottom + 17, f"{gpus[index]:,.0f}", "tick middle"))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(draw_text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 35, counted, "tick middle"))
    for ideal in ideals:
        if len(ideal) > 1:
            parts.append(f'<path class="ideal" d="{_trace(ideal, x_scale, y_scale)}"/>')
    for color, curve in zip(colors, curves):
        points = sorted(curve.points)
        if not curve.is_measured and len(points) > 1:
            parts.append(f'<path class="line {color}" d="{_trace(points, x_scale, y_scale)}"/>')
        for x, y in points:
            kind = ", measured" if curve.is_measured else ""
            said = escape(f"{curve.label}{kind}: {format_y(y)} {unit} on {x:,.0f} {counted}")
            place = f'cx="{x_scale(x)}" cy="{y_scale(y)}"'
            shape = f'class="fill {color}" r="5"' if curve.is_measured else f'class="dot {color}" r="3.5"'
            parts.append(f"<circle {shape} {place}><title>{said}</title></circle>")
    return draw_picture(title, bottom + 44, parts)


def _draw_ideal(curve: Curve) -> list[tuple[float, float]]:
    if curve.ideal is None:
        return []
    (first, value), *_ = points = sorted(curve.points)
    exponent = {"proportional": 1, "inverse": -1, "constant": 0}[curve.ideal]
    return [(x, value * (x / first) ** exponent) for x in (first, points[-1][0])]


def _trace(points: Sequence[tuple[float, float]], x_scale: Scale, y_scale: Scale) -> str:
    return "M" + "L".join(f"{x_scale(x)} {y_scale(y)}" for x, y in points)
