"""Token embedding and learned positions.

With `vocab` sharded, each device holds a slice of the rows and looks up the tokens that fall into it (Megatron-LM,
arXiv 1909.08053); otherwise each device looks up its own part of the sequence in all rows. Both give activations
sharded as `seq_sp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtx.collectives import Comm
from mtx.nn.context import Context, Sequence
from mtx.nn.param import Module, Rngs, param


class Embedding(Module):
    """Rows of a [V, D] table, by token."""

    def __init__(self, rngs: Rngs, vocab_size: int, d_model: int, std: float):
        self.table = param(rngs, jax.nn.initializers.normal(std), (vocab_size, d_model), ("vocab", "embed"))

    def __call__(self, tokens_BT: jax.Array, context: Context) -> jax.Array:
        """int32 [B, T] sharded as `seq` -> [B, T, D] sharded as `seq_sp`."""
        table_VD = self.table[...].astype(context.dtype)
        rows_BT, mine_BT = self._rows(tokens_BT, context.comm)
        found_BTD = table_VD[rows_BT]
        return found_BTD if mine_BT is None else self._collect(found_BTD, mine_BT, context.comm)

    def _rows(self, tokens_BT: jax.Array, comm: Comm) -> tuple[jax.Array, jax.Array | None]:
        """The rows of the local table to look up, and which of them stand for a token; None: all."""
        if not comm.axes("vocab"):
            return comm.split(tokens_BT, "seq", "seq_sp", 1), None
        num_rows = self.table.shape[0]
        rows_BT = tokens_BT - comm.index("vocab") * num_rows
        mine_BT = (rows_BT >= 0) & (rows_BT < num_rows)
        return jnp.where(mine_BT, rows_BT, 0), mine_BT

    def _collect(self, found_BTD: jax.Array, mine_BT: jax.Array, comm: Comm) -> jax.Array:
        return comm.reduce(jnp.where(mine_BT[..., None], found_BTD, 0), "vocab", "seq", "seq_sp", 1)

    def add_gradient(self, total_VD: jax.Array, dx_BTD: jax.Array, tokens_BT: jax.Array, context: Context) -> jax.Array:
        """Adds the gradient of the table to an accumulator, in place and in its dtype.

        JAX's own rule fills a table with zeros, scatters into it in the dtype of the activations, and adds it.

        Args:
            dx_BTD: Gradient by the output of `__call__`.
        """
        comm = context.comm
        rows_BT, mine_BT = self._rows(tokens_BT, comm)
        if mine_BT is not None:

            def collect(found_BTD: jax.Array) -> jax.Array:
                return comm.varying(self._collect(found_BTD, mine_BT, comm))

            found_BTD = comm.varying(jnp.zeros((*rows_BT.shape, dx_BTD.shape[-1]), dx_BTD.dtype))
            (dx_BTD,) = jax.vjp(collect, found_BTD)[1](dx_BTD)
        return total_VD.at[rows_BT].add(dx_BTD.astype(total_VD.dtype))


class LearnedPositions(Module):
    """Rows of a [max_seq_len, D] table, by place."""

    def __init__(self, rngs: Rngs, max_seq_len: int, d_model: int, std: float):
        self.table = param(rngs, jax.nn.initializers.normal(std), (max_seq_len, d_model), ("positions", "embed"))

    def __call__(self, sequence: Sequence, context: Context) -> jax.Array:
        """The positions of the tokens: [B or 1, T, D] sharded as `seq_sp`."""
        return self.table[...].astype(context.dtype)[self._places(sequence, context)]

    def _places(self, sequence: Sequence, context: Context) -> jax.Array:
        return context.comm.split(sequence.places(context.comm), "seq", "seq_sp", 1)

    def add_gradient(self, total_PD: jax.Array, dx_BTD: jax.Array, sequence: Sequence, context: Context) -> jax.Array:
        """Adds the gradient of the table to an accumulator, in place and in its dtype.

        Args:
            dx_BTD: Gradient by what the positions were added to.
        """
        places_BT = self._places(sequence, context)
        if places_BT.shape[0] < dx_BTD.shape[0]:
            dx_BTD = dx_BTD.astype(total_PD.dtype).sum(0, keepdims=True)
        return total_PD.at[places_BT].add(dx_BTD.astype(total_PD.dtype))
