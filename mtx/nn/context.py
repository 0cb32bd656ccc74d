"""What a forward pass carries besides weights and activations: collectives, number format, positions, dropout, taps.

Dim letters, here and in all of `mtx/nn`: B batch, T query length, S key length, D model, N query heads, K key/value
heads, G = N / K, H head dim, F feed-forward, V vocabulary. They name logical dims: inside `shard_map` an array is a
local shard and keeps its letters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mtx.collectives import Comm
from mtx.nn.float8 import Rounded, round_input

Tap = Callable[[str, jax.Array], jax.Array]
"""`tap(name, value)` marks a value that a recompute policy may keep; it returns the value to go on with."""


def no_tap(name: str, value: jax.Array) -> jax.Array:
    """Marks nothing."""
    return value


@dataclass(frozen=True)
class Context:
    """Trace-time facts of a forward pass.

    Attributes:
        comm: The collectives of the layout.
        dtype: Of matrix products and activations.
        attention: `auto`, `xla` or `cudnn`.
        platform: Of the mesh's devices, `cpu` or `gpu`: which kernels there are.
        compute_capability: Of the mesh's GPUs, such as 9.0 for Hopper; None where it is not known.
        context_exchange: How attention sees a sequence that is split over devices: `ring` or `all_to_all`.
        float8: Parts of a layer whose products with weights are of 8-bit numbers: `attention`, `mlp`.
    """

    comm: Comm
    dtype: Any = jnp.float32
    attention: str = "auto"
    platform: str = "cpu"
    compute_capability: float | None = None
    context_exchange: str = "ring"
    float8: tuple[str, ...] = ()

    def factor(self, part: str, x: jax.Array) -> jax.Array | Rounded:
        """The input of products with weights of a part of a layer, in the format in which they are computed."""
        return round_input(x) if part in self.float8 else x


Extras = dict[str, jax.Array]
"""What a layer tells besides its output: `load_balance_loss` and `router_z_loss` (float32 [], means over the tokens of
each sequence, summed over sequences), `expert_load` (float32 [E], tokens sent to each expert) and `dropped` (float32
[], those of them without a slot). Empty for layers without experts. This device's part: equal on devices that share its
tokens, to be summed over the others."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequence:
    """Where the tokens of a batch stand. Sequence dims are shards of `seq`, not of `seq_sp`.

    Attributes:
        positions_BT: int32, place of each token in its document; None: the place in the row (`Comm.places`).
        segments_BT: int32, document of each token in its row, 0 for padding; None: one document.
        length: Tokens of a row on this device (static).
        visible_BT: bool, False for tokens that no token attends to (an attention mask); None: all are visible.
    """

    positions_BT: jax.Array | None
    segments_BT: jax.Array | None
    length: int = field(metadata={"static": True})
    visible_BT: jax.Array | None = None

    def places(self, comm: Comm) -> jax.Array:
        """int32 [B or 1, T]: the place of each token."""
        if self.positions_BT is not None:
            return self.positions_BT
        return comm.places(self.length)[None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Dropout whose bits depend on the step, the sample, the token and the site, never on the layout.

    Attributes:
        key: Of the step (and the layer).
        rows_B: int32, index in the global batch of each row on this device.
        rate: Probability of dropping a value (static).
    """

    key: jax.Array
    rows_B: jax.Array
    rate: float = field(metadata={"static": True})

    def at(self, index: jax.Array | int) -> Dropout:
        """The dropout of one site: a layer, or a branch of it."""
        return Dropout(key=jax.random.fold_in(self.key, index), rows_B=self.rows_B, rate=self.rate)

    def __call__(self, x_BTD: jax.Array, comm: Comm) -> jax.Array:
        """Drops values of an array whose sequence is sharded as between blocks (`seq_sp`)."""
        shards = comm.size("seq_sp") // comm.size("seq")
        places_T = comm.split(comm.places(x_BTD.shape[1] * shards), "seq", "seq_sp", 0)

        def keep(row: jax.Array, place: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(self.key, row), place)
            return jax.random.bernoulli(key, 1.0 - self.rate, x_BTD.shape[2:])

        kept_BTD = jax.vmap(jax.vmap(keep, (None, 0)), (0, None))(self.rows_B, places_T)
        return jnp.where(kept_BTD, x_BTD / (1.0 - self.rate), 0).astype(x_BTD.dtype)


def drop(dropout: Dropout | None, site: int, x_BTD: jax.Array, comm: Comm) -> jax.Array:
    """Applies dropout where there is one."""
    return x_BTD if dropout is None else dropout.at(site)(x_BTD, comm)
