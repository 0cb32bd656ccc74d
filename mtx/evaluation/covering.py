"""Which layouts are tried for a run: few, on few devices, that meet what the run's own mesh does.

    each axis of the mesh alone         by 2, or the smallest prime factor of its own count
    rings of more than two, alone       a ring of two is the same in both directions
    all pairs of axes
    more axes at once                   as many as the devices allow, until every pair has met a third axis

Invariant: no layout comes twice, and none needs more devices than allowed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.errors import UserError

RINGS = ("pipe", "expert", "context")
"""Axes over which devices pass something on to their neighbour, or take turns."""


@dataclass(frozen=True)
class Layout:
    """A mesh that is tried, and the mesh that it stands for.

    Attributes:
        counts: Devices along each mesh axis.
        stands_for: Devices along each mesh axis of the full size: what divides over those, divides over `counts` at
            the reduced size.
    """

    counts: Mapping[str, int]
    stands_for: Mapping[str, int]

    @property
    def num_devices(self) -> int:
        return math.prod(self.counts.values())

    @property
    def mesh(self) -> schema.Mesh:
        return schema.Mesh(**self.counts)

    def __str__(self) -> str:
        return " ".join(f"{axis}={count}" for axis, count in self.counts.items() if count > 1) or "one device"


def make_layout(counts: Mapping[str, int], stands_for: Mapping[str, int] | None = None) -> Layout:
    """A layout of the given axes, all others at 1; it stands for itself unless another one is given."""
    full = counts if stands_for is None else stands_for
    return Layout({a: counts.get(a, 1) for a in MESH_AXES}, {a: full.get(a, 1) for a in MESH_AXES})


def parse_layout(text: str) -> Layout:
    """`pipe=2,tensor=2` -> the layout.

    Raises:
        UserError: Something else.
    """
    counts: dict[str, int] = {}
    for part in text.split(","):
        axis, _, count = (piece.strip() for piece in part.partition("="))
        if axis not in MESH_AXES or axis in counts or not count.isdecimal() or int(count) < 1:
            raise UserError(
                f"--layout {text!r}: {part.strip()!r} is not AXIS=COUNT with an axis once, of {', '.join(MESH_AXES)}, "
                "and a positive count; write for instance --layout 'pipe=2,tensor=2'"
            )
        counts[axis] = int(count)
    return make_layout(counts)


def cover(run: schema.Run, max_devices: int) -> list[Layout]:
    """The layouts for a run's mesh; where that names no count above 1, for all axes that its architecture allows."""
    own = {axis: getattr(run.mesh, axis) for axis in MESH_AXES}
    if any(count > 1 for count in own.values()):
        full = {axis: 2 if count == -1 else count for axis, count in own.items() if count != 1}
    else:
        full = {**dict.fromkeys(MESH_AXES, 2), "tensor": _smallest_factor(run.model.num_heads)}
        if run.model.num_experts % 2 or not run.model.num_experts:
            del full["expert"]
    smallest = {axis: 2 if axis == "pipe" else _smallest_factor(count) for axis, count in full.items()}
    chosen: list[tuple[str, ...]] = [(axis,) for axis in full]
    chosen += itertools.combinations(full, 2)
    chosen += _meet(
        [c for n in range(3, len(full) + 1) for c in itertools.combinations(full, n)], smallest, max_devices
    )
    counts = [{axis: smallest[axis] for axis in axes} for axes in chosen]
    longer = {axis: _longer_ring(axis, own[axis], run) for axis in full if axis in RINGS}
    counts[len(full) : len(full)] = [{axis: count} for axis, count in longer.items() if count > smallest[axis]]
    layouts = [make_layout(c, {axis: full[axis] for axis in c} if _divide(full, c) else c) for c in counts]
    return [layout for layout in layouts if layout.num_devices <= max_devices]


def _meet(
    candidates: Iterable[tuple[str, ...]], sizes: Mapping[str, int], max_devices: int
) -> Iterator[tuple[str, ...]]:
    """The most axes at once that the devices allow, until every pair is in one of them."""
    fitting = [axes for axes in candidates if math.prod(sizes[a] for a in axes) <= max_devices]
    wanted = {pair for axes in fitting for pair in itertools.combinations(axes, 2)}
    while wanted:
        best = max(fitting, key=lambda axes: len(wanted.intersection(itertools.combinations(axes, 2))))
        wanted.difference_update(itertools.combinations(best, 2))
        yield best


def _divide(full: Mapping[str, int], counts: Mapping[str, int]) -> bool:
    return all(full[axis] % count == 0 for axis, count in counts.items())


def _longer_ring(axis: str, own: int, run: schema.Run) -> int:
    """How many devices a ring is also tried with; 1: not."""
    if axis == "pipe":
        return 3 if own == -1 or own > 2 or (own == 1 and run.model.num_layers > 2) else 1
    if own > 2:
        return 4 if own % 4 == 0 else 1
    size = run.model.num_experts if axis == "expert" else run.train.seq_len // 2
    return 4 if own in (1, -1) and size % 4 == 0 else 1


def _smallest_factor(count: int) -> int:
    return next((factor for factor in range(2, count + 1) if count % factor == 0), 2)
