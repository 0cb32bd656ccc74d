"""Between the state as a pipeline holds it and the state as checkpoints hold it.

    canonical   a stack of layers has one row per layer, in the order of the network
    staged      the rows of a stage are together, chunk by chunk, and stages of fewer layers are filled up with zeros

So a checkpoint of any layout opens on any other. Without a pipeline, and where the stages are even and have one chunk
each, the two are the same arrays. Else rows travel one by one: one layer's slice is in memory at a time.

Invariant: both ways keep every bit of every row that is a layer's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from mtx.collectives import Comm, cast_varying
from mtx.nn.param import Params
from mtx.sharding import Placement, axis_sizes, mesh_axes, place_params
from mtx.training.stages import Stages

if TYPE_CHECKING:
    from mtx.training.state import Setup


def stage_shapes(stages: Stages, params: Params) -> Params:
    """Abstract canonical parameters -> abstract staged ones."""

    def resize(stack: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(stages.order(stack)), *leaf.shape[1:]), leaf.dtype)

    return {
        name: jax.tree.map(partial(resize, name), tree) if name in stages.slots else tree
        for name, tree in params.items()
    }


@dataclass(frozen=True)
class Canonical:
    """The canonical state of a run on its mesh."""

    setup: Setup

    @cached_property
    def _is_same(self) -> bool:
        stages = self.setup.stages
        if stages is None:
            return True
        orders = [stages.order(stack) for stack in set(stages.slots)]
        return all(np.array_equal(order, np.arange(len(order))) for order in orders)

    @cached_property
    def abstract_state(self) -> Any:
        """The state as `jax.ShapeDtypeStruct` with shardings: the target of restoring."""
        if self._is_same:
            return self.setup.abstract_state
        return self.setup.describe_state(self.setup.definition.whole.params, self._placements)

    @cached_property
    def _placements(self) -> Any:
        setup, whole = self.setup, self.setup.definition.whole
        sizes = axis_sizes(setup.mesh)
        placed = {}
        for name, params in whole.params.items():
            # Where the layers do not divide over the stages, another dim is split, so that no device holds all of them.
            divides = setup.run.model.layer_stacks.count(name) % sizes["pipe"] == 0
            rules = setup.rules if divides else {**setup.rules, "layers": ()}
            placed[name] = place_params(params, whole.axes[name], rules, setup.mesh, setup.run.rules.zero)
            if not divides:
                placed[name] = jax.tree.map(partial(_split_further, sizes), placed[name], params)
        return placed

    @cached_property
    def _stacks(self) -> Any:
        """For each leaf of the state the stack that it has rows of, or the empty string.

        Found by asking for the state of a model with one layer more in one of its stacks: so it holds for the moments
        of every optimizer, whatever their shapes.
        """
        setup, whole = self.setup, self.setup.definition.whole.params

        def shapes(longer: str) -> Any:
            def grow(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct((leaf.shape[0] + (name == longer), *leaf.shape[1:]), leaf.dtype)

            params = {
                name: jax.tree.map(partial(grow, name), tree) if name in setup.definition.layers else tree
                for name, tree in whole.items()
            }
            optimizer = jax.eval_shape(setup.transformation.init, params)
            return {"params": params, "optimizer": optimizer, "step": jax.ShapeDtypeStruct((), jnp.int32)}

        found = jax.tree.map(lambda _: "", shapes(""))
        for name in setup.definition.layers:
            found = jax.tree.map(
                lambda stack, before, after, name=name: stack if before.shape == after.shape else name,
                found,
                shapes(""),
                shapes(name),
            )
        return found

    def store(self, state: Any) -> Any:
        """The staged state as a canonical one. Arrays may be those of `state`."""
        return state if self._is_same else self._move(_store, state, self.setup.abstract_state, self.abstract_state)

    def load(self, state: Any) -> Any:
        """The canonical state, or parts of it by name, as a staged one. Arrays may be those of `state`."""
        return state if self._is_same else self._move(_load, state, self.abstract_state, self.setup.abstract_state)

    @cached_property
    def _programs(self) -> dict[Any, Any]:
        """What moves arrays, by how they lie: compiled at the first checkpoint, used at all."""
        return {}

    def _move(self, body: Any, state: Any, sources: Any, targets: Any) -> Any:
        stages, comm = self.setup.stages, self.setup.context.comm
        assert stages is not None

        def move(stack: str, x: jax.Array, source: jax.ShapeDtypeStruct, target: jax.ShapeDtypeStruct) -> jax.Array:
            if not stack:
                return x
            key = body, stack, source.sharding, target.sharding
            if key not in self._programs:
                specs: tuple[Any, Any] = source.sharding.spec, target.sharding.spec
                rows = _Rows(comm, stages, stack, *specs)
                moved = jax.shard_map(partial(body, rows), mesh=self.setup.mesh, in_specs=specs[0], out_specs=specs[1])

                def through_device(x: jax.Array) -> jax.Array:
                    return moved(jax.device_put(x, jax.memory.Space.Device))  # moments may be on the host

                self._programs[key] = jax.jit(through_device, out_shardings=target.sharding)
            return self._programs[key](x)

        def parts(tree: Any) -> Any:
            return {name: tree[name] for name in state}

        return jax.tree.map(move, parts(self._stacks), state, parts(sources), parts(targets))


def _split_further(sizes: dict[str, int], placement: Placement, leaf: jax.ShapeDtypeStruct) -> Placement:
    """Splits a dim that divides over the stages as well, where there is one."""

    def split(spec: P) -> P:
        for dim in range(1, leaf.ndim):
            axes = mesh_axes(spec[dim : dim + 1])
            pieces = sizes["pipe"]
            for axis in axes:
                pieces *= sizes[axis]
            if leaf.shape[dim] % pieces == 0:
                return P(*spec[:dim], (*axes, "pipe"), *spec[dim + 1 :])
        return spec

    return replace(placement, storage=split(placement.storage), optimizer=split(placement.optimizer))


class _Rows:
    """Where the rows of one array are, staged and canonical."""

    def __init__(self, comm: Comm, stages: Stages, stack: str, source: P, target: P):
        order = stages.order(stack)
        staged_row = np.flatnonzero(order >= 0)[np.argsort(order[order >= 0])]  # of each layer
        self.comm, self.source, self.target = comm, source, target
        self.num_layers, self.staged_rows = len(staged_row), len(order)
        self.staged_row = jnp.asarray(staged_row, jnp.int32)

    def fetch(self, x: jax.Array, row: jax.Array, num_rows: int) -> jax.Array:
        """One row, on every device of the ring of stages that needs it; as integers, whose sum keeps all bits."""
        bits = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize]
        split = "pipe" in mesh_axes(self.source[:1])
        count = num_rows // self.comm.size("layers") if split else num_rows
        values = lax.bitcast_convert_type(lax.dynamic_index_in_dim(x, row % count, 0, keepdims=False), bits)
        values = values.astype(jnp.uint32)  # no collective library sums 16-bit integers
        if split:
            values = self.comm.sum(jnp.where(self.comm.index("layers") == row // count, values, 0), "layers")
        for dim in range(1, x.ndim):
            if "pipe" in mesh_axes(self.source[dim : dim + 1]):
                values = self.comm.join(values, "layers", dim - 1)
        return lax.bitcast_convert_type(values.astype(bits), x.dtype)

    def put(self, out: jax.Array, value: jax.Array, row: jax.Array, num_rows: int) -> jax.Array:
        """Writes a row where it belongs."""
        for dim in range(1, out.ndim):
            if "pipe" in mesh_axes(self.target[dim : dim + 1]):
                width = out.shape[dim]
                value = lax.dynamic_slice_in_dim(value, self.comm.index("layers") * width, width, dim - 1)
        if "pipe" not in mesh_axes(self.target[:1]):
            return lax.dynamic_update_index_in_dim(out, value, row, 0)
        count = num_rows // self.comm.size("layers")
        here = self.comm.index("layers") == row // count
        old = lax.dynamic_index_in_dim(out, row % count, 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(out, jnp.where(here, value, old), row % count, 0)

    def empty(self, x: jax.Array, num_rows: int) -> jax.Array:
        """Zeros with the shape of this device's part of the result."""
        shape = list(x.shape)
        shape[0] = num_rows
        stages = self.comm.size("layers")
        for dim, (before, after) in enumerate(zip(_parts(self.source, x.ndim), _parts(self.target, x.ndim))):
            if dim == 0:
                shape[0] //= stages if "pipe" in after else 1
            elif "pipe" in before:
                shape[dim] *= stages
            elif "pipe" in after:
                shape[dim] //= stages
        return cast_varying(jnp.zeros(shape, x.dtype), mesh_axes(self.target))


def _parts(spec: P, ndim: int) -> list[tuple[str, ...]]:
    return [mesh_axes(spec[dim : dim + 1]) for dim in range(ndim)]


def _store(rows: _Rows, x: jax.Array) -> jax.Array:
    """Staged -> canonical."""

    def one(layer: jax.Array, out: jax.Array) -> jax.Array:
        value = rows.fetch(x, rows.staged_row[layer], rows.staged_rows)
        return rows.put(out, value, layer, rows.num_layers)

    return lax.fori_loop(0, rows.num_layers, one, rows.empty(x, rows.num_layers))


def _load(rows: _Rows, x: jax.Array) -> jax.Array:
    """Canonical -> staged."""

    def one(layer: jax.Array, out: jax.Array) -> jax.Array:
        value = rows.fetch(x, layer, rows.num_layers)
        return rows.put(out, value, rows.staged_row[layer], rows.staged_rows)

    return lax.fori_loop(0, rows.num_layers, one, rows.empty(x, rows.staged_rows))
