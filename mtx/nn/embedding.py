"""Token embedding and learned positions.

With `vocab` sharded, each device holds a slice of the rows and looks up the tokens that fall into it (Megatron-LM,
arXiv 1909.08053); otherwise each device looks up its own part of the sequence in all rows. Both give activations
sharded as `seq_sp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtx.nn.context import Context, Sequence
from mtx.nn.param import Module, Rngs, param


class Embedding(Module):
    """Rows of a [V, D] table, by token."""

    def __init__(self, rngs: Rngs, vocab_size: int, d_model: int, std: float):
        self.table = param(rngs, jax.nn.initializers.normal(std), (vocab_size, d_model), ("vocab", "embed"))

    def __call__(self, tokens_BT: jax.Array, context: Context) -> jax.Array:
        """int32 [B, T] sharded as `seq` -> [B, T, D] sharded as `seq_sp`."""
        comm, table_VD = context.comm, self.table[...].astype(context.dtype)
        if not comm.axes("vocab"):
            return table_VD[comm.split(tokens_BT, "seq", "seq_sp", 1)]
        rows_BT = tokens_BT - comm.index("vocab") * table_VD.shape[0]
        mine_BT = (rows_BT >= 0) & (rows_BT < table_VD.shape[0])
        found_BTD = jnp.where(mine_BT[..., None], table_VD[jnp.where(mine_BT, rows_BT, 0)], 0)
        return comm.reduce(found_BTD, "vocab", "seq", "seq_sp", 1)


class LearnedPositions(Module):
    """Rows of a [max_seq_len, D] table, by place."""

    def __init__(self, rngs: Rngs, max_seq_len: int, d_model: int, std: float):
        self.table = param(rngs, jax.nn.initializers.normal(std), (max_seq_len, d_model), ("positions", "embed"))

    def __call__(self, sequence: Sequence, context: Context) -> jax.Array:
        """The positions of the tokens: [B or 1, T, D] sharded as `seq_sp`."""
        places_BT = context.comm.split(sequence.places(context.comm), "seq", "seq_sp", 1)
        return self.table[...].astype(context.dtype)[places_BT]
