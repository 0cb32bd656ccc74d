"""What devices exchange in a compiled program: every collective, along which mesh axes, how much and how often.

Decides how groups of devices are named: by the mesh axes along which they differ, whichever way XLA writes them down.

Invariant: groups that lie along no axes of the mesh are a ValueError.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mtx.planning.hlo import Instruction, Program, Shape, read_integers

KINDS = (
    "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        name: Of its instruction.
        kind: One of KINDS.
        axes: Mesh axes along which devices exchange, in mesh order.
        group_size: Devices that exchange with each other.
        operands: What a device gives; several where XLA has joined exchanges.
        results: What it gets.
        executions: How often it runs.
        looped: Whether it is inside a loop.
        conditional: Whether it is inside a branch.
        estimated: Whether it is inside a loop whose turns are known at run time only.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    group_size: int
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    executions: int
    looped: bool
    conditional: bool
    estimated: bool

    @property
    def size_bytes(self) -> int:
        """Of one execution: the larger one of what a device gives and what it gets."""
        return max(sum(shape.size_bytes for shape in shapes) for shapes in (self.operands, self.results))


def read_collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that runs.

    Args:
        mesh: Devices along each mesh axis, outermost first; the program's devices are numbered in this order.

    Raises:
        ValueError: A group of devices lies along no axes of this mesh.
    """
    found = []
    for computation, line in program.find(*KINDS, *(f"{kind}-start" for kind in KINDS)):
        operands = tuple(s for name in line.operands for s in program.computations[computation][name].shapes)
        # What has started holds its operands, its results, and maybe more.
        repeats = line.opcode.endswith("-start") and len(line.shapes) >= 2 * len(operands)
        axes, group_size = _read_groups(line, mesh)
        found.append(
            Collective(
                name=line.name,
                kind=line.opcode.removesuffix("-start"),
                axes=axes,
                group_size=group_size,
                operands=operands,
                results=line.shapes[len(operands) : 2 * len(operands)] if repeats else line.shapes,
                executions=program.executions[computation],
                looped=computation in program.looped,
                conditional=computation in program.conditional,
                estimated=computation in program.estimated,
            )
        )
    return found


def _read_groups(line: Instruction, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes of a collective and the size of its groups."""
    count = math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", line.attributes):
        axes = _axes_of([read_integers(pair) for pair in re.findall(r"\{([\d,]*)\}", pairs[1])], mesh)
        return axes, math.prod(mesh[axis] for axis in axes)
    groups = _list_groups(line, count)
    axes = _axes_of(groups, mesh)
    size = math.prod(mesh[axis] for axis in axes)
    if any(len(group) != size for group in groups) or size * len(groups) != count:
        raise ValueError(f"{line.name}: groups along no axes of the mesh {dict(mesh)}: {groups}")
    return axes, size


def _list_groups(line: Instruction, count: int) -> list[tuple[int, ...]]:
    """The groups of a collective among `count` devices, from any of the forms that XLA writes."""
    text = line.attributes
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return [read_integers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])] or [tuple(range(count))]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _cut(_turn(iota[3], iota[4]), int(iota[2]))
    # A grid, by names of the compiler's own for some programs, in which the devices may lie in another order.
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if grid := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}:]*)\}}", text):
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", grid[1]))
        along = re.findall(r"'(\w+)'", grid[4])
        axes_last = [names.index(name) for name in sorted(names, key=along.__contains__)]
        places = _turn(",".join(sizes), ",".join(map(str, axes_last)))
        devices = _turn(grid[2], grid[3]) if grid[2] else range(count)
        return _cut([devices[place] for place in places], math.prod(int(sizes[names.index(name)]) for name in along))
    raise ValueError(f"{line.name}: groups of devices in a form that is not understood: {text[:300]}")


def _turn(dims_text: str, order_text: str | None) -> list[int]:
    """0, 1, 2 ... laid out in a grid, read with its dims in another order."""
    dims = read_integers(dims_text)
    order = read_integers(order_text) if order_text else range(len(dims))
    strides = [math.prod(dims[d + 1 :]) for d in range(len(dims))]
    places = itertools.product(*(range(dims[d]) for d in order))
    return [sum(i * strides[d] for i, d in zip(place, order)) for place in places]


def _cut(devices: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(devices[first : first + size]) for first in range(0, len(devices), size)]


def _axes_of(groups: Iterable[tuple[int, ...]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which devices of a group differ."""
    strides = {axis: math.prod(list(mesh.values())[place + 1 :]) for place, axis in enumerate(mesh)}

    def differ(axis: str, group: tuple[int, ...]) -> bool:
        return len({device // strides[axis] % mesh[axis] for device in group}) > 1

    return tuple(axis for axis in mesh if any(differ(axis, group) for group in groups))


def find_whole_gathers(found: Iterable[Collective], shapes: Iterable[tuple[int, ...]]) -> list[Collective]:
    """Gathers, and sums in their place, whose result is as large as one of these arrays (dims of 1 do not count)."""

    def plain(dims: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dim for dim in dims if dim != 1)

    whole = {plain(shape) for shape in shapes}
    kinds = ("all-gather", "all-reduce", "collective-broadcast")
    return [c for c in found if c.kind in kinds and any(plain(shape.dims) in whole for shape in c.results)]
