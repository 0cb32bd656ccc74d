"""Cross entropy of a linear head: the logits of a few tokens at a time, never all of them.

When a gradient is wanted, each chunk's logits give loss and gradient in the same visit: d loss / d logits is known as
soon as the logits are, so nothing is kept and nothing is computed twice. (The usual alternative, `jax.checkpoint`
around each chunk, costs a third more matmul time here.)

With `vocab` sharded, every device sees all tokens and its rows of the head, and the softmax is summed over devices;
otherwise each device sees all rows and its own part of the sequence.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import Comm, shared_varying, zeros_like_varying

CHUNK_BYTES = 1 << 28
"""float32 logits per chunk where the config does not say: small beside weights, large beside a matmul's start."""


_TILE = 128
"""Tokens that chunks are multiples of where they are larger: XLA on a GPU copies other ones to fill them up."""


def default_chunk(rows: int) -> int:
    """Tokens of a chunk where the config does not say, with so many rows of the head on a device."""
    size = max(1, CHUNK_BYTES // (4 * rows))
    return size - size % _TILE if size > _TILE else size


class Rows(NamedTuple):
    """The tokens that the rows of a piece of the head stand for.

    Attributes:
        first: Token of the first row.
        skip: Rows at the beginning that another device has as well, and computes; None: none.
    """

    first: jax.Array | int
    skip: jax.Array | None = None


class _Chunk(NamedTuple):
    x_TD: jax.Array
    columns_T: jax.Array
    weights_T: jax.Array


def _chunk_loss(
    comm: Comm, w_VD: jax.Array, skip: jax.Array | None, chunk: _Chunk, *, differentiate: bool
) -> tuple[jax.Array, ...]:
    """The weighted loss sum of a chunk; with its gradient by x and w where that is wanted."""
    logits_TV = jnp.einsum("td,vd->tv", chunk.x_TD, w_VD, preferred_element_type=jnp.float32)
    if skip is not None:
        logits_TV = jnp.where(jnp.arange(w_VD.shape[0]) >= skip, logits_TV, -jnp.inf)
    largest_T = comm.max(logits_TV.max(-1), "vocab")
    exponentials_TV = jnp.exp(logits_TV - largest_T[:, None])
    sum_T = comm.sum(exponentials_TV.sum(-1), "vocab")
    columns_T = chunk.columns_T
    is_here_T = (columns_T >= (0 if skip is None else skip)) & (columns_T < w_VD.shape[0])
    # Looked up, not summed over a mask: one number per token is read instead of all.
    found_T = jnp.take_along_axis(logits_TV, jnp.where(is_here_T, columns_T, 0)[:, None], axis=1)[:, 0]
    target_T = comm.sum(jnp.where(is_here_T, found_T, 0), "vocab")
    loss = jnp.sum(chunk.weights_T * (jnp.log(sum_T) + largest_T - target_T))
    if not differentiate:
        return (loss,)
    scale_T = chunk.weights_T / sum_T
    is_target_TV = jnp.where(is_here_T, columns_T, -1)[:, None] == jnp.arange(w_VD.shape[0])
    d_logits_TV = exponentials_TV * scale_T[:, None] - jnp.where(is_target_TV, chunk.weights_T[:, None], 0)
    d_logits_TV = d_logits_TV.astype(w_VD.dtype)
    dx_TD = jnp.einsum("tv,vd->td", d_logits_TV, w_VD)
    dw_VD = jnp.einsum("tv,td->vd", d_logits_TV, chunk.x_TD, preferred_element_type=jnp.float32)
    return loss, dx_TD, dw_VD


def _chunks(x_TD: jax.Array, columns_T: jax.Array, weights_T: jax.Array, size: int) -> _Chunk:
    """Splits tokens into equal chunks of at most `size`, the last one filled up with tokens of weight zero."""
    tokens = x_TD.shape[0]
    sizes = range(size - size % _TILE, max(size // 2, _TILE - 1), -_TILE)
    if size < tokens and sizes:  # as little as possible to fill up
        size = min(sizes, key=lambda tiled: -(-tokens // tiled) * tiled)
        count = -(-tokens // size)
    else:
        count = -(-tokens // size)
        size = -(-tokens // count)
    missing = count * size - tokens

    def cut(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)).reshape(count, size, *a.shape[1:])

    return _Chunk(cut(x_TD), cut(columns_T), cut(weights_T))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sum(
    comm: Comm,
    size: int,
    x_TD: jax.Array,
    w_VD: jax.Array,
    skip: jax.Array | None,
    columns_T: jax.Array,
    weights_T: jax.Array,
) -> jax.Array:
    chunks = _chunks(x_TD, columns_T, weights_T, size)
    if chunks.x_TD.shape[0] == 1:
        return _chunk_loss(comm, w_VD, skip, jax.tree.map(lambda a: a[0], chunks), differentiate=False)[0]
    return lax.map(lambda chunk: _chunk_loss(comm, w_VD, skip, chunk, differentiate=False)[0], chunks).sum()


def _forward(
    comm: Comm,
    size: int,
    x_TD: jax.Array,
    w_VD: jax.Array,
    skip: jax.Array | None,
    columns_T: jax.Array,
    weights_T: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    chunks = _chunks(x_TD, columns_T, weights_T, size)
    if chunks.x_TD.shape[0] == 1:
        first = jax.tree.map(lambda a: a[0], chunks)
        loss, dx_TD, dw_VD = _chunk_loss(comm, w_VD, skip, first, differentiate=True)
        return loss, (dx_TD, dw_VD.astype(w_VD.dtype))

    def visit(dw_VD: jax.Array, chunk: _Chunk) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        loss, dx_TD, added_VD = _chunk_loss(comm, w_VD, skip, chunk, differentiate=True)
        return dw_VD + added_VD, (loss, dx_TD)

    dw_VD, (losses, dx_CTD) = lax.scan(visit, zeros_like_varying(w_VD, jnp.float32), chunks)
    dx_TD = dx_CTD.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]]
    return losses.sum(), (dx_TD, dw_VD.astype(w_VD.dtype))


def _backward(comm: Comm, size: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple:
    dx_TD, dw_VD = saved
    return (dx_TD * g).astype(dx_TD.dtype), (dw_VD * g).astype(dw_VD.dtype), None, None, None


_loss_sum.defvjp(_forward, _backward)


def cross_entropy(
    comm: Comm,
    x_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk_tokens: int | None,
    rows: Rows | None = None,
) -> jax.Array:
    """The sum over tokens of weight * -log softmax(x w^T)[target], in nats, float32.

    Args:
        x_BTD: Final activations, sharded as `seq` where `vocab` is sharded, as `seq_sp` where it is not.
        w_VD: The head, in the same dtype.
        targets_BT: int32, sharded as x.
        weights_BT: float32, sharded as x.
        chunk_tokens: Tokens whose logits are in memory at a time; None: as many as CHUNK_BYTES hold.
        rows: Which rows of the vocabulary w_VD has; None: the shard of `vocab`.

    Returns:
        This device's part of the sum: that over the tokens' axes gives the whole.
    """
    tokens = targets_BT.size
    size = chunk_tokens or default_chunk(w_VD.shape[0])
    # The gradients of x and w differ between devices wherever either of them does; their types must say so. The
    # loss itself does not differ over the axes of `vocab`: it is summed over them.
    x_BTD, w_VD = shared_varying(x_BTD, w_VD)
    first, skip = rows or Rows(comm.index("vocab") * w_VD.shape[0])
    columns_T = targets_BT.reshape(-1) - first
    return _loss_sum(comm, min(size, tokens), x_BTD.reshape(tokens, -1), w_VD, skip, columns_T, weights_BT.reshape(-1))
