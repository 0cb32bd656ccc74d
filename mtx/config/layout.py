"""Layouts: the mesh that a run gets from a number of devices, whether the run fits it, and which others it would fit.

Knows nothing of devices that exist; what fits is decided in `mtx.config.fit`.

Invariant: a layout that is proposed passes the checks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.config.fit import Layout, contradictions, misfits
from mtx.config.render import Origin
from mtx.config.wording import divisors
from mtx.errors import UserError

Sizes = dict[str, int]
"""Devices along each mesh axis."""


def resolve_mesh(mesh: schema.Mesh, num_devices: int) -> schema.Mesh:
    """The mesh with -1 replaced by what is left of the devices.

    Raises:
        UserError: The mesh does not take exactly these devices.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    fixed = {axis: size for axis, size in sizes.items() if size > 1}
    product = math.prod(fixed.values())
    given = " * ".join(f"{axis} {size}" for axis, size in fixed.items()) or "of one device"
    rest = [axis for axis, size in sizes.items() if size == -1]
    if product > num_devices:
        raise UserError(
            f"the mesh {given} needs {product} devices and there are {num_devices}: lower "
            f"{' or '.join(f'Mesh.{axis}' for axis in fixed)}, or give it the devices (`--cpu-devices {product}` "
            "simulates them)"
        )
    if num_devices % product:
        raise UserError(
            f"the mesh {given} takes {product} devices at a time, which do not divide the {num_devices} that there "
            f"are: the product must be one of {divisors(num_devices)}"
        )
    if rest:
        return dataclasses.replace(mesh, **{rest[0]: num_devices // product})
    if product < num_devices:
        raise UserError(
            f"the mesh {given} would leave {num_devices - product} of {num_devices} devices idle: set Mesh.data = "
            f"{mesh.data * num_devices // product}, or Mesh.data = -1 for whatever is left"
        )
    return mesh


def check_layout(run: schema.Run, mesh: schema.Mesh, provenance: Mapping[str, Origin] | None = None) -> None:
    """Checks that a run fits a mesh and that all its options have an effect there.

    Args:
        mesh: With counts only (`resolve_mesh`).
        provenance: Where values were set, which messages then tell.

    Raises:
        UserError: All that does not fit, and the nearest layout of as many devices that does.
    """
    found = tuple(axis for axis in MESH_AXES if getattr(run.mesh, axis) == -1)
    layout = Layout(run=run, sizes=_sizes(mesh), provenance=provenance or {}, found=found)
    messages = [*misfits(layout), *contradictions(layout)]
    if messages:
        count = math.prod(layout.sizes.values())
        devices = f"{count} devices" if count > 1 else "one device"
        nearest = next(nearest_layouts(run, mesh, count), None)
        if nearest is None:
            messages.append(f"no layout of {devices} passes with the other settings as they are")
        else:
            changed = {axis: size for axis, size in _sizes(nearest).items() if size != layout.sizes[axis]}
            lines = ", ".join(f"Mesh.{axis} = {size}" for axis, size in changed.items())
            messages.append(f"the nearest layout of {devices} that works with the other settings as they are: {lines}")
        raise UserError("\n".join(messages))


def nearest_layouts(run: schema.Run, mesh: schema.Mesh, num_devices: int) -> Iterator[schema.Mesh]:
    """All other layouts of a number of devices that pass the checks, those most like a mesh first.

    Most alike are those with the fewest axes changed; of these, those that begin to use the fewest axes (`data` is
    nothing new); of these, those with the smallest changes.

    Args:
        mesh: With counts only.
    """
    old = _sizes(mesh)
    # An axis that is too long by itself is so whatever the others are.
    fitting = {
        axis: [
            size
            for size in _divide(num_devices)
            if next(misfits(Layout(run=run, sizes={**dict.fromkeys(MESH_AXES, 1), axis: size})), None) is None
        ]
        for axis in MESH_AXES
    }

    def distance(sizes: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        new = sum(old[axis] == 1 < size for axis, size in zip(MESH_AXES, sizes) if axis != "data")
        change = math.prod(max(size / old[axis], old[axis] / size) for axis, size in zip(MESH_AXES, sizes))
        return new, change, sizes

    for number in range(1, len(MESH_AXES) + 1):
        candidates: list[tuple[int, ...]] = []
        for changed in itertools.combinations(MESH_AXES, number):
            options = {
                axis: [size for size in fitting[axis] if size != old[axis]] if axis in changed else [old[axis]]
                for axis in MESH_AXES
            }
            candidates += _products(list(options.values()), num_devices)
        for sizes in sorted(candidates, key=distance):
            layout = Layout(run=run, sizes=dict(zip(MESH_AXES, sizes)))
            if next(itertools.chain(misfits(layout), contradictions(layout)), None) is None:
                yield schema.Mesh(**layout.sizes)


def _products(options: list[list[int]], product: int) -> Iterator[tuple[int, ...]]:
    """One of each list, in all ways that give the product."""
    if len(options) == 1:
        yield from [(product,)] if product in options[0] else []
        return
    for size in options[0]:
        if product % size == 0:
            yield from ((size, *rest) for rest in _products(options[1:], product // size))


def _divide(number: int) -> list[int]:
    """All its divisors."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _sizes(mesh: schema.Mesh) -> Sizes:
    return {axis: getattr(mesh, axis) for axis in MESH_AXES}
