"""Matrix products of rows with the matrices of their groups: as many products as there are rows, whatever the groups.

Decides how rows are laid out for it: those of a group stand together from a multiple of the block size on, so that a
block of rows has one matrix. A loop goes over the blocks in use. (`lax.ragged_dot` is the same mathematics; of it XLA
makes products of all rows with all matrices: jax 0.10.2, compiled for CPU and for H100.)

Invariant: rows in no group come out as zero, and blocks not in use cost nothing.

Letters: E groups, R rows in the blocks, I inputs, O outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import cast_varying, shared_varying, varying_axes

MOST_ROWS = 512


@dataclass(frozen=True)
class Blocks:
    """A layout of groups.

    Attributes:
        sizes_E: int32, rows of each group.
        most: Rows of all groups together, at most (static).
    """

    sizes_E: jax.Array
    most: int

    @property
    def block(self) -> int:
        """Rows of a block: about as many as a group has, or enough to keep a GPU busy."""
        return min(MOST_ROWS, max(8, self.most // len(self.sizes_E) // 8 * 8))

    @property
    def rows(self) -> int:
        """Room for all groups, each filled up to whole blocks (R)."""
        return (math.ceil(self.most / self.block) + len(self.sizes_E)) * self.block

    @property
    def ends_E(self) -> jax.Array:
        """int32, the block after the last one of each group."""
        return jnp.cumsum(-(-self.sizes_E // self.block))

    def rows_of(self, ids: jax.Array, ranks: jax.Array) -> jax.Array:
        """int32, the row of the rank-th of a group; R for ids beyond the groups."""
        starts_E = jnp.concatenate([jnp.zeros_like(self.ends_E[:1]), self.ends_E[:-1]]) * self.block
        groups = len(self.sizes_E)
        return jnp.where(ids < groups, jnp.take(starts_E, jnp.minimum(ids, groups - 1)) + ranks, self.rows)

    def multiply(self, x_RI: jax.Array, w_EIO: jax.Array) -> jax.Array:
        """[R, I], [E, I, O] -> [R, O]."""
        groups = (jnp.arange(self.rows // self.block)[:, None] >= self.ends_E).sum(-1)
        x_BRI = x_RI.reshape(-1, self.block, x_RI.shape[-1])
        y_BRO = _multiply(*shared_varying(x_BRI, w_EIO, jnp.minimum(groups, len(self.sizes_E) - 1), self.ends_E[-1]))
        return y_BRO.reshape(self.rows, -1)


def _zeros(shape: tuple[int, ...], like: jax.Array, dtype: Any = None) -> jax.Array:
    return cast_varying(jnp.zeros(shape, dtype or like.dtype), varying_axes(like))


def _pick(a: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


@jax.custom_vjp
def _multiply(x_BRI: jax.Array, w_EIO: jax.Array, group_B: jax.Array, used: jax.Array) -> jax.Array:
    """The first `used` blocks, each times the matrix of its group; the others are zero."""

    def visit(b: jax.Array, y_BRO: jax.Array) -> jax.Array:
        return y_BRO.at[b].set(jnp.dot(_pick(x_BRI, b), _pick(w_EIO, _pick(group_B, b))))

    return lax.fori_loop(0, used, visit, _zeros((*x_BRI.shape[:2], w_EIO.shape[2]), x_BRI))


Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _multiply_forward(x: jax.Array, w: jax.Array, group_B: jax.Array, used: jax.Array) -> tuple[jax.Array, Saved]:
    return _multiply(x, w, group_B, used), (x, w, group_B, used)


def _multiply_backward(saved: Saved, dy_BRO: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    x_BRI, w_EIO, group_B, used = saved

    def visit(b: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx_BRI, dw_EIO = carry
        group, dy_RO = _pick(group_B, b), _pick(dy_BRO, b)
        dx_RI = lax.dot_general(dy_RO, _pick(w_EIO, group), (((1,), (1,)), ((), ())))
        dw_IO = lax.dot_general(_pick(x_BRI, b), dy_RO, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return dx_BRI.at[b].set(dx_RI), dw_EIO.at[group].add(dw_IO)

    start = _zeros(x_BRI.shape, x_BRI), _zeros(w_EIO.shape, w_EIO, jnp.float32)
    dx_BRI, dw_EIO = lax.fori_loop(0, used, visit, start)
    return dx_BRI, dw_EIO.astype(w_EIO.dtype), None, None


_multiply.defvjp(_multiply_forward, _multiply_backward)
