"""Causal self-attention with grouped key/value heads (arXiv 2305.13245).

Decides how scores, masks and kernels go together; the masks of packed documents are never dropped: a kernel that
cannot take them is not used. Softmax and its sums are in float32, since bfloat16 has too few digits for them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from mtx.config.schema import Model
from mtx.errors import UserError
from mtx.nn.context import Context, Sequence, Tap
from mtx.nn.linear import Linear
from mtx.nn.param import Module, Rngs
from mtx.nn.position import alibi_slopes, rotate
from mtx.nn.ring_attention import ring_attention

QUERY_BLOCK = 512
"""Queries whose scores are in memory at a time; each block sees only the keys up to its end, half of all on average."""

Cache = tuple[jax.Array, jax.Array]
"""Keys and values of earlier tokens, [B, S, K, H] each; S is the longest sequence that fits."""


def _attend_block(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start: jax.Array | int,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    visible_BS: jax.Array | None,
    slopes_N: jax.Array | None,
) -> jax.Array:
    batch, length, num_heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, num_heads // kv_heads, width)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * width**-0.5
    distance_TS = start + jnp.arange(length)[:, None] - jnp.arange(k_BSKH.shape[1])
    if slopes_N is not None:
        scores_BKGTS -= slopes_N.reshape(kv_heads, -1, 1, 1) * distance_TS
    seen = distance_TS >= 0
    if q_segments_BT is not None and k_segments_BS is not None:
        seen = seen & (q_segments_BT[:, None, None, :, None] == k_segments_BS[:, None, None, None, :])
    if visible_BS is not None:
        seen = seen & visible_BS[:, None, None, None, :]
    # A finite floor: a row of padding that sees nothing yields an average, not NaN.
    weights_BKGTS = jax.nn.softmax(jnp.where(seen, scores_BKGTS, -1e30), axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    visible_BT: jax.Array | None = None,
    slopes_N: jax.Array | None = None,
    start: jax.Array | int | None = None,
) -> jax.Array:
    """Causal attention in plain XLA: [B, T, N, H] queries on [B, S, K, H] keys and values -> [B, T, N, H].

    Args:
        segments_BT: int32 documents of a packed row; queries see keys of their own document only.
        visible_BT: bool, False for keys that no query sees.
        slopes_N: float32 ALiBi slope of each head.
        start: Place of the first query among the keys, for decoding; None: queries and keys are the same tokens.
    """
    if start is not None:
        return _attend_block(q_BTNH, k_BSKH, v_BSKH, start, None, None, None, slopes_N)
    outputs = []
    for begin in range(0, q_BTNH.shape[1], QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, q_BTNH.shape[1])
        outputs.append(
            _attend_block(
                q_BTNH[:, begin:end],
                k_BSKH[:, :end],
                v_BSKH[:, :end],
                begin,
                None if segments_BT is None else segments_BT[:, begin:end],
                None if segments_BT is None else segments_BT[:, :end],
                None if visible_BT is None else visible_BT[:, :end],
                slopes_N,
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def empty_cache(config: Model, context: Context, batch: int, length: int) -> Cache:
    """Room for the keys and values of `length` tokens in one layer, on this device: its heads only."""
    kv_heads = config.kv_heads // context.comm.size("kv_heads")
    zeros = jnp.zeros((batch, length, kv_heads, config.head_width), context.dtype)
    return context.comm.varying((zeros, zeros))


def choose_kernel(context: Context, head_dim: int, *, packed: bool, masked: bool, alibi: bool) -> str:
    """`cudnn`, `xla`, or `ring` where the sequence is split and keys go round (in plain XLA).

    Raises:
        UserError: cuDNN is asked for and cannot compute this attention.
    """
    widest = 256 if (context.compute_capability or 0.0) >= 9.0 else 128  # cuDNN's limits, from Hopper on and before
    reasons = {
        f"the device is a {context.platform}": context.platform != "gpu",
        f"head_dim {head_dim} is not a multiple of 8 up to {widest}": head_dim % 8 != 0 or head_dim > widest,
        "Precision.compute is float32": context.dtype == jnp.float32,
        "documents are packed (Data.packing)": packed,
        "an attention mask hides tokens": masked,
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
        x_BTD = tap("attention_in", comm.gather(x_BTD, "seq_sp", "seq", 1))

        def heads(projection: Linear) -> jax.Array:
            y = projection(x_BTD, context.dtype)
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
        out_BTNH = tap("attention_out", self._core(q_BTNH, k_BTKH, v_BTKH, sequence, context, start))
        partial_BTD = self.output.multiply(out_BTNH.reshape(*out_BTNH.shape[:2], -1), context.dtype)
        return self.output.add_bias(comm.reduce(partial_BTD, "heads", "seq", "seq_sp", 1)), cache

    def _core(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        sequence: Sequence,
        context: Context,
        start: jax.Array | None,
    ) -> jax.Array:
        comm, local_heads = context.comm, q_BTNH.shape[2]
        first_head = comm.index("heads") * local_heads
        if comm.axes("heads") and not comm.axes("kv_heads"):  # every shard has all key/value heads and needs a few
            group = self.num_heads // self.kv_heads
            needed = max(1, local_heads // group)
            k_BSKH, v_BSKH = (lax.dynamic_slice_in_dim(a, first_head // group, needed, 2) for a in (k_BSKH, v_BSKH))
        segments_BT, visible_BT = sequence.segments_BT, sequence.visible_BT
        packed, masked = segments_BT is not None, visible_BT is not None
        kernel = choose_kernel(context, self.head_dim, packed=packed, masked=masked, alibi=self.alibi)
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
        masks = {"segments_BT": segments_BT, "visible_BT": visible_BT, "slopes_N": slopes_N}
        if kernel == "ring":
            return ring_attention(comm, q_BTNH, k_BSKH, v_BSKH, **masks)
        if kernel == "cudnn" and start is None:
            out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn")
        else:
            out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, **masks, start=start)
        return comm.exchange(comm.to_shards(out_BTNH, 1), "seq", 1, 2) if swaps else out_BTNH
