"""Causal attention over a sequence that is split over devices: keys and values go round a ring (arXiv 2310.01889).

Each shard of `seq` holds two slices of a row, an early one and a late one (`Comm.places`). Of the keys of another shard
the late queries see the whole early slice, and either the early queries see it too or the late queries see the late
slice: the same work on every shard at every step, and causality masks nothing outside the shard's own keys. Softmax is
taken online (arXiv 2205.14135), over blocks of queries and keys; the backward pass computes the weights again.

Decides the order of the work and of the exchanges. Invariant: memory is linear in the tokens of a shard: there are
never more scores than those of one block of queries with one block of keys.

Dim letters besides the usual: I blocks of a shard, in the order of the row; T and S tokens of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtx.collectives import Comm, shared_varying, zeros_like_varying

BLOCK = 1024
"""Tokens of a block at most; a slice is cut into equal blocks."""
UNSEEN = -1
"""The segment of keys that no query sees."""
# Masked scores are below every running maximum, which starts above them: their weight is exactly 0, and where nothing
# is seen there is no NaN.
MASKED, LEAST = -1e30, -1e29


def own_pairs(blocks: int) -> np.ndarray:
    """int32 [pairs, 2]: (block of queries, block of keys) to multiply within a shard of 2 x `blocks` blocks.

    Its tokens are in the order of the row: only pairs of a block with itself are masked by causality.
    """
    return np.stack(np.tril_indices(2 * blocks), axis=1).astype(np.int32)


def remote_pairs(blocks: int, keys_are_earlier: jax.Array | bool) -> jax.Array:
    """The same for the keys of another shard: 2 x blocks^2 pairs, none of them masked by causality.

    Args:
        keys_are_earlier: Whether the early keys come before the early queries (then the late ones come after all).
    """
    square = np.stack(np.divmod(np.arange(blocks**2), blocks), axis=1).astype(np.int32)
    shift = jnp.where(keys_are_earlier, 0, blocks).astype(jnp.int32)
    return jnp.concatenate([square + np.array([blocks, 0], np.int32), square + shift])


def _to_blocks(x: jax.Array, dim: int, block: int, fill: int = 0) -> jax.Array:
    """Cuts each of the two slices in `dim` into blocks: [I, ..., T, ...] with T where `dim` was; `fill` in the gaps."""
    before, half, after = x.shape[:dim], x.shape[dim] // 2, x.shape[dim + 1 :]
    x = x.reshape(*before, 2, half, *after)
    gap = -half % block
    if gap:
        widths = [(0, 0)] * x.ndim
        widths[dim + 1] = (0, gap)
        x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(*before, -1, block, *after), dim, 0)


def _from_blocks(x: jax.Array, dim: int, length: int) -> jax.Array:
    """The inverse of `_to_blocks`; `dim` as it was there."""
    x = jnp.moveaxis(x, 0, dim)
    before, after = x.shape[:dim], x.shape[dim + 2 :]
    x = lax.slice_in_dim(x.reshape(*before, 2, -1, *after), 0, length // 2, axis=dim + 1)
    return x.reshape(*before, length, *after)


def _take(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def _put(tree: Any, blocks: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x, b: lax.dynamic_update_index_in_dim(x, b, index, 0), tree, blocks)


def _add(tree: Any, blocks: Any, index: jax.Array) -> Any:
    return _put(tree, jax.tree.map(jnp.add, _take(tree, index), blocks), index)


_multiply = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _score(queries: Any, keys: Any, slopes_KG: jax.Array | None, masked: jax.Array | None) -> jax.Array:
    """float32 [B, K, G, T, S]: the scores of a block of queries with a block of keys.

    Args:
        queries: `q` [B, K, G, T, H]; `segments` [B, T] and `places` [T] where they matter.
        keys: `k` [B, K, S, H]; `segments` [B, S] and `places` [S].
        masked: bool, whether the two are the same block of tokens; None: they never are.
    """
    scores = _multiply("bkgth,bksh->bkgts", queries["q"], keys["k"]) * queries["q"].shape[-1] ** -0.5
    if slopes_KG is not None:
        scores -= slopes_KG[..., None, None] * (queries["places"][:, None] - keys["places"])
    seen: Any = True
    if "segments" in queries:
        seen = queries["segments"][:, None, None, :, None] == keys["segments"][:, None, None, None, :]
    if masked is not None:
        seen &= ~masked | np.tri(*scores.shape[-2:], dtype=np.bool_)
    return scores if seen is True else jnp.where(seen, scores, MASKED)


def _go_round(
    comm: Comm, keys: Any, stays: Any, gathered: Any, visit: Callable[..., tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Sends keys once round the ring and visits each pair of blocks.

    The keys of the next step are under way while those of this one are computed with; so is what keys gather.

    Args:
        keys: Tree of [I, ...].
        stays: What a shard accumulates for its queries.
        gathered: Zeros like what is accumulated for the keys: it travels with them, and home with the sums of all.
        visit: (stays, gathered, keys, block of queries, block of keys, masked) -> stays, gathered.
    """
    count, index = comm.size("seq"), comm.index("seq")
    blocks = jax.tree.leaves(keys)[0].shape[0] // 2

    def multiply_pairs(stays: Any, keys: Any, pairs: Any, own: bool) -> tuple[Any, Any]:
        def one(carry: tuple[Any, Any], pair: jax.Array) -> tuple[tuple[Any, Any], None]:
            i, j = pair[0], pair[1]
            return visit(*carry, keys, i, j, i == j if own else None), None

        return lax.scan(one, (stays, gathered), pairs)[0]

    def step(stays: Any, sums: Any, keys: Any, distance: jax.Array | int) -> tuple[Any, Any]:
        sums = comm.pass_on(sums, "seq")
        stays, more = multiply_pairs(stays, keys, remote_pairs(blocks, index >= distance), own=False)
        return stays, jax.tree.map(jnp.add, sums, more)

    def body(carry: tuple[Any, Any, Any], distance: jax.Array) -> tuple[tuple[Any, Any, Any], None]:
        stays, sums, keys = carry
        return (*step(stays, sums, keys, distance), comm.pass_on(keys, "seq")), None

    stays, sums = multiply_pairs(stays, keys, own_pairs(blocks), own=True)
    (stays, sums, keys), _ = lax.scan(body, (stays, sums, comm.pass_on(keys, "seq")), jnp.arange(1, count - 1))
    stays, sums = step(stays, sums, keys, count - 1)
    return stays, comm.pass_on(sums, "seq")


Sides = dict[str, jax.Array]
"""`segments` int32 [I, B, T] and `places` int32 [I, T] of a shard's tokens, where they matter."""


def _attend(
    comm: Comm, q: jax.Array, k: jax.Array, v: jax.Array, queries: Sides, keys: Sides, slopes_KG: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """[I, B, K, G, T, H] queries on [I, B, K, S, H] keys and values -> the same as queries, and log-sum-exp of scores.

    The latter is float32 [I, B, K, G, T].
    """
    queries = {**queries, "q": q}

    def visit(sums: Any, _: None, keys: Any, i: jax.Array, j: jax.Array, masked: jax.Array | None) -> Any:
        key = _take(keys, j)
        out, total, highest = _take(sums, i)
        scores = _score(_take(queries, i), key, slopes_KG, masked)
        higher = jnp.maximum(highest, scores.max(-1))
        weights, faded = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
        out = out * faded[..., None] + _multiply("bkgts,bksh->bkgth", weights.astype(v.dtype), key["v"])
        return _put(sums, (out, total * faded + weights.sum(-1), higher), i), None

    out, total = zeros_like_varying((q, q[..., 0]), jnp.float32)
    (out, total, highest), _ = _go_round(comm, {**keys, "k": k, "v": v}, (out, total, total + LEAST), None, visit)
    total = jnp.where(total > 0, total, 1)
    return (out / total[..., None]).astype(q.dtype), highest + jnp.log(total)


def _differentiate(
    comm: Comm, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    """The gradients of `_attend`; weights are computed again, from the log-sum-exp."""
    q, k, v, queries, keys, slopes_KG, out, log_sum = saved
    inner = (d_out.astype(jnp.float32) * out).sum(-1)  # [I, B, K, G, T]: what softmax takes off each of its gradients
    queries = {**queries, "q": q, "d_out": d_out, "log_sum": log_sum, "inner": inner}

    def visit(dq: jax.Array, dkv: Any, keys: Any, i: jax.Array, j: jax.Array, masked: jax.Array | None) -> Any:
        query, key = _take(queries, i), _take(keys, j)
        weights = jnp.exp(_score(query, key, slopes_KG, masked) - query["log_sum"][..., None])
        d_weights = _multiply("bkgth,bksh->bkgts", query["d_out"], key["v"])
        d_scores = (weights * (d_weights - query["inner"][..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dk = _multiply("bkgts,bkgth->bksh", d_scores, query["q"])
        dv = _multiply("bkgts,bkgth->bksh", weights.astype(v.dtype), query["d_out"])
        return _add(dq, _multiply("bkgts,bksh->bkgth", d_scores, key["k"]), i), _add(dkv, (dk, dv), j)

    dq, dkv = zeros_like_varying((q, (k, v)), jnp.float32)
    dq, (dk, dv) = _go_round(comm, {**keys, "k": k, "v": v}, dq, dkv, visit)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


def ring_attention(
    comm: Comm,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    visible_BT: jax.Array | None = None,
    slopes_N: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend` on shards of `seq`: [B, T, N, H] queries, [B, T, K, H] keys and values -> [B, T, N, H].

    Tokens that see nothing get zeros.

    Args:
        segments_BT: int32 documents of a packed row, from 0; queries see keys of their own document only.
        visible_BT: bool, False for keys that no query sees.
        slopes_N: float32 ALiBi slope of each head.
    """
    batch, length, kv_heads, width = k_BTKH.shape
    blocks = -(-length // (2 * BLOCK))
    block = -(-length // (2 * blocks))
    queries: Sides = {}
    keys: Sides = {}
    if segments_BT is not None or visible_BT is not None or block * blocks * 2 != length:
        segments_BT = jnp.zeros((batch, length), jnp.int32) if segments_BT is None else segments_BT
        seen_BT = segments_BT if visible_BT is None else jnp.where(visible_BT, segments_BT, UNSEEN)
        queries["segments"], keys["segments"] = (_to_blocks(x, 1, block, UNSEEN) for x in (segments_BT, seen_BT))
    if slopes_N is not None:
        queries["places"] = keys["places"] = _to_blocks(comm.places(length), 0, block)
        slopes_N = slopes_N.reshape(kv_heads, -1)
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(batch, length, kv_heads, -1, width), 1, 3)
    q = _to_blocks(q_BKGTH, 3, block)
    k, v = (_to_blocks(jnp.swapaxes(x, 1, 2), 2, block) for x in (k_BTKH, v_BTKH))

    attend = jax.custom_vjp(lambda *arrays: _attend(comm, *arrays)[0])

    def remember(*arrays: Any) -> tuple[jax.Array, Any]:
        out, log_sum = _attend(comm, *arrays)
        return out, (*arrays, out, log_sum)

    attend.defvjp(remember, partial(_differentiate, comm))
    # The gradient of each array differs between devices wherever any of them does.
    *arrays, _ = shared_varying(q, k, v, queries, keys, slopes_N, comm.index("seq"))
    out_BKGTH = _from_blocks(attend(*arrays), 3, length)
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(q_BTNH.shape)
