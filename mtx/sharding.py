"""From logical axes to mesh axes, and from there to the sharding of every array of the run.

Decides where each dimension of each parameter lives: as layers compute with it, as it is stored, and as the optimizer
sees it. Knows nothing of models: it is given shapes and logical axes.

Invariant: a mesh axis shards at most one dim of an array, and only axes with more than one device are ever named
(an axis of size 1 in a spec makes a value "varying" over it, for which no collective would then be emitted).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtx.config import schema
from mtx.config.rules import Rules, choose_rules
from mtx.errors import UserError

ZERO_AXES = ("fsdp", "data", "expert", "context")
"""Axes that split parameters only to save memory, in the order in which they divide a dim: those that are gathered
first, once a step, are the minor ones, so that each gather joins neighbouring pieces."""


def axis_sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Devices along each mesh axis."""
    return dict(mesh.shape)


def make_rules(run: schema.Run, mesh: Mesh) -> Rules:
    """The rules of a run on a mesh; see `mtx.config.rules.choose_rules`."""
    return choose_rules(run, axis_sizes(mesh))


@dataclass(frozen=True)
class Placement:
    """Where a parameter lives.

    Attributes:
        compute: Spec of the weight that a layer multiplies with.
        storage: Spec of the weight in the training state.
        optimizer: Spec of its moments, and of the update.
        is_matrix: Whether it has two dims or more besides `layers` and `experts`.
        in_float32: Whether it is used in float32 whatever the compute dtype: gains and biases, which enter sums in
            float32, and routers, of which a rounded one sends tokens elsewhere.
        split_dim: The dim that `layer_axes` and `step_axes` split, or None.
        layer_axes: Mesh axes gathered anew at each use of the weight (ZeRO-3).
        step_axes: Mesh axes gathered once at the start of a step (ZeRO-2).
        stack_axes: Mesh axes over which the stack is split that this is one layer of; empty for a whole parameter.
    """

    compute: P
    storage: P
    optimizer: P
    is_matrix: bool
    in_float32: bool
    split_dim: int | None
    layer_axes: tuple[str, ...]
    step_axes: tuple[str, ...]
    stack_axes: tuple[str, ...] = ()

    def of_one_layer(self) -> Placement:
        """Where a single layer's slice of a stacked parameter lives."""

        def rest(spec: P) -> P:
            return P(*spec[1:])

        return replace(
            self,
            compute=rest(self.compute),
            storage=rest(self.storage),
            optimizer=rest(self.optimizer),
            split_dim=None if self.split_dim is None else self.split_dim - 1,
            stack_axes=mesh_axes(self.compute[:1]),
        )


def mesh_axes(spec: Any) -> tuple[str, ...]:
    """All mesh axes that a spec names."""
    return tuple(a for part in spec for a in ((part,) if isinstance(part, str) else part or ()))


def _spec(parts: list[tuple[str, ...]]) -> P:
    return P(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in parts))


def place(shape: tuple[int, ...], axes: tuple[str, ...], rules: Rules, sizes: dict[str, int], zero: int) -> Placement:
    """Places one parameter.

    Raises:
        UserError: Two dims of the parameter would be sharded by the same mesh axis, or a dim does not divide.
    """
    parts = [rules[name] for name in axes]
    used: dict[str, str] = {}
    for size, name, over in zip(shape, axes, parts):
        for axis in over:
            if axis in used:
                raise UserError(f"rules shard both {used[axis]!r} and {name!r} of a parameter over {axis!r}: {axes}")
            used[axis] = name
        if size % math.prod(sizes[a] for a in over):
            raise UserError(f"a parameter's {name!r} dim of {size} does not divide over {over} of {sizes}")
    wanted = tuple(a for a in ZERO_AXES if sizes[a] > 1 and (a == "fsdp" or zero > 0) and a not in used)
    split_dim: int | None = None
    split: tuple[str, ...] = ()
    is_matrix = sum(name not in ("layers", "experts") for name in axes) > 1
    if is_matrix:  # gains and biases are too small to be worth a gather
        subsets = (c for n in range(len(wanted), 0, -1) for c in itertools.combinations(wanted, n))
        for candidate in sorted(subsets, key=lambda axes: -math.prod(sizes[a] for a in axes)):
            pieces = math.prod(sizes[a] for a in candidate)
            local = [size // math.prod(sizes[a] for a in over) for size, over in zip(shape, parts)]
            fits = [d for d, name in enumerate(axes) if name != "layers" and local[d] % pieces == 0]
            if fits:
                split_dim, split = fits[0], candidate
                break

    def with_split(added: tuple[str, ...]) -> P:
        return _spec([p + added if d == split_dim else p for d, p in enumerate(parts)])

    layer_axes = tuple(a for a in split if a == "fsdp")
    step_axes = tuple(a for a in split if a != "fsdp" and zero == 2)
    return Placement(
        compute=_spec(parts),
        storage=with_split(layer_axes + step_axes),
        optimizer=with_split(split),
        is_matrix=is_matrix,
        in_float32=not is_matrix or "router" in axes,
        split_dim=split_dim if layer_axes + step_axes else None,
        layer_axes=layer_axes,
        step_axes=step_axes,
    )


def place_params(params: Any, axes: Any, rules: Rules, mesh: Mesh, zero: int) -> Any:
    """A `Placement` for each leaf of a nested dict of shapes.

    Args:
        params: Nested dict of arrays or `jax.ShapeDtypeStruct`.
        axes: The same nested dict, with a tuple of logical axes per leaf.
    """
    sizes = axis_sizes(mesh)
    return jax.tree.map(lambda leaf, names: place(leaf.shape, names, rules, sizes, zero), params, axes)


def shardings(placements: Any, mesh: Mesh, which: str) -> Any:
    """The `NamedSharding` of each leaf; `which` is a spec of `Placement`: compute, storage or optimizer."""
    return jax.tree.map(lambda p: NamedSharding(mesh, getattr(p, which)), placements)


def batch_spec(rules: Rules, ndim: int) -> P:
    """Spec of a batch array: [batch] or [batch, sequence, ...]."""
    return _spec([rules["batch"], rules["seq"], *([()] * ndim)][:ndim])
