"""A search as a frontier: what each layout takes in memory and in time, and which ones nothing beats in both.

Decides axes and marks. Whether a layout fits is the planner's word, not the picture's.

Invariant: every candidate is drawn; those too large for the axis stand at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mtx.reports.canvas import (
    TEXT_WIDTH,
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
from mtx.reports.units import format_gib, format_seconds

GIB = 2**30
_HEIGHT, _LEFT, _RIGHT = 380, 66, 24
_REACH = 3.0  # capacities that the axis of memory shows at most


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout whose memory and time are known.

    Attributes:
        label: Its layout.
        memory_bytes: Per GPU.
        seconds: Per step.
        fits: Whether it was accepted.
        reason: Why not.
    """

    label: str
    memory_bytes: float
    seconds: float
    fits: bool
    reason: str = ""


def find_frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of those that fit, the ones that no other beats in memory and time together, by growing memory."""
    front: list[Candidate] = []
    for candidate in sorted((c for c in candidates if c.fits), key=lambda c: (c.memory_bytes, c.seconds)):
        if not front or candidate.seconds < front[-1].seconds:
            front.append(candidate)
    return front


def draw_frontier(
    candidates: Sequence[Candidate], capacity: float, *, title: str = "Step time against memory per GPU"
) -> str:
    """The candidates, with the frontier through them and the fastest one named.

    Args:
        candidates: At least one.
        capacity: Bytes that a GPU has.
        title: For those who cannot see it.
    """
    front = find_frontier(candidates)
    fitting = [c for c in candidates if c.fits]
    rejected = [c for c in candidates if not c.fits]
    parts, top = draw_swatches([Swatch("s0", f"{len(fitting):,} fit")], _LEFT, 8)
    if rejected:
        parts.append(_draw_cross(_LEFT + 120, 14, ""))
        parts.append(draw_text(_LEFT + 132, 18.5, f"{len(rejected):,} do not"))
    if front:
        parts.append(f'<path class="line s1" d="M{_LEFT + 240} 14L{_LEFT + 264} 14"/>')
        parts.append(draw_text(_LEFT + 272, 18.5, f"{len(front):,} that none beats in both"))
    top += 34
    bottom = top + _HEIGHT
    limit = capacity / GIB
    sizes = [min(c.memory_bytes / GIB, _REACH * limit) for c in candidates]
    x_scale = Scale.around([*sizes, limit], _LEFT, WIDTH - _RIGHT)
    y_scale = Scale.around([c.seconds for c in candidates], bottom, top, is_log=True)
    parts += draw_x_axis(x_scale, top, bottom, format_tick, "GiB per GPU")
    parts += draw_y_axis(y_scale, _LEFT, WIDTH - _RIGHT, format_tick, "seconds a step")
    x = x_scale(limit)
    parts.append(f'<line class="limit" x1="{x}" x2="{x}" y1="{top - 4}" y2="{bottom}"/>')
    parts.append(draw_text(x, top - 9, f"the card has {format_gib(capacity)}", "caption end"))

    def place(candidate: Candidate) -> tuple[float, float]:
        return x_scale(candidate.memory_bytes / GIB), y_scale(candidate.seconds)

    parts += [_draw_cross(*place(c), _describe(c)) for c in rejected]
    if len(front) > 1:
        path = "L".join("{} {}".format(*place(c)) for c in front)
        parts.append(f'<path class="line s1" d="M{path}"/>')
    chosen = {id(c) for c in front}
    for candidate in fitting:
        color, radius = ("s1", 4.5) if id(candidate) in chosen else ("s0", 3)
        cx, cy = place(candidate)
        told = f"<title>{escape(_describe(candidate))}</title>"
        parts.append(f'<circle class="fill {color} edged" cx="{cx}" cy="{cy}" r="{radius}">{told}</circle>')
    if front:
        parts += _draw_best(front[-1], *place(front[-1]))
    return draw_picture(title, bottom + 44, parts)


def _describe(candidate: Candidate) -> str:
    memory = format_gib(candidate.memory_bytes)
    what = f"{candidate.label}: {format_seconds(candidate.seconds)} a step, {memory} per GPU"
    return f"{what}; {candidate.reason}" if candidate.reason else what


def _draw_cross(x: float, y: float, told: str) -> str:
    title = f"<title>{escape(told)}</title>" if told else ""
    return f'<path class="cross" d="M{x - 3} {y - 3}l6 6m0 -6l-6 6">{title}</path>'


def _draw_best(best: Candidate, x: float, y: float) -> list[str]:
    """A ring around the fastest layout and its name beside it, on the side that has room."""
    text = f"{best.label}: {format_seconds(best.seconds)}, {format_gib(best.memory_bytes)}"
    fits_right = x + 14 + TEXT_WIDTH * len(text) < WIDTH
    side, at = ("", x + 12) if fits_right else (" end", x - 12)
    ring = f'<circle class="line s1" cx="{x}" cy="{y}" r="8"/>'
    return [ring, draw_text(at, y + 20, text, f"caption strong halo{side}")]
