"""Causal attention in plain XLA, a block of queries at a time.

The gradient is written out (FlashAttention, arXiv 2205.14135, appendix B.2): with o = softmax(s) v it is ds =
softmax(s) * (do v^T - delta), where delta is the sum over a head of do * o. JAX's own rule divides every score by the
softmax's sum, where this one divides every output. Heads stand before tokens, and keys and values have their width
before their tokens: as the products are written here none needs a transposed copy of all scores, which a CPU takes
longer for than for the product.

B rows, T queries, S keys, N query heads, K key-value heads, G query heads for each of those, H width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import shared_varying

QUERY_BLOCK = 512
"""Queries whose scores are in memory at a time; each block sees only the keys up to its end, half of all on average."""

CPU_BLOCKS = (8, 128)
"""On a CPU: into how many blocks a row is cut, of how many queries at least. There more of them cost nothing."""

KEPT_TOKENS = 2048
"""Tokens of a row up to which the backward pass finds the weights in memory. With more it computes them again, block by
block, so that memory grows with the length of the row, not with its square."""

MOST_STRIPS = 4
"""Of longer rows: they are cut into so many strips, with a loop over the blocks of each, which all see the keys up to
the strip's end: a quarter more is computed than need be, but XLA, which may work on all that is written out at the same
time, holds the scores of so many blocks and no more."""


def block_size(platform: str, length: int) -> int:
    """Queries of a block in a row of `length` tokens."""
    count, least = CPU_BLOCKS
    return min(QUERY_BLOCK, max(-(-length // count), least)) if platform == "cpu" else QUERY_BLOCK


class _Masks(NamedTuple):
    """What decides which keys a block of queries sees; arguments as of `attend`.

    Attributes:
        start: Place of the first query among the keys.
    """

    start: jax.Array | int
    q_segments_BT: jax.Array | None
    k_segments_BS: jax.Array | None
    visible_BS: jax.Array | None
    slopes_N: jax.Array | None


def _scores(q_BKGTH: jax.Array, k_BKHS: jax.Array, masks: _Masks) -> jax.Array:
    """float32 [B, K, G, T, S], with a finite floor: a row of padding that sees nothing yields an average, not NaN."""
    _, kv_heads, _, length, width = q_BKGTH.shape
    scores = jnp.einsum("bkgth,bkhs->bkgts", q_BKGTH, k_BKHS, preferred_element_type=jnp.float32) * width**-0.5
    distance_TS = masks.start + jnp.arange(length)[:, None] - jnp.arange(k_BKHS.shape[3])
    if masks.slopes_N is not None:
        scores -= masks.slopes_N.reshape(kv_heads, -1, 1, 1) * distance_TS
    seen = distance_TS >= 0
    if masks.q_segments_BT is not None and masks.k_segments_BS is not None:
        seen = seen & (masks.q_segments_BT[:, None, None, :, None] == masks.k_segments_BS[:, None, None, None, :])
    if masks.visible_BS is not None:
        seen = seen & masks.visible_BS[:, None, None, None, :]
    return jnp.where(seen, scores, -1e30)


def _forward(
    keeps: bool, q_BKGTH: jax.Array, k_BKHS: jax.Array, v_BKHS: jax.Array, masks: _Masks
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    scores_BKGTS = _scores(q_BKGTH, k_BKHS, masks)
    largest_BKGT = scores_BKGTS.max(-1)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT[..., None])
    sum_BKGT = weights_BKGTS.sum(-1)
    weights_BKGTS = weights_BKGTS.astype(v_BKHS.dtype)
    out_BKGTH = jnp.einsum("bkgts,bkhs->bkgth", weights_BKGTS, v_BKHS, preferred_element_type=jnp.float32)
    out_BKGTH = (out_BKGTH / sum_BKGT[..., None]).astype(v_BKHS.dtype)
    _, delta_BKGT = shared_varying(q_BKGTH, jnp.zeros(sum_BKGT.shape))
    kept = (weights_BKGTS, sum_BKGT) if keeps else (None, largest_BKGT + jnp.log(sum_BKGT))
    return (out_BKGTH, delta_BKGT), (q_BKGTH, k_BKHS, v_BKHS, masks, *kept)


def _backward(keeps: bool, saved: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q_BKGTH, k_BKHS, v_BKHS, masks, weights_BKGTS, sum_BKGT = saved
    do_BKGTH, delta_BKGT = gradients[0].astype(jnp.float32), gradients[1]
    if keeps:  # the weights are not divided by their sum yet: the gradients are
        do_BKGTH, delta_BKGT = do_BKGTH / sum_BKGT[..., None], delta_BKGT / sum_BKGT
    else:
        # Without a barrier XLA would merge these scores with the first ones, and keep them.
        q_again, k_again = lax.optimization_barrier((q_BKGTH, k_BKHS))
        weights_BKGTS = jnp.exp(_scores(q_again, k_again, masks) - sum_BKGT[..., None]).astype(v_BKHS.dtype)
    do_BKGTH = do_BKGTH.astype(v_BKHS.dtype)
    dv_BKHS = jnp.einsum("bkgth,bkgts->bkhs", do_BKGTH, weights_BKGTS)
    dweights_BKGTS = jnp.einsum("bkgth,bkhs->bkgts", do_BKGTH, v_BKHS, preferred_element_type=jnp.float32)
    scale = q_BKGTH.shape[-1] ** -0.5
    dscores_BKGTS = (weights_BKGTS * ((dweights_BKGTS - delta_BKGT[..., None]) * scale)).astype(q_BKGTH.dtype)
    dq_BKGTH = jnp.einsum("bkgts,bkhs->bkgth", dscores_BKGTS, k_BKHS)
    dk_BKHS = jnp.einsum("bkgth,bkgts->bkhs", q_BKGTH, dscores_BKGTS)
    return dq_BKGTH, dk_BKHS, dv_BKHS, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _average(
    keeps: bool, q_BKGTH: jax.Array, k_BKHS: jax.Array, v_BKHS: jax.Array, masks: _Masks
) -> tuple[jax.Array, jax.Array]:
    """Averages of the values, [B, K, G, T, H], and zeros [B, K, G, T] whose gradient is delta: see `_with_delta`."""
    return _forward(keeps, q_BKGTH, k_BKHS, v_BKHS, masks)[0]


_average.defvjp(_forward, _backward)


@jax.custom_vjp
def _with_delta(out_BTNH: jax.Array, delta_BTN: jax.Array) -> jax.Array:
    """The output, from which the backward pass takes delta: from what a tap has put in its place, if there is one."""
    return out_BTNH


def _find_delta(out_BTNH: jax.Array, do_BTNH: jax.Array) -> tuple[jax.Array, jax.Array]:
    return do_BTNH, (do_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1)


_with_delta.defvjp(lambda out_BTNH, delta_BTN: (out_BTNH, out_BTNH), _find_delta)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    visible_BT: jax.Array | None = None,
    slopes_N: jax.Array | None = None,
    start: jax.Array | int | None = None,
    block: int | None = None,
    tap: Callable[[jax.Array], jax.Array] = lambda out_BTNH: out_BTNH,
) -> jax.Array:
    """Causal attention in plain XLA: [B, T, N, H] queries on [B, S, K, H] keys and values -> [B, T, N, H].

    Args:
        segments_BT: int32 documents of a packed row; queries see keys of their own document only.
        visible_BT: bool, False for keys that no query sees.
        slopes_N: float32 ALiBi slope of each head.
        start: Place of the first query among the keys, for decoding; None: queries and keys are the same tokens.
        block: Queries whose scores are in memory at a time; None: QUERY_BLOCK.
        tap: Marks the output as a value that a recompute policy may keep; returns the value to go on with.
    """
    batch, length, _, width = q_BTNH.shape
    q_BTNH, k_BSKH, v_BSKH = shared_varying(q_BTNH, k_BSKH, v_BSKH)
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(batch, length, k_BSKH.shape[2], -1, width), 1, 3)
    k_BKHS, v_BKHS = jnp.moveaxis(k_BSKH, 1, 3), jnp.moveaxis(v_BSKH, 1, 3)
    if start is not None:
        found = [_average(True, q_BKGTH, k_BKHS, v_BKHS, _Masks(start, None, None, None, slopes_N))]
    else:
        found = _average_blocks(q_BKGTH, k_BKHS, v_BKHS, segments_BT, visible_BT, slopes_N, block or QUERY_BLOCK)
    out_BKGTH, delta_BKGT = found[0] if len(found) == 1 else (jnp.concatenate(parts, axis=3) for parts in zip(*found))
    out_BTNH = tap(jnp.moveaxis(out_BKGTH, 3, 1).reshape(q_BTNH.shape))
    return _with_delta(out_BTNH, jnp.moveaxis(delta_BKGT, 3, 1).reshape(q_BTNH.shape[:3]))


def _average_blocks(
    q_BKGTH: jax.Array,
    k_BKHS: jax.Array,
    v_BKHS: jax.Array,
    segments_BT: jax.Array | None,
    visible_BT: jax.Array | None,
    slopes_N: jax.Array | None,
    block: int,
) -> list[tuple[jax.Array, jax.Array]]:
    """What `_average` gives of consecutive queries, each time with no more keys than they see."""
    length = q_BKGTH.shape[3]
    keeps = length <= KEPT_TOKENS
    strip = block if keeps else -(-length // (block * MOST_STRIPS)) * block

    def average_strip(begin: int, end: int) -> tuple[jax.Array, jax.Array]:
        k_segments_BS, visible_BS = (None if a is None else a[:, :end] for a in (segments_BT, visible_BT))

        def average(q_BKGTH: jax.Array, first: jax.Array | int, q_segments_BT: jax.Array | None) -> Any:
            masks = _Masks(first, q_segments_BT, k_segments_BS, visible_BS, slopes_N)
            return _average(keeps, q_BKGTH, k_BKHS[..., :end], v_BKHS[..., :end], masks)

        queries = q_BKGTH[:, :, :, begin:end], None if segments_BT is None else segments_BT[:, begin:end]
        if end - begin <= block:
            return average(queries[0], begin, queries[1])

        def cut(a: jax.Array, axis: int) -> jax.Array:
            return jnp.moveaxis(a.reshape(*a.shape[:axis], -1, block, *a.shape[axis + 1 :]), axis, 0)

        rows = cut(queries[0], 3), None if queries[1] is None else cut(queries[1], 1)
        firsts = jnp.arange(begin, end, block)
        found = lax.map(lambda xs: average(xs[1][0], xs[0], xs[1][1]), (firsts, rows))
        join = lambda a: jnp.moveaxis(a, 0, 3).reshape(*a.shape[1:4], -1, *a.shape[5:])  # noqa: E731
        return jax.tree.map(join, found)

    found = []
    for begin in range(0, length, strip):
        end = min(begin + strip, length)
        whole = end - (end - begin) % block if end - begin > block else end
        found += [average_strip(first, last) for first, last in ((begin, whole), (whole, end)) if first < last]
    return found
