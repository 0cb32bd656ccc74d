"""Rules between fields: what a run may not combine, and how it fits a number of devices.

Decides nothing about single values (the schema does) and nothing about files or devices that exist. A component adds
its own rules with a method `check(run) -> Iterable[str]`.

Invariant: each message names the fields with their values and says what to set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

from mtx.config import render, schema
from mtx.config.axes import LOGICAL_AXES, MESH_AXES
from mtx.config.components import families, sections, settings
from mtx.config.render import Origin
from mtx.config.statements import nearest
from mtx.config.values import format_value
from mtx.errors import UserError

Show = Callable[[str], str]
"""'Model.d_model' -> 'Model.d_model = 770 (runs/x.gin:3)'."""

LATER_AXES = ("pipe", "expert", "context")
"""Mesh axes that the training step does not fill yet."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the sequences of a batch are split."""


def check_run(run: schema.Run, provenance: Mapping[str, Origin]) -> list[str]:
    """What is wrong with a run whatever the devices; empty if nothing is."""

    def show(key: str) -> str:
        value = _get(run, key)
        place = f" ({provenance[key].place})" if key in provenance else ""
        return f"{key} = {format_value(value)}{place}"

    rules = (_check_model, _check_position, _check_train, _check_ramp, _check_mesh, _check_data, _check_checkpoint)
    messages = [message for rule in rules for message in rule(run, show)]
    for part in render.parts(run).values():
        if hasattr(part, "check"):
            messages += part.check(run)
    return messages


def require_training_data(run: schema.Run) -> None:
    """Raises UserError where a run has nothing to train on."""
    if not run.data.train:
        raise UserError(
            "Data.train is empty, so there is nothing to train on: set Data.train = {'STORE': 1.0}, where STORE is a "
            "folder made by `mtx data build`"
        )


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
            f"are: the product must be one of {_divisors(num_devices)}"
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
                f"{key} = {size} does not divide over {axes} = {shards}: set {key} to {_multiples(size, shards)}, or "
                f"{axes} to one of {_divisors(size)}"
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
                f"{_multiples(size, step)}, or {axes} to one of {_divisors(size)}"
            )
        elif size % step:
            yield (
                f"{key} = {size} gives each of {shards} data shards ({axes}) {size // shards} sequences, which "
                f"Train.microbatch_size = {train.microbatch_size} does not divide: set Train.microbatch_size to one of "
                f"{_divisors(size // shards)}, or {key} to {_multiples(size, step)}"
            )


def _check_model(run: schema.Run, show: Show) -> Iterator[str]:
    model = run.model
    if model.family not in families():
        yield f"{show('Model.family')} is no file of mtx/models; {nearest(model.family, families())}"
    if model.head_dim is None and model.d_model % model.num_heads:
        yield (
            f"{show('Model.d_model')} does not divide by {show('Model.num_heads')}: set Model.d_model to "
            f"{_multiples(model.d_model, model.num_heads)}, or set Model.head_dim"
        )
    if model.num_heads % model.kv_heads:
        yield (
            f"{show('Model.num_heads')} does not divide by {show('Model.num_kv_heads')}: set Model.num_kv_heads to one "
            f"of {_divisors(model.num_heads)}"
        )
    for name, axes in run.rules.overrides.items():
        chosen = (axes,) if isinstance(axes, str) else axes or ()
        if name not in LOGICAL_AXES:
            yield f"Rules.overrides: {name!r} is no logical axis; {nearest(name, LOGICAL_AXES)}"
        for axis in chosen:
            if axis not in MESH_AXES:
                yield f"Rules.overrides: {name!r}: {axis!r} is no mesh axis; {nearest(axis, MESH_AXES)}"
        if len(set(chosen)) < len(chosen):
            yield f"Rules.overrides: {name!r}: {format_value(chosen)} names a mesh axis twice: keep one"


def _check_position(run: schema.Run, show: Show) -> Iterator[str]:
    model = run.model
    if model.position == "rotary":
        if model.head_width % 2:
            yield (
                f"rotary positions turn pairs of numbers and the width of a head is {model.head_width}, which is odd: "
                "set Model.head_dim to an even number"
            )
    else:
        for name in ("rope_theta", "rope_scaling"):
            if getattr(model, name) != settings(schema.Model)[name].default:
                yield _useless(show, f"Model.{name}", f"with {show('Model.position')}", "set Model.position = 'rotary'")
    scaling = model.rope_scaling
    if scaling and scaling.high_frequency_factor <= scaling.low_frequency_factor:
        yield (
            f"RopeScaling.high_frequency_factor = {scaling.high_frequency_factor} must be above "
            f"RopeScaling.low_frequency_factor = {scaling.low_frequency_factor}"
        )


def _check_train(run: schema.Run, show: Show) -> Iterator[str]:
    train = run.train
    if train.steps is None and train.tokens is None:
        yield "neither Train.steps nor Train.tokens is set: set one of them, to say how long the run is"
    if train.steps is not None and train.tokens is not None:
        yield f"{show('Train.steps')} and {show('Train.tokens')} both say how long the run is: keep one"
    if train.seq_len > run.model.max_seq_len:
        yield (
            f"{show('Train.seq_len')} is longer than {show('Model.max_seq_len')}: lower the one to "
            f"{run.model.max_seq_len}, or raise the other to {train.seq_len}"
        )


def _check_ramp(run: schema.Run, show: Show) -> Iterator[str]:
    ramp, batch = run.train.batch_ramp, show("Train.global_batch_size")
    if ramp is None:
        return
    if run.train.microbatch_size is None:
        yield (
            "Train.batch_ramp needs Train.microbatch_size: the batch grows by more microbatches of one size; set it to "
            "what each data shard computes at a time, such as 1"
        )
    distance = run.train.global_batch_size - ramp.start
    if distance <= 0:
        yield f"BatchRamp.start = {ramp.start} must be below {batch}, where the ramp ends"
    elif distance % ramp.increment:
        yield (
            f"BatchRamp.start = {ramp.start} and steps of BatchRamp.increment = {ramp.increment} do not reach {batch}: "
            f"set BatchRamp.increment to one of {_divisors(distance)}"
        )


def _check_mesh(run: schema.Run, show: Show) -> Iterator[str]:
    rest = [axis for axis in MESH_AXES if getattr(run.mesh, axis) == -1]
    if len(rest) > 1:
        yield f"{' and '.join(show(f'Mesh.{axis}') for axis in rest)}: one axis at most can take what is left"
    for axis in MESH_AXES:
        if getattr(run.mesh, axis) == 0:
            yield f"{show(f'Mesh.{axis}')} must be a positive count, or -1 for what the other axes leave"


def _check_data(run: schema.Run, show: Show) -> Iterator[str]:
    for store, weight in run.data.train.items():
        if weight <= 0:
            yield f"Data.train: the weight of {store!r} is {weight} and must be above 0 (or remove the store)"
    if not run.data.validation:
        for name in ("eval_every", "eval_batches"):
            if getattr(run.train, name) != settings(schema.Train)[name].default:
                cure = "set Data.validation = {'NAME': 'STORE'}"
                yield _useless(show, f"Train.{name}", "without Data.validation", cure)


def _check_checkpoint(run: schema.Run, show: Show) -> Iterator[str]:
    every, keep = run.checkpoint.every_steps, run.checkpoint.keep_every
    if keep is not None and every is None:
        yield _useless(show, "Checkpoint.keep_every", "without Checkpoint.every_steps", "set Checkpoint.every_steps")
    elif keep is not None and every is not None and keep % every:
        yield (
            f"{show('Checkpoint.keep_every')} must be a multiple of {show('Checkpoint.every_steps')}, or most of the "
            f"steps to be kept are never saved: set Checkpoint.keep_every to {_multiples(keep, every)}"
        )


def _useless(show: Show, key: str, circumstance: str, cure: str) -> str:
    owner, name = key.split(".")
    default = settings(sections()[owner])[name].default
    return f"{show(key)} has no effect {circumstance}: {cure}, or leave {key} at {format_value(default)}"


def _get(run: schema.Run, key: str) -> object:
    owner, name = key.split(".")
    return getattr(render.parts(run)[owner], name)


def _split(run: schema.Run, sizes: Mapping[str, int], logical: str, axes: tuple[str, ...]) -> tuple[str, int]:
    """The mesh axes that split a logical axis, as the config writes them, and into how many shards."""
    if logical in run.rules.overrides:
        chosen = run.rules.overrides[logical]
        axes = (chosen,) if isinstance(chosen, str) else chosen or ()
    live = [axis for axis in axes if sizes[axis] > 1]
    return " * ".join(f"Mesh.{axis}" for axis in live), math.prod(sizes[axis] for axis in live)


def _multiples(value: int, divisor: int) -> str:
    """The multiples of a divisor around a value: '8 or 12'."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def _divisors(value: int) -> str:
    """'1, 2, 3, 4, 6, 12'; the twelve smallest, and the value itself."""
    found = [d for d in range(1, min(value, 4096) + 1) if value % d == 0][:12]
    return ", ".join(map(str, found if found[-1] == value else [*found, value]))
