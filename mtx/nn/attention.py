"""Causal self-attention with grouped key/value heads (arXiv 2305.13245).

Decides how scores, masks and kernels go together; the masks of packed documents are never dropped: a kernel that
cannot take them is not used. Softmax and its sums are in float32, since bfloat16 has too few digits for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.config.schema import Model
from mtx.errors import UserError
from mtx.nn.blockwise import attend, block_size
from mtx.nn.context import Context, Sequence, Tap
from mtx.nn.linear import Linear
from mtx.nn.param import Module, Rngs
from mtx.nn.position import alibi_slopes, rotate
from mtx.nn.ring_attention import ring_attention

LONGEST_MASK = 16384
"""Tokens of a row up to which cuDNN is given its mask: two bytes for each pair of tokens, half a gigabyte here, and as
much again for the mask's gradient, which it writes though nobody reads it. A longer row goes through `attend`."""

Cache = tuple[jax.Array, jax.Array]
"""Keys and values of earlier tokens, [B, S, K, H] each; S is the longest sequence that fits."""


def attend_cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    visible_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal attention in one kernel of cuDNN's; arguments as of `attend`, bfloat16.

    Documents and hidden keys enter the kernel as numbers that are added to the scores, bfloat16 [B, 1, T, T] for all
    heads. (cuDNN can also be told where documents start, but only through what JAX does not publish, and for a number
    of documents in a row that is fixed beforehand.) A head that is no multiple of 8 wide is filled up with zeros, which
    change no score and no value.
    """
    width = q_BTNH.shape[-1]
    missing = -width % 8
    if missing:
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(a, [(0, 0)] * 3 + [(0, missing)]) for a in (q_BTNH, k_BSKH, v_BSKH))
    seen = None
    if segments_BT is not None:
        seen = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    if visible_BT is not None:
        all_rows = jnp.broadcast_to(visible_BT[:, None, None, :], (*visible_BT.shape[:1], 1, *visible_BT.shape[1:] * 2))
        seen = all_rows if seen is None else seen & all_rows
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=seen, scale=width**-0.5, is_causal=True, implementation="cudnn"
    )
    return out_BTNH[..., :width]


def empty_cache(config: Model, context: Context, batch: int, length: int) -> Cache:
    """Room for the keys and values of `length` tokens in one layer, on this device: its heads only."""
    kv_heads = config.kv_heads // context.comm.size("kv_heads")
    zeros = jnp.zeros((batch, length, kv_heads, config.head_width), context.dtype)
    return context.comm.varying((zeros, zeros))


def choose_kernel(context: Context, head_dim: int, *, length: int, masked: bool, alibi: bool) -> str:
    """`cudnn`, `xla`, or `ring` where the sequence is split and keys go round (in plain XLA).

    Args:
        length: Tokens of a whole row.
        masked: Whether queries do not see all keys before them: documents are packed, or a mask hides tokens.

    Raises:
        UserError: cuDNN is asked for and cannot compute this attention.
    """
    widest = 256 if (context.compute_capability or 0.0) >= 9.0 else 128  # cuDNN's limits, from Hopper on and before
    reasons = {
        f"the device is a {context.platform}": context.platform != "gpu",
        f"head_dim {head_dim} is above {widest}": head_dim > widest,
        "Precision.compute is float32": context.dtype == jnp.float32,
        f"a mask of packed documents or hidden tokens is for rows of an even length up to {LONGEST_MASK}, not "
        f"{length}": masked and (length > LONGEST_MASK or length % 2 != 0),
        "positions are alibi": alibi,
    }
    ring = context.context_exchange == "ring" and bool(context.comm.axes("seq"))
    if context.attention == "cudnn" and ring:
        raise UserError(
            "Train.attention = 'cudnn' cannot be with keys that go round Mesh.context: set Train.context_exchange = "
            "'all_to_all', which gives each device whole sequences of some heads, or Train.attention = 'auto'"
        )
    if ring:
        return "ring"
    obstacles = [reason for reason, holds in reasons.items() if holds]
    if context.attention == "cudnn" and obstacles:
        raise UserError(f"Train.attention = 'cudnn' cannot be: {'; '.join(obstacles)}; set 'auto' or 'xla'")
    return "xla" if obstacles or context.attention == "xla" else "cudnn"


class Attention(Module):
    """Query, key, value and output projections around `attend`."""

    def __init__(self, rngs: Rngs, config: Model):
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_width
        self.rotary, self.alibi = config.position == "rotary", config.position == "alibi"
        query_width, kv_width = self.num_heads * self.head_dim, self.kv_heads * self.head_dim

        def project(width: int, axis: str) -> Linear:
            shape, axes = (config.d_model, width), ("embed", axis)
            return Linear(rngs, shape, axes, std=config.init_std, use_bias=config.use_bias)

        self.query = project(query_width, "heads")
        self.key = project(kv_width, "kv_heads")
        self.value = project(kv_width, "kv_heads")
        residual_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.output = Linear(
            rngs, (query_width, config.d_model), ("heads", "embed"), std=residual_std, use_bias=config.use_bias
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        sequence: Sequence,
        table: tuple[jax.Array, jax.Array] | None,
        context: Context,
        tap: Tap,
        cache: Cache | None = None,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] sharded as `seq_sp` -> the same, and the cache with this call's keys and values in it.

        Args:
            table: Rotary cos and sin of the tokens.
            cache: Keys and values of earlier tokens when decoding.
            start: int32, number of tokens in the cache; None: none, and queries see only this call's keys.
        """
        comm = context.comm
        factor_BTD = context.factor("attention", tap("attention_in", comm.gather(x_BTD, "seq_sp", "seq", 1)))

        def heads(projection: Linear) -> jax.Array:
            y = projection(factor_BTD, context.dtype)
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        q_BTNH, k_BTKH, v_BTKH = heads(self.query), heads(self.key), heads(self.value)
        if self.rotary:
            assert table is not None
            q_BTNH, k_BTKH = rotate(q_BTNH, table), rotate(k_BTKH, table)
        q_BTNH, k_BTKH, v_BTKH = tap("query", q_BTNH), tap("key", k_BTKH), tap("value", v_BTKH)
        if cache is not None:
            first = 0 if start is None else start
            cached_k_BSKH = lax.dynamic_update_slice_in_dim(cache[0], k_BTKH, first, 1)
            cached_v_BSKH = lax.dynamic_update_slice_in_dim(cache[1], v_BTKH, first, 1)
            cache = (cached_k_BSKH, cached_v_BSKH)
            if start is not None:
                k_BTKH, v_BTKH = cache
        out_BTNH = self._core(q_BTNH, k_BTKH, v_BTKH, sequence, context, partial(tap, "attention_out"), start)
        merged = context.factor("attention", out_BTNH.reshape(*out_BTNH.shape[:2], -1))
        partial_BTD = self.output.multiply(merged, context.dtype)
        return self.output.add_bias(comm.reduce(partial_BTD, "heads", "seq", "seq_sp", 1)), cache

    def _core(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        sequence: Sequence,
        context: Context,
        tap: Callable[[jax.Array], jax.Array],
        start: jax.Array | None,
    ) -> jax.Array:
        comm, local_heads = context.comm, q_BTNH.shape[2]
        first_head = comm.index("heads") * local_heads
        if comm.axes("heads") and not comm.axes("kv_heads"):  # every shard has all key/value heads and needs a few
            group = self.num_heads // self.kv_heads
            needed = max(1, local_heads // group)
            k_BSKH, v_BSKH = (lax.dynamic_slice_in_dim(a, first_head // group, needed, 2) for a in (k_BSKH, v_BSKH))
        segments_BT, visible_BT = sequence.segments_BT, sequence.visible_BT
        masked = segments_BT is not None or visible_BT is not None
        length = q_BTNH.shape[1] * comm.size("seq")
        kernel = choose_kernel(context, self.head_dim, length=length, masked=masked, alibi=self.alibi)
        swaps = bool(comm.axes("seq")) and kernel != "ring"  # all heads of some tokens for all tokens of some heads
        if swaps:
            shards = comm.size("seq")
            copies = shards // math.gcd(shards, k_BSKH.shape[2])  # of a head that several shards need
            k_BSKH, v_BSKH = (jnp.repeat(a, copies, axis=2) for a in (k_BSKH, v_BSKH))
            q_BTNH, k_BSKH, v_BSKH = (comm.to_rows(comm.exchange(a, "seq", 2, 1), 1) for a in (q_BTNH, k_BSKH, v_BSKH))
            segments_BT, visible_BT = (
                None if a is None else comm.to_rows(comm.gather_all(a, "seq", 1), 1) for a in (segments_BT, visible_BT)
            )
            local_heads //= shards
            first_head += comm.index("seq") * local_heads
        slopes_N = None
        if self.alibi:
            slopes_N = lax.dynamic_slice_in_dim(jnp.array(alibi_slopes(self.num_heads)), first_head, local_heads, 0)
        masks: dict[str, Any] = {"segments_BT": segments_BT, "visible_BT": visible_BT, "slopes_N": slopes_N}
        if kernel == "ring":
            return tap(ring_attention(comm, q_BTNH, k_BSKH, v_BSKH, **masks))
        if kernel == "xla" or start is not None:
            block = block_size(context.platform, q_BTNH.shape[1])
            plain = partial(attend, q_BTNH, k_BSKH, v_BSKH, **masks, start=start, block=block)
            if not swaps:
                return plain(tap=tap)
            out_BTNH = plain()
        else:
            out_BTNH = attend_cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT=segments_BT, visible_BT=visible_BT)
        return tap(comm.exchange(comm.to_shards(out_BTNH, 1), "seq", 1, 2) if swaps else out_BTNH)
