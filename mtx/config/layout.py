"""Rules between fields and devices: how a run fits a mesh.

Decides what a layout must satisfy; knows nothing of files or of devices that exist.

Invariant: each message names the fields with their values and says what to set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.config.wording import divisors, multiples
from mtx.errors import UserError

LATER_AXES = ("pipe", "expert", "context")
"""Mesh axes that the training step does not fill yet."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the sequences of a batch are split."""


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


def check_layout(run: schema.Run, mesh: schema.Mesh) -> None:
    """Checks that everything that is split over a mesh divides.

    Args:
        mesh: With counts only (`resolve_mesh`).

    Raises:
        UserError: All that does not divide.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    messages = [
        f"Mesh.{axis} = {sizes[axis]}: this version trains with pipe, expert and context at 1; use Mesh.fsdp "
        "(weights gathered layer by layer) and Mesh.tensor (matrices split inside a layer) instead"
        for axis in LATER_AXES
        if sizes[axis] > 1
    ]
    sequence = ("context", "tensor") if run.rules.sequence_parallel else ("context",)
    for logical, preset, key, size in (
        ("heads", ("tensor",), "Model.num_heads", run.model.num_heads),
        ("kv_heads", ("tensor",), "Model.num_kv_heads", run.model.num_kv_heads),
        ("mlp", ("tensor",), "Model.d_ff", run.model.ff_width),
        ("seq_sp", sequence, "Train.seq_len", run.train.seq_len),
    ):
        if size is None:
            continue
        axes, shards = _split(run, sizes, logical, preset)
        shared = logical == "kv_heads" and shards % size == 0  # several shards compute with the same head
        if size % shards and not shared:
            messages.append(
                f"{key} = {size} does not divide over {axes} = {shards}: set {key} to {multiples(size, shards)}, or "
                f"{axes} to one of {divisors(size)}"
            )
    messages += _check_batch(run, *_split(run, sizes, "batch", BATCH_AXES))
    if messages:
        raise UserError("\n".join(messages))


def _check_batch(run: schema.Run, axes: str, shards: int) -> Iterator[str]:
    """Every size that the batch takes, over the data shards and then over microbatches."""
    train, ramp = run.train, run.train.batch_ramp
    sizes = {"Train.global_batch_size": train.global_batch_size}
    if ramp:
        sizes |= {"BatchRamp.start": ramp.start, "BatchRamp.increment": ramp.increment}
    for key, size in sizes.items():
        step = shards * (train.microbatch_size or 1)
        if size % shards:
            yield (
                f"{key} = {size} sequences do not divide over {axes} = {shards} data shards: set {key} to "
                f"{multiples(size, step)}, or {axes} to one of {divisors(size)}"
            )
        elif size % step:
            yield (
                f"{key} = {size} gives each of {shards} data shards ({axes}) {size // shards} sequences, which "
                f"Train.microbatch_size = {train.microbatch_size} does not divide: set Train.microbatch_size to one of "
                f"{divisors(size // shards)}, or {key} to {multiples(size, step)}"
            )


def _split(run: schema.Run, sizes: Mapping[str, int], logical: str, axes: tuple[str, ...]) -> tuple[str, int]:
    """The mesh axes that split a logical axis, as the config writes them, and into how many shards."""
    if logical in run.rules.overrides:
        chosen = run.rules.overrides[logical]
        axes = (chosen,) if isinstance(chosen, str) else chosen or ()
    live = [axis for axis in axes if sizes[axis] > 1]
    return " * ".join(f"Mesh.{axis}" for axis in live), math.prod(sizes[axis] for axis in live)
