"""Every collective of the system, named by logical axis.

Decides which mesh axes a logical exchange runs over; a rule that maps a name to nothing makes its collective vanish.
All of it is called inside the one `shard_map` of a step, which is manual over all mesh axes.

Invariant: only axes with more than one device are ever named, so that one device compiles to no collective at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.sharding import Placement, Rules, mesh_axes


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Mesh axes over which the type system holds `x` to differ between devices."""
    return tuple(jax.typeof(x).mat.varying)


def cast_varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """Marks arrays as differing over `axes`. Costs nothing; its transpose is the sum over the axes added."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def shared_varying(*trees: Any) -> tuple[Any, ...]:
    """Marks all arrays as differing over every axis that any of them differs over (for carries and custom rules)."""
    axes = tuple({a for x in jax.tree.leaves(trees) for a in varying_axes(x)})
    return tuple(cast_varying(tree, axes) for tree in trees)


@dataclass(frozen=True)
class Comm:
    """The collectives of one layout.

    Attributes:
        rules: Logical axis -> live mesh axes.
        sizes: Devices along each mesh axis.
    """

    rules: Rules
    sizes: dict[str, int]

    @property
    def live(self) -> tuple[str, ...]:
        """Mesh axes with more than one device."""
        return tuple(a for a, n in self.sizes.items() if n > 1)

    def axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes that shard a logical axis."""
        return self.rules[name]

    def size(self, name: str) -> int:
        """Number of shards of a logical axis."""
        return math.prod(self.sizes[a] for a in self.axes(name))

    def index(self, name: str) -> jax.Array | int:
        """Which shard of a logical axis this device holds."""
        return lax.axis_index(self.axes(name)) if self.axes(name) else 0

    def _extra(self, finer: str, coarser: str) -> tuple[str, ...]:
        return tuple(a for a in self.axes(finer) if a not in self.axes(coarser))

    def share_axis(self, name: str, other: str) -> bool:
        """Whether a mesh axis shards both logical axes."""
        return bool(set(self.axes(name)) & set(self.axes(other)))

    def varying(self, tree: Any) -> Any:
        """Marks a tree as differing over all live axes."""
        return cast_varying(tree, self.live)

    def gather(self, x: jax.Array, source: str, target: str, dim: int) -> jax.Array:
        """Joins the pieces of `dim` that `source` shards and `target` does not."""
        axes = self._extra(source, target)
        return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x

    def split(self, x: jax.Array, source: str, target: str, dim: int) -> jax.Array:
        """This device's piece of a `dim` that every device holds whole: the inverse of `gather`, without traffic."""
        axes = self._extra(target, source)
        if not axes:
            return x
        length = x.shape[dim] // math.prod(self.sizes[a] for a in axes)
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * length, length, dim)

    def reduce(self, x: jax.Array, contracted: str, source: str, target: str, dim: int) -> jax.Array:
        """Sums the partial results of a matmul over a sharded `contracted` axis, splitting `dim` on the way.

        Megatron's reduce-scatter with sequence parallelism, its all-reduce without.

        Raises:
            ValueError: The rules split the sequence over other axes than the contraction.
        """
        summed, split = self.axes(contracted), self._extra(target, source)
        if not summed:
            return self.split(x, source, target, dim)
        if not split:
            return lax.psum(x, summed)
        if split != summed:
            raise ValueError(f"{contracted!r} is sharded over {summed}, but {target!r} adds {split} to {source!r}")
        return lax.psum_scatter(x, summed, scatter_dimension=dim, tiled=True)

    def gather_all(self, x: jax.Array, name: str, dim: int) -> jax.Array:
        """Joins all shards of a logical axis, in the order of their index."""
        return lax.all_gather(x, self.axes(name), axis=dim, tiled=True) if self.axes(name) else x

    def pass_on(self, tree: Any, name: str, by: int = 1) -> Any:
        """Sends arrays `by` shards further round the ring of a logical axis, and receives those from behind."""
        axes, count = self.axes(name), self.size(name)
        if not axes:
            return tree
        ring = [(i, (i + by) % count) for i in range(count)]
        return jax.tree.map(lambda x: lax.ppermute(cast_varying(x, axes), axes, ring), tree)

    def exchange(self, x: jax.Array, name: str, split_dim: int, join_dim: int) -> jax.Array:
        """All-to-all: piece i of `split_dim` goes to shard i, and what the shards sent is joined along `join_dim`."""
        axes = self.axes(name)
        return lax.all_to_all(cast_varying(x, axes), axes, split_dim, join_dim, tiled=True) if axes else x

    def places(self, length: int) -> jax.Array:
        """int32 [length]: the place in its row of each token of this device's shard of `seq`.

        A shard holds two slices of a row, one as far from the front as the other is from the back ("zigzag"): so
        under a causal mask all shards have the same work.
        """
        shards, index, half = self.size("seq"), self.index("seq"), length // 2
        if shards == 1:
            return jnp.arange(length, dtype=jnp.int32)
        slice_T = jnp.arange(half, dtype=jnp.int32)
        return jnp.concatenate([index * half + slice_T, (2 * shards - 1 - index) * half + slice_T])

    def cut_sequence(self, x: jax.Array, dim: int) -> jax.Array:
        """This device's shard of `seq`, of whole rows; the tokens that `places` names."""
        length = x.shape[dim] // self.size("seq")
        return jnp.take(x, self.places(length), axis=dim) if self.axes("seq") else x

    def to_rows(self, x: jax.Array, dim: int) -> jax.Array:
        """Whole rows in their own order, from all shards of `seq` joined in the order of their index."""
        shards, before, after = self.size("seq"), x.shape[:dim], x.shape[dim + 1 :]
        if shards == 1:
            return x
        early, late = jnp.split(x.reshape(*before, shards, 2, -1, *after), 2, axis=dim + 1)
        return jnp.concatenate([early, jnp.flip(late, dim)], axis=dim).reshape(x.shape)

    def to_shards(self, x: jax.Array, dim: int) -> jax.Array:
        """All shards of `seq` joined, from whole rows: the inverse of `to_rows`."""
        shards, before, after = self.size("seq"), x.shape[:dim], x.shape[dim + 1 :]
        if shards == 1:
            return x
        early, late = jnp.split(x.reshape(*before, 2 * shards, 1, -1, *after), 2, axis=dim)
        return jnp.concatenate([early, jnp.flip(late, dim)], axis=dim + 1).reshape(x.shape)

    def sum(self, x: jax.Array, name: str) -> jax.Array:
        """Sum over the shards of a logical axis."""
        return lax.psum(x, self.axes(name)) if self.axes(name) else x

    def max(self, x: jax.Array, name: str) -> jax.Array:
        """Maximum over the shards of a logical axis; without gradient (JAX has no rule for it)."""
        x = lax.stop_gradient(x)
        return lax.pmax(x, self.axes(name)) if self.axes(name) else x

    def share(self, x: jax.Array) -> jax.Array:
        """This device's share of a value: of several devices that hold the same one, the first has all of it."""
        copies = tuple(a for a in self.live if a not in varying_axes(x))
        return jnp.where(lax.axis_index(copies) == 0, x, 0) if copies else x

    def sum_shares(self, x: jax.Array, *kept: str) -> jax.Array:
        """The whole of what `share` divided: a sum over all devices, but for the shards of the `kept` logical axes."""
        axes = tuple(a for a in self.live if a not in {a for name in kept for a in self.axes(name)})
        return lax.psum(x, axes) if axes else x

    def average_copies(self, x: jax.Array, *names: str) -> jax.Array:
        """Makes a value that is equal on all devices but for the shards of the named axes known to be so."""
        wanted = {a for name in names for a in self.axes(name)}
        copies = tuple(a for a in varying_axes(x) if a not in wanted)
        return lax.pmean(x, copies) if copies else x

    def join(self, x: jax.Array, name: str, dim: int) -> jax.Array:
        """Joins the shards of a logical axis into an array that is known to be equal on all of them."""
        axes = self.axes(name)
        if not axes:
            return x
        whole = [x.shape[d] * (self.size(name) if d == dim else 1) for d in range(x.ndim)]
        here = lax.dynamic_update_slice_in_dim(jnp.zeros(whole, x.dtype), x, self.index(name) * x.shape[dim], dim)
        return lax.psum(cast_varying(here, axes), axes)

    def join_copies(self, x: jax.Array, name: str, dim: int) -> jax.Array:
        """Joins the shards of a logical axis into an array that is known to be equal on all devices that hold it."""
        return self.average_copies(self.join(x, name, dim), "batch", "seq")

    def gather_for_step(self, w: jax.Array, placement: Placement) -> jax.Array:
        """A weight with the pieces joined that ZeRO-2 split."""
        return self._gather_weight(w, placement.step_axes, placement.split_dim)

    def gather_for_layer(self, w: jax.Array, placement: Placement) -> jax.Array:
        """A weight with the pieces joined that ZeRO-3 split. Its transpose is the reduce-scatter of the gradient."""
        return self._gather_weight(w, placement.layer_axes, placement.split_dim)

    def _gather_weight(self, w: jax.Array, axes: tuple[str, ...], dim: int | None) -> jax.Array:
        return lax.all_gather(w, axes, axis=dim, tiled=True) if axes else w

    def reduce_gradient(self, g: jax.Array, placement: Placement) -> jax.Array:
        """Sums a gradient over every live axis that the parameter is not sharded by; ZeRO-2 gets its piece only.

        Args:
            g: Gradient by what `gather_for_step` returned.
        """
        if placement.step_axes:
            assert placement.split_dim is not None
            g = lax.psum_scatter(
                self.varying(g), placement.step_axes, scatter_dimension=placement.split_dim, tiled=True
            )
        summed = tuple(a for a in self.live if a not in (*mesh_axes(placement.storage), *placement.stack_axes))
        return lax.psum(cast_varying(g, summed), summed) if summed else g


def zeros_like_varying(tree: Any, dtype: Any = None) -> Any:
    """Zeros with the shapes and the varying axes of a tree: initial values of accumulators."""
    return jax.tree.map(lambda x: cast_varying(jnp.zeros(x.shape, dtype or x.dtype), varying_axes(x)), tree)
