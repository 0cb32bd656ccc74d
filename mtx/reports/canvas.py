"""What the pictures of plans have in common: axes, linear or logarithmic, swatches, legends, and how one stands alone.

Decides where ticks are and how wide a text is taken to be; each picture decides what it shows.

Invariant: whatever a scale is asked for lies within its ends, and every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from mtx.reports.page import PICTURE_STYLE
from mtx.reports.svg import find_ticks

WIDTH = 1080
"""Of every picture, pixels at scale 1."""
TEXT_WIDTH = 6.9
"""Of a letter of 12 pixels, at most on average."""

_HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line class="hatch" x1="0" x2="0" y1="0" y2="6"/></pattern></defs>'
)
HATCH_SHEET = f'<svg width="0" height="0" style="position:absolute" aria-hidden="true">{_HATCH}</svg>'
"""What a page holds once for `draw_hatch`: lines over what is communication, which need no colour to be told."""


@dataclass(frozen=True)
class Scale:
    """From values to pixels.

    Attributes:
        low: Value at `start`; positive on a logarithmic scale.
        high: Value at `end`; may equal `low`.
        start: Pixel.
        end: Pixel; below `start` for an axis that grows upwards.
        is_log: Whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, is_log: bool = False) -> Scale:
        """From the least to the largest value, with some room on both sides; linear ones begin at 0."""
        low, high = min(values), max(values)
        if is_log:
            room = max((high / low) ** 0.08, 1.15)
            return cls(low / room, high * room, start, end, True)
        return cls(min(0.0, low), high * 1.06 or 1.0, start, end)

    def __call__(self, value: float) -> float:
        low, high = self._flat(self.low), self._flat(self.high)
        share = (self._flat(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)

    def _flat(self, value: float) -> float:
        return math.log(max(value, self.low)) if self.is_log else value

    def ticks(self, count: int) -> list[float]:
        """About `count` round values."""
        return find_log_ticks(self.low, self.high, count) if self.is_log else find_ticks(self.low, self.high, count)


def find_log_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis: 1, 2 and 5 in each decade, or fewer, or linear ones.

    Args:
        low: Positive.
        high: Not below `low`.
        count: About how many.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= count:
            return ticks if len(ticks) >= 3 else find_ticks(low, high, min(count, 4))
    return ticks[:: math.ceil(len(ticks) / count)]


def format_tick(value: float) -> str:
    """At least three digits, without an exponent as long as people read that: 0.05, 13.4, 1,200."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def space_out(places: Sequence[float], least: float) -> list[int]:
    """Indices of places, growing, of which each is `least` or more behind the one before."""
    kept: list[int] = []
    for index, place in enumerate(places):
        if not kept or place - places[kept[-1]] >= least:
            kept.append(index)
    return kept


def draw_text(x: float, y: float, text: str, name: str = "caption") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def draw_box(name: str, x: float, y: float, width: float, height: float, title: str = "") -> str:
    """A filled box of a colour class, with what it is under the pointer."""
    told = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="fill {name}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">{told}</rect>'


def draw_hatch(x: float, y: float, width: float, height: float) -> str:
    """Lines over a box; its page holds `HATCH_SHEET`."""
    shape = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect fill="url(#hatch)" pointer-events="none" {shape}/>'


def draw_x_axis(scale: Scale, top: float, bottom: float, format_x: Callable[[float], str], unit: str) -> list[str]:
    """Grid lines from `top` to `bottom`, their values below it, and the unit at the end of them."""
    parts = []
    for tick in scale.ticks(8):
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        parts.append(draw_text(x, bottom + 17, format_x(tick), "tick middle"))
    parts.append(f'<line class="axis" x1="{scale.start}" x2="{scale.end}" y1="{bottom}" y2="{bottom}"/>')
    return [*parts, draw_text((scale.start + scale.end) / 2, bottom + 35, unit, "tick middle")]


def draw_y_axis(scale: Scale, left: float, right: float, format_y: Callable[[float], str], unit: str) -> list[str]:
    """Grid lines from `left` to `right`, their values before it, and the unit above them."""
    parts = []
    for tick in scale.ticks(6):
        y = scale(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(draw_text(left - 8, y + 4, format_y(tick), "tick end"))
    return [*parts, draw_text(left - 46, scale.end - 10, unit, "tick")]


@dataclass(frozen=True)
class Swatch:
    """An entry of a legend: class of its colour, text, whether it is hatched."""

    name: str
    text: str
    is_hatched: bool = False


def draw_swatches(swatches: Iterable[Swatch], left: float, top: float, right: float = WIDTH) -> tuple[list[str], float]:
    """A legend in as many lines as it needs, and where it ends."""
    parts: list[str] = []
    x = left
    for swatch in swatches:
        width = 19 + TEXT_WIDTH * len(swatch.text)
        if x > left and x + width > right:
            x, top = left, top + 20
        parts.append(draw_box(swatch.name, x, top, 12, 12))
        if swatch.is_hatched:
            parts.append(draw_hatch(x, top, 12, 12))
        parts.append(draw_text(x + 18, top + 10.5, swatch.text))
        x += width + 16
    return parts, top + 20


def draw_picture(title: str, height: float, parts: Sequence[str]) -> str:
    """The whole picture, to stand in a page."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {math.ceil(height)}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def stand_alone(picture: str) -> str:
    """A picture as a file of its own, on the ground of whatever page shows it."""
    font = 'svg { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }'
    opening, rest = picture.split(">", 1)
    opening = opening.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" ', 1)
    return f"{opening}>\n<style>{PICTURE_STYLE}{font}\n</style>\n{_HATCH}\n{rest.replace('><', '>' + chr(10) + '<')}\n"
