"""A training step over time: what each pipeline stage does when, and what the seconds go to.

Decides geometry and colours; ticks are those of `mtx.training.schedule`, seconds the planner's.

Invariant: both pictures are as wide as the step is long, with nothing left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

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
from mtx.reports.units import format_seconds
from mtx.training.schedule import CLOSED_FORMS, Lockstep

# Part of the step -> class of its colour. What is communication is hatched, what is waiting grey.
_COLORS = {
    "matmul": "s0",
    "attention": "s6",
    "memory_bound": "s2",
    "recompute": "s7",
    "tensor": "s1",
    "context": "s5",
    "expert": "s3",
    "pipeline": "s4",
    "bubble": "gap",
    "data": "s5",
    "optimizer": "s4",
    "launch": "dull",
}
_HATCHED = ("tensor", "context", "expert", "pipeline", "data")
_KINDS = {"forward": "s0", "backward": "s2"}
_BAR, _MARGIN = 30, 12


def draw_parts(parts: Mapping[str, float], *, title: str = "One step by what it does") -> str:
    """One bar of a step's parts, those that take no time left out.

    Args:
        parts: Name -> seconds that nothing else covers; their sum is the step.
        title: For those who cannot see it.
    """
    total = sum(parts.values())
    scale = Scale(0.0, total or 1.0, _MARGIN, WIDTH - _MARGIN)
    present = {name: seconds for name, seconds in parts.items() if seconds > 0}
    swatches = [
        Swatch(_COLORS.get(name, "dull"), _describe(name, seconds, total), name in _HATCHED)
        for name, seconds in present.items()
    ]
    drawn, top = draw_swatches(swatches, _MARGIN, 8, WIDTH - _MARGIN)
    top += 6
    drawn += draw_x_axis(scale, top, top + _BAR + 6, format_tick, "seconds; hatched: communication that nothing hides")
    now = 0.0
    for name, seconds in present.items():
        start, end = scale(now), scale(now + seconds)
        now += seconds
        drawn.append(
            draw_box(_COLORS.get(name, "dull"), start, top, end - start, _BAR, _describe(name, seconds, total))
        )
        if name in _HATCHED:
            drawn.append(draw_hatch(start, top, end - start, _BAR))
        if end - start > 2:
            drawn.append(f'<line class="edge" x1="{end}" x2="{end}" y1="{top}" y2="{top + _BAR}"/>')
    return draw_picture(title, top + _BAR + 48, drawn)


def draw_lanes(
    num_stages: int,
    virtual_stages: int,
    num_microbatches: int,
    *,
    forward_s: float,
    backward_s: float,
    tail: Mapping[str, float],
    schedule: str = "1f1b",
    title: str = "One step, stage by stage",
) -> str:
    """A lane for each pipeline stage: forward and backward units at their ticks, then what follows the pipeline.

    Args:
        num_stages: S; 1 for a step without a pipeline, which is a row of microbatches.
        virtual_stages: Chunks of layers per stage.
        num_microbatches: M, of a data shard.
        forward_s: Seconds of a forward unit: one microbatch through one chunk. Every tick that has one is that long.
        backward_s: Likewise of a backward unit.
        tail: What all stages do after the last tick: name -> seconds.
        schedule: A name of `Pipeline.schedule`.
        title: For those who cannot see it.
    """
    lockstep = CLOSED_FORMS[schedule](num_stages, virtual_stages, num_microbatches)
    pipeline_s = _find_start(lockstep, lockstep.ticks[2], forward_s, backward_s)
    row = 26 if num_stages <= 8 else max(5, min(14, 420 // num_stages))
    label = "stage" if num_stages > 1 else "GPU"
    left = 24 + TEXT_WIDTH * len(f"{label} {num_stages - 1}")
    total = pipeline_s + sum(tail.values())
    scale = Scale(0.0, total or 1.0, left, WIDTH - _MARGIN)
    present = {name: seconds for name, seconds in tail.items() if seconds > 0}
    swatches = [
        Swatch("s0", f"forward {format_seconds(forward_s)} a unit"),
        Swatch("s2", f"backward {format_seconds(backward_s)}"),
        *([Swatch("gap", "idle")] if num_stages > 1 else []),
        *(
            Swatch(_COLORS.get(name, "dull"), _describe(name, seconds, total), name in _HATCHED)
            for name, seconds in present.items()
        ),
    ]
    parts, top = draw_swatches(swatches, left, 8)
    top += 6
    bottom = top + row * num_stages
    parts += draw_x_axis(scale, top, bottom + 2, format_tick, "seconds")
    named = max(1, -(-14 // row))  # rows to a label
    for stage in range(num_stages):
        y = top + row * stage
        if stage % named == 0:
            name = f"{label} {stage}" if num_stages > 1 else label
            parts.append(draw_text(left - 8, y + row / 2 + 4, name, "tick end"))
        parts.append(draw_box("gap", left, y, scale(pipeline_s) - left, row - 1))
        for kind in _KINDS:
            parts += _draw_units(lockstep, stage, kind, (forward_s, backward_s), scale, y, row - 1)
    now = pipeline_s
    for name, seconds in present.items():
        start, end = scale(now), scale(now + seconds)
        now += seconds
        color, height = _COLORS.get(name, "dull"), row * num_stages - 1
        parts.append(draw_box(color, start, top, end - start, height, _describe(name, seconds, total)))
        if name in _HATCHED:
            parts.append(draw_hatch(start, top, end - start, height))
    return draw_picture(title, bottom + 46, parts)


def _find_start(lockstep: Lockstep, tick: int, forward_s: float, backward_s: float) -> float:
    """When a tick begins. The first ones have forward units alone, the last ones backward units alone."""
    first_backward, first_without_forward, _ = lockstep.ticks
    return min(tick, first_without_forward) * forward_s + max(0, tick - first_backward) * backward_s


def _draw_units(
    lockstep: Lockstep, stage: int, kind: str, lengths: tuple[float, float], scale: Scale, top: float, height: float
) -> list[str]:
    """A stage's units of one kind: a line per phase of the schedule, with a dash for each unit.

    Where ticks are too narrow to be seen, one dash stands for several of them.
    """
    unit = lockstep.forward if kind == "forward" else lockstep.backward
    busy = np.flatnonzero(np.asarray(unit(np.arange(lockstep.ticks[2]), stage).valid))
    pixels = (scale.end - scale.start) / (scale.high - scale.low)
    forward, backward = (length * pixels for length in lengths)
    first_backward, first_without_forward, end = lockstep.ticks
    phases = {
        "alone": (0, first_backward) if kind == "forward" else (first_without_forward, end),
        "both": (first_backward, first_without_forward),
    }
    parts = []
    for phase, (since, until) in phases.items():
        ticks = busy[(busy >= since) & (busy < until)]
        if not ticks.size:
            continue
        x1, x2 = (scale(_find_start(lockstep, int(tick), *lengths)) for tick in (ticks[0], ticks[-1] + 1))
        several = max(1, int(np.ceil(2.5 / (forward + backward))))
        own, other = (forward, backward) if kind == "forward" else (backward, forward)
        own, other = several * own, several * other if phase == "both" else 0.0
        origin = scale(_find_start(lockstep, since, *lengths))
        if kind == "backward" and phase == "both":
            origin += other
        seam = 1.0 if own > 8 else 0.0
        dashes = f"{own - seam:.3f} {other + seam:.3f}"
        offset = (x1 - origin) % (own + other)
        y = top + height / 2
        parts.append(
            f'<line class="{_KINDS[kind]}" x1="{x1}" x2="{x2}" y1="{y}" y2="{y}" stroke-width="{height}" '
            f'stroke-dasharray="{dashes}" stroke-dashoffset="{offset:.3f}"/>'
        )
    return parts


def _describe(name: str, seconds: float, total: float) -> str:
    return f"{name.replace('_', ' ')} {format_seconds(seconds)} ({seconds / total:.1%})"
