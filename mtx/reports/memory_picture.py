"""Memory per GPU as stacked bars by part, against what the card has.

Decides colours and order of the parts; the bytes are the planner's or the compiler's.

Invariant: bars share one scale that reaches the capacity and the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtx.reports.canvas import (
    TEXT_WIDTH,
    WIDTH,
    Scale,
    Swatch,
    draw_box,
    draw_hatch,
    draw_picture,
    draw_swatches,
    draw_text,
    draw_x_axis,
    format_tick,
)
from mtx.reports.units import format_gib

GIB = 2**30
_ROW, _BAR = 34, 22

# Part -> class of its colour; those of one bar differ. Parts of the estimate first, then the compiler's.
_COLORS = {
    "parameters": "s0",
    "compute_weights": "s6",
    "gradients": "s2",
    "optimizer": "s4",
    "activations": "s1",
    "logits": "s5",
    "pipeline": "s3",
    "communication": "s7",
    "overhead": "dull",
    "arguments": "dull",
    "temporaries": "gap",
}
_HATCHED = ("communication", "pipeline")


@dataclass(frozen=True)
class MemoryBar:
    """One bar.

    Attributes:
        label: Whose memory, or who says so: 'plan', 'compiler', 'stage 3'.
        parts: Name -> bytes, not negative, in the order of the stack; empty parts are left out.
    """

    label: str
    parts: Mapping[str, float]


def draw_memory(bars: Sequence[MemoryBar], capacity: float | None, *, title: str = "Memory per GPU") -> str:
    """The bars, from above.

    Args:
        bars: At least one.
        capacity: Bytes that a GPU has; None: no limit is drawn.
        title: For those who cannot see it.
    """
    totals = [sum(bar.parts.values()) for bar in bars]
    left = 24 + TEXT_WIDTH * max(len(bar.label) for bar in bars)
    right = WIDTH - 90
    scale = Scale(0.0, 1.04 * max(*totals, capacity or 0.0) / GIB or 1.0, left, right)
    names = dict.fromkeys(name for bar in bars for name, size in bar.parts.items() if size)
    parts, top = draw_swatches([_swatch(name, bars) for name in names], left, 8)
    top += 24 if capacity else 6
    bottom = top + _ROW * len(bars)
    parts += draw_x_axis(scale, top, bottom, format_tick, "GiB per GPU")
    for index, (bar, total) in enumerate(zip(bars, totals)):
        parts += _draw_bar(bar, total, scale, top + _ROW * index + (_ROW - _BAR) / 2, capacity)
    if capacity:
        x = scale(capacity / GIB)
        parts.append(f'<line class="limit" x1="{x}" x2="{x}" y1="{top - 4}" y2="{bottom}"/>')
        parts.append(draw_text(x, top - 9, f"the card has {format_gib(capacity)}", "caption end"))
    return draw_picture(title, bottom + 42, parts)


def _swatch(name: str, bars: Sequence[MemoryBar]) -> Swatch:
    text = name.replace("_", " ")
    if len(bars) == 1:
        text = f"{text} {format_gib(bars[0].parts[name])}"
    return Swatch(_COLORS.get(name, "dull"), text, name in _HATCHED)


def _draw_bar(bar: MemoryBar, total: float, scale: Scale, top: float, capacity: float | None) -> list[str]:
    parts = [draw_text(scale.start - 12, top + 15, bar.label, "caption end")]
    below = 0.0
    for name, size in bar.parts.items():
        start, end = scale(below / GIB), scale((below + size) / GIB)
        below += size
        if size:
            what = f"{bar.label}: {name.replace('_', ' ')} {format_gib(size)}, {size / total:.1%}"
            parts.append(draw_box(_COLORS.get(name, "dull"), start, top, end - start, _BAR, what))
            if name in _HATCHED:
                parts.append(draw_hatch(start, top, end - start, _BAR))
            if end - start > 2:
                parts.append(f'<line class="edge" x1="{end}" x2="{end}" y1="{top}" y2="{top + _BAR}"/>')
    over = " bad" if capacity and total > capacity else ""
    return [*parts, draw_text(scale(total / GIB) + 8, top + 15, format_gib(total), f"caption strong halo{over}")]
