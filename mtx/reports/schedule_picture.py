"""A pipeline schedule as a picture: stages are rows, time runs to the right, idle time is what stays grey.

    python -m mtx.reports.schedule_picture docs/pictures    draws the pictures of the documentation again

Decides geometry and colours; what is drawn comes from the tasks of `mtx.training.schedule` alone.

Invariant: a tick is as wide as what is done in it takes: one unit of width for forward, two for backward.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from html import escape

from mtx.training.schedule import SCHEDULES, Task, bubble_fraction

PICTURES = {"schedule_1f1b.svg": ("1f1b", 4, 1, 8), "schedule_interleaved.svg": ("1f1b", 4, 2, 8)}
"""Of the documentation: file -> schedule, stages, virtual stages, microbatches."""

_LENGTHS = {"forward": 1, "backward": 2}
_UNIT, _ROW, _LEFT, _TOP, _BOTTOM, _RIGHT = 17, 30, 66, 42, 54, 12
_STYLE = """
svg { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; --text: #1b1f26; --soft: #667085; --idle: #e9ecf0;
  --forward: #2f6fde; --backward: #1f8a5c; }
@media (prefers-color-scheme: dark) { svg { --text: #e6e9ee; --soft: #98a2b3; --idle: #262c36;
  --forward: #3f78dd; --backward: #24865c; } }
text { fill: var(--text); } .soft { fill: var(--soft); font-size: 10px; } .title { font-size: 14px; font-weight: 600; }
.idle { fill: var(--idle); } .forward { fill: var(--forward); } .backward { fill: var(--backward); }
.number { fill: #fff; font-size: 11px; } .middle { text-anchor: middle; } .end { text-anchor: end; }
.tick { stroke: var(--soft); stroke-width: 0.5; opacity: 0.5; }
"""


def draw_schedule(name: str, tasks: Sequence[Task]) -> str:
    """A schedule as SVG text.

    Args:
        name: Of the schedule.
        tasks: Of all stages; the number in each box is the microbatch.
    """
    stages = 1 + max(task.stage for task in tasks)
    chunks = 1 + max(task.chunk for task in tasks)
    microbatches = 1 + max(task.microbatch for task in tasks)
    starts = _place(tasks)
    ends = {part: start + _LENGTHS[part[1]] for part, start in starts.items()}
    width, bottom = _LEFT + _UNIT * max(ends.values()) + _RIGHT, _TOP + _ROW * stages
    title = (
        f"{name}, {stages} stages{f' of {chunks} chunks' if chunks > 1 else ''}, {microbatches} microbatches: "
        f"a bubble of {100 * bubble_fraction(list(tasks)):.4g} % of the work"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + _BOTTOM}" width="{width}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="20">{escape(title)}</text>',
    ]
    for stage in range(stages):
        top = _TOP + _ROW * stage
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{top + 18}">stage {stage}</text>')
        parts.append(_box("idle", _LEFT, top, _UNIT * max(ends.values())))
    for tick in range(1 + max(task.tick for task in tasks)):
        first = _LEFT + _UNIT * min(start for (at, _), start in starts.items() if at == tick)
        last = _LEFT + _UNIT * max(end for (at, _), end in ends.items() if at == tick)
        parts.append(f'<line class="tick" x1="{first}" x2="{first}" y1="{_TOP - 6}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="soft middle" x="{(first + last) / 2}" y="{bottom + 14}">{tick}</text>')
    for task in tasks:
        left, top = _LEFT + _UNIT * starts[task.tick, task.kind], _TOP + _ROW * task.stage
        length = _UNIT * _LENGTHS[task.kind]
        parts.append(_box(task.kind, left, top, length, opacity=_shade(task.chunk, chunks)))
        parts.append(f'<text class="number middle" x="{left + length / 2}" y="{top + 18}">{task.microbatch}</text>')
    parts.append(f'<text class="soft end" x="{_LEFT - 8}" y="{bottom + 14}">tick</text>')
    return "\n".join([*parts, *_draw_legend(chunks, bottom + 26), "</svg>", ""])


def _place(tasks: Sequence[Task]) -> dict[tuple[int, str], int]:
    """When the forward and the backward part of each tick begin, in units; a part that no stage has takes no time."""
    starts, now = {}, 0
    parts = {(task.tick, task.kind) for task in tasks}
    for tick in range(1 + max(tick for tick, _ in parts)):
        for kind, length in _LENGTHS.items():
            if (tick, kind) in parts:
                starts[tick, kind] = now
                now += length
    return starts


def _shade(chunk: int, chunks: int) -> float:
    """Later chunks are paler, and numbers on them can still be read."""
    return 1 - 0.3 * chunk / max(chunks - 1, 1)


def _box(name: str, left: int, top: int, width: int, height: int = _ROW - 2, opacity: float = 1.0) -> str:
    place = f'x="{left + 0.5}" y="{top + 1}" width="{width - 1}" height="{height}" rx="3"'
    return f'<rect class="{name}" {place} opacity="{opacity:.2g}"/>'


def _draw_legend(chunks: int, top: int) -> list[str]:
    kinds = [(kind, chunk) for kind in _LENGTHS for chunk in range(chunks)]
    parts, left = [], _LEFT
    for kind, chunk in [*kinds, ("idle", 0)]:
        label = kind if chunks == 1 or kind == "idle" else f"{kind}, chunk {chunk}"
        parts.append(_box(kind, left, top, 15, 14, _shade(chunk, chunks)))
        parts.append(f'<text x="{left + 20}" y="{top + 12}">{label}</text>')
        left += 44 + 7 * len(label)
    return parts


def main(folder: str) -> None:
    """Draws `PICTURES` into a folder."""
    for file, (name, *shape) in PICTURES.items():
        (pathlib.Path(folder) / file).write_text(draw_schedule(name, SCHEDULES[name](*shape)))


if __name__ == "__main__":
    main(sys.argv[1])
